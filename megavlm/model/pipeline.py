"""What pipeline stages send each other: hidden states of the text, then the image states.

The image states ride along unchanged, so that every stage has them for its cross-attention layers,
and their gradients come back to the encoder by the same way. megatron-core's schedules send one
tensor, so both lie end to end in it.

Letters in shapes: t text positions, b rows, v image tokens, w width, all of them this rank's part
under sequence parallelism.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from megavlm.config.engines import MegatronSettings
from megavlm.data.packing import NO_TEXT, Batch


def join(text_tbw: Tensor, image_v1w: Tensor) -> Tensor:
    """Returns (t * b + v, 1, w)."""
    return torch.cat([text_tbw.flatten(0, 1).unsqueeze(1), image_v1w])


def split(joined: Tensor, text_positions: int, rows: int) -> tuple[Tensor, Tensor]:
    """Undo `join`; returns (t, b, w) and (v, 1, w)."""
    text = text_positions * rows
    return joined[:text].view(text_positions, rows, -1), joined[text:]


def joined_tokens(batch: Batch, tokens_per_image: int, parallel: MegatronSettings) -> int:
    """Tokens of the tensor that stages send for a batch, over all tensor-parallel ranks."""
    image_tokens = len(batch.pixels) * tokens_per_image
    return batch.tokens_bt.numel() + padded(image_tokens, parallel)


def padded(image_tokens: int, parallel: MegatronSettings) -> int:
    """Image tokens, rounded up to what sequence parallelism can split."""
    return image_tokens + -image_tokens % parallel.token_shards


def same_shapes(batches: Sequence[Batch]) -> list[Batch]:
    """Pad micro-batches with empty rows, places and images until all have the same shapes.

    The schedules want one shape for all micro-batches of a step.
    """
    rows, length = (max(sizes) for sizes in zip(*(b.tokens_bt.shape for b in batches), strict=True))
    images = max(len(batch.pixels) for batch in batches)
    return [_grown(batch, rows, length, images) for batch in batches]


def blank(batch: Batch) -> Batch:
    """A batch of the same shapes from which nothing is learned."""
    return replace(batch, learned_bt=torch.zeros_like(batch.learned_bt), samples=0, skipped=())


def _grown(batch: Batch, rows: int, length: int, images: int) -> Batch:
    if (rows, length, images) == (*batch.tokens_bt.shape, len(batch.pixels)):
        return batch
    has_rows, has_length = batch.tokens_bt.shape
    below = (0, length - has_length, 0, rows - has_rows)
    return replace(
        batch,
        tokens_bt=functional.pad(batch.tokens_bt, below),
        labels_bt=functional.pad(batch.labels_bt, below),
        learned_bt=functional.pad(batch.learned_bt, below),
        text_numbers_bt=functional.pad(batch.text_numbers_bt, below, value=NO_TEXT),
        sources_bt=functional.pad(batch.sources_bt, below),
        image_ranges_2bt=functional.pad(batch.image_ranges_2bt, below),
        pixels=functional.pad(batch.pixels, (0, 0) * 3 + (0, images - len(batch.pixels))),
    )
