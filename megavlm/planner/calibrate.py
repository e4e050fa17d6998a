"""Measures the machine at hand, in place of what `hardware` assumes of it."""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import psutil
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.multiprocessing.spawn import spawn
from torch.nn import functional

from megavlm.dist import groups
from megavlm.planner.compute import ATTENTION_BACKWARD
from megavlm.planner.hardware import Gpu, gpu_named, precision_bytes
from megavlm.planner.work import Attention

MEASURE_SECONDS = 0.6
"""For each rate: GPUs under load have lowered their clocks after some tenths of a second."""
WINDOW_SECONDS = 0.02
LINK_REPEATS = 9
LINK_BYTES_OF_GPUS = (64 << 20, 256 << 20, 1 << 30)
"""Whole tensors that are gathered."""
LINK_BYTES_OF_CPUS = (1 << 20, 4 << 20, 16 << 20)


class Rates(NamedTuple):
    """Of one rank while all ranks of its host do the same."""

    matmul_flops_per_second: float
    attention_flops_per_second: float
    """Of forward and backward pass together, counted as the planner counts them."""
    memory_bytes_per_second: float
    launch_seconds: float
    link_bytes_per_second: float
    """As NCCL and gloo count it; 0 if there is but one rank."""


def measure(gpu: Gpu, ranks: int | None, precision: str) -> Gpu:
    """What the GPUs of this host, or its CPU, reach.

    ranks: that measure at a time, at most as many as there are GPUs; None is one on each GPU, or
    one on the CPU.
    gpu: what is assumed. Where this machine has such GPUs its nominal figures stay and their
    efficiencies change; of other devices the nominal figures are the measured ones. What one host
    cannot tell stays as assumed: the network, and with one rank the link.
    """
    if gpus := torch.cuda.device_count():
        ranks = min(ranks or gpus, gpus)
    ranks = ranks or 1
    with tempfile.TemporaryDirectory() as folder:
        spawn(_on_rank, (ranks, precision, MEASURE_SECONDS, folder), nprocs=ranks)
        rates = Rates(*json.loads((Path(folder) / "rates.json").read_text()))
    here = gpu_here()
    assumed = gpu if here and here.name == gpu.name else _this_device(gpu, ranks, precision)
    measured = with_rates(assumed, rates, precision)
    if torch.cuda.is_available():
        return measured
    own = measured.memory_bytes_per_second  # a CPU's memory is that of its host
    return replace(measured, host_link_bytes_per_second=own, host_memory_bytes_per_second=own)


def with_rates(gpu: Gpu, rates: Rates, precision: str) -> Gpu:
    """The same GPU reaching these rates; where it has no nominal one (0), that is the nominal.

    precision: in which they were measured. The other one is assumed to reach the same share of its
    nominal rate, and where there is none, the same rate.
    """
    memory = gpu.memory_bytes_per_second or rates.memory_bytes_per_second
    link = gpu.link_bytes_per_second or rates.link_bytes_per_second
    matmul = rates.matmul_flops_per_second
    nominal = replace(
        gpu,
        matmul_flops_per_second=gpu.matmul_flops_per_second or matmul,
        fp32_matmul_flops_per_second=gpu.fp32_matmul_flops_per_second or matmul,
        memory_bytes_per_second=memory,
    )
    flops = nominal.peak_flops_per_second(precision_bytes(precision))
    measured = replace(
        nominal,
        matmul_efficiency=matmul / flops,
        attention_efficiency=rates.attention_flops_per_second / flops,
        memory_efficiency=rates.memory_bytes_per_second / memory,
        launch_seconds=rates.launch_seconds,
    )
    if not rates.link_bytes_per_second:
        return measured
    efficiency = rates.link_bytes_per_second / link
    return replace(measured, link_bytes_per_second=link, link_efficiency=efficiency)


def print_calibration(measured: Gpu, assumed: Gpu, precision: str) -> None:
    """A table of both, at the precision that was measured."""
    table = Table("", "measured", "assumed", "ratio", title=f"{measured.name} / {assumed.name}")
    for column in table.columns[1:]:
        column.justify = "right"
    for (name, value), (_, before) in zip(
        _figures(measured, precision), _figures(assumed, precision), strict=True
    ):
        if value == before:
            table.add_row(name, "not measured", f"{before:,.4g}", "")
        else:
            table.add_row(name, f"{value:,.4g}", f"{before:,.4g}", f"{value / before:.3g}")
    Console().print(table)


def _figures(gpu: Gpu, precision: str) -> list[tuple[str, float]]:
    flops = gpu.peak_flops_per_second(precision_bytes(precision))
    memory = gpu.memory_bytes_per_second
    return [
        ("matrix products, TFLOP/s", flops * gpu.matmul_efficiency / 1e12),
        ("attention, TFLOP/s", flops * gpu.attention_efficiency / 1e12),
        ("memory, GB/s", memory * gpu.memory_efficiency / 1e9),
        ("launch of a kernel, us", gpu.launch_seconds * 1e6),
        ("link inside the host, GB/s", gpu.link_bytes_per_second * gpu.link_efficiency / 1e9),
        ("network, GB/s", gpu.network_bytes_per_second * gpu.network_efficiency / 1e9),
    ]


def gpu_here() -> Gpu | None:
    """What is known of this machine's first GPU; None if it has none, or another one."""
    if not torch.cuda.is_available():
        return None
    properties: Any = torch.cuda.get_device_properties(0)
    return gpu_named(properties.name, properties.total_memory)


def _this_device(gpu: Gpu, ranks: int, precision: str) -> Gpu:
    """This machine's device, without nominal rates for what is measured."""
    if torch.cuda.is_available():
        properties: Any = torch.cuda.get_device_properties(0)
        name, memory = torch.cuda.get_device_name(), properties.total_memory
        multiprocessors = properties.multi_processor_count
    else:
        name = f"CPU, {_threads(ranks)} of {os.cpu_count()} threads"
        memory, multiprocessors = psutil.virtual_memory().total // ranks, 1
    return replace(
        gpu,
        name=f"{name}, {precision}",
        memory_bytes=memory,
        multiprocessors=multiprocessors,
        matmul_flops_per_second=0.0,
        fp32_matmul_flops_per_second=0.0,
        memory_bytes_per_second=0.0,
        link_bytes_per_second=0.0 if ranks > 1 else gpu.link_bytes_per_second,
    )


def _threads(ranks: int) -> int:
    """Of each rank on a CPU, as the training loop sets them."""
    return max(1, (os.cpu_count() or 1) // ranks)


def _on_rank(rank: int, ranks: int, precision: str, seconds: float, folder: str) -> None:
    """One of the processes that measure; the first one writes what all have found."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    os.environ.update(LOCAL_WORLD_SIZE=str(ranks))
    if not torch.cuda.is_available():
        torch.set_num_threads(_threads(ranks))
    store = cast(Any, dist).FileStore(f"{folder}/store", ranks)
    with groups.world_group(store=store):
        rates = measure_rates(precision, seconds)
    if rank == 0:
        (Path(folder) / "rates.json").write_text(json.dumps(rates))


def measure_rates(precision: str, seconds: float) -> Rates:
    """Medians over all ranks of the world, which measure at the same time; collective.

    seconds: for each rate.
    """
    device = groups.device()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    measures: dict[str, Callable[[], float]] = {
        "matrix products": lambda: _matmul_rate(device, dtype, seconds),
        "attention": lambda: _attention_rate(device, dtype, seconds),
        "memory": lambda: _memory_rate(device, dtype, seconds),
        "launches": lambda: _launch_seconds(device, seconds),
        "link": lambda: _link_rate(device),
    }
    mine: list[float] = []
    _tell(f"measuring on {groups.world_size()} rank(s):", end=" ")
    for name, rate in measures.items():
        _tell(f"{name} ...", end=" ")
        dist.barrier()
        mine.append(rate())
    _tell("done")
    of_all = groups.from_all_ranks(mine)
    return Rates(*(statistics.median(values) for values in zip(*of_all, strict=True)))


def _tell(text: str, end: str = "\n") -> None:
    if groups.rank() == 0:
        print(text, end=end, flush=True)


def _matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """FLOP/s of a large matrix product."""
    side = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / _seconds_of(lambda: torch.mm(a, b, out=out), device, seconds)


def _attention_rate(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """FLOP/s of the attention of `model/layers.AttentionCore`, called as it calls it.

    As much of the encoder's (no mask, 257 tokens of a picture) as of the decoder's (packed texts
    behind a mask, grouped heads).
    """
    pictures, rows = (64, 4) if device.type == "cuda" else (4, 1)
    kinds = [(pictures, 257, 16, 16), (rows, 1024, 16, 4)]
    rates: list[float] = []
    for number, (batch, tokens, heads, groups_of_heads) in enumerate(kinds):
        q, k, v = (
            torch.randn(batch, n, tokens, 64, device=device, dtype=dtype, requires_grad=True)
            for n in (heads, groups_of_heads, groups_of_heads)
        )
        texts = torch.arange(tokens, device=device) // 64
        seen = (texts[:, None] == texts).tril()[None, None] if number else None
        gradient = torch.randn_like(q)

        def both(q: Any = q, k: Any = k, v: Any = v, seen: Any = seen, g: Any = gradient) -> None:
            out = functional.scaled_dot_product_attention(
                q, k, v, attn_mask=seen, enable_gqa=q.shape[1] != k.shape[1]
            )
            torch.autograd.grad(out, (q, k, v), g)

        flops = (1 + ATTENTION_BACKWARD) * Attention(batch * tokens**2, heads * 64).flops
        rates.append(flops / _seconds_of(both, device, seconds / 2))
    return statistics.harmonic_mean(rates)


def _memory_rate(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """Bytes/s, read and written, of an elementwise kernel on tensors larger than caches."""
    numel = (512 << 20 if device.type == "cuda" else 64 << 20) // dtype.itemsize
    a, b = (torch.ones(numel, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    moved = 3 * numel * dtype.itemsize
    return moved / _seconds_of(lambda: torch.add(a, b, out=out), device, seconds)


def _launch_seconds(device: torch.device, seconds: float) -> float:
    """From one kernel without work to the next."""
    a = torch.ones(8, device=device)
    return _seconds_of(lambda: a.add_(1.0), device, seconds / 2)


def _link_rate(device: torch.device) -> float:
    """Bytes/s that enter each rank when a large tensor is gathered: the best of some sizes."""
    ranks = dist.get_world_size()
    if ranks == 1:
        return 0.0
    rates: list[float] = []
    for whole in LINK_BYTES_OF_GPUS if device.type == "cuda" else LINK_BYTES_OF_CPUS:
        part = torch.ones(whole // ranks, dtype=torch.uint8, device=device)
        out = torch.empty(part.numel() * ranks, dtype=torch.uint8, device=device)
        times: list[float] = []
        # As often on all ranks: a rank that stopped by its clock would leave the others waiting.
        for _ in range(LINK_REPEATS):
            started = time.perf_counter()
            dist.all_gather_into_tensor(out, part)
            _wait(device)
            times.append(time.perf_counter() - started)
        rates.append((out.numel() - part.numel()) / statistics.median(times[1:]))
    return max(rates)


def _seconds_of(function: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Of one call, under sustained load: the median of the later half of this time."""

    def timed(calls: int) -> float:
        started = time.perf_counter()
        for _ in range(calls):
            function()
        _wait(device)
        return (time.perf_counter() - started) / calls

    timed(2)
    calls = max(1, int(WINDOW_SECONDS / timed(1)))
    windows: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(windows) < 4:
        windows.append(timed(calls))
    return statistics.median(windows[len(windows) // 2 :])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
