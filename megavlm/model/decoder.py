"""The decoder: megatron-core's GPT with cross-attention layers among its layers."""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megavlm.config.engines import MegatronSettings
from megavlm.config.sizes import DecoderSizes
from megavlm.model.cross_attention import CrossAttentionLayer
from megavlm.model.layers import LANGUAGE_STYLE, Norm, layer_config, self_attention_layer_spec


class Decoder(GPTModel):
    """megatron-core's GPT; in training, each token's loss has the z-loss (PaLM, section 5)."""

    z_loss: float = 0.0
    """Weight of the squared logarithm of the softmax's denominator."""

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Loss (b, t) fp32 of labels (b, t), from this rank's part of the logits (t, b, v)."""
        if not (self.z_loss and self.training):
            return super().compute_language_model_loss(labels, logits)
        # Before the cross entropy, which overwrites fp32 logits.
        label_logits_tb = _label_logits(logits, labels.t())
        losses_bt = super().compute_language_model_loss(labels, logits)
        log_partition_bt = losses_bt + label_logits_tb.t()
        return losses_bt + self.z_loss * log_partition_bt.square()


def _label_logits(logits_tbv: Tensor, labels_tb: Tensor) -> Tensor:
    """Every label's logit, (t, b) fp32, from the tensor-parallel ranks' parts of the vocabulary."""
    size = logits_tbv.shape[-1]
    own_tb = labels_tb - parallel_state.get_tensor_model_parallel_rank() * size
    elsewhere_tb = (own_tb < 0) | (own_tb >= size)
    rows = torch.arange(own_tb.numel(), device=own_tb.device)
    # By index, which does not keep the logits for the backward pass; they are overwritten.
    picked = logits_tbv.flatten(0, 1)[rows, own_tb.clamp(0, size - 1).flatten()].view_as(own_tb)
    return reduce_from_tensor_model_parallel_region(picked.float().masked_fill(elsewhere_tb, 0.0))


def build_decoder(
    sizes: DecoderSizes,
    *,
    dtype: torch.dtype,
    recompute: str,
    parallel: MegatronSettings,
    vp_stage: int | None,
    z_loss: float = 0.0,
) -> Decoder:
    """RMSNorm, SwiGLU, rotary embeddings, grouped-query attention, no biases, untied head.

    Builds what this pipeline rank holds (of chunk `vp_stage`, if the schedule interleaves).
    Rotary embeddings are relative, so packed texts need no positions of their own.
    """
    interleaved = parallel.virtual_pipeline > 1
    config = layer_config(
        dtype=dtype,
        recompute=recompute,
        parallel=parallel,
        layers=sizes.layers,
        width=sizes.width,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        mlp_width=sizes.mlp_width,
        norm_epsilon=sizes.norm_epsilon,
        **LANGUAGE_STYLE,
        qk_layernorm=True,  # sums the gradients of q_layernorm and k_layernorm over heads' ranks
        pipeline_model_parallel_size=parallel.pipeline_parallel,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if interleaved else None,
        pipeline_model_parallel_layout=_layout(parallel) if parallel.chunks > 1 else None,
        # On gloo, interleaving over batched sends computes wrong gradients, silently, and so does
        # freeing what is still being sent.
        batch_p2p_comm=not interleaved,
        overlap_p2p_comm=interleaved,
        deallocate_pipeline_outputs=not interleaved or torch.cuda.is_available(),
    )
    at: dict[str, Any] = {"ignore_virtual": False, "vp_stage": vp_stage}
    decoder = Decoder(
        config,
        _block_spec(config, sizes, vp_stage),  # pyright: ignore[reportArgumentType]
        vocab_size=sizes.vocabulary,
        max_sequence_length=0,  # unused: rotary embeddings have no table to size
        position_embedding_type="rope",
        rotary_base=sizes.rope_base,
        rope_scaling=sizes.rope_scaling is not None,
        rope_scaling_factor=sizes.rope_scaling or 1.0,
        pre_process=parallel_state.is_pipeline_first_stage(**at),
        post_process=parallel_state.is_pipeline_last_stage(**at),
        vp_stage=vp_stage,
    )
    decoder.z_loss = z_loss
    return decoder


def _layout(parallel: MegatronSettings) -> list[list[str]]:
    """megatron-core's notation for what each chunk holds."""
    assert parallel.chunk_layers is not None, "the cut must be chosen before the model is built"
    layout = [["decoder"] * layers for layers in parallel.chunk_layers]
    return [["embedding", *layout[0]], *layout[1:-1], [*layout[-1], "loss"]]


def _block_spec(
    config: TransformerConfig, sizes: DecoderSizes, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """The layers that this pipeline stage builds."""
    cross_layer = ModuleSpec(
        module=CrossAttentionLayer, params={"initial_gate": sizes.initial_gate}
    )
    self_layer = self_attention_layer_spec(AttnMaskType.causal, attention_bias=False)
    first = get_transformer_layer_offset(config, vp_stage)
    positions = range(first, first + get_num_layers_to_build(config, vp_stage))
    return TransformerBlockSubmodules(
        [cross_layer if p in sizes.cross_layers else self_layer for p in positions],
        layer_norm=Norm,  # pyright: ignore[reportArgumentType] (its hint forgets classes)
    )
