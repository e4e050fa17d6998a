"""What the two towers of contrastive stages make of pictures and texts.

Letters in shapes: n pictures or texts, d feature width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megavlm.config.run import RunSettings
from megavlm.data.collate import Drawn, pairs
from megavlm.data.samples import CAPTION_TASK, text
from megavlm.data.tokenizer import Tokenizer
from megavlm.dist import groups
from megavlm.model.pretraining import PretrainingModel

PICTURES_AT_ONCE = 64
TEXTS_AT_ONCE = 256


class Encoded(NamedTuple):
    """Pairs of a picture and a text."""

    features: list[tuple[Tensor, Tensor]]
    """By each model, of the pictures and of the texts: fp32 (n, d), on the CPU, of any norm."""
    truncated_texts: int
    """Texts that were cut to the row length."""


def encode(
    models: Sequence[PretrainingModel],
    drawn: Sequence[Drawn],
    tokenizer: Tokenizer,
    run: RunSettings,
) -> Encoded:
    """Features of each sample's first picture and of its first text, by each model.

    Every sample must have both. Call it inside `process_groups`, as what follows.
    """
    pixels = [sample.pictures[0] for sample in drawn]
    texts = [sample.texts[0].turns[-1].answer for sample in drawn]
    features: list[tuple[Tensor, Tensor]] = []
    cut = 0
    for model in models:
        text_nd, cut = text_features(model, texts, tokenizer, run)
        features.append((image_features(model, pixels), text_nd))
    return Encoded(features, cut)


@torch.no_grad()
def image_features(model: PretrainingModel, pixels: Sequence[Tensor]) -> Tensor:
    """Of uint8 (3, side, side) pictures: fp32 (n, d) on the CPU, of any norm."""
    assert model.contrastive_head is not None, "the stage is checked for it"
    features: list[Tensor] = []
    for start in range(0, len(pixels), PICTURES_AT_ONCE):
        batch = torch.stack([*pixels[start : start + PICTURES_AT_ONCE]]).to(groups.device())
        pooled_nw = model.pooled(model.encoder(batch))
        features.append(model.contrastive_head.image(pooled_nw).float().cpu())
    return torch.cat(features)


@torch.no_grad()
def text_features(
    model: PretrainingModel, texts: Sequence[str], tokenizer: Tokenizer, run: RunSettings
) -> tuple[Tensor, int]:
    """Of texts: fp32 (n, d) on the CPU, of any norm, and how many were cut to the row length.

    Texts share rows as in training, so that a feature depends on what else is encoded with it, but
    by rounding alone.
    """
    assert model.contrastive_head is not None and model.text_tower is not None
    side = run.model.encoder.image_pixels
    blank = torch.zeros((3, side, side), dtype=torch.uint8)  # a pair has a picture; it is not read
    features: list[Tensor] = []
    cut = 0
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        drawn = [
            Drawn("", (blank,), (text("", each, CAPTION_TASK),), np.random.default_rng(0))
            for each in texts[start : start + TEXTS_AT_ONCE]
        ]
        batch = pairs(drawn, tokenizer, run, len(drawn))
        cut += batch.truncated_texts
        batch = batch.to(groups.device())
        states_nw = model.text_tower(batch.tokens_bt, batch.text_numbers_bt, batch.ends_n)
        features.append(model.contrastive_head.text(states_nw).float().cpu())
    return torch.cat(features), cut
