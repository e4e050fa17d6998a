"""How long each rank works in a step and waits for others, and which ranks hold up the rest.

The straggler is not the one that waits: all others wait for it in the next collective. What tells
is the rest of its step: work, and waiting for data.
"""

import json
import os
import socket
import statistics
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from megatron.core import parallel_state
from torch.autograd.profiler import profile

from megavlm.config.run import RunSettings
from megavlm.dist import groups
from megavlm.train.metrics import MetricsLog

RANKS_FILE = "ranks.json"
WINDOW = 5
"""Measured steps that a rank's median is taken over."""
FEWEST = 3
"""Measured steps before ranks are compared."""
GPU_ACTIVITIES = ("kernel", "gpu_memcpy", "gpu_memset")
"""Of kineto; what else it tells of a GPU are marks, which span what they enclose."""


class RankTimes(NamedTuple):
    """What one rank did in a step."""

    host: str
    stage: int
    """Of the pipeline; ranks of one stage have the same to do."""
    work_seconds: float
    """The rest of the step."""
    data_seconds: float
    """Until its loader has given it the samples."""
    communication_wait_seconds: float
    """In which a collective went on, and no computation."""
    gpu_celsius: float | None
    gpu_megahertz: float | None

    @property
    def busy_seconds(self) -> float:
        """In which others may have waited for it."""
        return self.work_seconds + self.data_seconds


class Peers(NamedTuple):
    """Medians of ranks that have the same to do."""

    work_seconds: float
    data_seconds: float
    busy_seconds: float


class Stragglers:
    """Measures some steps on every rank, by torch's profiler; the methods are collective.

    It writes the medians over the last measured steps to RUN_FOLDER/ranks.json, and says when a
    rank begins to hold up its peers, and when that is over.
    """

    def __init__(self, run: RunSettings, log: MetricsLog) -> None:
        self._settings = run.metrics
        self._every = run.metrics.rank_times_every if groups.world_size() > 1 else None
        # Torch profiles one thing at a time; ranks that do not are to take part alike.
        self._left_out = range(*run.profile.steps) if run.profile.steps else range(0)
        self._log = log
        self._path = run.run_folder / RANKS_FILE
        self._window: deque[list[RankTimes]] = deque(maxlen=WINDOW)
        self._told: set[int] = set()
        self._profiler: profile | None = None
        self._started = 0.0
        if self._every is not None:
            # Kineto says on stderr when it starts; it looks at this once.
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")
            with _profiler():  # the first one takes longer
                pass

    def begin(self, step: int) -> None:
        """A step begins."""
        if self._every is None or (step + 1) % self._every or step in self._left_out:
            return
        _wait_for_gpu()
        self._profiler = _profiler()
        self._profiler.__enter__()
        self._started = time.perf_counter()

    def end(self, step: int, data_seconds: float) -> dict[str, float]:
        """It ends; returns its figures, if it was measured.

        data_seconds: that this rank's own loader has taken.
        """
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return {}
        _wait_for_gpu()
        seconds = time.perf_counter() - self._started
        profiler.__exit__(None, None, None)
        results: Any = profiler.kineto_results
        waited = communication_wait_seconds(results.events())
        mine = None
        if waited is not None:
            work = seconds - data_seconds - waited
            stage = parallel_state.get_pipeline_model_parallel_rank()
            mine = RankTimes(socket.gethostname(), stage, work, data_seconds, waited, *_gpu_state())
        ranks = [rank for rank in groups.from_all_ranks(mine) if rank is not None]
        if len(ranks) < groups.world_size():  # another profiler has the GPU
            return {}
        if groups.rank() == 0:
            self._window.append(ranks)
            self._tell(step)
        waits = [rank.communication_wait_seconds for rank in ranks]
        return {"communication_wait_seconds": statistics.fmean(waits)}

    def _tell(self, step: int) -> None:
        ranks = medians(self._window)
        peers = peers_of(ranks)
        found: set[int] = set()
        if len(self._window) >= FEWEST:
            more = self._settings.straggler_percent / 100
            for number, (rank, usual) in enumerate(zip(ranks, peers, strict=True)):
                # Half as much to stay one, so that none comes and goes at the limit.
                allowed = more / 2 if number in self._told else more
                if rank.busy_seconds > usual.busy_seconds * (1 + allowed):
                    found.add(number)
        self._write(step, ranks, found)
        for number in sorted(found - self._told):
            rank, usual = ranks[number], peers[number]
            self._log.say(_said(number, rank, usual, f"{len(self._window)} steps up to {step + 1}"))
            of_peers = {f"peers_{name}": seconds for name, seconds in usual._asdict().items()}
            told = {"step": step, "rank": number, **rank._asdict(), **of_peers}
            self._log.events.write("straggler", **told)
        for number in sorted(self._told - found):
            self._log.say(f"rank {number} on {ranks[number].host} no longer holds up others")
            self._log.events.write("straggler_over", step=step, rank=number)
        self._told = found

    def _write(self, step: int, ranks: Sequence[RankTimes], stragglers: set[int]) -> None:
        """What the report draws; the newest alone."""
        found = {
            "step": step,
            "measured_steps": len(self._window),
            "stragglers": sorted(stragglers),
            "ranks": [rank._asdict() for rank in ranks],
        }
        partial = self._path.with_suffix(".partial")
        try:
            partial.write_text(json.dumps(found))
            partial.rename(self._path)
        except OSError as error:
            self._log.say(f"cannot write {self._path}: {error.strerror}; it stays as it was")


def read_ranks(run_folder: Path) -> dict[str, Any] | None:
    """What was last written of the ranks; None if nothing was."""
    path = run_folder / RANKS_FILE
    return json.loads(path.read_text()) if path.is_file() else None


def medians(window: Sequence[Sequence[RankTimes]]) -> list[RankTimes]:
    """Of each rank, over measured steps; what is known of its GPU is of the last one."""
    return [
        of_rank[-1]._replace(
            work_seconds=statistics.median(times.work_seconds for times in of_rank),
            data_seconds=statistics.median(times.data_seconds for times in of_rank),
            communication_wait_seconds=statistics.median(
                times.communication_wait_seconds for times in of_rank
            ),
        )
        for of_rank in zip(*window, strict=True)
    ]


def peers_of(ranks: Sequence[RankTimes]) -> list[Peers]:
    """What is usual among the ranks that have the same to do as each, itself included.

    Of two the quicker one is: where there are no more, a slow one cannot hide.
    """
    by_stage: dict[int, list[RankTimes]] = {}
    for rank in ranks:
        by_stage.setdefault(rank.stage, []).append(rank)
    usual = {
        stage: Peers(
            statistics.median_low(rank.work_seconds for rank in same),
            statistics.median_low(rank.data_seconds for rank in same),
            statistics.median_low(rank.busy_seconds for rank in same),
        )
        for stage, same in by_stage.items()
    }
    return [usual[rank.stage] for rank in ranks]


def _said(number: int, rank: RankTimes, usual: Peers, when: str) -> str:
    more = 100 * (rank.busy_seconds / usual.busy_seconds - 1)
    gpu = ""
    if rank.gpu_celsius is not None and rank.gpu_megahertz is not None:
        gpu = f"; its GPU has {rank.gpu_celsius:g} °C and {rank.gpu_megahertz:g} MHz"
    return (
        f"rank {number} on {rank.host} holds up others: busy {rank.busy_seconds:.2f} s a step, the "
        f"median of its peers {usual.busy_seconds:.2f} s ({more:.0f} % more), over {when}; work "
        f"{rank.work_seconds:.2f} s (peers {usual.work_seconds:.2f}), waiting for data "
        f"{rank.data_seconds:.2f} s (peers {usual.data_seconds:.2f}){gpu}"
    )


def communication_wait_seconds(events: Iterable[Any]) -> float | None:
    """Seconds in which communication went on and no computation, by the profiler's events.

    On a GPU NCCL's kernels count against all others and copies; on a CPU gloo's collectives, from
    their call to their end, against torch's operators. None where the profiler saw none of them.
    """
    communication: list[tuple[int, int]] = []
    computation: list[tuple[int, int]] = []
    for event in events:
        name: str = event.name()
        if event.activity_type() in GPU_ACTIVITIES:
            kind = communication if name.startswith("nccl") else computation
        elif name.startswith("gloo:"):
            kind = communication
        elif name.startswith(("aten::", "megavlm::")):
            kind = computation
        else:
            continue
        kind.append((event.start_ns(), event.end_ns()))
    if not computation:
        return None
    return (covered(communication + computation) - covered(computation)) / 1e9


def covered(intervals: Sequence[tuple[int, int]]) -> int:
    """Length of the union of intervals, each from a first number to before another."""
    if not intervals:
        return 0
    starts_n, ends_n = np.array(sorted(intervals), np.int64).T
    reached_n = np.maximum.accumulate(ends_n)
    gaps_n = np.maximum(starts_n[1:] - reached_n[:-1], 0)
    return int(reached_n[-1] - starts_n[0] - gaps_n.sum())


def _profiler() -> profile:
    """Of kernels alone where there is a GPU, which is cheaper than of all."""
    if torch.cuda.is_available():
        return profile(use_cpu=False, use_device="cuda", use_kineto=True)
    return profile(use_kineto=True)


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _gpu_state() -> tuple[float | None, float | None]:
    """Temperature and clock of its processors, where nvidia-ml-py is there to tell."""
    with suppress(Exception):
        return torch.cuda.temperature(), torch.cuda.clock_rate()
    return None, None
