"""Masked image modelling: hidden patches are predicted in pixels, by one linear layer (SimMIM).

Trains the image encoder, the embedding of hidden patches and the linear layer. docs/decisions/0006
says why pixels, and why the encoder sees the hidden patches' places.
"""

import torch
from torch import Tensor

VARIANCE_FLOOR = 0.05  # of pixels from 0 to 255; patches of one colour have a target of 0


def loss_sum(
    predicted_npc: Tensor, pixels: Tensor, masked_np: Tensor, has_image_n: Tensor, patch: int
) -> Tensor:
    """Sum over the pictures of the mean squared error over their hidden patches.

    predicted_npc: fp32 (n, p, 3 x patch x patch). pixels: uint8 (n, 3, side, side). masked_np and
    has_image_n: bool; slots without a picture count nothing.
    """
    error_np = (predicted_npc - patch_targets(pixels, patch)).square().mean(-1)
    hidden_np = masked_np & has_image_n[:, None]
    return (error_np * hidden_np).sum(1).div(masked_np.sum(1).clamp(min=1)).sum()


def patch_targets(pixels: Tensor, patch: int) -> Tensor:
    """Each patch's pixels at zero mean and unit variance (MAE, He et al. 2022, section 3).

    pixels: uint8 (n, 3, side, side). Returns fp32 (n, p, 3 x patch x patch).
    """
    side = pixels.shape[-1] // patch
    patches = pixels.float().unflatten(-1, (side, patch)).unflatten(-3, (side, patch))
    patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) * (variance + VARIANCE_FLOOR).rsqrt()
