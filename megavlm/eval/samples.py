"""Samples as evaluation reads them: in order, whole, not augmented, each rank its share."""

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from megavlm.config.data import SourceSettings
from megavlm.config.run import RunSettings
from megavlm.data.image import read_square
from megavlm.data.samples import Text
from megavlm.data.sources import Sources
from megavlm.dist import groups
from megavlm.errors import BadSampleError
from megavlm.terminal import printable

BATCH_SIZE = 64

Read = TypeVar("Read")


class Shown(NamedTuple):
    """A sample."""

    sample: int
    """Its number in the split."""
    pictures: tuple[Tensor, ...]
    """uint8 (3, side, side)."""
    texts: tuple[Text, ...]

    def answer_of(self, kind: str) -> str | None:
        """The answer of the first text of a kind, if there is one."""
        return next((text.answer for text in self.texts if text.kind == kind), None)

    def generator(self) -> np.random.Generator:
        """For what else is random of it."""
        return np.random.default_rng(self.sample)


class Split:
    """The first samples of some sources; raises DataError when one cannot be read."""

    def __init__(
        self, name: str, sources: Sequence[SourceSettings], run: RunSettings, limit: int | None
    ) -> None:
        """limit: at most so many samples; None: all."""
        self.name = name
        """For the table."""
        self._sources = Sources(sources, run.seed)
        self._side = run.model.encoder.image_pixels
        whole = len(self._sources)
        self._samples = whole if limit is None else min(limit, whole)

    def __len__(self) -> int:
        return self._samples

    def __str__(self) -> str:
        return f"the {len(self):,} samples of split {self.name}"

    def share(self) -> Iterator[Shown]:
        """This rank's samples, which are every so many; bad ones are named and left out."""
        yield from self._share(self.show)

    def share_of_texts(self) -> Iterator[Text]:
        """The texts of this rank's samples; no picture is read."""
        texts = self._share(lambda n: self._sources.read_texts(self._sources.in_order(n)))
        yield from itertools.chain.from_iterable(texts)

    def _share(self, read: Callable[[int], Read]) -> Iterator[Read]:
        for number in range(groups.rank(), len(self), groups.world_size()):
            try:
                found = read(number)
            except BadSampleError as error:
                place = self._sources.locate(self._sources.in_order(number))
                print(f"skipped {place}: {error}", file=sys.stderr, flush=True)
                continue
            yield found

    def show(self, number: int) -> Shown:
        """One sample; raises BadSampleError when a picture or a text of it is bad."""
        sample = self._sources.read(self._sources.in_order(number))
        pictures = tuple(read_square(p, sample.key, self._side) for p in sample.pictures)
        return Shown(number, pictures, sample.texts)


def batched(samples: Iterable[Shown]) -> Iterator[list[Shown]]:
    """So many at a time as go through a model together."""
    samples = iter(samples)
    while some := list(itertools.islice(samples, BATCH_SIZE)):
        yield some


def joined(
    samples: list[int], texts: list[str], features: Sequence[Sequence[Tensor]]
) -> tuple[list[int], list[str], list[Tensor]]:
    """What all ranks have of their samples, in the samples' order; collective.

    features: any number of kinds, each in parts, which are joined.
    """
    # Joined first: a view would take its whole batch along when it travels.
    own = samples, texts, [torch.cat([torch.empty(0), *parts]) for parts in features]
    shares = groups.from_all_ranks(own)
    all_samples = [number for share in shares for number in share[0]]
    all_texts = [text for share in shares for text in share[1]]
    order = sorted(range(len(all_samples)), key=all_samples.__getitem__)
    kinds = zip(*(share[2] for share in shares), strict=True)
    return (
        [all_samples[i] for i in order],
        [all_texts[i] for i in order],
        [torch.cat(parts)[order] for parts in kinds],
    )


def tell(line: str) -> None:
    """Print a line for the user, once for all ranks."""
    if groups.rank() == 0:
        print(printable(line), file=sys.stderr, flush=True)


@contextmanager
def progress(what: str, items: int, *, show: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar of the first rank's items; what it gives hears how many more are done."""
    hide = not show or groups.rank() > 0
    with Progress(console=Console(stderr=True), disable=hide) as bar:
        task = bar.add_task(what, total=items)
        yield lambda done: bar.advance(task, done)
