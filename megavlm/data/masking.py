"""Which patches masked image modelling hides."""

import numpy as np
import torch
from torch import Tensor


def mask_blocks(generator: np.random.Generator, side: int, fraction: float, block: int) -> Tensor:
    """Hide whole blocks of patches at random (SimMIM, Xie et al. 2022, section 3.1).

    side: patches along a side of the picture. block: patches along a side of a block; at the border
    blocks are cut. At least one block is hidden, and one is not. Returns bool (side * side,).
    """
    blocks = -(-side // block)
    hidden = np.zeros(blocks**2, dtype=bool)
    count = min(max(1, round(fraction * blocks**2)), blocks**2 - 1)
    hidden[generator.permutation(blocks**2)[:count]] = True
    patches = hidden.reshape(blocks, blocks).repeat(block, 0).repeat(block, 1)
    return torch.from_numpy(patches[:side, :side].flatten())  # pyright: ignore
