"""Timing of competing functions in one run, and what to hold the times against."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

Function = Callable[[], object]
Row = dict[str, Any]
Problem = TypeVar("Problem")

SLEEP_CYCLES = 2_000_000  # 1 ms on a GPU of 2 GHz
LONGEST_SLEEP_CYCLES = 32_000_000
DISAGREEMENT = 5  # times another's error


class UnavailableError(Exception):
    """A contender cannot run this problem here."""


def reason_of(error: Exception) -> str:
    """Why a contender cannot run, in a few words."""
    if isinstance(error, UnavailableError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:70]}"


def race(
    contenders: dict[str, Callable[[], tuple[Function, float | None]]],
    device: torch.device,
    rounds: int,
) -> list[Row]:
    """Seconds and relative error of each contender; one that raises, at any time, is refused alone.

    contenders: name -> what returns the function to time and the error of its result.
    """
    functions: dict[str, Function] = {}
    errors: dict[str, float | None] = {}
    refused: dict[str, str] = {}
    for name, prepare in contenders.items():
        try:
            functions[name], errors[name] = prepare()
        except Exception as error:
            refused[name] = reason_of(error)
    seconds, failed = interleaved_seconds(functions, device, rounds)
    refused |= failed
    mine = errors.get("megavlm")
    for name, error in errors.items():
        if mine and error and max(mine / error, error / mine) > DISAGREEMENT:
            print(f"  warning: relative error of {name} {error:.1e}, of megavlm {mine:.1e}")
    return [
        {
            "contender": name,
            "seconds": seconds.get(name),
            "relative_error": errors.get(name),
            "refused": refused.get(name),
        }
        for name in contenders
    ]


def interleaved_seconds(
    functions: dict[str, Function], device: torch.device, rounds: int
) -> tuple[dict[str, float], dict[str, str]]:
    """Median seconds of each function, and why the others could not be timed.

    Each round runs all of them, so that noise hits all alike. On a CPU: wall clock, caches as the
    function before left them. On a GPU: from the start of the function's first kernel to the end of
    its last, with an empty L2 cache and without the host's time to launch them, see `_gpu_seconds`.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    refused: dict[str, str] = {}
    sleeps = dict.fromkeys(functions, SLEEP_CYCLES)
    warm_up = 2 if _is_gpu(device) else 1
    for round_number in range(warm_up + rounds):
        for name, function in functions.items():
            if name in refused:
                continue
            try:
                if _is_gpu(device):
                    elapsed, sleeps[name] = _gpu_seconds(function, device, sleeps[name])
                else:
                    started = time.perf_counter()
                    function()
                    elapsed = time.perf_counter() - started
            except Exception as error:
                refused[name] = reason_of(error)
                continue
            if round_number >= warm_up:
                times[name].append(elapsed)
    return {n: statistics.median(t) for n, t in times.items() if n not in refused}, refused


def _gpu_seconds(function: Function, device: torch.device, sleep_cycles: int) -> tuple[float, int]:
    """The device's time, and how long it had to sleep before.

    While the device sleeps the host queues the whole function, so that its kernels then follow each
    other without gaps. If the device woke before the host was done, it sleeps twice as long and all
    is done again; only a function that waits for the device itself is timed with its gaps.
    """
    while True:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        _larger_than_cache(device).zero_()
        torch.cuda._sleep(sleep_cycles)
        start.record()
        function()
        end.record()
        woke_early = start.query()
        torch.cuda.synchronize()
        if not woke_early or sleep_cycles >= LONGEST_SLEEP_CYCLES:
            return start.elapsed_time(end) / 1e3, sleep_cycles
        sleep_cycles *= 2


@cache
def _larger_than_cache(device: torch.device) -> torch.Tensor:
    return torch.empty(256 << 20, dtype=torch.uint8, device=device)


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def measured_ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of torch's large matrix product, and bytes/s of a large copy (read plus written)."""
    side = 8192 if _is_gpu(device) else 1536
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    size = (4 << 30) if _is_gpu(device) else (256 << 20)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds, _ = interleaved_seconds(
        {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, device, rounds=8
    )
    return 2 * side**3 / seconds["product"], 2 * source.numel() / seconds["copy"]


def machine(device: torch.device) -> dict[str, str]:
    """What the figures were measured on."""
    if _is_gpu(device):
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_processor()}, {torch.get_num_threads()} thread(s)"
    return {"date": date.today().isoformat(), "device": name, "torch": torch.__version__}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{names[0] if names else platform.processor()} ({capability})"


def run_in_turn(
    problems: Sequence[Problem],
    contest: Callable[[Problem], list[Row]],
    report: Callable[[list[Row], str], None],
    seconds: float,
) -> list[Row]:
    """The rows of all problems, reported after each, with a line on those that have not run.

    After `seconds` no further problem starts.
    """
    deadline = time.monotonic() + seconds
    rows: list[Row] = []
    for i, problem in enumerate(problems):
        if i and time.monotonic() > deadline:
            print(f"no time left after {seconds:.0f} s for: {'; '.join(map(str, problems[i:]))}")
            break
        print(f"[{i + 1}/{len(problems)}] {problem}", flush=True)
        rows += contest(problem)
        left = "; ".join(map(str, problems[i + 1 :]))
        report(rows, f"\nNot run: {left}.\n" if left else "")
    return rows


def markdown_table(rows: list[dict[str, str]]) -> str:
    """One line per row; columns in the order of the first row's keys."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([row.get(key, "") for key in head] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def refusals(rows: list[Row]) -> str:
    """A list of the contenders that could not run, one line for each and its reason."""
    passes: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["refused"]:
            passes.setdefault((row["contender"], row["refused"]), []).append(row["direction"])
    lines = [
        f"- {name}{'' if 'forward' in where else f', {where[0]}'}: {reason}\n"
        for (name, reason), where in sorted(passes.items())
    ]
    return "\nCannot run some of these or all:\n\n" + "".join(lines) if lines else ""


def write_results(
    stem: Path, title: str, about: dict[str, str], text: str, rows: list[Row]
) -> None:
    """`stem`.json with every figure and `stem`.md with the text."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(
        json.dumps({"machine": about, "rows": rows}, indent=1) + "\n"
    )
    head = f"# {title}\n\n{', '.join(f'{key}: {value}' for key, value in about.items())}\n\n"
    stem.with_suffix(".md").write_text(head + text)
