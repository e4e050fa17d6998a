"""Which tokens of packed texts see which."""

import torch
from torch import Tensor


def causal_text_mask(text_numbers_bt: Tensor) -> Tensor:
    """Hide later tokens, and tokens of other texts: (b, 1, t, t) bool, True where hidden."""
    length = text_numbers_bt.shape[1]
    later = torch.ones(length, length, dtype=torch.bool, device=text_numbers_bt.device).triu(1)
    other = text_numbers_bt[:, :, None] != text_numbers_bt[:, None, :]
    return (other | later)[:, None]
