"""Full recomputation (gradient checkpointing) of layers, alike on every engine."""

from functools import partial

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn
from torch.utils.checkpoint import checkpoint

from megavlm.model.cross_attention import CrossAttentionLayer


def recompute_layers(model: nn.Module) -> None:
    """Have each layer keep only its inputs, and run again in the backward pass.

    megatron-core's own recomputation surrounds a layer; this one runs inside it, and so inside the
    hooks by which engines gather its weights and free them. Outside, under FSDP2 the forward
    prefetch of layers that are done already leaves nearly the whole model gathered at the end, and
    ZeRO-3 keeps frozen layers gathered until the backward pass is over. And megatron-core's gives
    no gradient to a layer none of whose inputs has one, such as the first that is trained. The
    model has no dropout, so there is no random state to preserve.
    """
    for layer in model.modules():
        if isinstance(layer, TransformerLayer | CrossAttentionLayer):
            layer.forward = partial(
                checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
            )
