"""The decoder: megatron-core's GPT with a cross-attention layer after every few of its layers."""

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch.nn import functional

from megavlm.config.sizes import DecoderSizes
from megavlm.model.cross_attention import CrossAttentionLayer
from megavlm.model.layers import Norm, layer_config, self_attention_layer_spec


def build_decoder(sizes: DecoderSizes, *, dtype: torch.dtype, recompute: str) -> GPTModel:
    """RMSNorm, SwiGLU, rotary embeddings, grouped-query attention, no biases, untied head.

    Rotary embeddings are relative, so packed texts need no positions of their own.
    """
    config = layer_config(
        dtype=dtype,
        recompute=recompute,
        layers=sizes.layers,
        width=sizes.width,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        mlp_width=sizes.mlp_width,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=functional.silu,
        add_bias_linear=False,
    )
    return GPTModel(
        config,
        _block_spec(config, sizes),  # pyright: ignore[reportArgumentType]
        vocab_size=sizes.vocabulary,
        max_sequence_length=0,  # unused: rotary embeddings have no table to size
        position_embedding_type="rope",
        rotary_base=sizes.rope_base,
    )


def _block_spec(config: TransformerConfig, sizes: DecoderSizes) -> TransformerBlockSubmodules:
    """The layers that this pipeline stage builds."""
    cross_layer = ModuleSpec(
        module=CrossAttentionLayer, params={"initial_gate": sizes.initial_gate}
    )
    self_layer = self_attention_layer_spec(AttnMaskType.causal)
    first = get_transformer_layer_offset(config)
    positions = range(first, first + get_num_layers_to_build(config))
    return TransformerBlockSubmodules(
        [cross_layer if p in sizes.cross_layers else self_layer for p in positions],
        layer_norm=Norm,  # pyright: ignore[reportArgumentType] (its hint forgets classes)
    )
