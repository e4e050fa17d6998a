"""The folders of shards that a stage takes its samples from, as one."""

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from megavlm.config.data import SourceSettings
from megavlm.data.cursor import sample_at, source_at
from megavlm.data.samples import Sample, Text
from megavlm.data.shards import ShardFolder
from megavlm.errors import BadSampleError, DataError

TASK_SAMPLES = 200
"""So many of a source's samples, evenly spaced, say which tasks it has."""


class Place(NamedTuple):
    """Where a sample lies."""

    source: int
    number: int
    """In the source's folder."""


class Sources:
    """A mixture of folders; raises DataError when one cannot be read.

    Which sample comes at which position is a function of the seed, computed and not stored.
    """

    def __init__(self, settings: Sequence[SourceSettings], seed: int) -> None:
        self._settings = settings
        self._seed = seed
        self.folders = [ShardFolder(source.folder) for source in settings]

    def __len__(self) -> int:
        return sum(len(folder) for folder in self.folders)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what decides which sample comes when, the seed apart."""
        prints = [folder.fingerprint for folder in self.folders]
        if len(prints) == 1 and not self._settings[0].tasks:
            return prints[0]
        mixed = [(p, s.parts, s.tasks) for p, s in zip(prints, self._settings, strict=True)]
        return hashlib.sha256(json.dumps(mixed).encode()).hexdigest()

    def shuffled(self, position: int) -> Place:
        """The sample at a global position of training; each source begins again when it is through.

        Each pass through a source has an order of its own.
        """
        parts = [source.parts for source in self._settings]
        source, own_position = source_at(position, parts, self._seed)
        # Each with an order of its own: two of one folder would show each sample twice in a step.
        seed = self._seed + source
        return Place(source, sample_at(own_position, len(self.folders[source]), seed))

    def in_order(self, position: int) -> Place:
        """The sample at a position when all sources are read once, one after the other."""
        for source, folder in enumerate(self.folders):
            if position < len(folder):
                return Place(source, position)
            position -= len(folder)
        raise IndexError("the sources hold fewer samples")

    def locate(self, place: Place) -> str:
        """Name of a sample for logs."""
        return self.folders[place.source].locate(place.number)

    def pictures_of(self, place: Place) -> int:
        """How many pictures a sample has, by the index alone."""
        return self.folders[place.source].pictures_of(place.number)

    def read(self, place: Place) -> Sample:
        """One sample, with the texts of the source's tasks; raises BadSampleError."""
        sample = self.folders[place.source].read(place.number)
        return replace(sample, texts=self._taken(place, sample.texts))

    def read_texts(self, place: Place) -> tuple[Text, ...]:
        """The texts of one sample alone; raises BadSampleError."""
        return self._taken(place, self.folders[place.source].read_texts(place.number))

    def readable_texts(self) -> Iterator[Text]:
        """All texts of all samples in order; samples whose texts are bad are named and left out."""
        for position in range(len(self)):
            try:
                yield from self.read_texts(self.in_order(position))
            except BadSampleError as error:
                print(f"skipped {error}", file=sys.stderr, flush=True)

    def check_tasks(self) -> None:
        """Raise DataError for a source in which none of some samples has a text of its tasks."""
        for source, (settings, folder) in enumerate(zip(self._settings, self.folders, strict=True)):
            if not settings.tasks:
                continue
            step = max(1, len(folder) // TASK_SAMPLES)
            numbers = range(0, len(folder), step)
            tasks = {task for number in numbers for task in self._tasks(Place(source, number))}
            if not tasks & set(settings.tasks):
                raise DataError(
                    f"data: none of {len(numbers)} samples of {settings.folder} has a text of "
                    f"tasks={list(settings.tasks)}; theirs are {sorted(tasks)}"
                )

    def _tasks(self, place: Place) -> set[str]:
        """Tasks of a sample's texts; none of one that cannot be read."""
        try:
            return {text.task for text in self.folders[place.source].read_texts(place.number)}
        except BadSampleError:
            return set()

    def _taken(self, place: Place, texts: tuple[Text, ...]) -> tuple[Text, ...]:
        tasks = self._settings[place.source].tasks
        return tuple(text for text in texts if not tasks or text.task in tasks)
