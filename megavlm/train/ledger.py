"""Which samples each step took: proof that training skips none and repeats none."""

import os
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megavlm.checkpoint.listing import latest_checkpoint
from megavlm.checkpoint.state import checkpoint_root
from megavlm.config.plan import Plan
from megavlm.config.run import RunSettings
from megavlm.data.sources import id_of, places_of, training_sources
from megavlm.errors import DataError
from megavlm.redact import without_secrets
from megavlm.terminal import counted
from megavlm.train.appended import Appended
from megavlm.train.events import EVENTS_FILE, read_events
from megavlm.train.start import left_out_before

FILE = "samples.ledger"
HEADER = struct.Struct("<QII")
"""Of a record: its step, its samples and the bytes that follow: the ids, ascending, as differences
from one to the next (uint64), compressed by zlib."""
SHOWN = 5


class Ledger:
    """Writes which samples each step took, on the rank where it is enabled.

    After a resume, records of steps that will be done again are dropped.
    """

    def __init__(self, run: RunSettings, first_step: int, *, enabled: bool) -> None:
        self._file: Appended | None = None
        if enabled:
            path = run.run_folder / FILE
            path.touch()
            kept = [end for step, *_, end in _records(path) if step < first_step]
            os.truncate(path, kept[-1] if kept else 0)
            self._file = Appended(path)

    def write(self, step: int, ids_n: NDArray[np.int64]) -> None:
        """Add the samples of a step."""
        if self._file is not None:
            differences = np.diff(np.sort(ids_n), prepend=0).astype(np.uint64)
            packed = zlib.compress(differences.view(np.uint8).reshape(-1, 8).T.tobytes())
            self._file.write(HEADER.pack(step, len(ids_n), len(packed)) + packed)

    def sync(self) -> None:
        """Have what was written on the disk."""
        if self._file is not None:
            self._file.sync()


def read_ledger(run_folder: Path) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Steps and the ids of their samples, ascending; a torn last record is left out.

    Raises DataError where it is damaged.
    """
    for step, samples, packed, _ in _records(run_folder / FILE):
        try:
            planes = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(8, samples)
        except (zlib.error, ValueError) as error:
            raise DataError(
                f"{run_folder / FILE} is damaged at step {step} ({error}); delete it to keep a new "
                "one from here on"
            ) from error
        differences = np.ascontiguousarray(planes.T).view(np.int64).reshape(-1)
        yield step, np.cumsum(differences)


def _records(path: Path) -> Iterator[tuple[int, int, bytes, int]]:
    """Steps, how many samples each has, what they are packed in, and where the record ends."""
    with path.open("rb") as file:
        while len(header := file.read(HEADER.size)) == HEADER.size:
            step, samples, size = HEADER.unpack(header)
            packed = file.read(size)
            if len(packed) < size:
                return
            yield step, samples, packed, file.tell()


def _left_out(run: RunSettings) -> list[tuple[int, int]]:
    """Positions that rollbacks have left out, also those since the newest checkpoint."""
    rolled_back = None
    for event in read_events(run.run_folder / EVENTS_FILE):
        if event["event"] == "built":  # a checkpoint tells, where the run starts or a stage begins
            rolled_back = None
        elif event["event"] == "rolled_back":
            rolled_back = event["left_out"]
    return rolled_back or left_out_before(latest_checkpoint(checkpoint_root(run)))


def check_ledger(plan: Plan) -> list[str]:
    """What a run's ledger proves, in lines; raises DataError if it is not as planned.

    Each step must have exactly the samples at its positions in the order of the data; and beside
    that it is counted how often each sample was taken.
    """
    if not (plan.first.run_folder / FILE).is_file():
        raise DataError(
            f"run {plan.first.run_folder} has no {FILE}; train with data.ledger=true to keep one"
        )
    left_out = _left_out(plan.first)
    sources_of = {stage.name: training_sources(stage.run, left_out) for stage in plan.stages}
    fingerprints = {name: sources.fingerprint for name, sources in sources_of.items()}
    taken: dict[str, list[NDArray[np.uint32]]] = {
        fingerprints[name]: [np.zeros(len(folder), np.uint32) for folder in sources.folders]
        for name, sources in sources_of.items()
    }
    steps: list[int] = []
    wrong: list[int] = []
    for step, ids_n in read_ledger(plan.first.run_folder):
        steps.append(step)
        if step >= plan.stages[-1].end_step:
            wrong.append(step)
            continue
        stage = plan.at(step + 1)
        sources = sources_of[stage.name]
        positions = np.arange(stage.sample_at(step), stage.sample_at(step + 1))
        planned = sorted(id_of(place) for place in sources.shuffled(positions))
        if ids_n.tolist() != planned:
            wrong.append(step)
            continue
        of_sources, numbers = places_of(ids_n)
        for source, times_n in enumerate(taken[fingerprints[stage.name]]):
            np.add.at(times_n, numbers[of_sources == source], 1)
    times = Counter(steps)
    expected = range(min(steps, default=0), max(steps, default=0))
    for problem, of in (
        ("with other samples than planned", wrong),
        ("missing", [step for step in expected if not times[step]]),
        ("more than once", sorted(step for step in times if times[step] > 1)),
    ):
        if of:
            shown = ", ".join(map(str, of[:SHOWN])) + (", ..." if len(of) > SHOWN else "")
            raise DataError(f"in {FILE}, {counted(len(of), 'step')} {problem}: {shown}")
    lines = [f"steps {steps[0]} to {steps[-1]}: each loaded exactly its samples"] if steps else []
    for fingerprint, name in {fingerprints[name]: name for name in sources_of}.items():
        folders = sources_of[name].folders
        for folder, times_n in zip(folders, taken[fingerprint], strict=True):
            lines.append(
                f"{without_secrets(str(folder))}: {times_n.sum():,} samples loaded out of "
                f"{len(times_n):,}, each of them {times_n.min():,} to {times_n.max():,} times"
            )
    return lines
