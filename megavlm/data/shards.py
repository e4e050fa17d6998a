"""WebDataset-style tar shards with an offset index, so that any sample is one read away.

A shard `name.tar` holds, for every sample, `key.json` (its texts) and, unless it is text-only,
`key.png`, `key.jpg` or `key.webp`; of several pictures `key.0.jpg`, `key.1.jpg` and so on. Keys
have no dots. Beside it, `name.index.json` lists where each member lies.
"""

import hashlib
import io
import json
import os
import re
import tarfile
from bisect import bisect_right
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any

from megavlm.data.samples import MAX_PICTURES, Sample, Text, texts_from_json, texts_to_json
from megavlm.errors import BadSampleError, DataError

PICTURE_SUFFIXES = ("png", "jpg", "jpeg", "webp")
MAX_INDEX_BYTES = 256 * 2**20
MAX_MEMBER_BYTES = 64 * 2**20  # one picture file; anything larger is refused before it is read
_NUMBERED = re.compile(r"(?P<key>.+)\.(?P<suffix>\d+\.[a-z]+)", re.IGNORECASE)


def write_shard(path: Path, samples: Iterable[Sample]) -> int:
    """Write one tar shard and its index; returns the number of samples.

    Appears under its name only once complete. Member times and owners are fixed, so equal samples
    give equal bytes.
    """
    partial = path.with_suffix(".tar.partial")
    count = 0
    with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            several = len(sample.pictures) > 1
            for number, picture in enumerate(sample.pictures):
                place = f"{number}." if several else ""
                _add_member(tar, f"{sample.key}.{place}{_suffix_of(picture)}", picture)
            record = json.dumps(texts_to_json(sample), ensure_ascii=False)
            _add_member(tar, f"{sample.key}.json", record.encode())
            count += 1
    index = json.dumps(index_shard(partial))
    _index_path(path).write_text(index)
    partial.rename(path)
    return count


def index_shard(path: Path) -> list[dict[str, Any]]:
    """List the samples of a tar: `[{"key": ..., "members": {"json": [offset, bytes], ...}}]`."""
    entries: dict[str, dict[str, Any]] = {}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if not member.isfile():
                continue
            numbered = _NUMBERED.fullmatch(member.name)
            key, _, suffix = member.name.rpartition(".")
            if numbered is not None:
                key, suffix = numbered["key"], numbered["suffix"]
            entry = entries.setdefault(key, {"key": key, "members": {}})
            entry["members"][suffix.lower()] = [member.offset_data, member.size]
    return list(entries.values())


class ShardFolder:
    """All shards of a folder, in name order, read by sample number.

    Raises DataError when the folder, an index or part of a shard is missing. Safe to use from
    several processes: each read opens its file anew.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise DataError(
                f"data folder {folder} does not exist; set data.train or data.heldout to a folder "
                "of tar shards, or make the sample set with `make data`"
            )
        self.paths = sorted(folder.glob("*.tar"))
        if not self.paths:
            raise DataError(f"data folder {folder} holds no .tar shard")
        self._entries = [_read_index(path) for path in self.paths]
        self._ends = list(accumulate(len(entries) for entries in self._entries))

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the shards' names and lengths: which sample has which number."""
        shards = [(p.name, len(e)) for p, e in zip(self.paths, self._entries, strict=True)]
        return hashlib.sha256(json.dumps(shards).encode()).hexdigest()

    def locate(self, number: int) -> str:
        """Name of a sample for logs: `shard.tar:key`."""
        path, entry = self._find(number)
        return f"{path.name}:{entry['key']}"

    def pictures_of(self, number: int) -> int:
        """How many pictures a sample has, by the index alone; 0 if it has too many to be read."""
        _, entry = self._find(number)
        pictures = sum(suffix != "json" for suffix in entry["members"])
        return pictures if pictures <= MAX_PICTURES else 0

    def read(self, number: int) -> Sample:
        """Read one sample; raises BadSampleError when its members are not as the format says."""
        path, entry = self._find(number)
        members: dict[str, list[int]] = entry["members"]
        key = str(entry["key"])
        pictures = [suffix for suffix in members if suffix != "json"]
        # By number: 2 before 10. What is not a number is refused below.
        pictures.sort(key=lambda suffix: (len(suffix.partition(".")[0]), suffix))
        places = [suffix.rpartition(".")[0] for suffix in pictures]
        suffixes = {suffix.rpartition(".")[2] for suffix in pictures}
        numbers = [str(number) for number in range(len(places))]
        if not suffixes <= set(PICTURE_SUFFIXES) or places not in ([""], numbers):
            raise BadSampleError(
                f"sample {path.name}:{key} has the members {pictures}; besides its JSON it may "
                f"have one of {PICTURE_SUFFIXES}, or several, numbered from 0 on"
            )
        if len(pictures) > MAX_PICTURES:
            raise BadSampleError(
                f"sample {path.name}:{key} has {len(pictures)} pictures; the limit is "
                f"{MAX_PICTURES}"
            )
        encoded = tuple(_read_member(path, key, members[suffix]) for suffix in pictures)
        return Sample(key=key, pictures=encoded, texts=self.read_texts(number))

    def read_texts(self, number: int) -> tuple[Text, ...]:
        """Read the texts of one sample alone; raises BadSampleError."""
        path, entry = self._find(number)
        key = str(entry["key"])
        if "json" not in entry["members"]:
            raise BadSampleError(f"sample {path.name}:{key} has no .json member")
        try:
            parsed = json.loads(_read_member(path, key, entry["members"]["json"]))
        except ValueError as error:
            raise BadSampleError(
                f"sample {path.name}:{key}: its JSON is broken: {error}"
            ) from error
        return texts_from_json(key, parsed, self.pictures_of(number))

    def _find(self, number: int) -> tuple[Path, dict[str, Any]]:
        shard = bisect_right(self._ends, number)
        start = self._ends[shard - 1] if shard else 0
        return self.paths[shard], self._entries[shard][number - start]


def _index_path(path: Path) -> Path:
    return path.with_suffix(".index.json")


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


def _read_index(path: Path) -> list[dict[str, Any]]:
    index_path = _index_path(path)
    if not index_path.is_file():
        raise DataError(f"shard {path} has no index {index_path.name} beside it")
    try:
        if os.path.getsize(index_path) > MAX_INDEX_BYTES:
            raise ValueError(f"it is larger than {MAX_INDEX_BYTES} bytes")
        entries = json.loads(index_path.read_text())
        extents = [extent for e in entries for extent in e["members"].values()]
        if any(type(n) is not int or n < 0 for extent in extents for n in extent):
            raise ValueError("offsets and sizes must be whole numbers from 0 on")
        end = max((offset + size for offset, size in extents), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"index {index_path} is broken: {error}") from error
    if os.path.getsize(path) < end:
        raise DataError(
            f"shard {path} is truncated: {os.path.getsize(path)} bytes, but its index reaches "
            f"{end}; copy it again"
        )
    return entries


def _read_member(path: Path, key: str, extent: list[int]) -> bytes:
    offset, size = extent
    if size > MAX_MEMBER_BYTES:
        raise BadSampleError(
            f"sample {path.name}:{key} has a member of {size} bytes; the limit is "
            f"{MAX_MEMBER_BYTES}"
        )
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        raise DataError(f"cannot read shard {path}: {error.strerror}") from error
