"""Samples to one micro-batch: texts packed into rows, images in slots.

Letters in shapes: b rows, t tokens of a row, n image slots.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from megavlm.data.tokenizer import END, PADDING, Tokenizer

NO_TEXT = -1  # text number of padding


class PackedText(NamedTuple):
    """One text as tokens, before it has a place."""

    tokens: list[int]
    answer_start: int
    """Tokens before this one are the prompt; only the rest is learned."""
    image: int | None
    """The image slot that its tokens see."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch of one rank."""

    tokens_bt: Tensor
    """int64; padding is the tokenizer's padding symbol."""
    labels_bt: Tensor
    """int64, the next token; meaningless where `learned_bt` is False."""
    learned_bt: Tensor
    """bool, whether the label counts in the loss."""
    text_numbers_bt: Tensor
    """int32, which text of its row a token belongs to; NO_TEXT for padding."""
    image_ranges_2bt: Tensor
    """int32, first and one past the last image token that a token sees; equal: none."""
    pixels: Tensor
    """uint8 (n, 3, side, side); slots without an image are zero."""
    samples: int = 0
    """Samples that it holds, bad ones not counted."""
    skipped: tuple[str, ...] = ()
    """Names of bad samples that were left out."""
    truncated_texts: int = 0
    """Texts that were cut to the row length."""

    def to(self, device: torch.device) -> "Batch":
        """The batch with its tensors on a device."""
        moved = {
            f.name: getattr(self, f.name).to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)


def tokenize(
    tokenizer: Tokenizer, prompt: str, answer: str, image: int | None, row_tokens: int
) -> tuple[PackedText, bool]:
    """One text as tokens, cut to a row's length; also tells whether it was cut."""
    tokens = tokenizer.prompt(prompt, with_image=image is not None)
    answer_start = len(tokens)
    tokens = [*tokens, *tokenizer.encode(answer), END]
    # One more token than fits: the last one is only ever a label.
    cut = len(tokens) > row_tokens + 1
    return PackedText(tokens[: row_tokens + 1], answer_start, image), cut


def pack(
    texts: Sequence[PackedText], pixels: Tensor, *, row_tokens: int, image_tokens: int
) -> Batch:
    """Pack texts into as few rows of `row_tokens` as first-fit decreasing finds.

    image_tokens: tokens of one image; slot i holds tokens i * image_tokens and on.
    """
    places = text_places([len(text.tokens) - 1 for text in texts], row_tokens)
    shape = (max((row for row, _, _ in places), default=0) + 1, row_tokens)
    tokens = torch.full(shape, PADDING)
    labels = torch.full(shape, PADDING)
    learned = torch.zeros(shape, dtype=torch.bool)
    numbers = torch.full(shape, NO_TEXT, dtype=torch.int32)
    ranges = torch.zeros((2, *shape), dtype=torch.int32)
    for text, (row, start, number) in zip(texts, places, strict=True):
        end = start + len(text.tokens) - 1
        place = (row, slice(start, end))
        sequence = torch.tensor(text.tokens)
        tokens[place] = sequence[:-1]
        labels[place] = sequence[1:]
        # The token before the answer predicts the answer's first token.
        learned[row, start + text.answer_start - 1 : end] = True
        numbers[place] = number
        if text.image is not None:
            ranges[0, row, start:end] = text.image * image_tokens
            ranges[1, row, start:end] = (text.image + 1) * image_tokens
    return Batch(
        tokens_bt=tokens,
        labels_bt=labels,
        learned_bt=learned,
        text_numbers_bt=numbers,
        image_ranges_2bt=ranges,
        pixels=pixels,
    )


def python_text_places(lengths: Sequence[int], capacity: int) -> list[tuple[int, int, int]]:
    """Row, first token in it and number in it of each text.

    Rows by first-fit decreasing: the longest first, each into the first row with room. In a row
    texts keep their order.
    """
    room: list[int] = []
    row_of = [0] * len(lengths)
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = (row for row, space in enumerate(room) if space >= lengths[item])
        row = next(fits, len(room))
        if row == len(room):
            room.append(capacity)
        room[row] -= lengths[item]
        row_of[item] = row
    used, texts = [0] * len(room), [0] * len(room)
    places: list[tuple[int, int, int]] = []
    for row, length in zip(row_of, lengths, strict=True):
        places.append((row, used[row], texts[row]))
        used[row] += length
        texts[row] += 1
    return places


try:
    _data = cast(Any, importlib.import_module("megavlm._data"))
    text_places: Callable[[Sequence[int], int], list[tuple[int, int, int]]] = _data.text_places
except (ImportError, AttributeError):  # installed without a compiler, or built from older sources
    text_places = python_text_places
