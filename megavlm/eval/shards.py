"""Work in pieces that any number of ranks share and that a killed evaluation need not do again."""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megavlm.dist import groups
from megavlm.errors import DataError
from megavlm.eval.samples import progress, tell

SHARD_ITEMS = 128
"""Items of a piece. Pieces are cut alike for any number of ranks, so that the same items go through
the model together, and come out the same to the bit."""
Row = dict[str, Any]


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Raise DataError while another evaluation runs in a folder; collective, on all ranks."""
    descriptor = os.open(folder, os.O_RDONLY)
    busy = False
    try:
        if groups.rank() == 0:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        busy = True
    except OSError:  # a file system without locks
        pass
    try:
        if groups.from_all_ranks(busy)[0]:
            raise DataError(f"another evaluation is running in {folder}; wait until it has ended")
        yield
    finally:
        os.close(descriptor)  # which unlocks it


def in_shards(
    folder: Path,
    settings: Mapping[str, Any],
    items: int,
    work: Callable[[range, Callable[[int], None]], list[Row]],
    title: str,
) -> list[Row]:
    """A row for each item, in order, on the first rank, none on the others; collective.

    Each copy of the model appends the rows of a piece to a file of its own as soon as it is done,
    and syncs it. What a call with the same settings has done before, on however many ranks, is not
    done again, but for pieces with rows that are `unreadable`. Nothing else is touched. work: the
    rows of some items; what it is given beside them hears how many more are done. title: for the
    first rank's progress bar.
    """
    copy, copies = groups.data_rank(), groups.data_ranks()
    is_first = groups.rank() == 0
    # One rank looks: the others may see older files.
    done, parts = _begin(folder, settings) if is_first else ({}, 0)
    numbers, parts = groups.from_all_ranks((list(done), parts))[0]
    pieces = [
        range(start, min(start + SHARD_ITEMS, items)) for start in range(0, items, SHARD_ITEMS)
    ]
    left = sorted(set(range(len(pieces))) - set(numbers))
    if numbers:
        tell(f"{len(numbers):,} of {len(pieces):,} pieces of {SHARD_ITEMS} are done already")
    new: dict[int, list[Row]] = {}
    mine = left[copy::copies]
    part = folder / _parts(settings).replace("*", f"{parts + copy:05d}")
    with progress(title, sum(len(pieces[number]) for number in mine)) as advance:
        for number in mine:
            rows = work(pieces[number], advance)
            assert len(rows) == len(pieces[number]), "a row for each item"
            if groups.is_first_model_rank():
                append(part, number, rows)
            new[number] = rows
    for share in groups.from_all_ranks(new):
        done |= share
    return [row for number in range(len(pieces)) for row in done[number]] if is_first else []


def write_atomically(path: Path, content: str) -> None:
    """Write a file that is there whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(content)
    partial.rename(path)


def read_lines(path: Path) -> list[Row]:
    """The objects of a file of JSON lines."""
    with path.open(newline="\n") as file:  # an answer may hold other ends of lines
        return [json.loads(line) for line in file]


def write_lines(path: Path, rows: Iterable[Row]) -> None:
    """Write a file of JSON lines that is there whole or not at all."""
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append(part: Path, number: int, rows: list[Row]) -> None:
    """Add a piece's rows; they are on the disk when it returns."""
    part.parent.mkdir(parents=True, exist_ok=True)  # not there on other hosts' own disks
    with part.open("a") as file:
        file.write(json.dumps({"piece": number, "rows": rows}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def forget(folder: Path, settings: Mapping[str, Any]) -> None:
    """Remove the pieces that were made with these settings; their results are elsewhere."""
    for part in folder.glob(_parts(settings)):
        part.unlink()


def _parts(settings: Mapping[str, Any]) -> str:
    """The names of the files that hold pieces, which tell their settings apart."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return f"part-{digest[:16]}-*.jsonl"


def _begin(folder: Path, settings: Mapping[str, Any]) -> tuple[dict[int, list[Row]], int]:
    """Pieces that are done, and a number past those of the files that hold them."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = sorted(folder.glob(_parts(settings)))
    others = len(list(folder.glob("part-*.jsonl"))) - len(parts)
    if others:
        tell(
            f"{folder} holds pieces of an evaluation with other settings or weights, which are not "
            "used; they stay for it to go on, and may be deleted"
        )
    done: dict[int, list[Row]] = {}
    for part in parts:
        *lines, _ = part.read_bytes().split(b"\n")  # the last was being written, or is empty
        for line in lines:
            with suppress(ValueError):  # what a crash of the machine has left is done again
                piece = json.loads(line)
                done[piece["piece"]] = piece["rows"]
    usable = {
        number: rows for number, rows in done.items() if not any("unreadable" in r for r in rows)
    }
    following = int(parts[-1].stem.rpartition("-")[2]) + 1 if parts else 0
    return usable, following
