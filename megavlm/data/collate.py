"""What a micro-batch is made of: texts that stand alone, chats, or pictures with a text each."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megavlm.config.run import RunSettings
from megavlm.data.masking import mask_blocks
from megavlm.data.packing import Batch, PackedText, PairBatch, pack, pack_pairs, tokenize
from megavlm.data.samples import Text, Turn
from megavlm.data.tokenizer import BEGIN, END, Tokenizer
from megavlm.errors import BadSampleError


class Drawn(NamedTuple):
    """A sample as it is trained on."""

    name: str
    """For logs."""
    pictures: tuple[Tensor, ...]
    """uint8 (3, side, side), augmented."""
    texts: tuple[Text, ...]
    """Those that were drawn."""
    generator: np.random.Generator
    """For what else is random of it."""
    source: int = 0
    """Of `data.train`, by its place there."""


Collate = Callable[[Sequence[Drawn], Tokenizer, RunSettings, int], Batch | PairBatch]
"""Makes a micro-batch of samples, with so many image slots."""


def texts_alone(
    drawn: Sequence[Drawn], tokenizer: Tokenizer, run: RunSettings, slots: int
) -> Batch:
    """Every text stands alone; those of a sample share its image slots."""
    return _texts(drawn, tokenizer, run, slots)


def chats(drawn: Sequence[Drawn], tokenizer: Tokenizer, run: RunSettings, slots: int) -> Batch:
    """As `texts_alone`, but texts of one turn with the same pictures are joined into a chat."""
    return _texts([d._replace(texts=_joined(d.texts)) for d in drawn], tokenizer, run, slots)


def _joined(texts: Sequence[Text]) -> tuple[Text, ...]:
    """The pictures are shown in the first turn alone; every later turn sees them, too."""
    single = [text for text in texts if len(text.turns) == 1]
    joined = [text for text in texts if len(text.turns) > 1]
    single.sort(key=lambda text: text.turns[0].pictures)  # stable: else in the order drawn
    for _, group in groupby(single, key=lambda text: text.turns[0].pictures):
        first, *later = group
        turns: list[Turn] = [replace(text.turns[0], pictures=()) for text in later]
        joined.append(replace(first, turns=(first.turns[0], *turns)))
    return tuple(joined)


def _texts(drawn: Sequence[Drawn], tokenizer: Tokenizer, run: RunSettings, slots: int) -> Batch:
    row_tokens = run.data.row_tokens
    pixels = _blank(run, slots)
    packed: list[PackedText] = []
    skipped: list[str] = []
    used = samples = without_text = truncated_texts = 0
    for sample in drawn:
        places = range(used, used + len(sample.pictures))
        try:
            tokenized = [tokenize(tokenizer, text, places, row_tokens) for text in sample.texts]
        except BadSampleError as error:
            skipped.append(f"{sample.name}: {error}")
            continue
        samples += 1
        without_text += not sample.texts
        for place, picture in zip(places, sample.pictures, strict=True):
            pixels[place] = picture
        used += len(sample.pictures)
        packed += [text._replace(source=sample.source) for text, _ in tokenized]
        truncated_texts += sum(cut for _, cut in tokenized)
    batch = pack(packed, pixels, run.data, image_tokens=run.model.encoder.tokens)
    return replace(
        batch,
        samples=samples,
        skipped=tuple(skipped),
        without_text=without_text,
        truncated_texts=truncated_texts,
        images=used,
    )


def pairs(drawn: Sequence[Drawn], tokenizer: Tokenizer, run: RunSettings, slots: int) -> PairBatch:
    """The first picture of each sample with its first text's last answer, alone.

    Without a picture a sample is of no use here, and counts as one without text.
    """
    row_tokens, encoder = run.data.row_tokens, run.model.encoder
    side = encoder.image_pixels // encoder.patch_pixels
    pixels = _blank(run, slots)
    masked_np = torch.zeros((slots, side**2), dtype=torch.bool)
    texts: list[tuple[int, list[int]]] = []
    pictured = [sample for sample in drawn if sample.pictures]
    truncated_texts = 0
    for slot, sample in enumerate(pictured):
        pixels[slot] = sample.pictures[0]
        if "mim" in run.objectives:
            masked_np[slot] = mask_blocks(
                sample.generator, side, run.mim.masked_fraction, run.mim.block_patches
            )
        if sample.texts:
            answer = tokenizer.encode(sample.texts[0].turns[-1].answer)
            truncated_texts += len(answer) > row_tokens - 2
            texts.append((slot, [BEGIN, *answer[: row_tokens - 2], END]))
    has_image_n = torch.arange(slots) < len(pictured)
    batch = pack_pairs(texts, pixels, has_image_n, masked_np, run.data)
    return replace(
        batch,
        samples=len(drawn),
        without_text=len(drawn) - len(texts),
        truncated_texts=truncated_texts,
        images=len(pictured),
    )


def _blank(run: RunSettings, slots: int) -> Tensor:
    side = run.model.encoder.image_pixels
    return torch.zeros((slots, 3, side, side), dtype=torch.uint8)
