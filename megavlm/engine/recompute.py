"""Recomputation of whole layers, for engines that gather weights when a module is called."""

from functools import partial
from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn
from torch.utils.checkpoint import checkpoint

from megavlm.config.run import TrainSettings
from megavlm.model.cross_attention import CrossAttentionLayer


def recompute_inside_layers(train: TrainSettings) -> str:
    """What is left to megatron-core to recompute: all but whole layers, which come here."""
    return "none" if train.recompute == "full" else train.recompute


def layers_of(model: nn.Module) -> list[Any]:
    """What recomputation takes as one."""
    kinds = TransformerLayer | CrossAttentionLayer
    return [module for module in model.modules() if isinstance(module, kinds)]


def recompute(layer: Any) -> None:
    """Keep only the layer's inputs, and run it again in the backward pass.

    This runs inside the hooks by which engines gather the layer's weights and free them.
    megatron-core's own recomputation would pass them again: under FSDP2 the forward prefetch of
    layers that are done already then leaves nearly the whole model gathered at the end; ZeRO-3
    keeps frozen layers gathered until the backward pass is over. The model has no dropout, so there
    is no random state to preserve.
    """
    layer.forward = partial(
        checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
    )
