"""What lies in a folder of shards: counts of all samples by the index, a closer look at some."""

import io
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np
from PIL import Image

from megavlm.config.data import SourceSettings
from megavlm.config.objectives import is_pretraining
from megavlm.config.plan import Plan
from megavlm.config.run import samples_per_micro_batch
from megavlm.data.image import FORMATS, MAX_PICTURE_PIXELS
from megavlm.data.index import (
    CAPTION,
    JSON,
    PICTURE,
    ShardSize,
    members_per_sample,
    read_index,
    read_manifest,
)
from megavlm.data.packing import lay_out, tokenize
from megavlm.data.samples import Sample, Text
from megavlm.data.shards import ShardFolder
from megavlm.data.texts import evenly_spaced
from megavlm.data.tokenizer import Tokenizer
from megavlm.errors import BadSampleError
from megavlm.files.folder import Folder
from megavlm.terminal import with_progress

SAMPLES_AT_ONCE = 64
SHARDS_AT_ONCE = 16
SHEET_PICTURES = 60
STANDARD_ROWS = (512, 1_024, 2_048)
STANDARD_MICRO_BATCHES = (8, 32, 128)
MOST_NAMES = 20
"""Of tasks or kinds."""
UNCUT = 10**9
"""More tokens than any text has."""
# 0, 1, 2, 3, 4, 6, 8, 12, ...: two bins for each doubling.
EDGES = [0, 1, *sorted(n for k in range(1, 40) for n in (2**k, 3 * 2 ** (k - 1)))]
ASPECT_EDGES = [0, 0.33, 0.5, 0.67, 0.75, 0.95, 1.05, 1.34, 1.5, 2, 3]


class Histogram(NamedTuple):
    """How many values lie in each bin."""

    title: str
    bins: dict[str, int]
    note: str = ""
    """Median and largest, say."""


class Row(NamedTuple):
    """How well texts fill rows of so many tokens."""

    name: str
    row_tokens: int
    filled: dict[int, float]
    """Tokens used of those in all rows, by the samples of a micro-batch."""
    cut: float
    """Share of the texts that are longer than a row."""


class Length(NamedTuple):
    """Tokens that a text takes in a row."""

    task: str
    tokens: int
    answer_tokens: int
    """Of its last answer alone, with its marks."""


class Layout(NamedTuple):
    """How a stage packs texts."""

    name: str
    row_tokens: int
    texts_per_sample: int
    only_answers: bool
    """As contrastive stages take the last answer of one text alone."""
    tasks: frozenset[str] = frozenset()
    """That it takes; none named: all."""
    bucket_tokens: int | None = None
    shared: bool = True


@dataclass
class Indexed:
    """Of a whole folder, by its index alone."""

    shards: int = 0
    samples: int = 0
    bytes: int = 0
    picture_bytes: int = 0
    without_text: int = 0
    """Samples with neither JSON nor caption."""
    pictures_per_sample: Counter[int] = field(default_factory=Counter[int])
    pictures_by_edge: Counter[int] = field(default_factory=Counter[int])
    """Pictures by the bin of EDGES that their bytes fall in."""

    def add(self, other: "Indexed") -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def without_picture(self) -> int:
        return self.pictures_per_sample[0]


class SheetPicture(NamedTuple):
    """A picture with what its sample says."""

    name: str
    encoded: bytes
    lines: list[str]


@dataclass
class Looked:
    """Of the samples that were read."""

    samples: int = 0
    texts: int = 0
    bad: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    """Names of bad samples by reason."""
    characters: list[int] = field(default_factory=list[int])
    """Of each text, all of its turns together."""
    tasks: Counter[str] = field(default_factory=Counter[str])
    kinds: Counter[str] = field(default_factory=Counter[str])
    formats: Counter[str] = field(default_factory=Counter[str])
    sizes: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    """Width and height of pictures, as they lie in the file."""
    lengths: list[list[Length]] = field(default_factory=list[list[Length]])
    """Of the texts of each good sample; none without a tokenizer."""
    sheet: list[SheetPicture] = field(default_factory=list[SheetPicture])


@dataclass(frozen=True, kw_only=True)
class FolderReport:
    """All of one folder."""

    place: str
    indexed: Indexed
    index_seconds: float
    looked: Looked
    of_index: list[Histogram]
    of_samples: list[Histogram]
    packing: list[Row]


def layouts_of(plan: Plan | None) -> list[Layout]:
    """How the stages of a plan pack texts, and for comparison rows of usual lengths."""
    layouts = [
        Layout(
            stage.name,
            stage.run.data.row_tokens,
            stage.run.data.texts_per_sample,
            is_pretraining(stage.run.objectives),
            _tasks_of(stage.run.data.train),
            stage.run.data.row_bucket_tokens,
            stage.run.data.pack_texts,
        )
        for stage in (plan.stages if plan else ())
    ]
    last = layouts[-1] if layouts else Layout("", 0, 1, False)
    return layouts + [
        last._replace(name="for comparison", row_tokens=size) for size in STANDARD_ROWS
    ]


def _tasks_of(sources: Sequence[SourceSettings]) -> frozenset[str]:
    if any(not source.tasks for source in sources):
        return frozenset()
    return frozenset(task for source in sources for task in source.tasks)


def micro_batches_of(plan: Plan | None, ranks: int) -> list[int]:
    """Samples of a plan's micro-batches, and some usual numbers."""
    stages = plan.stages if plan else ()
    own = {samples_per_micro_batch(stage.run.train, ranks) for stage in stages}
    return sorted({*own, *STANDARD_MICRO_BATCHES})


def inspect_folder(
    place: str | Path,
    *,
    samples: int,
    tokenizer: Tokenizer | None,
    layouts: Sequence[Layout],
    micro_batches: Sequence[int],
) -> FolderReport:
    """Look at a folder of shards; raises DataError where it cannot be read."""
    folder = ShardFolder(place)
    started = perf_counter()
    indexed = read_counts(place)
    seconds = perf_counter() - started
    looked = look_at(folder, evenly_spaced(len(folder), samples), tokenizer)
    return FolderReport(
        place=str(place),
        indexed=indexed,
        index_seconds=seconds,
        looked=looked,
        of_index=_histograms_of_index(indexed),
        of_samples=_histograms_of_samples(looked),
        packing=[packing_of(layout, looked, micro_batches) for layout in layouts]
        if tokenizer
        else [],
    )


def read_counts(place: str | Path) -> Indexed:
    """What the index says of all samples."""
    folder = Folder(place)
    shards = read_manifest(folder)
    total = Indexed()
    # Threads, as a store answers slowly; numpy and the disk let them run side by side.
    with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
        for part in range(0, len(shards), 64 * SHARDS_AT_ONCE):
            chosen = [*shards.items()][part : part + 64 * SHARDS_AT_ONCE]
            for counts in pool.map(partial(_counts, folder), *zip(*chosen, strict=True)):
                total.add(counts)
    return total


def _counts(folder: Folder, shard: str, size: ShardSize) -> Indexed:
    members = read_index(folder, shard, size)
    pictures, records, captions = (
        members_per_sample(members, kind, size.samples) for kind in (PICTURE, JSON, CAPTION)
    )
    sizes = np.asarray(members["size"][members["kind"] == PICTURE], np.int64)
    edges = np.bincount(np.searchsorted(EDGES, sizes, side="right") - 1)
    return Indexed(
        shards=1,
        samples=size.samples,
        bytes=size.size,
        picture_bytes=int(sizes.sum()),
        without_text=int((records + captions == 0).sum()),
        pictures_per_sample=_counter(np.bincount(pictures).tolist()),
        pictures_by_edge=_counter(edges.tolist()),
    )


def _counter(counts: Iterable[int]) -> Counter[int]:
    return Counter({value: count for value, count in enumerate(counts) if count})


def look_at(folder: ShardFolder, numbers: Sequence[int], tokenizer: Tokenizer | None) -> Looked:
    """Read samples; of their pictures the headers alone."""
    looked = Looked()
    parts = [numbers[i : i + SAMPLES_AT_ONCE] for i in range(0, len(numbers), SAMPLES_AT_ONCE)]
    for part in with_progress(parts, "samples", len(parts)):
        for number, content in zip(part, folder.fetch(part), strict=True):
            looked.samples += 1
            try:
                sample = folder.parse(number, content)
                headers = [_header(picture) for picture in sample.pictures]
                lengths = [_length(tokenizer, t, sample) for t in sample.texts if tokenizer]
            except BadSampleError as error:
                name = folder.locate(number)
                looked.bad.setdefault(_reason(str(error), name), []).append(name)
                continue
            _count_sample(looked, sample, headers, lengths)
            # One as soon as one is due, so that they are spread over all samples.
            is_due = len(looked.sheet) * len(numbers) < SHEET_PICTURES * looked.samples
            if sample.pictures and is_due:
                lines = [_words(text) for text in sample.texts]
                name = folder.name_of(number, sample.key)
                looked.sheet.append(SheetPicture(name, sample.pictures[0], lines))
    return looked


def _count_sample(
    looked: Looked,
    sample: Sample,
    headers: Sequence[tuple[str, int, int]],
    lengths: list[Length],
) -> None:
    looked.texts += len(sample.texts)
    for text in sample.texts:
        looked.characters.append(sum(len(t.prompt) + len(t.answer) for t in text.turns))
        looked.tasks[text.task] += 1
        looked.kinds[f"{text.task}, {text.kind}" if text.kind else text.task] += 1
    for name, width, height in headers:
        looked.formats[name] += 1
        looked.sizes.append((width, height))
    looked.lengths.append(lengths)


def _header(encoded: bytes) -> tuple[str, int, int]:
    """Format, width and height, without decoding; raises BadSampleError."""
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            name, (width, height) = str(image.format), image.size
    except Exception as error:  # Pillow raises whatever it stumbles over
        raise BadSampleError(f"picture cannot be read: {type(error).__name__}") from error
    if width * height > MAX_PICTURE_PIXELS:
        raise BadSampleError(f"picture is over the limit of {MAX_PICTURE_PIXELS} pixels")
    return name, width, height


def _length(tokenizer: Tokenizer, text: Text, sample: Sample) -> Length:
    packed, _ = tokenize(tokenizer, text, range(len(sample.pictures)), UNCUT)
    answer = packed.answers[-1]
    # A lone answer stands between a begin and an end symbol; its span has the end.
    return Length(text.task, len(packed.tokens) - 1, answer.end - answer.start + 1)


def _reason(message: str, name: str) -> str:
    """What is wrong, the same for all samples of which it is."""
    unnamed = re.sub(r"\s+", " ", message.replace(name, "").replace(" : ", ": "))
    return re.sub(r"\d+", "N", unnamed).strip(" :")


def _words(text: Text) -> str:
    return " / ".join(f"{turn.prompt} {turn.answer}".strip() for turn in text.turns)


def packing_of(layout: Layout, looked: Looked, micro_batches: Sequence[int]) -> Row:
    """How full rows are when the texts of the samples that were read are drawn and packed."""
    generator = np.random.default_rng(0)
    drawn: list[list[int]] = []
    for of_sample in looked.lengths:
        taken = [t for t in of_sample if not layout.tasks or t.task in layout.tasks]
        count = min(1 if layout.only_answers else layout.texts_per_sample, len(taken))
        numbers: list[int] = generator.permutation(len(taken))[:count].tolist()
        chosen = [taken[number] for number in numbers]
        drawn.append([t.answer_tokens if layout.only_answers else t.tokens for t in chosen])
    lengths = [length for of_sample in drawn for length in of_sample]
    cut = sum(length > layout.row_tokens for length in lengths) / max(1, len(lengths))
    filled: dict[int, float] = {}
    for samples in micro_batches:
        used = room = 0
        for start in range(0, len(drawn) - samples + 1, samples):
            batch = [
                min(length, layout.row_tokens)
                for of_sample in drawn[start : start + samples]
                for length in of_sample
            ]
            (rows, row_tokens), _ = lay_out(
                *(batch, layout.row_tokens),
                bucket_tokens=layout.bucket_tokens,
                shared=layout.shared,
            )
            used += sum(batch)
            room += rows * row_tokens
        if room:
            filled[samples] = used / room
    return Row(layout.name, layout.row_tokens, filled, cut)


def _histograms_of_index(indexed: Indexed) -> list[Histogram]:
    per_sample = sorted(indexed.pictures_per_sample.items())
    pictures = sum(count * number for number, count in per_sample)
    mean = indexed.picture_bytes / max(1, pictures)
    return [
        Histogram("pictures per sample", {str(number): count for number, count in per_sample}),
        Histogram(
            "picture size, bytes", _bins(EDGES, indexed.pictures_by_edge), f"mean {mean:,.0f}"
        ),
    ]


def _histograms_of_samples(looked: Looked) -> list[Histogram]:
    widths, heights = [w for w, _ in looked.sizes], [h for _, h in looked.sizes]
    aspects = [w / h for w, h in looked.sizes]
    tokens = [length.tokens for of_sample in looked.lengths for length in of_sample]
    histograms = [
        _histogram("text length, characters", looked.characters, EDGES),
        _histogram("text length, tokens with its marks", tokens, EDGES),
        _histogram("picture width, pixels", widths, EDGES),
        _histogram("picture height, pixels", heights, EDGES),
        _histogram("picture width over height", aspects, ASPECT_EDGES),
        Histogram("picture format", dict(looked.formats.most_common())),
        Histogram("texts by task", _commonest(looked.tasks)),
        Histogram("texts by task and kind", _commonest(looked.kinds)),
    ]
    return [histogram for histogram in histograms if histogram.bins]


def _histogram(title: str, values: Sequence[float], edges: Sequence[float]) -> Histogram:
    bins = Counter(bisect_right(edges, value) - 1 for value in values)
    if not values:
        return Histogram(title, {})
    low, middle, high = np.percentile(values, [1, 50, 99]).tolist()
    note = f"median {middle:,.4g}, 98 % from {low:,.4g} to {high:,.4g}, largest {max(values):,.4g}"
    return Histogram(title, _bins(edges, bins), note)


def _commonest(counts: Counter[str]) -> dict[str, int]:
    """The names that are there most often, and how many others there are."""
    shown = dict(counts.most_common(MOST_NAMES))
    others = counts.total() - sum(shown.values())
    return shown | ({f"{len(counts) - len(shown):,} others": others} if others else {})


def _bins(edges: Sequence[float], counts: Counter[int]) -> dict[str, int]:
    """Counts with their names, empty bins between them included."""
    if not counts:
        return {}
    return {_name(edges, bin): counts[bin] for bin in range(min(counts), max(counts) + 1)}


def _name(edges: Sequence[float], bin: int) -> str:
    first = _short(edges[bin])
    if bin + 1 == len(edges):
        return f"from {first}"
    if isinstance(edges[bin], float) or isinstance(edges[bin + 1], float):
        return f"{first} to {_short(edges[bin + 1])}"
    return first if edges[bin + 1] - edges[bin] == 1 else f"from {first}"


def _short(number: float) -> str:
    for unit, size in (("G", 2**30), ("M", 2**20), ("k", 2**10)):
        if number >= 10 * size or (number >= size and number % (size // 2) == 0):
            return f"{number / size:g}{unit}"
    return f"{number:g}"
