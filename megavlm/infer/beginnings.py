"""Texts that begin, as the decoder reads them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megavlm.data.tokenizer import PADDING
from megavlm.infer.decoder import Caches, Step
from megavlm.infer.prompts import Prompt


def beginnings(
    texts: Sequence[Prompt], places: Sequence[int], caches: Caches, picture_tokens: int
) -> tuple[Tensor, Step]:
    """Tokens (b, t), padded at their ends, and the step of texts that lie in these places."""
    shape = len(texts), max(len(text.tokens) for text in texts)
    tokens_bt = np.full(shape, PADDING, np.int64)
    sees_2bt = np.zeros((2, *shape), np.int32)
    for row, (place, text) in enumerate(zip(places, texts, strict=True)):
        tokens_bt[row, : len(text.tokens)] = text.tokens
        seen_t2 = np.array(text.seen) * picture_tokens + place * caches.image_tokens
        sees_2bt[:, row, : len(text.tokens)] = seen_t2.T
    device = caches.device
    return torch.as_tensor(tokens_bt, device=device), Step(
        places_b=torch.tensor([*places], device=device),
        positions_bt=torch.arange(shape[1], device=device).repeat(shape[0], 1),
        low_bt=torch.as_tensor(sees_2bt[0], device=device),
        high_bt=torch.as_tensor(sees_2bt[1], device=device),
        sees_images=any(high > low for text in texts for low, high in text.seen),
        visible_bc=None,
    )
