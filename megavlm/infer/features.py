"""What the two towers of contrastive stages make of pictures and texts.

Letters in shapes: n pairs, d feature width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megavlm.config.run import RunSettings
from megavlm.data.collate import Drawn, pairs
from megavlm.data.tokenizer import Tokenizer
from megavlm.dist import groups
from megavlm.model.pretraining import PretrainingModel


class Encoded(NamedTuple):
    """Pairs of a picture and a text."""

    features: list[tuple[Tensor, Tensor]]
    """By each model, of the pictures and of the texts: fp32 (n, d), on the CPU, of any norm."""
    truncated_texts: int
    """Texts that were cut to the row length."""


@torch.no_grad()
def encode(
    models: Sequence[PretrainingModel],
    drawn: Sequence[Drawn],
    tokenizer: Tokenizer,
    run: RunSettings,
) -> Encoded:
    """Features of each sample's first picture and of its first text, by each model.

    Every sample must have both. Texts share rows as in training, so that a feature depends on what
    else is encoded with it, but by rounding alone. Call it inside `process_groups`.
    """
    batch = pairs(drawn, tokenizer, run, len(drawn)).to(groups.device())
    features: list[tuple[Tensor, Tensor]] = []
    for model in models:
        image_nd, text_nd, *_ = model(
            batch.pixels, None, batch.tokens_bt, batch.text_numbers_bt, batch.ends_n
        )
        features.append((image_nd.float().cpu(), text_nd.float().cpu()))
    return Encoded(features, batch.truncated_texts)
