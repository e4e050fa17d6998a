"""Finds out where the samples of a folder's shards lie: `megavlm data index`."""

import multiprocessing
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megavlm.data.index import (
    CAPTION,
    JSON,
    KINDS,
    MANIFEST,
    PICTURE,
    Members,
    ShardSize,
    index_name,
    index_tar,
    members_per_sample,
    read_index,
    read_manifest,
    samples_of,
    write_index,
    write_manifest,
)
from megavlm.errors import DataError
from megavlm.files.folder import Folder
from megavlm.terminal import counted, printable, with_progress

SHOWN_BROKEN = 20
"""Shards that are named."""


class _Found(NamedTuple):
    """What one shard holds."""

    ignored: Counter[str]
    """Members that no sample uses, by suffix."""
    samples: int = 0
    without_picture: int = 0
    without_text: int = 0
    doubled: int = 0
    """Members of a sample that are a second picture of the same number, record or caption."""
    broken: str = ""
    """What is wrong with the shard, if it cannot be indexed."""


def index_folder(place: str, workers: int) -> None:
    """Index the shards of a folder that are new or have changed, and write `shards.json`.

    Shows how far it is, and what was found. Raises DataError.
    """
    folder = Folder(place)
    files = folder.entries()
    shards = sorted(name for name in files if name.endswith(".tar"))
    if not shards:
        raise DataError(_without_shards(folder, [*files]))
    known = read_manifest(folder) if MANIFEST in files else {}
    stale: list[bool] = []
    for shard in shards:
        index = files.get(index_name(shard))
        same_size = shard not in known or known[shard].size == files[shard].size
        stale.append(index is None or not same_size or files[shard].modified > index.modified)
    with _pool(workers) as run_each:
        found = run_each(partial(_index_shard, place), shards, stale)
        found = [*with_progress(found, "shards", len(shards))]
    broken = [(shard, of.broken) for shard, of in zip(shards, found, strict=True) if of.broken]
    for shard, problem in broken[:SHOWN_BROKEN]:
        print(printable(f"{folder}/{shard}: {problem}"), file=sys.stderr)
    if broken:
        raise DataError(
            f"{len(broken):,} of {len(shards):,} shards of {folder} cannot be indexed, of which "
            f"{min(len(broken), SHOWN_BROKEN)} are named above; mend or delete them, and run again"
        )
    if not any(of.samples for of in found):
        why = ", ".join(_ignored(found)) or "all are empty"
        raise DataError(f"no shard of {folder} has a sample; {why}")
    sizes = zip(shards, found, strict=True)
    write_manifest(folder, {s: ShardSize(of.samples, files[s].size) for s, of in sizes})
    _tell(folder, found, sum(stale))


@contextmanager
def _pool(workers: int) -> Generator[Callable[..., Iterable[_Found]]]:
    """A `map` of so many processes."""
    if workers == 1:
        yield map
        return
    context = multiprocessing.get_context("spawn")  # clients of stores do not survive a fork
    with ProcessPoolExecutor(workers, context) as pool:
        yield partial(pool.map, chunksize=4)


def _index_shard(place: str, shard: str, stale: bool) -> _Found:
    """Index a shard unless that is done already, and look at what it holds."""
    folder, ignored = Folder(place), Counter[str]()
    try:
        members = None if stale else _readable(folder, shard)
        if members is None:
            with folder.open(shard, "rb") as file:
                members = index_tar(file, ignored)
            write_index(folder, shard, members)
    except tarfile.ReadError as error:
        return _Found(ignored, broken=f"no whole tar, or a compressed one: {error}")
    except (tarfile.TarError, DataError) as error:
        return _Found(ignored, broken=str(error))
    finally:
        folder.forget(index_name(shard))
    return _look(members, ignored)


def _readable(folder: Folder, shard: str) -> Members | None:
    """An index, if it is not broken."""
    try:
        return read_index(folder, shard)
    except DataError:
        return None


def _look(members: Members, ignored: Counter[str]) -> _Found:
    samples = samples_of(members)
    pictures, records, captions = (
        members_per_sample(members, kind, samples) for kind in (PICTURE, JSON, CAPTION)
    )
    return _Found(
        ignored,
        samples=samples,
        without_picture=int((pictures == 0).sum()),
        without_text=int((records + captions == 0).sum()),
        doubled=int(_are_doubled(members).sum()),
    )


def _are_doubled(members: Members) -> NDArray[np.bool_]:
    """Which members are a second picture of the same number, record or caption of their sample."""
    before, after = members[:-1], members[1:]  # sorted, so that these are neighbours
    same = (before["sample"] == after["sample"]) & (before["kind"] == after["kind"])
    return same & ((before["number"] == after["number"]) | (after["kind"] != PICTURE))


def _tell(folder: Folder, found: list[_Found], new: int) -> None:
    for line in _ignored(found):
        print(line)
    without_text = sum(of.without_text for of in found)
    doubled = sum(of.doubled for of in found)
    if without_text:
        print(f"{counted(without_text, 'sample')} without text: training will skip them")
    if doubled:
        print(f"{counted(doubled, 'member')} twice in a sample: training will skip such samples")
    samples = sum(of.samples for of in found)
    print(
        f"{folder}: {counted(samples, 'sample')} in {counted(len(found), 'shard')}, {new:,} of "
        f"them new; {sum(of.without_picture for of in found):,} samples without a picture"
    )


def _ignored(found: list[_Found]) -> list[str]:
    ignored = sum((of.ignored for of in found), Counter[str]())
    return [
        f"ignored {counted(count, 'member')} .{printable(suffix)}, which no sample uses"
        + (" (a key must have no dots)" if suffix.lower() in KINDS else "")
        for suffix, count in ignored.most_common()
    ]


def _without_shards(folder: Folder, names: list[str]) -> str:
    path = folder.local_path
    if path is not None and not path.is_dir():
        return f"data folder {folder} is not there; name a folder of tar shards"
    compressed = [name for name in names if re.search(r"\.tar\.|\.tgz$", name)]
    advice = f"; unpack {compressed[0]}, and the like, first" if compressed else ""
    return f"data folder {folder} holds no .tar shard{advice}"
