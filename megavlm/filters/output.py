"""Shards of what stays, and counts of what went."""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megavlm.data.index import index_name
from megavlm.data.samples import Sample, texts_from_json
from megavlm.data.shards import ShardFolder, write_shard
from megavlm.files.folder import Folder, sync_path
from megavlm.filters.verdicts import batches, read_columns

WORK = "filter"
"""Folder within the new one, for what is not training data."""
UNFINISHED = "unfinished-"
LONGEST_KEY = 80
"""Bytes; the names of a tar's members have room for 100."""
EXAMPLES = 6
"""Of dropped samples that each shard offers for the report, for each reason."""
COPY_BYTES = 16 * 2**20


@dataclass(kw_only=True)
class Counts:
    """What became of samples: `samples` = `kept` + the sum of `dropped`.

    Of the texts of kept samples, `texts` = `kept_texts` + the sum of `removed_texts`.
    """

    samples: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter[str])
    texts: int = 0
    kept_texts: int = 0
    removed_texts: Counter[str] = field(default_factory=Counter[str])
    masked_texts: int = 0
    renamed_keys: int = 0
    """Of kept samples whose key their shard has twice, or that cannot be a name everywhere."""

    @classmethod
    def of(cls, record: dict[str, Any]) -> "Counts":
        """Those that `as_record` has given."""
        fields: dict[str, Any] = {}
        for name, value in record.items():
            fields[name] = Counter[str](value) if isinstance(value, dict) else value
        return cls(**fields)

    def as_record(self) -> dict[str, Any]:
        """As JSON-safe data; reasons from the most frequent on."""
        return {
            n: dict(sorted(v.items(), key=lambda entry: (-entry[1], entry[0])))
            if isinstance(v, Counter)
            else v
            for n, v in vars(self).items()
        }

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(**{name: value + getattr(other, name) for name, value in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class Example:
    """A dropped sample."""

    number: int
    reason: str
    same_as: int | None
    """The sample that it is a duplicate of."""
    detail: str


def new_keys(keys: list[str]) -> list[str]:
    """Keys that no two samples of a shard share, and that can be names of files anywhere."""
    taken: set[str] = set()
    new: list[str] = []
    for n, key in enumerate(keys):
        plain = key.isprintable() and not set(key) & set('/\\:*?"<>|')
        if not key.strip() or not plain or len(key.encode(errors="replace")) > LONGEST_KEY:
            key = f"sample-{n:06}"
        while key in taken:  # it may be one that was made here, too
            key = f"{key}-{n}"
        taken.add(key)
        new.append(key)
    return new


def write_kept(
    shards: ShardFolder, shard: int, verdicts: Folder, gone: Container[int], target: Folder
) -> int:
    """Write a shard's samples that stay, under its name, and its index; returns their number.

    gone: numbers of duplicates. Nothing is written if no sample stays.
    """
    name, first = shards.name(shard), shards.numbers_of(shard).start
    table = read_columns(verdicts, name, ["key", "reason", "changed"]).to_pydict()
    kept = [reason is None and first + n not in gone for n, reason in enumerate(table["reason"])]
    if not any(kept):
        return 0
    keys = new_keys(table["key"])

    def samples() -> Iterator[Sample]:
        for numbers in batches(shards, shard):
            chosen = [number for number in numbers if kept[number - first]]
            contents = shards.fetch(chosen) if chosen else []
            for number, content in zip(chosen, contents, strict=True):
                sample, changed = shards.parse(number, content), table["changed"][number - first]
                if changed is not None:
                    record = json.loads(changed)
                    texts = texts_from_json(sample.key, record, len(sample.pictures))
                    sample = replace(sample, texts=texts)
                yield replace(sample, key=keys[number - first])

    # Written in a place of its own: a worker of a run that was killed may still be writing, too.
    local = target.local_path
    near = None if local is None else local / WORK
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=near) as scratch:
        write_shard(Path(scratch) / name, samples())
        for file in (index_name(name), name):  # the shard last: if it is there, so is its index
            if local is not None:
                sync_path(Path(scratch) / file)
                os.replace(Path(scratch) / file, local / file)
                sync_path(local)
            else:
                _upload(Path(scratch) / file, target, file)
    return sum(kept)


def _upload(path: Path, target: Folder, name: str) -> None:
    with path.open("rb") as source, target.open(name, "wb") as copy:
        while content := source.read(COPY_BYTES):
            copy.write(content)


def count(
    shards: ShardFolder, shard: int, verdicts: Folder, gone: Mapping[int, tuple[int, str]]
) -> tuple[Counts, list[Example]]:
    """What became of a shard's samples, and some that were dropped.

    gone: duplicates, with what they are the same as, and the reason.
    """
    first = shards.numbers_of(shard).start
    columns = ["key", "reason", "detail", "texts", "removed_texts", "masked_texts"]
    rows: list[dict[str, Any]] = read_columns(verdicts, shards.name(shard), columns).to_pylist()
    counts, examples = Counts(samples=len(rows)), list[Example]()
    renamed = new_keys([row["key"] for row in rows])
    for number, (row, key) in enumerate(zip(rows, renamed, strict=True), first):
        same_as, reason = gone.get(number, (None, row["reason"]))
        if reason is None:
            removed = Counter[str](json.loads(row["removed_texts"]))
            counts.kept += 1
            counts.texts += row["texts"]
            counts.removed_texts += removed
            counts.kept_texts += row["texts"] - removed.total()
            counts.masked_texts += row["masked_texts"]
            counts.renamed_keys += key != row["key"]
            continue
        counts.dropped[reason] += 1
        if counts.dropped[reason] <= EXAMPLES:
            examples.append(
                Example(number=number, reason=reason, same_as=same_as, detail=row["detail"])
            )
    return counts, examples


def first_of_each(examples: Iterable[Example]) -> list[Example]:
    """The first samples of each reason."""
    taken, first = Counter[str](), list[Example]()
    for example in sorted(examples, key=lambda example: example.number):
        taken[example.reason] += 1
        if taken[example.reason] <= EXAMPLES:
            first.append(example)
    return first
