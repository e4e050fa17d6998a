"""The folders of shards that a stage takes its samples from, as one."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from megavlm.config.data import SourceSettings
from megavlm.config.run import RunSettings
from megavlm.data.cursor import Numbers, Shuffle, joined_ranges, passed_over, sources_at
from megavlm.data.samples import Sample, Text
from megavlm.data.shards import SampleSizes, ShardFolder
from megavlm.data.texts import evenly_spaced
from megavlm.errors import BadSampleError, DataError
from megavlm.redact import without_secrets

NUMBER_BITS = 48
"""Of a sample's id, for its number in its source."""
TASK_SAMPLES = 200
"""At most so many of a source's samples, evenly spaced, say which tasks it has."""


class Place(NamedTuple):
    """Where a sample lies."""

    source: int
    number: int
    """In the source's folder."""


def id_of(place: Place) -> int:
    """Its source and number in one."""
    return place.source << NUMBER_BITS | place.number


def places_of(ids_n: Numbers) -> tuple[Numbers, Numbers]:
    """Sources and numbers; undoes `id_of`."""
    return ids_n >> NUMBER_BITS, ids_n & (1 << NUMBER_BITS) - 1


def training_sources(run: RunSettings, left_out: Sequence[tuple[int, int]] = ()) -> "Sources":
    """What a stage trains on; raises DataError when one cannot be read.

    left_out: positions that rollbacks have left out, beside those of the settings.
    """
    return Sources(
        run.data.train,
        run.seed,
        group_shards=run.data.shuffle_shards,
        skip_samples=joined_ranges([*run.data.skip_samples, *left_out]),
    )


def source_names(settings: Sequence[SourceSettings]) -> list[str]:
    """Short names of sources, each another, of letters, digits and `_`.

    As much of each folder's end as tells it from all others; else its place among them follows.
    """
    folders = [without_secrets(source.folder).split("/") for source in settings]
    paths = [[re.sub(r"[^A-Za-z0-9]+", "_", f).strip("_") for f in path if f] for path in folders]
    names: list[str] = []
    for length in range(1, max(map(len, paths), default=0) + 1):
        names = ["_".join(path[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{name}_{place}" for place, name in enumerate(names)]


class Sources:
    """A mixture of folders; raises DataError when one cannot be read.

    Which sample comes at which position is a function of the seed, computed and not stored.
    """

    def __init__(
        self,
        settings: Sequence[SourceSettings],
        seed: int,
        *,
        group_shards: int = 1,
        skip_samples: Sequence[tuple[int, int]] = (),
    ) -> None:
        """group_shards: whose samples are mixed in training. skip_samples: positions left out."""
        self._settings = settings
        self._seed = seed
        self._group_shards = group_shards
        self._skip_samples = skip_samples
        self.folders = [ShardFolder(source.folder, group_shards) for source in settings]
        # Each with an order of its own: two of one folder would show each sample twice in a step.
        self._shuffles = [
            Shuffle(folder.shard_samples, group_shards, seed + source)
            for source, folder in enumerate(self.folders)
        ]

    def __len__(self) -> int:
        return sum(len(folder) for folder in self.folders)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what decides which sample comes when, the seed apart."""
        mixed = [
            (folder.fingerprint, source.parts, source.tasks)
            for folder, source in zip(self.folders, self._settings, strict=True)
        ]
        return hashlib.sha256(json.dumps([self._group_shards, mixed]).encode()).hexdigest()

    def shuffled(self, positions: Numbers) -> list[Place]:
        """The samples at global positions of training; each source begins again when it is through.

        Each pass through a source has an order of its own.
        """
        positions = self.position(positions)
        parts = [source.parts for source in self._settings]
        sources, own_positions = sources_at(positions, parts, self._seed)
        numbers = np.empty_like(positions)
        for source, shuffle in enumerate(self._shuffles):
            numbers[sources == source] = shuffle.numbers(own_positions[sources == source])
        return [Place(*place) for place in zip(sources.tolist(), numbers.tolist(), strict=True)]

    def position(self, samples: Numbers) -> Numbers:
        """Positions in the order of the data, when so many samples were trained on before."""
        return passed_over(samples, self._skip_samples)

    def in_order(self, position: int) -> Place:
        """The sample at a position when all sources are read once, one after the other."""
        for source, folder in enumerate(self.folders):
            if position < len(folder):
                return Place(source, position)
            position -= len(folder)
        raise IndexError("the sources hold fewer samples")

    def locate(self, place: Place) -> str:
        """Name of a sample for logs, read from its shard."""
        return self.folders[place.source].locate(place.number)

    def name_of(self, place: Place, key: str) -> str:
        """The same for a sample whose key is known."""
        return self.folders[place.source].name_of(place.number, key)

    def sizes_of(self, places: Sequence[Place]) -> SampleSizes:
        """How large samples are, by the index alone."""
        sizes = SampleSizes(np.zeros(len(places), np.int64), np.zeros(len(places), np.int64))
        for of_source, folder in self._by_source(places):
            own = folder.sizes_of(np.array([places[i].number for i in of_source]))
            for all_n, own_n in zip(sizes, own, strict=True):
                all_n[of_source] = own_n
        return sizes

    def fetch(self, places: Sequence[Place]) -> list[bytes]:
        """What `parse` makes samples of; those of an object store come at once."""
        out = [b""] * len(places)
        for of_source, folder in self._by_source(places):
            contents = folder.fetch([places[i].number for i in of_source])
            for i, content in zip(of_source, contents, strict=True):
                out[i] = content
        return out

    def parse(self, place: Place, content: bytes) -> Sample:
        """One sample, with the texts of the source's tasks; raises BadSampleError."""
        sample = self.folders[place.source].parse(place.number, content)
        return replace(sample, texts=self._taken(place, sample.texts))

    def read(self, place: Place) -> Sample:
        """As `parse`."""
        return self.parse(place, self.fetch([place])[0])

    def read_texts(self, place: Place) -> tuple[Text, ...]:
        """The texts of one sample alone; raises BadSampleError."""
        return self._taken(place, self.folders[place.source].read_texts(place.number))

    def check(self) -> None:
        """Raise DataError unless all shards are there and whole."""
        for folder in self.folders:
            folder.check_sizes()

    def check_tasks(self) -> None:
        """Raise DataError for a source in which none of some samples has a text of its tasks."""
        for source, (settings, folder) in enumerate(zip(self._settings, self.folders, strict=True)):
            if not settings.tasks:
                continue
            numbers = evenly_spaced(len(folder), TASK_SAMPLES)
            tasks = {task for number in numbers for task in self._tasks(Place(source, number))}
            if not tasks & set(settings.tasks):
                raise DataError(
                    f"data: none of {len(numbers)} samples of {settings.folder} has a text of "
                    f"tasks={list(settings.tasks)}; theirs are {sorted(tasks)}"
                )

    def _by_source(self, places: Sequence[Place]) -> Iterator[tuple[list[int], ShardFolder]]:
        """Which of the places are in which folder."""
        for source, folder in enumerate(self.folders):
            of_source = [i for i, place in enumerate(places) if place.source == source]
            if of_source:
                yield of_source, folder

    def _tasks(self, place: Place) -> set[str]:
        """Tasks of a sample's texts; none of one that cannot be read."""
        try:
            return {text.task for text in self.folders[place.source].read_texts(place.number)}
        except BadSampleError:
            return set()

    def _taken(self, place: Place, texts: tuple[Text, ...]) -> tuple[Text, ...]:
        settings = self._settings[place.source]
        tasks, prompts = settings.tasks, settings.caption_prompts
        if prompts:
            prompt = prompts[place.number % len(prompts)]
            texts = tuple(text.with_prompt(prompt) if text.is_bare else text for text in texts)
        return tuple(text for text in texts if not tasks or text.task in tasks)
