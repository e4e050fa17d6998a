"""Micro-batches by number: what a rank trains on is a pure function of seed and position."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from megavlm.config.run import RunSettings, samples_per_micro_batch
from megavlm.data.augment import rand_augment
from megavlm.data.balance import deal
from megavlm.data.cursor import sample_at
from megavlm.data.image import (
    CROP_ASPECTS,
    decode_picture,
    fit_square,
    random_resized_crop,
    to_uint8_tensor,
)
from megavlm.data.packing import Batch, PackedText, pack, tokenize
from megavlm.data.samples import Text
from megavlm.data.shards import ShardFolder
from megavlm.data.tokenizer import Tokenizer
from megavlm.errors import BadSampleError

AUGMENT_FILL = (255, 255, 255)  # what a shear or a rotation uncovers


class Share(NamedTuple):
    """Which part of each micro-batch is ours."""

    rank: int
    """Which copy of the model this is."""
    ranks: int
    """Copies of the model."""


class MicroBatches(Dataset[Batch]):
    """Micro-batch i of this share, for any i, in any order.

    Training step s holds the samples at global positions from s * samples_per_step on, whatever the
    number of ranks. They are dealt to its micro-batches and ranks so that each has as many images
    as the next; all of them have the same number of image slots. Held-out samples come in order.
    """

    def __init__(
        self,
        folder: ShardFolder,
        tokenizer: Tokenizer,
        run: RunSettings,
        share: Share,
        *,
        training: bool,
    ) -> None:
        self.folder = folder
        self.tokenizer = tokenizer
        self.run = run
        self.share = share
        self.training = training
        """Whether to shuffle, draw texts and augment; otherwise samples come whole and in order."""
        self.samples = samples_per_micro_batch(run.train, share.ranks)
        self._dealt: tuple[int, list[list[int]], int] | None = None

    def __getitem__(self, number: int) -> Batch:
        """The micro-batch; unusable samples leave their slot empty and are named in it."""
        positions, slots = self._positions(number)
        row_tokens = self.run.data.row_tokens
        side = self.run.model.encoder.image_pixels
        pixels = torch.zeros((slots, 3, side, side), dtype=torch.uint8)
        packed: list[PackedText] = []
        skipped: list[str] = []
        samples = truncated_texts = images = 0
        for position in positions:
            sample_number = self._sample_number(position)
            try:
                picture, texts = self._load(sample_number, position)
            except BadSampleError as error:
                skipped.append(f"{self.folder.locate(sample_number)}: {error}")
                continue
            samples += 1
            image = None
            if picture is not None:
                image = images
                pixels[image] = picture
                images += 1
            for text in texts:
                tokens, cut = tokenize(self.tokenizer, text.prompt, text.answer, image, row_tokens)
                packed.append(tokens)
                truncated_texts += cut
        batch = pack(
            packed,
            pixels,
            row_tokens=row_tokens,
            image_tokens=self.run.model.encoder.tokens,
        )
        return replace(
            batch, samples=samples, skipped=tuple(skipped), truncated_texts=truncated_texts
        )

    def count(self) -> int:
        """Micro-batches that hold every sample once; the same on all ranks."""
        return -(-len(self.folder) // (self.samples * self.share.ranks))

    def _positions(self, number: int) -> tuple[Sequence[int], int]:
        """Global positions of a micro-batch's samples, and how many image slots it has."""
        if not self.training:
            first = (number * self.share.ranks + self.share.rank) * self.samples
            return range(first, min(first + self.samples, len(self.folder))), self.samples
        step, micro_batch = divmod(number, self.run.train.micro_batches)
        cells, slots = self._deal_step(step)
        return cells[micro_batch * self.share.ranks + self.share.rank], slots

    def _deal_step(self, step: int) -> tuple[list[list[int]], int]:
        """Positions of every micro-batch of every share in a step, and their image slots."""
        if self._dealt is None or self._dealt[0] != step:
            size = self.run.train.samples_per_step
            positions = range(step * size, (step + 1) * size)
            images = [int(self.folder.has_picture(self._sample_number(p))) for p in positions]
            cells = deal(images, self.run.train.micro_batches * self.share.ranks)
            slots = max(1, *(sum(images[i] for i in cell) for cell in cells))
            self._dealt = (step, [[positions[i] for i in cell] for cell in cells], slots)
        return self._dealt[1:]

    def _sample_number(self, position: int) -> int:
        if not self.training:
            return position
        return sample_at(position, len(self.folder), self.run.seed)

    def _load(self, sample_number: int, position: int) -> tuple[Tensor | None, tuple[Text, ...]]:
        """The picture as uint8 (3, side, side), and the texts drawn for it."""
        sample = self.folder.read(sample_number)
        # Seeded by the position alone, so that a resumed run draws the same.
        generator = np.random.default_rng((self.run.seed, position))
        texts = sample.texts
        if self.training:
            drawn = min(self.run.data.texts_per_sample, len(texts))
            chosen: list[int] = generator.choice(len(texts), drawn, replace=False).tolist()
            texts = tuple(texts[i] for i in chosen)
        if sample.picture is None:
            return None, texts
        side = self.run.model.encoder.image_pixels
        augment = self.run.data.augment
        if not self.training:
            image = decode_picture(sample.picture, sample.key, side)
            return to_uint8_tensor(fit_square(image, side)), texts
        # A crop is enlarged to the square, so its source must be larger than the square.
        source = math.ceil(side / math.sqrt(augment.minimum_area * min(CROP_ASPECTS)))
        image = decode_picture(sample.picture, sample.key, source)
        image = random_resized_crop(image, side, generator, augment.minimum_area)
        image = rand_augment(
            image,
            generator,
            operations=augment.operations,
            magnitude=augment.magnitude,
            colour_operations=augment.colour_operations,
            fill=AUGMENT_FILL,
        )
        return to_uint8_tensor(image), texts


def load(micro_batches: MicroBatches, numbers: Iterable[int], workers: int) -> Iterator[Batch]:
    """The numbered micro-batches in order, prepared ahead by worker processes."""
    return iter(
        DataLoader(
            micro_batches,
            batch_size=None,
            sampler=numbers,
            num_workers=workers,
            collate_fn=_unchanged,  # pyright: ignore[reportArgumentType] (batches come as they are)
        )
    )


def _unchanged(batch: Batch) -> Batch:
    return batch
