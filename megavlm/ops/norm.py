"""RMSNorm, alone and joined to a gated residual.

Letters in shapes: v image tokens, g key/value heads, d head width, w width.
"""

import torch
from torch import Tensor

from megavlm.ops import reference
from megavlm.ops.library import NORM_WIDTH_LIMIT, refusal


def rms_norm(x: Tensor, weight_w: Tensor, epsilon: float) -> Tensor:
    """RMSNorm over the last axis, x / sqrt(mean(x^2) + epsilon) * weight, computed in fp32."""
    if refusal(x, NORM_WIDTH_LIMIT):
        return reference.rms_norm(x, weight_w, epsilon)
    normed, _ = torch.ops.megavlm.rms_norm(x.flatten(0, -2), weight_w.float(), epsilon)
    return normed.view(x.shape)


def prepare_keys(k_vgd: Tensor, k_weight_d: Tensor, q_weight_d: Tensor, epsilon: float) -> Tensor:
    """Keys for `cross_attention` with query normalisation: RMSNorm, with both norms' weights.

    (q r w_q) . (k s w_k) = r (q . (k s w_k w_q)), so the queries need only their reciprocal root
    mean square r. Worth keeping while an image is attended to again.
    """
    return rms_norm(k_vgd, k_weight_d.float() * q_weight_d.float(), epsilon)


def gated_norm(
    residual: Tensor, branch: Tensor, gate: Tensor, weight_w: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """The sum residual + tanh(gate) * branch, and its RMSNorm; both (..., w) in residual's dtype.

    gate: one element. Source: Alayrac et al. 2022, section 3.1.
    """
    if refusal(residual, NORM_WIDTH_LIMIT):
        return reference.gated_norm(residual, branch, gate, weight_w, epsilon)
    shape = residual.shape
    total, normed, _ = torch.ops.megavlm.gated_norm(
        residual.flatten(0, -2), branch.flatten(0, -2), gate.float(), weight_w.float(), epsilon
    )
    return total.view(shape), normed.view(shape)
