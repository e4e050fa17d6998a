"""Sees that a run makes progress; where it hangs, says which rank stands where, and ends it."""

import faulthandler
import json
import os
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread, main_thread
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch._C import _distributed_c10d

from megavlm.dist import groups
from megavlm.terminal import tell

HUNG = 124  # as of timeout(1)
LAST_COLLECTIVES = 20
HURRIED_SECONDS = 20.0
ANSWER_SECONDS = 10.0
"""Ranks are waited for so long when they say where they stand, and so is the store."""
SUMMARY_FILE = "summary.txt"

Value = TypeVar("Value")


class Watch:
    """Of this rank, while it is in the context.

    Progress is what `at` and `progress` tell, and each collective, of all ranks: so one that waits
    for a slower one is no hang. After so many seconds without any, each rank writes the stacks of
    its threads and its last collectives to `rank-N.txt`, the lowest of them a summary of where the
    ranks stand, and all end with code 124.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        """seconds: 0 switches it off."""
        self._folder = folder
        self._seconds = seconds
        self._where = "before its first step"
        self._count = 0
        self._hurried = self._calm = False
        self._over = Event()
        self._thread = Thread(target=self._look, name="watch", daemon=True)

    def __enter__(self) -> "Watch":
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._seconds:
            self._thread.join()

    def at(self, where: str) -> None:
        """Something begins, so what was before it is done."""
        self._where = where
        self.progress()

    def progress(self) -> None:
        """What goes on has come further. Any thread may call it."""
        self._count += 1  # a count that two threads make one is still another than before

    def hurry(self) -> None:
        """The launcher ends this rank soon, perhaps because another one is gone for good.

        From now on three times the longest silence so far is enough, and `HURRIED_SECONDS`.
        """
        self._hurried = True

    def calm(self) -> None:
        """All ranks have heard of it, so none is gone: what they still do may take its time."""
        self._calm = True

    def _look(self) -> None:
        board = _Board()
        before, since, count, longest = -1, time.monotonic(), 0, 0.0
        interval = min(self._seconds / 20, ANSWER_SECONDS)
        while not self._over.wait(interval):
            now = self._count + _collectives_begun()
            total = board.add(now - count)
            silence = time.monotonic() - since
            enough = self._seconds
            if self._hurried and not self._calm:
                enough = min(enough, max(HURRIED_SECONDS, 3 * longest))
            if total != before or now != count:
                longest = max(longest, silence)
                before, since, count = total, time.monotonic(), now
            elif silence > enough:
                self._report(board, enough)
                os._exit(HUNG)

    def _report(self, board: "_Board", seconds: float) -> None:
        last = _within(ANSWER_SECONDS, _last_collectives) or []
        standing = f"{self._where}; in {_own_frame()}; last collective: {(last or ['unknown'])[-1]}"
        with suppress(OSError):
            self._write_stacks(standing, last)
        tell(
            f"rank {groups.rank()} on {socket.gethostname()}: no rank has come further for "
            f"{seconds:g} s; at {standing}; stacks in {self._folder}/{_file_name()}"
        )
        standings = board.exchanged(standing)
        if groups.rank() == min(standings):
            text = _summary(standings)
            with suppress(OSError):
                (self._folder / SUMMARY_FILE).write_text(text + "\n")
            tell(text)
        else:  # whose end would have the launcher end the one that writes
            time.sleep(1)

    def _write_stacks(self, standing: str, last: list[str]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / _file_name()).open("w") as file:
            collectives = "\n".join(last) or "unknown: TORCH_FR_BUFFER_SIZE is 0"
            file.write(
                f"rank {groups.rank()}, process {os.getpid()} on {socket.gethostname()}\n"
                f"at {standing}\n\nlast collectives, the newest last:\n{collectives}\n\n"
            )
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)


class _Board:
    """Where all ranks see what each says: the store in which they have met.

    Over a connection of its own: the training may wait on the other.
    """

    def __init__(self) -> None:
        self._total = 0
        self._store: Any = None
        if groups.world_size() > 1:
            self._store = cast(Any, dist).distributed_c10d._get_default_store().clone()

    def add(self, progress: int) -> int:
        """The progress of all ranks, as far as it is known: the store's host may hang, too."""
        if self._store is None:
            self._total += progress
        else:
            add = self._store.add
            self._total = _within(ANSWER_SECONDS, lambda: add("progress", progress)) or self._total
        return self._total

    def exchanged(self, standing: str) -> dict[int, str]:
        """Where ranks stand: those that say so in time."""
        standings = {groups.rank(): standing}
        if self._store is not None:
            _within(ANSWER_SECONDS, lambda: self._exchange(standings))
        return dict(standings)

    def _exchange(self, standings: dict[int, str]) -> None:
        mine = json.dumps([groups.rank(), standings[groups.rank()]])
        self._store.append("standings", f"{mine}\n")
        while len(standings) < groups.world_size():
            time.sleep(0.1)
            standings.update(map(json.loads, self._store.get("standings").splitlines()))


def _within(seconds: float, call: Callable[[], Value]) -> Value | None:
    """What a call returns, or None if it fails or takes longer."""
    found: list[Value] = []

    def run() -> None:
        with suppress(Exception):
            found.append(call())

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None


def _summary(standings: dict[int, str]) -> str:
    """Most ranks wait for those that stand elsewhere, or that do not answer."""
    by_standing: dict[str, list[int]] = defaultdict(list)
    for rank, standing in sorted(standings.items()):
        by_standing[standing].append(rank)
    silent = [rank for rank in range(groups.world_size()) if rank not in standings]
    most, *others = sorted(by_standing.items(), key=lambda item: -len(item[1]))
    lines = [f"the run hangs; {_ranks(most[1])} at {most[0]}"]
    lines += [f"elsewhere: {_ranks(ranks)} at {standing}" for standing, ranks in others]
    if silent:
        lines.append(f"no answer: {_ranks(silent)} (ended, stopped, or out of reach)")
    return "\n".join(lines)


def _ranks(ranks: list[int]) -> str:
    """Such as `ranks 0-3, 7`."""
    parts: list[str] = []
    for position, rank in enumerate(ranks):
        if position and ranks[position - 1] == rank - 1:
            parts[-1] = f"{parts[-1].partition('-')[0]}-{rank}"
        else:
            parts.append(str(rank))
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(parts)}"


def _own_frame() -> str:
    """The innermost line of ours that the main thread is in."""
    frame = sys._current_frames().get(main_thread().ident or 0)
    innermost = frame
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("megavlm."):
            return f"{frame.f_globals['__name__']}.{frame.f_code.co_name}:{frame.f_lineno}"
        frame = frame.f_back
    return innermost.f_code.co_qualname if innermost else "no code"


def _collectives_begun() -> int:
    """By this rank, in all its groups."""
    all_groups: list[Any] = list(cast(Any, dist).distributed_c10d._world.pg_map)
    return sum(group._get_sequence_number_for_group() for group in all_groups)


def _last_collectives() -> list[str]:
    """Of torch's flight recorder, the newest last."""
    entries: list[Any] = []
    for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):
        dump: Any = getattr(_distributed_c10d, name, None)
        if dump is not None:
            entries += json.loads(dump()).get("entries", [])
    entries.sort(key=lambda entry: entry["time_created_ns"])
    return [
        f"{entry['profiling_name']} number {entry['collective_seq_id'] or entry['p2p_seq_id']} of "
        f"group {entry['process_group'][-1]}, sizes {entry['input_sizes']}"
        for entry in entries[-LAST_COLLECTIVES:]
    ]


def _file_name() -> str:
    return f"rank-{groups.rank()}.txt"
