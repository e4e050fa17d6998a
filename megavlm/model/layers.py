"""What the encoder and the decoder are both built from, on megatron-core's parallel layers.

megatron-core's layout is sequence first. Letters: t tokens, b rows (batch), h heads, d head width.
"""

from typing import Any, cast

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn
from torch.nn import functional

from megavlm.config.engines import MegatronSettings
from megavlm.ops.norm import gated_norm, rms_norm

LANGUAGE_STYLE: dict[str, Any] = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": functional.silu,
    "add_bias_linear": False,
}
"""Of every model that reads text, for `layer_config`: RMSNorm, SwiGLU, no biases."""


class Norm(nn.Module):
    """RMSNorm or LayerNorm, and its epsilon, as the configuration says.

    megatron-core's own torch norm refuses sequence parallelism; this one marks its parameters for
    it, so that their gradients are summed over the tensor-parallel ranks, unless each of them has
    `all_tokens`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        *,
        all_tokens: bool = False,
        **_: Any,
    ) -> None:
        super().__init__()
        self.eps = config.layernorm_epsilon
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = (
            nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
            if config.normalization == "LayerNorm"
            else None
        )
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel and not all_tokens  # pyright: ignore

    def forward(self, x: Tensor) -> Tensor:
        shape = (x.shape[-1],)
        if self.bias is not None:
            return functional.layer_norm(x, shape, self.weight, self.bias, self.eps)
        if x.is_cuda:
            return functional.rms_norm(x, shape, self.weight, self.eps)
        # On CPUs torch has no kernel for it, and keeps two copies of x in fp32.
        return rms_norm(x, self.weight, self.eps)


class NormWeight(Norm):
    """The weight of an RMSNorm that is computed elsewhere.

    It is read through a call, because the engines make a module's parameters ready when it is
    called.
    """

    def forward(self, scale_w: Tensor) -> Tensor:  # pyright: ignore
        """Returns scale * weight."""
        return scale_w * self.weight


class GatedNorm(Norm):
    """RMSNorm of a residual that a gated branch is added to first, in one pass over both."""

    def forward(self, residual: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore
        """Returns residual + tanh(gate) * branch, and its norm."""
        assert self.bias is None, "RMSNorm alone can be joined to a gate"
        return gated_norm(residual, branch, gate, self.weight, self.eps)


class AttentionCore(MegatronModule):
    """softmax(q k / sqrt(d)) v with grouped key/value heads, by torch's fused attention."""

    def __init__(self, config: TransformerConfig, attn_mask_type: AttnMaskType, **_: Any) -> None:
        super().__init__(config)
        self.attn_mask_type = attn_mask_type

    def forward(
        self,
        q_tbhd: Tensor,
        k_tbhd: Tensor,
        v_tbhd: Tensor,
        hidden_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        **_: Any,
    ) -> Tensor:
        """hidden_mask: bool, broadcastable to (b, h, t, t), True where a key is hidden.

        Without it, keys are causally hidden if the mask type says so. Returns (t, b, h * d).
        """
        mask_type = attn_mask_type or self.attn_mask_type
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q_tbhd, k_tbhd, v_tbhd))
        out_bhtd = functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if hidden_mask is None else ~hidden_mask,
            is_causal=hidden_mask is None and mask_type == AttnMaskType.causal,
            enable_gqa=q.shape[1] != k.shape[1],  # fewer of torch's kernels can
        )
        return out_bhtd.permute(2, 0, 1, 3).flatten(2)


class BiasFreeColumnLinear(ColumnParallelLinear):
    """A column-parallel linear layer without bias, whatever the configuration says."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"bias": False}))


class BiasFreeRowLinear(RowParallelLinear):
    """A row-parallel linear layer without bias, whatever the configuration says."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"bias": False}))


def mlp_spec() -> ModuleSpec:
    """The feed-forward network; its activation and gating come from the configuration."""
    return ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
    )


def self_attention_layer_spec(mask_type: AttnMaskType, *, attention_bias: bool) -> ModuleSpec:
    """Pre-norm self-attention and feed-forward network.

    attention_bias: the attention has biases if the configuration has any; otherwise it has none.
    """
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": mask_type},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear if attention_bias else BiasFreeColumnLinear,
            core_attention=AttentionCore,
            linear_proj=RowParallelLinear if attention_bias else BiasFreeRowLinear,
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=attention,
            self_attn_bda=cast(Any, get_bias_dropout_add),
            pre_mlp_layernorm=Norm,
            mlp=mlp_spec(),
            mlp_bda=cast(Any, get_bias_dropout_add),
        ),
    )


def layer_config(
    *,
    dtype: torch.dtype,
    recompute: str,
    parallel: MegatronSettings,
    layers: int,
    width: int,
    heads: int,
    kv_heads: int,
    mlp_width: int,
    norm_epsilon: float,
    **style: Any,
) -> TransformerConfig:
    """megatron-core's configuration for layers of these sizes.

    Fusions that need CUDA extensions are off; `style` sets the norm, the activation and biases.
    recompute: "full" is left to `recompute_layers`. Weights stay as they were allocated:
    `model/initial.py` fills them, alike on every engine.
    """
    recompute_settings: dict[str, Any] = (
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
        if recompute == "selective"
        else {}
    )
    return TransformerConfig(
        init_method=_leave_alone,
        output_layer_init_method=_leave_alone,
        num_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        num_query_groups=kv_heads,
        ffn_hidden_size=mlp_width,
        layernorm_epsilon=norm_epsilon,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        calculate_per_token_loss=True,
        tensor_model_parallel_size=parallel.tensor_parallel,
        sequence_parallel=parallel.sequence_parallel,
        # On the CPU, or on whatever device a surrounding `torch.device` names.
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        **recompute_settings,
        **style,
    )


def _leave_alone(weight: Tensor) -> Tensor:
    return weight
