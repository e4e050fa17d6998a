"""What the compiled operators compute, in plain torch: oracle of their tests, and their fallback.

Letters in shapes: b rows, t text tokens, v image tokens, h query heads, g key/value heads, d head
width, n rows of a norm, w its width.
"""

import torch
from torch import Tensor
from torch.nn import functional


def cross_attention(
    q_bthd: Tensor,
    k_vgd: Tensor,
    v_vgd: Tensor,
    low_bt: Tensor,
    high_bt: Tensor,
    q_norm_epsilon: float | None = None,
) -> Tensor:
    """As `megavlm.ops.cross_attention.cross_attention`, for every floating dtype."""
    if q_norm_epsilon is not None:
        q_bthd = functional.rms_norm(q_bthd, q_bthd.shape[-1:], eps=q_norm_epsilon)
    image_tokens = torch.arange(k_vgd.shape[0], device=q_bthd.device)
    sees_btv = (low_bt[..., None] <= image_tokens) & (image_tokens < high_bt[..., None])
    sees_any_bt = low_bt < high_bt
    # A row without any key has no softmax. Let it see everything, then multiply it by zero.
    sees_btv = sees_btv | ~sees_any_bt[..., None]
    rows = q_bthd.shape[0]
    out_bhtd = functional.scaled_dot_product_attention(
        q_bthd.transpose(1, 2),
        k_vgd.transpose(0, 1).expand(rows, -1, -1, -1),
        v_vgd.transpose(0, 1).expand(rows, -1, -1, -1),
        attn_mask=sees_btv[:, None],
        enable_gqa=True,
    )
    return torch.where(sees_any_bt[..., None, None], out_bhtd.transpose(1, 2), 0)


def rms_norm(x_nw: Tensor, weight_w: Tensor, epsilon: float) -> Tensor:
    """As `megavlm.ops.norm.rms_norm`, for every floating dtype."""
    return functional.rms_norm(x_nw, x_nw.shape[-1:], weight_w.to(x_nw.dtype), epsilon)


def gated_norm(
    residual_nw: Tensor, branch_nw: Tensor, gate: Tensor, weight_w: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """As `megavlm.ops.norm.gated_norm`, for every floating dtype."""
    sum_nw = residual_nw + torch.tanh(gate).to(residual_nw.dtype) * branch_nw
    return sum_nw, rms_norm(sum_nw, weight_w, epsilon)
