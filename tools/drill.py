"""A fault drill: real runs of several processes that are killed, stopped, spoiled and cheated.

    python tools/drill.py --out docs/benchmarks/drill-cpu.md

Each engine trains `configs/drill.yaml` (or another run file of captioning) once without a fault,
and once under torchrun, which starts again what fails, with faults at random moments. At the end
the weights must be bit for bit those of the first. A further run has its gradients spoiled and goes
back each time; it must end as one whose `data.skip_samples` names what that left out. The first of
them lies on a small tmpfs, which is filled now and then, and takes root. The detection time of what
kills ranks lasts until all ranks of the start are gone, otherwise until the run tells the fault;
the recovery time, from the injection to the end of the first step (or checkpoint) after it.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
import yaml

from megavlm.checkpoint.copies import is_whole, union
from megavlm.checkpoint.listing import latest_checkpoint
from megavlm.checkpoint.load import lazy_tensors
from megavlm.checkpoint.storage import STATE_FILE, CheckpointReader, read_state
from megavlm.files.folder import Folder
from megavlm.train.events import EVENTS_FILE, Event, read_events
from megavlm.train.ledger import read_ledger
from megavlm.train.metrics import read_metrics

LAYOUTS = {
    "ZeRO-3": (2, ["engine=zero3"]),
    "FSDP2": (2, ["engine=fsdp2"]),
    "TP2 x PP2": (4, ["engine=megatron", "megatron={tensor_parallel: 2, pipeline_parallel: 2}"]),
}
LONGEST_SECONDS = 240
LATEST_STEPS = 18
"""A fault comes so many steps after the last one has passed, at most."""
DISK_BYTES = 64 << 20
PAGE_BYTES = 4096
SHARES = {
    "SIGKILL of a rank": 18,
    "SIGKILL while starting": 6,
    "hang of a rank": 8,
    "copies lost, newest checkpoint truncated": 4,
    "copies lost, newest checkpoint corrupt": 4,
    "newest checkpoint damaged": 4,
    "full disk": 6,
    "SIGTERM to a rank": 8,
    "NaN in a gradient": 6,
    "spike of a gradient": 4,
}
"""Of 68 injections an engine has so many."""
FAILED_SAVE = "training goes on to the next"
"""What a run prints of it."""
SPOILED = {"NaN in a gradient": "nan", "spike of a gradient": "spike"}


@dataclass(frozen=True, kw_only=True)
class Injection:
    """What a fault cost."""

    layout: str
    fault: str
    step: int
    detected_seconds: float
    recovered_seconds: float
    repeated_steps: int | None
    """None where nothing goes back."""


class DrillError(Exception):
    """Something did not recover, or not as it should."""


class Run:
    """A run under torchrun, seen from outside."""

    def __init__(self, run_file: Path, folder: Path, ranks: int, overrides: Sequence[str]) -> None:
        self.folder = folder
        self._words = [
            *(str(Path(sys.executable).with_name("torchrun")), "--standalone"),
            *(f"--nproc-per-node={ranks}", "--max-restarts=1000"),
            *(str(Path(__file__).with_name("drill_rank.py")), "train", str(run_file)),
            *(f"run_folder={folder}", *overrides),
        ]
        self.ranks = ranks
        self._log = folder.with_suffix(".log")

    def __enter__(self) -> "Run":
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._log.open("a") as log:
            self._launcher = psutil.Popen(
                self._words,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "DRILL_FOLDER": str(self.folder), "OMP_NUM_THREADS": "1"},
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._launcher.poll() is None:
            for process in [*self._launcher.children(recursive=True), self._launcher]:
                with suppress(psutil.Error):
                    process.kill()
            self._launcher.wait()

    def processes(self) -> list[psutil.Process]:
        """The ranks, in order; those that are just starting or ending may be missing."""
        found: dict[int, psutil.Process] = {}
        for process in self._launcher.children():
            with suppress(psutil.Error, KeyError):  # it has no environment of its own yet
                found[int(process.environ()["RANK"])] = process
        return [found[rank] for rank in sorted(found)]

    def events(self, name: str, since: float = 0.0) -> list[Event]:
        """Those of a name, since a time."""
        events = read_events(self.folder / EVENTS_FILE)
        return [e for e in events if e["event"] == name and e["unix_seconds"] > since]

    def step(self) -> int:
        """The last one that metrics.jsonl tells, or -1."""
        path = self.folder / "metrics.jsonl"
        if not path.is_file():
            return -1
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 20_000))
            lines = file.read().splitlines()
        for line in reversed(lines):
            with suppress(ValueError):
                entry = json.loads(line)
                if "gradient_norm" in entry:
                    return entry["step"]
        return -1

    def until(self, what: Callable[[], Any], told: str) -> Any:
        """Wait for something; raises DrillError where it takes too long, or the run ends."""
        deadline = time.monotonic() + LONGEST_SECONDS
        while not (found := what()):
            if time.monotonic() > deadline:
                raise DrillError(
                    f"{self.folder}: no {told} in {LONGEST_SECONDS} s; see {self._log}"
                )
            if self._launcher.poll() is not None:
                raise DrillError(f"{self.folder}: ended before {told}; see {self._log}")
            time.sleep(0.02)
        return found

    def finish(self) -> None:
        """Wait for the end; raises DrillError where it is a failure, or steps come no more."""
        step = -2
        while self._launcher.poll() is None:
            before, step = step, self.step()
            if step == before:
                raise DrillError(f"{self.folder}: no end after step {step}; see {self._log}")
            with suppress(psutil.TimeoutExpired):
                self._launcher.wait(LONGEST_SECONDS)
        if self._launcher.returncode:
            raise DrillError(f"{self.folder}: ended with {self._launcher.returncode}, {self._log}")

    def told(self) -> str:
        """What its processes have printed."""
        return self._log.read_text(errors="replace")

    def newest(self) -> Folder | None:
        return latest_checkpoint(Folder(self.folder / "checkpoints"))


class Drill:
    """Injects faults into a run, one after the other."""

    def __init__(self, run: Run, layout: str, rng: random.Random, memory: Path) -> None:
        self._run = run
        self._layout = layout
        self._rng = rng
        self._memory = memory
        self._damaged: set[int] = set()
        """Inodes of their `state.json`; one that is written again has another."""
        self._hurt: dict[str, Callable[[], int]] = {
            "SIGKILL of a rank": lambda: self._signal(signal.SIGKILL),
            "SIGKILL while starting": lambda: self._signal(signal.SIGKILL),
            "hang of a rank": lambda: self._signal(signal.SIGSTOP),
            "SIGTERM to a rank": lambda: self._signal(signal.SIGTERM),
            "copies lost, newest checkpoint truncated": lambda: self._damage(_truncate),
            "copies lost, newest checkpoint corrupt": lambda: self._damage(_flip_a_bit),
            "newest checkpoint damaged": lambda: self._damage(
                rng.choice((_truncate, _flip_a_bit)), copies_stay=True
            ),
        }

    def inject(self, fault: str) -> Injection:
        """Wait for a random moment, inject a fault, and wait until the run has recovered."""
        run, rng = self._run, self._rng
        target = run.step() + rng.randint(4, LATEST_STEPS)
        run.until(lambda: run.step() >= target, f"step {target}")
        run.until(lambda: len(self._whole()) > 1, "two checkpoints")
        time.sleep(rng.random())
        before, step = time.time(), run.step()
        if fault == "full disk":
            return self._fill_disk(before, step)
        if fault in SPOILED:
            return self._spoil(fault, before, step)
        old = {process.pid for process in run.processes()}
        kept = self._hurt[fault]()
        run.until(lambda: not any(map(psutil.pid_exists, old)), "end of all ranks")
        detected, last_step = time.time(), run.step()
        since = self._kill_again() if fault == "SIGKILL while starting" else before
        first = run.until(lambda: run.events("first_step_done", since), "first step")[-1]
        back = run.events("resumed", since)[-1]["step"]
        if fault == "SIGTERM to a rank":
            kept = last_step + 1  # which it has saved
        if back < kept:
            raise DrillError(f"{run.folder}: {fault}: back to step {back}, not to {kept}")
        return Injection(
            layout=self._layout,
            fault=fault,
            step=step,
            detected_seconds=detected - before,
            recovered_seconds=first["unix_seconds"] - before,
            repeated_steps=max(0, last_step + 1 - back),
        )

    def _signal(self, number: signal.Signals) -> int:
        """Returns the step before which the run must not go back, as `_damage` does."""
        kept = max(self._copied(), _step_of(self._whole()[-1]))
        self._rng.choice(self._run.processes()).send_signal(number)
        return kept

    def _kill_again(self) -> float:
        """While the ranks are starting; returns when."""
        run = self._run
        starting = run.until(run.processes, "new ranks")
        time.sleep(8 * self._rng.random())
        before = time.time()
        self._rng.choice(starting).send_signal(signal.SIGKILL)
        if run.events("first_step_done", starting[0].create_time()):
            raise DrillError(f"{run.folder}: started before it was killed again; kill it earlier")
        return before

    def _damage(
        self, damage: Callable[[Path, random.Random], None], copies_stay: bool = False
    ) -> int:
        """A crash that damages the newest checkpoint, and may cost the copies in memory."""
        processes = self._run.processes()
        for process in processes:
            process.kill()
        psutil.wait_procs(processes, timeout=LONGEST_SECONDS)
        if not copies_stay:
            shutil.rmtree(self._memory, ignore_errors=True)
            self._memory.mkdir()
        *_, earlier, newest = self._whole()
        self._damaged.add((newest / STATE_FILE).stat().st_ino)
        damage(newest, self._rng)
        return max(self._copied(), _step_of(earlier))

    def _whole(self) -> list[Path]:
        """Checkpoints that are as they were written."""
        found: list[Path] = []
        for folder in sorted((self._run.folder / "checkpoints").glob("step-*")):
            with suppress(FileNotFoundError):
                if (folder / STATE_FILE).stat().st_ino not in self._damaged:
                    found.append(folder)
        return found

    def _copied(self) -> int:
        """Step of the newest whole copy in memory; 0 if there is none."""
        steps = [0]
        for folder in self._memory.glob("megavlm-*/*/*/step-*"):
            with suppress(OSError, ValueError):
                copy = union(json.loads(path.read_bytes()) for path in folder.glob("*.json"))
                if copy is not None and is_whole(copy):
                    steps.append(copy["step"])
        return max(steps)

    def _fill_disk(self, before: float, step: int) -> Injection:
        run, filler = self._run, self._run.folder / "filler"
        failures = run.told().count(FAILED_SAVE)
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            for _ in range(DISK_BYTES // PAGE_BYTES):
                file.write(bytes(PAGE_BYTES))
        try:  # events are kept back until there is room
            run.until(lambda: run.told().count(FAILED_SAVE) > failures, "failed save")
        finally:
            filler.unlink()
        [failed, *_] = run.until(lambda: run.events("checkpoint_failed", before), "its event")
        since = failed["unix_seconds"]
        [saved, *_] = run.until(lambda: run.events("checkpoint_committed", since), "good save")
        return Injection(
            layout=self._layout,
            fault="full disk",
            step=step,
            detected_seconds=since - before,
            recovered_seconds=saved["unix_seconds"] - before,
            repeated_steps=None,
        )

    def _spoil(self, fault: str, before: float, step: int) -> Injection:
        run = self._run
        # Under pipelines the last stage has the losses.
        rank = self._rng.randrange(run.ranks // 2, run.ranks)
        (run.folder / f"{SPOILED[fault]}-{rank}").touch()
        [back, *_] = run.until(lambda: run.events("rolled_back", before), "rollback")
        run.until(lambda: run.step() > back["from"], "steps after the rollback")
        return Injection(
            layout=self._layout,
            fault=fault,
            step=step,
            detected_seconds=run.events("bad_step", before)[0]["unix_seconds"] - before,
            recovered_seconds=time.time() - before,
            repeated_steps=back["from"] + 1 - back["to"],
        )


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _truncate(checkpoint: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(checkpoint.iterdir()))
    os.truncate(path, rng.randrange(path.stat().st_size))


def _flip_a_bit(checkpoint: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(checkpoint.iterdir()))
    with path.open("r+b") as file:
        position = rng.randrange(path.stat().st_size)
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1 << rng.randrange(8)]))


@contextmanager
def _small_disk(folder: Path):
    """A tmpfs, where that is allowed; tells whether it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    mounted = subprocess.run(words, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def _weights(run: Run) -> dict[str, torch.Tensor]:
    newest = run.newest()
    assert newest is not None
    reader = CheckpointReader(newest)
    return {name: lazy.read() for name, lazy in lazy_tensors(reader).items()}


def _differing(run: Run, expected: dict[str, torch.Tensor]) -> list[str]:
    """Tensors that are not the same, moments included."""
    found = _weights(run)
    if found.keys() != expected.keys():
        raise DrillError(f"{run.folder} has other tensors than the run without faults")
    return [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])]


def _compare_lines(run: Run, expected: Run) -> None:
    """Raise DrillError unless metrics and samples of all steps are there, once each."""
    if _losses(run) != _losses(expected):
        raise DrillError(
            f"{run.folder}/metrics.jsonl has other steps or losses than without faults"
        )
    if _samples(run) != _samples(expected):
        raise DrillError(f"{run.folder}: its ledger has other steps or samples than without faults")


def _losses(run: Run) -> list[tuple[int, float]]:
    lines = read_metrics(run.folder)
    return [(line["step"], line["loss"]) for line in lines if "gradient_norm" in line]


def _samples(run: Run) -> list[tuple[int, list[int]]]:
    return [(step, ids_n.tolist()) for step, ids_n in read_ledger(run.folder)]


def _schedule(injections: int, rng: random.Random) -> list[str]:
    total = sum(SHARES.values())
    faults = [f for f, share in SHARES.items() for _ in range(round(share * injections / total))]
    rng.shuffle(faults)
    return faults


def _drill(options: argparse.Namespace, layout: str, rng: random.Random) -> list[Injection]:
    ranks, overrides = LAYOUTS[layout]
    place = options.folder / layout.replace(" ", "")
    shutil.rmtree(place, ignore_errors=True)
    memory = place / "memory"
    memory.mkdir(parents=True)
    overrides = [*overrides, f"checkpoint.memory_folder={memory}", "data.ledger=true"]
    overrides += options.overrides
    faults = _schedule(options.injections, rng)
    done: list[Injection] = []

    def start(name: str, *more: str) -> Run:
        return Run(options.run_file, place / name, ranks, [*overrides, *more])

    def inject(run: Run, wanted: list[str]) -> None:
        drill = Drill(run, layout, rng, memory)
        for fault in wanted:
            done.append(drill.inject(fault))
            _tell(done[-1], len(done), len(faults))

    wanted = [fault for fault in faults if fault not in SPOILED]
    steps = _steps(len(wanted))
    with start("whole", steps) as whole:
        whole.finish()
    with _small_disk(place / "hurt") as mounted, start("hurt", steps) as run:
        if not mounted:
            wanted = [fault for fault in wanted if fault != "full disk"]
            print(f"{layout}: no full disks, which take root", flush=True)
        inject(run, wanted)
        run.finish()
        different = _differing(run, _weights(whole))
        print(f"{layout}: {len(different)} tensors differ from the run without faults", flush=True)
        if different:
            raise DrillError(f"{layout}: {', '.join(different[:5])} differ")
        _compare_lines(run, whole)
    wanted = [fault for fault in faults if fault in SPOILED]
    steps = _steps(len(wanted))
    with start("spoiled", steps) as run:
        inject(run, wanted)
        run.finish()
    newest = run.newest()
    assert newest is not None
    left_out = json.dumps(read_state(newest)["left_out"])
    with start("without", steps, f"data.skip_samples={left_out}") as without:
        without.finish()
    if different := _differing(run, _weights(without)):
        raise DrillError(f"{layout}: {', '.join(different[:5])} differ after rollbacks")
    print(f"{layout}: no tensor differs from the run that leaves the same samples out", flush=True)
    return done


def _steps(injections: int) -> str:
    """More than it takes."""
    return f"train.steps={LATEST_STEPS * injections + 100}"


def _tell(injection: Injection, number: int, of: int) -> None:
    repeated = injection.repeated_steps
    print(
        f"{injection.layout} {number}/{of}: {injection.fault} after step {injection.step}; "
        f"detected after {injection.detected_seconds:.1f} s, "
        f"recovered after {injection.recovered_seconds:.1f} s"
        + (f", {repeated} steps again" if repeated is not None else ""),
        flush=True,
    )


def _page(injections: Sequence[Injection], options: argparse.Namespace) -> str:
    rows: dict[tuple[str, str], list[Injection]] = defaultdict(list)
    for injection in injections:
        rows[injection.layout, injection.fault].append(injection)
    settings = yaml.safe_load(options.run_file.read_text())["checkpoint"]
    lines = [
        f"# Fault drill: {len(injections)} injections",
        "",
        f"`python tools/drill.py --seed {options.seed}` on {os.cpu_count()} cores without a GPU, "
        f"over gloo: `{options.run_file}`, checkpoints every {settings['every']} steps, copies in "
        f"memory every {settings['memory_every']}. All runs ended, each with the weights and "
        "moments of a run without faults, bit for bit, and with its losses and samples in "
        "`metrics.jsonl` and the ledger; those whose gradients were spoiled, with the weights of a "
        "run that leaves out the same samples. None went back further than to the newest whole "
        "copy in memory, or the newest whole checkpoint where no newer copy was left. Seconds: "
        "median, and most; those of a hang have `guard.hang_seconds` in them, and torchrun's 30 s "
        "for a rank that is stopped.",
        "",
        "| engine | fault | times | detected (s) | recovered (s) | steps again, at most |",
        "|---|---|---|---|---|---|",
    ]
    for (layout, fault), those in sorted(rows.items(), key=_place):
        detected = [i.detected_seconds for i in those]
        recovered = [i.recovered_seconds for i in those]
        repeated = [i.repeated_steps for i in those if i.repeated_steps is not None]
        lines.append(
            f"| {layout} | {fault} | {len(those)} | {median(detected):.1f}, {max(detected):.1f} | "
            f"{median(recovered):.1f}, {max(recovered):.1f} | {max(repeated, default='none')} |"
        )
    return "\n".join([*lines, ""])


def _place(row: tuple[tuple[str, str], list[Injection]]) -> tuple[int, int]:
    """In the order of the lists above."""
    (layout, fault), _ = row
    return list(LAYOUTS).index(layout), list(SHARES).index(fault)


def main() -> None:
    """Drill layouts; writes a table, and all injections beside it as JSON.

    What stands there of other layouts stays.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run_file", type=Path, nargs="?", default=Path("configs/drill.yaml"))
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--injections", type=int, default=68, help="of each layout")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("runs/drill"), help="for the runs")
    parser.add_argument("--out", type=Path, required=True, help="Markdown file of the table")
    options = parser.parse_args()
    figures = options.out.with_suffix(".json")
    before = json.loads(figures.read_text()) if figures.is_file() else []
    done = [Injection(**one) for one in before if one["layout"] not in options.layouts]
    for layout in options.layouts:
        try:
            done += _drill(options, layout, random.Random(f"{options.seed} {layout}"))
        except DrillError as error:
            sys.exit(f"{layout}: {error}")
        options.out.write_text(_page(done, options))
        figures.write_text(json.dumps([asdict(injection) for injection in done], indent=1) + "\n")
    print(f"{len(done)} injections: {options.out}")


if __name__ == "__main__":
    main()
