"""The gated cross-attention layer (Flamingo, Alayrac et al. 2022, section 3.1; Llama 3.2 Vision).

Letters in shapes: t text positions, b rows, v image tokens of the micro-batch, w width, h query
heads, g key/value heads, d head width; all heads are this tensor-parallel rank's.
"""

from typing import Any, cast

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn

from megavlm.model.layers import GatedNorm, Norm, NormWeight, mlp_spec
from megavlm.ops.cross_attention import cross_attention
from megavlm.ops.norm import prepare_keys


class CrossAttention(MegatronModule):
    """Grouped-query attention from text to image tokens, with RMSNorm on queries and keys.

    The weights of both norms are applied to the keys: see `ops.norm.prepare_keys`.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, pg_collection: ProcessGroupCollection
    ) -> None:
        super().__init__(config)
        self.layer_number = layer_number
        assert config.kv_channels is not None and config.num_query_groups is not None
        self.head_width: int = config.kv_channels
        query_width = config.num_attention_heads * self.head_width
        key_width = config.num_query_groups * self.head_width
        common: dict[str, Any] = {
            "config": config,
            "bias": False,
            "skip_bias_add": True,
            "tp_group": pg_collection.tp,
        }
        column: dict[str, Any] = {
            **common,
            "init_method": config.init_method,
            "gather_output": False,
        }
        self.linear_q = ColumnParallelLinear(config.hidden_size, query_width, **column)
        # Keys and values of one head lie together, so that heads split over ranks.
        self.linear_kv = ColumnParallelLinear(config.hidden_size, 2 * key_width, **column)
        # Shared by all heads; under these names megatron-core sums their gradients over ranks.
        self.q_layernorm = NormWeight(config, self.head_width)
        self.k_layernorm = NormWeight(config, self.head_width)
        self.linear_proj = RowParallelLinear(
            query_width,
            config.hidden_size,
            **common,
            init_method=cast(Any, config.output_layer_init_method),
            input_is_parallel=True,
        )

    def forward(
        self,
        x_tbw: Tensor,
        image_v1w: Tensor,
        image_ranges_2bt: Tensor,
    ) -> Tensor:
        """Attend; returns (t, b, w).

        image_ranges_2bt: int32, the first and one past the last image token each text token sees.
        """
        q_tbhd = self.linear_q(x_tbw)[0].unflatten(-1, (-1, self.head_width))
        k_vgd, v_vgd = self._keys_values(image_v1w)
        low_bt, high_bt = image_ranges_2bt
        out_bthd = cross_attention(
            q_tbhd.transpose(0, 1), k_vgd, v_vgd, low_bt, high_bt, self.q_layernorm.eps
        )
        return self.linear_proj(out_bthd.transpose(0, 1).flatten(2))[0]

    def _keys_values(self, image_v1w: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all image tokens, each (v, g, d)."""
        kv_vgd2 = self.linear_kv(image_v1w)[0].squeeze(1).unflatten(-1, (-1, 2 * self.head_width))
        k_vgd, v_vgd = kv_vgd2.chunk(2, dim=-1)
        one_d = k_vgd.new_ones(self.head_width, dtype=torch.float32)
        weights = self.k_layernorm(one_d), self.q_layernorm(one_d)
        return prepare_keys(k_vgd, *weights, self.k_layernorm.eps), v_vgd


class CrossAttentionLayer(MegatronModule):
    """Text attends to its images, then a feed-forward network; both branches scaled by tanh(gate).

    A text token that sees no image passes unchanged: both its branches are exactly zero.
    Takes the place of a TransformerLayer in megatron-core's TransformerBlock.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        initial_gate: float,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config)
        self.layer_number = layer_number + get_transformer_layer_offset(config, vp_stage)
        self.tp_group = pg_collection.tp
        self.input_norm = Norm(config, config.hidden_size)
        self.cross_attention = CrossAttention(config, self.layer_number, pg_collection)
        self.attention_gate = _gate(config, initial_gate)
        self.mlp_norm = GatedNorm(config, config.hidden_size)
        self.mlp = build_module(mlp_spec(), config=config)
        self.mlp_gate = _gate(config, initial_gate)

    def forward(
        self,
        hidden_states: Tensor,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the new hidden states and the unchanged context.

        hidden_states: (t, b, w). context: image states (v, 1, w). context_mask: image ranges,
        int32 (2, b, t). The names are TransformerBlock's. Under sequence parallelism a rank has its
        part of the t tokens and of the v image tokens, but all image ranges.
        """
        assert context is not None, "cross-attention needs image states"
        assert context_mask is not None, "cross-attention needs image ranges"
        attended = self.cross_attention(self.input_norm(hidden_states), context, context_mask)
        x, normed = self.mlp_norm(hidden_states, attended, self.attention_gate)
        low_bt, high_bt = context_mask
        sees_image_tb1 = (low_bt < high_bt).t().unsqueeze(-1)
        if self.config.sequence_parallel:
            sees_image_tb1 = sees_image_tb1.chunk(self.tp_group.size())[self.tp_group.rank()]
        gate_tb1 = torch.tanh(self.mlp_gate) * sees_image_tb1
        return torch.addcmul(x, self.mlp(normed)[0], gate_tb1), context


def _gate(config: TransformerConfig, initial: float) -> nn.Parameter:
    gate = nn.Parameter(torch.full((1,), initial, dtype=config.params_dtype))
    gate.sequence_parallel = config.sequence_parallel  # pyright: ignore
    return gate
