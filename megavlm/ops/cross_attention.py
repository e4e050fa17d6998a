"""Cross-attention from packed text tokens to packed image tokens, in plain torch.

Letters in shapes: t text tokens, v image tokens, h query heads, g key/value heads, d head width.
"""

import torch
from torch import Tensor
from torch.nn import functional


def cross_attention(
    q_thd: Tensor, k_vgd: Tensor, v_vgd: Tensor, low_t: Tensor, high_t: Tensor
) -> Tensor:
    """Text token i attends to the image tokens low[i] <= j < high[i].

    q_thd: (t, h, d); k_vgd and v_vgd: (v, g, d) with h a multiple of g and v at least 1; same
    floating dtype. low_t and high_t: (t,) integers within 0 to v. Returns (t, h, d) in q's dtype.
    A token that sees nothing (low == high) gets exactly zero and sends exactly zero gradient.
    The scores are scaled by 1 / sqrt(d).
    """
    image_tokens = torch.arange(k_vgd.shape[0], device=q_thd.device)
    sees_tv = (low_t[:, None] <= image_tokens) & (image_tokens < high_t[:, None])
    sees_any_t = low_t < high_t
    # A row without any key has no softmax. Let it see everything, then multiply it by zero.
    sees_tv = sees_tv | ~sees_any_t[:, None]
    out_htd = functional.scaled_dot_product_attention(
        q_thd.transpose(0, 1)[None],
        k_vgd.transpose(0, 1)[None],
        v_vgd.transpose(0, 1)[None],
        attn_mask=sees_tv,
        enable_gqa=True,
    )[0]
    return out_htd.transpose(0, 1) * sees_any_t[:, None, None]
