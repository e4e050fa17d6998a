"""Cross-attention from rows of text tokens to packed image tokens.

Letters in shapes: b rows, t text tokens, v image tokens, h query heads, g key/value heads, d head
width.
"""

import math

import torch
from torch import Tensor

from megavlm.ops import reference
from megavlm.ops.library import refusal


def cross_attention(
    q_bthd: Tensor,
    k_vgd: Tensor,
    v_vgd: Tensor,
    low_bt: Tensor,
    high_bt: Tensor,
    q_norm_epsilon: float | None = None,
) -> Tensor:
    """Text token i of a row attends to the packed image tokens low[i] <= j < high[i].

    q_bthd: (b, t, h, d); k_vgd and v_vgd: (v, g, d) with h a multiple of g; same floating dtype,
    any strides. low_bt and high_bt: int32 (b, t), 0 <= low <= high <= v. Scores are scaled by
    1 / sqrt(d). With `q_norm_epsilon`, queries pass an RMSNorm first, whose weight is part of the
    keys: see `norm.prepare_keys`. Returns (b, t, h, d) in q's dtype.

    A token that sees nothing (low == high) gets exactly zero and sends exactly zero gradient.

    The operands are finite and of one dtype (no autocast). Gradients can be taken once, not twice.

    Raises RuntimeError for shapes, dtypes or devices that do not fit and, on the CPU, for intervals
    out of range; on a GPU, where reading them would wait for it, they are clamped to 0 and v.
    """
    if refusal(q_bthd):
        return reference.cross_attention(q_bthd, k_vgd, v_vgd, low_bt, high_bt, q_norm_epsilon)
    scale = 1 / math.sqrt(q_bthd.shape[-1])
    return torch.ops.megavlm.cross_attention(
        q_bthd, k_vgd, v_vgd, low_bt, high_bt, scale, q_norm_epsilon
    )[0]
