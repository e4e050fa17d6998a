"""Samples to one micro-batch: texts in rows, which they may share, and images in slots.

Letters in shapes: b rows, t tokens of a row, n image slots.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megavlm.config.data import DataSettings
from megavlm.data.samples import Text
from megavlm.data.tokenizer import END, PADDING, Tokenizer
from megavlm.errors import BadSampleError

NO_TEXT = -1  # text number of padding


class Span(NamedTuple):
    """Tokens from `start` to before `end`."""

    start: int
    end: int


class PackedText(NamedTuple):
    """One text as tokens, before it has a place in a row."""

    tokens: list[int]
    answers: list[Span]
    """What is learned."""
    images: list[tuple[int, Span]]
    """From which token on which image slots are seen, until the next entry."""
    source: int = 0
    """Of `data.train`, by its place there."""


@dataclass(frozen=True, kw_only=True)
class Counted:
    """What became of a micro-batch's samples."""

    samples: int = 0
    """Samples that it holds, bad ones not counted."""
    skipped: tuple[str, ...] = ()
    """Names of bad samples that were left out."""
    without_text: int = 0
    """Samples none of whose texts are of the tasks that are trained."""
    truncated_texts: int = 0
    """Texts that were cut to the row length."""
    text_tokens: int = 0
    """Of the places in its rows, those that are no padding."""
    images: int = 0
    """Of its image slots, those that are no padding."""
    sample_ids: tuple[int, ...] = ()
    """Of all that were drawn for it, bad ones too, by `sources.id_of`."""

    def to(self, device: torch.device) -> Self:
        """The same with its tensors on a device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: t for name, t in tensors.items() if isinstance(t, Tensor)}
        if device.type == "cuda":  # from other memory a copy would hold up this process
            tensors = {name: t.pin_memory() for name, t in tensors.items()}
        moved = {name: t.to(device, non_blocking=True) for name, t in tensors.items()}
        return replace(self, **moved)


@dataclass(frozen=True, kw_only=True)
class Batch(Counted):
    """One micro-batch of one rank, for a language model."""

    tokens_bt: Tensor
    """int64; padding is the tokenizer's padding symbol."""
    labels_bt: Tensor
    """int64, the next token; meaningless where `learned_bt` is False."""
    learned_bt: Tensor
    """bool, whether the label counts in the loss."""
    text_numbers_bt: Tensor
    """int32, which text of its row a token belongs to; NO_TEXT for padding."""
    sources_bt: Tensor
    """int32, which source a token is of; meaningless in padding."""
    image_ranges_2bt: Tensor
    """int32, first and one past the last image token that a token sees; equal: none."""
    pixels: Tensor
    """uint8 (n, 3, side, side); slots without an image are zero."""


@dataclass(frozen=True, kw_only=True)
class PairBatch(Counted):
    """One micro-batch of one rank, of pictures with a text each."""

    tokens_bt: Tensor
    """int64; padding is the tokenizer's padding symbol."""
    text_numbers_bt: Tensor
    """int32, which text of its row a token belongs to; NO_TEXT for padding."""
    ends_n: Tensor
    """int64, where in the flattened tokens_bt a picture's text ends; 0 where it has none."""
    is_pair_n: Tensor
    """bool, whether a slot has a picture and a text."""
    pixels: Tensor
    """uint8 (n, 3, side, side); slots without a picture are zero."""
    has_image_n: Tensor
    """bool, whether a slot has a picture."""
    masked_np: Tensor
    """bool (n, patches), which patches masked image modelling hides."""


def tokenize(
    tokenizer: Tokenizer, text: Text, slots: Sequence[int], row_tokens: int
) -> tuple[PackedText, bool]:
    """One text as tokens, cut to a row's length; also tells whether it was cut.

    slots: the image slot of each of the sample's pictures. A token sees the pictures of the last
    turn, its own included, that shows any, of which an image symbol sees those up to its own:
    Hugging Face Mllama's rule (`get_cross_attention_token_mask`). Turns that do not fit are left
    out; the first one is cut. Raises BadSampleError where a turn shows pictures whose slots do not
    follow one another.
    """
    tokens: list[int] = []
    answers: list[Span] = []
    images: list[tuple[int, Span]] = []
    left_out = False
    for number, turn in enumerate(text.turns):
        shown = [slots[picture] for picture in turn.pictures]
        if shown != list(range(min(shown, default=0), min(shown, default=0) + len(shown))):
            raise BadSampleError(
                f"a turn shows the pictures {list(turn.pictures)}, which do not follow one another "
                "in the sample; repeat a picture there that is shown in other company"
            )
        prompt = tokenizer.turn(turn.prompt, images=len(shown), first=number == 0)
        added = [*prompt, *tokenizer.encode(turn.answer), END]
        # One more token than fits: the last one is only ever a label.
        if number > 0 and len(tokens) + len(added) > row_tokens + 1:
            left_out = True
            break
        images += [(len(tokens) + n, Span(shown[0], slot + 1)) for n, slot in enumerate(shown)]
        answers.append(Span(len(tokens) + len(prompt), len(tokens) + len(added)))
        tokens += added
    cut = left_out or len(tokens) > row_tokens + 1
    return PackedText(tokens[: row_tokens + 1], answers, images), cut


class Layout(NamedTuple):
    """Where texts lie in rows."""

    shape: tuple[int, int]
    """Rows, at least one, and the tokens of each."""
    places: list[tuple[int, int, int]]
    """Row, first token in it and number in it of each text."""


def lay_out(
    lengths: Sequence[int], row_tokens: int, *, bucket_tokens: int | None, shared: bool
) -> Layout:
    """Where texts of so many tokens lie in rows of at most `row_tokens`; none is longer.

    bucket_tokens: rows are only as long as needed, in steps of so many tokens. shared: whether
    several texts may lie in a row.
    """
    lengths_n = np.array(lengths, np.int64)
    place = text_places if shared else _one_each
    places_3n = place(lengths_n, row_tokens)
    rows = int(places_3n[0].max(initial=0)) + 1
    # Rows need not be longer than fills them evenly, if the texts still fit in as many.
    needed = max(-(-int(lengths_n.sum()) // rows), int(lengths_n.max(initial=1)))
    step = bucket_tokens or row_tokens
    for shorter in range(needed + -needed % step, row_tokens, step):
        closer_3n = place(lengths_n, shorter)
        if closer_3n[0].max(initial=0) < rows:
            return Layout((rows, shorter), _listed(closer_3n))
    return Layout((rows, row_tokens), _listed(places_3n))


def _in_rows(lengths: Sequence[int], data: DataSettings) -> Layout:
    return lay_out(
        lengths, data.row_tokens, bucket_tokens=data.row_bucket_tokens, shared=data.pack_texts
    )


def _one_each(lengths_n: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    rows_n = np.arange(len(lengths_n))
    return np.stack((rows_n, 0 * rows_n, 0 * rows_n))


def _listed(places_3n: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    return [*zip(*places_3n.tolist(), strict=True)]


def pack(
    texts: Sequence[PackedText], pixels: Tensor, data: DataSettings, *, image_tokens: int
) -> Batch:
    """Lay texts out in rows.

    image_tokens: tokens of one image; slot i holds tokens i * image_tokens and on.
    """
    lengths = [len(text.tokens) - 1 for text in texts]
    shape, places = _in_rows(lengths, data)
    tokens = torch.full(shape, PADDING)
    labels = torch.full(shape, PADDING)
    learned = torch.zeros(shape, dtype=torch.bool)
    numbers = torch.full(shape, NO_TEXT, dtype=torch.int32)
    sources = torch.zeros(shape, dtype=torch.int32)
    ranges = torch.zeros((2, *shape), dtype=torch.int32)
    for text, (row, start, number) in zip(texts, places, strict=True):
        end = start + len(text.tokens) - 1
        place = (row, slice(start, end))
        sequence = torch.tensor(text.tokens)
        tokens[place] = sequence[:-1]
        labels[place] = sequence[1:]
        for answer in text.answers:
            # The token before the answer predicts the answer's first token.
            learned[row, start + answer.start - 1 : min(start + answer.end - 1, end)] = True
        numbers[place] = number
        sources[place] = text.source
        for first, slots in text.images:
            ranges[0, row, start + first : end] = slots.start * image_tokens
            ranges[1, row, start + first : end] = slots.end * image_tokens
    return Batch(
        tokens_bt=tokens,
        labels_bt=labels,
        learned_bt=learned,
        text_numbers_bt=numbers,
        sources_bt=sources,
        image_ranges_2bt=ranges,
        pixels=pixels,
        text_tokens=sum(lengths),
    )


def pack_pairs(
    texts: Sequence[tuple[int, list[int]]],
    pixels: Tensor,
    has_image_n: Tensor,
    masked_np: Tensor,
    data: DataSettings,
) -> PairBatch:
    """Lay the texts of pictures, each given with its slot, out in rows."""
    lengths = [len(tokens) for _, tokens in texts]
    shape, places = _in_rows(lengths, data)
    tokens_bt = torch.full(shape, PADDING)
    numbers = torch.full(shape, NO_TEXT, dtype=torch.int32)
    ends_n = torch.zeros(len(pixels), dtype=torch.int64)
    is_pair_n = torch.zeros(len(pixels), dtype=torch.bool)
    for (slot, tokens), (row, start, number) in zip(texts, places, strict=True):
        end = start + len(tokens)
        tokens_bt[row, start:end] = torch.tensor(tokens)
        numbers[row, start:end] = number
        ends_n[slot] = row * shape[1] + end - 1
        is_pair_n[slot] = True
    return PairBatch(
        tokens_bt=tokens_bt,
        text_numbers_bt=numbers,
        ends_n=ends_n,
        is_pair_n=is_pair_n,
        pixels=pixels,
        has_image_n=has_image_n,
        masked_np=masked_np,
        text_tokens=sum(lengths),
    )


def python_text_places(lengths_n: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """Row, first token in it and number in it of each text, as three rows of an array.

    Rows by first-fit decreasing: the longest first, each into the first row with room. In a row
    texts keep their order.
    """
    lengths: list[int] = lengths_n.tolist()
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
    places_3n = np.empty((3, len(lengths)), np.int64)
    for i, (row, length) in enumerate(zip(row_of, lengths, strict=True)):
        places_3n[:, i] = row, used[row], texts[row]
        used[row] += length
        texts[row] += 1
    return places_3n


try:
    _data = cast(Any, importlib.import_module("megavlm._data"))
    text_places: Callable[[NDArray[np.int64], int], NDArray[np.int64]] = _data.text_places
except (ImportError, AttributeError):  # installed without a compiler, or built from older sources
    text_places = python_text_places
