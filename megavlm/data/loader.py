"""Micro-batches by number: what a rank trains on is a pure function of seed and position."""

import ctypes
import math
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from threading import Thread
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from megavlm.config.objectives import is_pretraining
from megavlm.config.run import RunSettings, samples_per_micro_batch
from megavlm.data.augment import rand_augment
from megavlm.data.balance import deal, deal_by_length, within
from megavlm.data.collate import Collate, Drawn
from megavlm.data.image import (
    CROP_ASPECTS,
    decode_for_crop,
    random_resized_crop,
    read_square,
    to_uint8_tensor,
)
from megavlm.data.packing import Batch, PairBatch
from megavlm.data.samples import MAX_PICTURES
from megavlm.data.shards import SampleSizes
from megavlm.data.sources import Place, Sources, id_of
from megavlm.data.tokenizer import Tokenizer
from megavlm.errors import BadSampleError

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
AUGMENT_FILL = (255, 255, 255)  # what a shear or a rotation uncovers


class Share(NamedTuple):
    """Which part of each micro-batch is ours."""

    rank: int
    """Which copy of the model this is."""
    ranks: int
    """Copies of the model."""


def most_pictures(run: RunSettings) -> int:
    """Of a sample. Pre-training looks at the first one; the others are not decoded."""
    return 1 if is_pretraining(run.objectives) else MAX_PICTURES


class _Cell(NamedTuple):
    """What a rank has in a micro-batch."""

    positions: list[int]
    left_out: list[int]
    """Positions whose pictures find no room in it."""


class _Dealt(NamedTuple):
    """Samples that are trained on together, or measured."""

    step: int
    cells: list[_Cell]
    """One for each micro-batch and rank."""
    slots: int
    """Of images, in every cell."""


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
        self._pictures = most_pictures(run)
        self._dealt: _Dealt | None = None

    def __getitem__(self, number: int) -> Batch | PairBatch:
        """The micro-batch; unusable samples leave their slot empty and are named in it."""
        (positions, left_out), slots = self._cell(number)
        drawn: list[Drawn] = []
        left_places = self._places(left_out)
        skipped = [self._without_room(place) for place in left_places]
        places = self._places(positions)
        contents = self.sources.fetch(places)
        for position, place, content in zip(positions, places, contents, strict=True):
            try:
                drawn.append(self._draw(place, content, position))
            except BadSampleError as error:
                skipped.append(f"{self.sources.locate(place)}: {error}")
        batch = self.collate(drawn, self.tokenizer, self.run, slots)
        ids = tuple(id_of(place) for place in (*places, *left_places))
        return replace(batch, skipped=(*skipped, *batch.skipped), sample_ids=ids)

    def count(self) -> int:
        """Micro-batches that hold every sample once; the same on all ranks."""
        return -(-len(self.sources) // (self.samples * self.share.ranks))

    def _cell(self, number: int) -> tuple[_Cell, int]:
        """What we have in a micro-batch, and how many image slots it has."""
        if self.training:
            step, micro_batch = divmod(number, self.run.train.micro_batches)
            dealt = self._deal_step(step)
            return dealt.cells[micro_batch * self.share.ranks + self.share.rank], dealt.slots
        first = number * self.share.ranks * self.samples
        end = min(first + self.share.ranks * self.samples, len(self.sources))
        images = self._sizes(range(first, end)).pictures_n.tolist()
        starts = range(0, self.share.ranks * self.samples, self.samples)
        cells = [[*range(len(images))[start : start + self.samples]] for start in starts]
        # All are measured, so that the loss is that of the same samples on any number of ranks.
        dealt = self._fitted(number, cells, range(first, end), images, most=None)
        return dealt.cells[self.share.rank], dealt.slots

    def _deal_step(self, step: int) -> _Dealt:
        """What every rank has in every micro-batch of a step."""
        if self._dealt is None or self._dealt.step != step:
            size = self.run.train.samples_per_step
            first = self.first_sample + step * size
            positions = range(first, first + size)
            images, text_bytes = (sizes_n.tolist() for sizes_n in self._sizes(positions))
            micro_batches, ranks = self.run.train.micro_batches, self.share.ranks
            if self.run.data.pack_texts:
                cells = deal(images, text_bytes, micro_batches * ranks)
            else:
                cells = deal_by_length(images, text_bytes, micro_batches, ranks)
            most = self.run.data.micro_batch_images
            self._dealt = self._fitted(step, cells, positions, images, most)
        return self._dealt

    def _fitted(
        self,
        step: int,
        cells: list[list[int]],
        positions: Sequence[int],
        images: list[int],
        most: int | None,
    ) -> _Dealt:
        """Leave out what exceeds the image slots that are allowed, if they are limited.

        cells: numbers of positions. images: of each position.
        """
        most = most or sum(images)
        fitted: list[_Cell] = []
        slots = 1  # the encoder runs whatever there is
        for cell in cells:
            kept = {cell[i] for i in within([images[i] for i in cell], most)}
            slots = max(slots, sum(images[i] for i in kept))
            left_out = [positions[i] for i in cell if i not in kept]
            fitted.append(_Cell([positions[i] for i in cell if i in kept], left_out))
        return _Dealt(step, fitted, slots)

    def _without_room(self, place: Place) -> str:
        return (
            f"{self.sources.locate(place)}: its pictures find no room in a micro-batch of "
            f"data.micro_batch_images={self.run.data.micro_batch_images}"
        )

    def _sizes(self, positions: Sequence[int]) -> SampleSizes:
        """Of samples at positions, by the index alone; pictures that are not used do not count."""
        sizes = self.sources.sizes_of(self._places(positions))
        return sizes._replace(pictures_n=np.minimum(sizes.pictures_n, self._pictures))

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
        name = self.sources.name_of(place, sample.key)
        return Drawn(name, pictures, texts, generator, place.source)

    def _picture(self, encoded: bytes, key: str, generator: np.random.Generator) -> Tensor:
        """Decoded and, in training, augmented: uint8 (3, side, side)."""
        side = self.run.model.encoder.image_pixels
        augment = self.run.data.augment
        if not self.training:
            return read_square(encoded, key, side)
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


def load(
    micro_batches: MicroBatches, numbers: Iterable[int], workers: int
) -> Iterator[Batch | PairBatch]:
    """The numbered micro-batches in order, prepared ahead by worker processes."""
    loaded: Iterable[Batch | PairBatch] = DataLoader(
        micro_batches,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        collate_fn=_to_arrays,  # pyright: ignore[reportArgumentType] (it gets a whole batch)
        worker_init_fn=_heed_its_rank_alone,
    )
    return map(_to_tensors, loaded)


def _heed_its_rank_alone(_: int) -> None:
    """Have a worker end when its rank says so, or dies.

    Launchers signal all processes of a rank, which still needs its workers to finish a step. And
    workers hold what their rank had open: until they end, others do not see that it is gone.
    """
    if sys.platform == "linux":
        rank = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != rank:
            os._exit(1)
    signals = {signal.SIGTERM, signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    def watch() -> None:
        while signal.sigwaitinfo(signals).si_pid != os.getppid():
            pass
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def _to_arrays(batch: Batch | PairBatch) -> Batch | PairBatch:
    """For the way from a worker, on which each tensor takes a file and a connection of its own.

    Only the pixels are large enough to be worth them.
    """
    tensors = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return replace(batch, **{name: t.numpy() for name, t in tensors.items() if name != "pixels"})


def _to_tensors(batch: Batch | PairBatch) -> Batch | PairBatch:
    values = vars(batch)
    arrays = [name for name, value in values.items() if isinstance(value, np.ndarray)]
    return replace(batch, **{name: torch.as_tensor(values[name]) for name in arrays})
