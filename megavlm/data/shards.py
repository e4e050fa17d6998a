"""WebDataset-style tar shards with an offset index, so that any sample is one read away.

A shard `name.tar` holds, for every sample, `key.json` (its texts) or `key.txt` (its caption) and,
unless it is text-only, `key.png`, `key.jpg` or `key.webp`; of several pictures `key.0.jpg`,
`key.1.jpg` and so on. Keys have no dots.
"""

import hashlib
import io
import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megavlm.data.cursor import Numbers
from megavlm.data.headers import (
    BLOCK_BYTES,
    HEADERS_BYTES,
    from_own,
    key_of,
    own_header,
    size_in,
)
from megavlm.data.index import (
    CAPTION,
    JSON,
    MANIFEST,
    PICTURE,
    Members,
    ShardSize,
    bytes_per_sample,
    index_name,
    index_tar,
    members_per_sample,
    read_index,
    read_manifest,
    samples_of,
    write_index,
    write_manifest,
)
from megavlm.data.samples import (
    CAPTION_TASK,
    MAX_PICTURES,
    Sample,
    Text,
    text,
    texts_from_json,
    texts_to_json,
)
from megavlm.errors import BadSampleError, DataError
from megavlm.files.folder import Folder
from megavlm.terminal import printable

MAX_SAMPLE_BYTES = 256 * 2**20
"""Anything larger is refused before it is read."""
OPEN_INDICES = 64
"""Of shards, at once, or two groups' if that is more; a local one is mapped, and takes little."""


def write_shards(folder: Path, samples: Iterable[Sample], shard_samples: int) -> None:
    """Write shards of so many samples, and what tells where they lie."""
    sizes: dict[str, ShardSize] = {}
    samples = iter(samples)
    while of_shard := list(islice(samples, shard_samples)):
        name = f"{len(sizes):06}.tar"
        count = write_shard(folder / name, of_shard)
        sizes[name] = ShardSize(count, os.path.getsize(folder / name))
    write_manifest(Folder(folder), sizes)


def write_shard(path: Path, samples: Iterable[Sample]) -> int:
    """Write one tar shard and its index; returns the number of samples.

    Appears under its name only once complete. Member times and owners are fixed, so equal samples
    give equal bytes.
    """
    partial = path.with_suffix(".tar.partial")
    with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            several = len(sample.pictures) > 1
            for number, picture in enumerate(sample.pictures):
                place = f"{number}." if several else ""
                _add_member(tar, f"{sample.key}.{place}{_suffix_of(picture)}", picture)
            record = json.dumps(texts_to_json(sample), ensure_ascii=False)
            _add_member(tar, f"{sample.key}.json", record.encode())
    with partial.open("rb") as file:
        members = index_tar(file)
    write_index(Folder(path.parent), path.name, members)
    partial.rename(path)
    return samples_of(members)


class SampleSizes(NamedTuple):
    """Of samples, by the index alone."""

    pictures_n: Numbers
    """0 for those with too many."""
    text_bytes_n: Numbers
    """Of the caption, or of the JSON where there is none: how long the texts are, about."""


class _OpenShard(NamedTuple):
    members: Members
    pictures_n: NDArray[np.uint8]
    text_bytes_n: NDArray[np.uint16]


class _Place(NamedTuple):
    """Where a sample lies."""

    shard: int
    members: Members
    start: int
    """Of the headers before its first member's own, which hold names that it has no room for."""
    header: int
    """Its first member's own."""
    stop: int


class ShardFolder:
    """All shards of a folder or an object store, in name order, read by sample number.

    Raises DataError when the folder, its `shards.json` or an index is missing or broken. Several
    processes may use it: each opens what it reads itself.
    """

    def __init__(self, place: str | Path, group_shards: int = 1) -> None:
        """group_shards: from which samples are read in turn; a step may end one such group."""
        self._place = str(place)
        self._most_open = max(OPEN_INDICES, 2 * group_shards)
        self._pid = 0
        folder = self._folder()
        if not folder.has(MANIFEST):
            raise DataError(_without_manifest(folder))
        shards = read_manifest(folder)
        # In arrays, which the forked workers of a loader share: of dicts each would have a copy.
        self._names = np.array([name.encode() for name in shards])
        self.shard_samples = np.array([size.samples for size in shards.values()])
        self._shard_bytes = np.array([size.size for size in shards.values()])
        self._firsts = np.cumsum([0, *self.shard_samples])
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    def __str__(self) -> str:
        return self._place

    def __len__(self) -> int:
        return int(self._firsts[-1])

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the shards' names and lengths: which sample has which number."""
        shards = [*zip(self.names(), self.shard_samples.tolist(), strict=True)]
        return hashlib.sha256(json.dumps(shards).encode()).hexdigest()

    def names(self) -> list[str]:
        """Of the shards, in order."""
        return [name.decode() for name in self._names]

    def check_sizes(self) -> None:
        """Raise DataError unless all shards and indices are there, and the shards are whole."""
        found = self._folder().sizes()
        for name, size in zip(self.names(), self._shard_bytes.tolist(), strict=True):
            if index_name(name) not in found:
                raise DataError(
                    f"shard {self._place}/{name} has no index {index_name(name)} beside it; run "
                    f"`megavlm data index {self._place}`"
                )
            if found.get(name) != size:
                has = f"has {found[name]} bytes" if name in found else "is missing"
                raise DataError(
                    f"shard {self._place}/{name} {has}, but {MANIFEST} says {size}; copy it again, "
                    f"or, if it was meant to change, run `megavlm data index {self._place}`"
                )

    def sizes_of(self, numbers: Numbers) -> SampleSizes:
        """How large samples are, by the index alone."""
        shards = np.searchsorted(self._firsts, numbers, side="right") - 1
        pictures_n, text_bytes_n = np.empty_like(numbers), np.empty_like(numbers)
        for shard in np.unique(shards).tolist():
            here = shards == shard
            of_shard, places = self._opened(shard), numbers[here] - self._firsts[shard]
            pictures_n[here] = of_shard.pictures_n[places]
            text_bytes_n[here] = of_shard.text_bytes_n[places]
        return SampleSizes(np.where(pictures_n > MAX_PICTURES, 0, pictures_n), text_bytes_n)

    def fetch(self, numbers: Sequence[int]) -> list[bytes]:
        """What `parse` makes samples of: the part of a shard that holds each of them.

        Those of an object store come at once.
        """
        places = [self._find(number) for number in numbers]
        ranges = [(place.start, place.stop) for place in places]
        # What is too large is refused when it is parsed. Of an empty range, S3 would send all.
        ranges = [(a, b if b - a <= MAX_SAMPLE_BYTES else a + BLOCK_BYTES) for a, b in ranges]
        names = [self.name(place.shard) for place in places]
        contents = zip(self._folder().read_ranges(names, ranges), places, strict=True)
        return [from_own(content, place.header - place.start) for content, place in contents]

    def parse(self, number: int, content: bytes) -> Sample:
        """One sample; raises BadSampleError when its members are not as the format says."""
        place = self._find(number)
        members = place.members
        self._check_size(number, place.stop - place.start)
        start = place.header - own_header(content)
        if len(content) < place.stop - start:
            raise BadSampleError(
                f"sample {self.locate(number)} is cut off: shard {self.name(place.shard)} is "
                f"shorter than {MANIFEST} says; copy it again"
            )
        key = self._key(number, content)
        name = self.name_of(number, key)
        parts = _parts()
        in_content: list[tuple[int, int, int]] = members[["kind", "offset", "size"]].tolist()
        for kind, offset, size in in_content:
            at = offset - start
            self._check_header(number, content[at - BLOCK_BYTES : at], size)
            parts[kind].append(content[at : at + size])
        numbers = members["number"][members["kind"] == PICTURE].tolist()
        if len(numbers) > MAX_PICTURES:
            raise BadSampleError(
                f"sample {name} has {len(numbers)} pictures; the limit is {MAX_PICTURES}"
            )
        if numbers != list(range(len(numbers))):
            raise BadSampleError(
                f"sample {name} has pictures of the numbers {numbers}; it may have one, or "
                "several, numbered from 0 on"
            )
        texts = _texts(name, parts[JSON], parts[CAPTION], len(numbers))
        return Sample(key=key, pictures=tuple(parts[PICTURE]), texts=texts)

    def read(self, number: int) -> Sample:
        """One sample; raises BadSampleError as `parse` does."""
        return self.parse(number, self.fetch([number])[0])

    def name_of(self, number: int, key: str) -> str:
        """Name of a sample for logs: `shard.tar:key`."""
        return printable(f"{self.name(self._shard_of(number))}:{key}")

    def locate(self, number: int) -> str:
        """The same, with the key read from the shard if it can be."""
        place = self._find(number)
        shard, end = self.name(place.shard), place.header + BLOCK_BYTES
        try:
            [content] = self._folder().read_ranges([shard], [(place.start, end)])
            return self.name_of(number, key_of(from_own(content, place.header - place.start)))
        except (DataError, tarfile.HeaderError):
            return f"{shard}, number {number - self._firsts[place.shard]}"

    def read_texts(self, number: int) -> tuple[Text, ...]:
        """The texts of one sample alone; raises BadSampleError."""
        place = self._find(number)
        members = place.members
        pictures = int((members["kind"] == PICTURE).sum())
        written = members[members["kind"] != PICTURE]
        self._check_size(number, int(written["size"].sum()))
        headers = (place.start, place.header + BLOCK_BYTES)
        ranges = [headers, *map(_range, written.reshape(-1, 1))]
        names = [self.name(place.shard)] * len(ranges)
        first, *contents = self._folder().read_ranges(names, ranges)
        name = self.name_of(number, self._key(number, from_own(first, place.header - place.start)))
        parts = _parts()
        for member, content in zip(written, contents, strict=True):
            self._check_header(number, content[:BLOCK_BYTES], int(member["size"]))
            parts[int(member["kind"])].append(content[BLOCK_BYTES:])
        return _texts(name, parts[JSON], parts[CAPTION], pictures)

    def _check_size(self, number: int, size: int) -> None:
        """Raise BadSampleError for what is too large to be read."""
        if size > MAX_SAMPLE_BYTES:
            raise BadSampleError(
                f"sample {self.locate(number)} has {size} bytes; the limit is {MAX_SAMPLE_BYTES}"
            )

    def _key(self, number: int, content: bytes) -> str:
        """A sample's key, by its first member's headers; raises BadSampleError."""
        try:
            return key_of(content)
        except tarfile.HeaderError as error:
            raise BadSampleError(self._misplaced(number)) from error

    def _check_header(self, number: int, header: bytes, size: int) -> None:
        """Raise BadSampleError unless this is the header of a member of this size."""
        if size_in(header) != size:
            raise BadSampleError(self._misplaced(number))

    def _misplaced(self, number: int) -> str:
        name = index_name(self.name(self._shard_of(number)))
        return (
            f"sample {self.locate(number)} is not where its index says; delete {name} and run "
            f"`megavlm data index {self._place}`"
        )

    def _folder(self) -> Folder:
        """Of this process: clients of object stores do not survive a fork."""
        if self._pid != os.getpid():
            self._pid, self._own_folder = os.getpid(), Folder(self._place)
        return self._own_folder

    def _shard_of(self, number: int) -> int:
        return int(np.searchsorted(self._firsts, number, side="right")) - 1

    def _find(self, number: int) -> _Place:
        shard = self._shard_of(number)
        members = self.members_of(shard)
        sample = number - self._firsts[shard]
        before, first, stop = np.searchsorted(members["sample"], [sample - 1, sample, sample + 1])
        header, end = _range(members[first:stop])
        end_before = _stop(members[before:first]) if before < first else 0
        blocks = -(-end_before // BLOCK_BYTES)
        start = min(header, max(blocks * BLOCK_BYTES, header - HEADERS_BYTES))
        return _Place(shard, members[first:stop], start, header, end)

    def name(self, shard: int) -> str:
        """Of a shard."""
        return self._names[shard].decode()

    def numbers_of(self, shard: int) -> range:
        """Of a shard's samples."""
        return range(int(self._firsts[shard]), int(self._firsts[shard + 1]))

    def members_of(self, shard: int) -> Members:
        """Of a shard, by its index."""
        return self._opened(shard).members

    def _opened(self, shard: int) -> _OpenShard:
        if shard not in self._open:
            samples = int(self.shard_samples[shard])
            size = ShardSize(samples, int(self._shard_bytes[shard]))
            members = read_index(self._folder(), self.name(shard), size)
            self._open[shard] = _OpenShard(members, *_sizes_in(members, samples))
            if len(self._open) > self._most_open:
                closed, _ = self._open.popitem(last=False)
                self._folder().forget(index_name(self.name(closed)))
        self._open.move_to_end(shard)
        return self._open[shard]


def _sizes_in(members: Members, samples: int) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    """Of a shard's samples: how many pictures they have, and how many bytes of text.

    In few bytes: many are open in many processes.
    """
    pictures_n = members_per_sample(members, PICTURE, samples)
    captions, records = (bytes_per_sample(members, kind, samples) for kind in (CAPTION, JSON))
    text_bytes_n = np.where(captions > 0, captions, records)
    return (
        np.minimum(pictures_n, np.iinfo(np.uint8).max).astype(np.uint8),
        np.minimum(text_bytes_n, np.iinfo(np.uint16).max).astype(np.uint16),
    )


def _texts(
    name: str, records: list[bytes], captions: list[bytes], pictures: int
) -> tuple[Text, ...]:
    """Of a sample's JSON; or its caption, if the JSON is of what it was downloaded from."""
    if max(len(records), len(captions)) > 1:
        raise BadSampleError(
            f"sample {name} has {len(records)} .json and {len(captions)} .txt members; it may have "
            "one of each"
        )
    try:
        record: Any = json.loads(records[0]) if records else {}
        if captions and not (isinstance(record, dict) and "texts" in record):
            caption = captions[0].decode()
            return (text("", caption, CAPTION_TASK, pictures=tuple(range(pictures))),)
    except (ValueError, RecursionError) as error:
        raise BadSampleError(f"sample {name}: its JSON or caption is broken: {error}") from error
    if not records:
        raise BadSampleError(f"sample {name} has neither a .json member nor a .txt")
    return texts_from_json(name, record, pictures)


def _parts() -> list[list[bytes]]:
    """Contents of a sample's members, by their kind."""
    return [[] for _ in (JSON, CAPTION, PICTURE)]


def _range(members: Members) -> tuple[int, int]:
    """Bytes of a shard that hold some members, with the first one's header."""
    return int(members["offset"].min()) - BLOCK_BYTES, _stop(members)


def _stop(members: Members) -> int:
    """Where the last one of some members ends."""
    return int((members["offset"] + members["size"]).max())


def _suffix_of(picture: bytes) -> str:
    if picture.startswith(b"\x89PNG"):
        return "png"
    if picture.startswith(b"RIFF"):
        return "webp"
    return "jpg"


def _add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def _without_manifest(folder: Folder) -> str:
    names = folder.names()
    here = folder.local_path
    if not names and not (here is not None and here.is_dir()):
        return (
            f"data folder {folder} does not exist; name a folder of tar shards, or make the sample "
            "set with `make data`"
        )
    if not any(name.endswith(".tar") for name in names):
        return f"data folder {folder} holds no .tar shard"
    return f"data folder {folder} has no {MANIFEST}; run `megavlm data index {folder}`"
