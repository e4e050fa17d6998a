"""Timing of competing functions in one run, and what to hold the times against."""

import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

Function = Callable[[], object]


def interleaved_seconds(
    functions: dict[str, Function], device: torch.device, rounds: int
) -> dict[str, float]:
    """Median seconds of each function; each round runs all of them, so that noise hits all alike.

    On a GPU the L2 cache is emptied before each call and events time the device's work alone.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    spoiler = torch.empty(256 << 20, dtype=torch.uint8, device=device) if _is_gpu(device) else None
    for round_number in range(rounds + 2):
        for name, function in functions.items():
            if spoiler is not None:
                spoiler.zero_()
            elapsed = _seconds(function, device)
            if round_number >= 2:  # the first two warm up
                seconds[name].append(elapsed)
    return {name: statistics.median(times) for name, times in seconds.items()}


def _seconds(function: Function, device: torch.device) -> float:
    if _is_gpu(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def measured_ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of torch's large matrix product, and bytes/s of a large copy (read plus written)."""
    side = 8192 if _is_gpu(device) else 1536
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty((4 << 30) if _is_gpu(device) else (256 << 20), dtype=torch.uint8)
    source = source.to(device)
    target = torch.empty_like(source)
    seconds = interleaved_seconds(
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


def markdown_table(rows: list[dict[str, str]]) -> str:
    """One line per row; columns in the order of the first row's keys."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([row.get(key, "") for key in head] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def write_results(stem: Path, title: str, about: dict[str, str], table: str, rows: list) -> None:
    """`stem`.json with every figure and `stem`.md with the table."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(
        json.dumps({"machine": about, "rows": rows}, indent=1) + "\n"
    )
    head = f"# {title}\n\n{', '.join(f'{key}: {value}' for key, value in about.items())}\n\n"
    stem.with_suffix(".md").write_text(head + table)
    print(f"written: {stem.with_suffix('.md')}, {stem.with_suffix('.json')}")
