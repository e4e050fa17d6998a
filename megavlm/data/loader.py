"""Micro-batches by number: what a rank trains on is a pure function of seed and position."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from megavlm.config.objectives import is_pretraining
from megavlm.config.run import RunSettings, samples_per_micro_batch
from megavlm.data.augment import rand_augment
from megavlm.data.balance import deal
from megavlm.data.collate import Collate, Drawn
from megavlm.data.image import (
    CROP_ASPECTS,
    decode_for_crop,
    decode_picture,
    fit_square,
    random_resized_crop,
    to_uint8_tensor,
)
from megavlm.data.packing import Batch, PairBatch
from megavlm.data.samples import MAX_PICTURES
from megavlm.data.sources import Place, Sources
from megavlm.data.tokenizer import Tokenizer
from megavlm.errors import BadSampleError

AUGMENT_FILL = (255, 255, 255)  # what a shear or a rotation uncovers


class Share(NamedTuple):
    """Which part of each micro-batch is ours."""

    rank: int
    """Which copy of the model this is."""
    ranks: int
    """Copies of the model."""


class MicroBatches(Dataset[Batch | PairBatch]):
    """Micro-batch i of this share, for any i, in any order.

    Training step s holds the samples at global positions from first_sample + s * samples_per_step
    on, whatever the number of ranks. They are dealt to its micro-batches and ranks so that each has
    as many images as the next; all of them have the same number of image slots. Held-out samples
    come in order.
    """

    def __init__(
        self,
        sources: Sources,
        tokenizer: Tokenizer,
        run: RunSettings,
        share: Share,
        collate: Collate,
        *,
        training: bool,
        first_sample: int = 0,
    ) -> None:
        self.sources = sources
        self.tokenizer = tokenizer
        self.run = run
        self.share = share
        self.collate = collate
        self.training = training
        """Whether to shuffle, draw texts and augment; otherwise samples come whole and in order."""
        self.first_sample = first_sample
        """What earlier stages have drawn, so that a new one does not begin with the same again."""
        self.samples = samples_per_micro_batch(run.train, share.ranks)
        # Pre-training looks at the first picture of a sample; the others are not decoded.
        self._pictures = 1 if is_pretraining(run.objectives) else MAX_PICTURES
        self._dealt: tuple[int, list[list[int]], int] | None = None

    def __getitem__(self, number: int) -> Batch | PairBatch:
        """The micro-batch; unusable samples leave their slot empty and are named in it."""
        positions, slots = self._positions(number)
        drawn: list[Drawn] = []
        skipped: list[str] = []
        places = self._places(positions)
        contents = self.sources.fetch(places)
        for position, place, content in zip(positions, places, contents, strict=True):
            try:
                drawn.append(self._draw(place, content, position))
            except BadSampleError as error:
                skipped.append(f"{self.sources.locate(place)}: {error}")
        batch = self.collate(drawn, self.tokenizer, self.run, slots)
        return replace(batch, skipped=(*skipped, *batch.skipped))

    def count(self) -> int:
        """Micro-batches that hold every sample once; the same on all ranks."""
        return -(-len(self.sources) // (self.samples * self.share.ranks))

    def _positions(self, number: int) -> tuple[Sequence[int], int]:
        """Global positions of a micro-batch's samples, and how many image slots it has."""
        if self.training:
            step, micro_batch = divmod(number, self.run.train.micro_batches)
            cells, slots = self._deal_step(step)
            return cells[micro_batch * self.share.ranks + self.share.rank], slots
        first = number * self.share.ranks * self.samples
        starts = range(first, first + self.share.ranks * self.samples, self.samples)
        end = len(self.sources)
        by_rank = [range(min(start, end), min(start + self.samples, end)) for start in starts]
        images = [self._images(cell) for cell in by_rank]
        return by_rank[self.share.rank], _slots(images)

    def _deal_step(self, step: int) -> tuple[list[list[int]], int]:
        """Positions of every micro-batch of every share in a step, and their image slots."""
        if self._dealt is None or self._dealt[0] != step:
            size = self.run.train.samples_per_step
            first = self.first_sample + step * size
            positions = range(first, first + size)
            images = self._images(positions)
            dealt = deal(images, self.run.train.micro_batches * self.share.ranks)
            cells = [[positions[i] for i in cell] for cell in dealt]
            self._dealt = (step, cells, _slots([[images[i] for i in cell] for cell in dealt]))
        return self._dealt[1:]

    def _images(self, positions: Sequence[int]) -> list[int]:
        """Pictures that are used of the samples at positions, by the index alone."""
        pictures = self.sources.pictures_of(self._places(positions))
        return [min(self._pictures, count) for count in pictures]

    def _places(self, positions: Sequence[int]) -> list[Place]:
        if self.training:
            return self.sources.shuffled(np.array(positions, np.int64))
        return [self.sources.in_order(position) for position in positions]

    def _draw(self, place: Place, content: bytes, position: int) -> Drawn:
        """The sample, and what is random of it."""
        sample = self.sources.parse(place, content)
        # Seeded by the position alone, so that a resumed run draws the same.
        generator = np.random.default_rng((self.run.seed, position))
        texts = sample.texts
        if self.training:
            drawn = min(self.run.data.texts_per_sample, len(texts))
            chosen: list[int] = []
            if texts:
                chosen = generator.choice(len(texts), drawn, replace=False).tolist()
            texts = tuple(texts[i] for i in chosen)
        used = sample.pictures[: self._pictures]
        pictures = tuple(self._picture(picture, sample.key, generator) for picture in used)
        return Drawn(self.sources.name_of(place, sample.key), pictures, texts, generator)

    def _picture(self, encoded: bytes, key: str, generator: np.random.Generator) -> Tensor:
        """Decoded and, in training, augmented: uint8 (3, side, side)."""
        side = self.run.model.encoder.image_pixels
        augment = self.run.data.augment
        if not self.training:
            return to_uint8_tensor(fit_square(decode_picture(encoded, key, side), side))
        # So large that no side of a crop is enlarged to the square.
        source = math.ceil(side / math.sqrt(augment.minimum_area * min(CROP_ASPECTS)))
        picture = decode_for_crop(encoded, key, source)
        image = random_resized_crop(picture, side, generator, augment.minimum_area)
        image = rand_augment(
            image,
            generator,
            operations=augment.operations,
            magnitude=augment.magnitude,
            colour_operations=augment.colour_operations,
            fill=AUGMENT_FILL,
        )
        return to_uint8_tensor(image)


def _slots(images: Iterable[Iterable[int]]) -> int:
    """Image slots that micro-batches whose samples have so many pictures need alike."""
    return max(1, *map(sum, images))


def load(
    micro_batches: MicroBatches, numbers: Iterable[int], workers: int
) -> Iterator[Batch | PairBatch]:
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


def _unchanged(batch: Batch | PairBatch) -> Batch | PairBatch:
    return batch
