"""Measures one rank of many without the others: compute, model-FLOPs utilisation, memory.

    python tools/bench_rank.py configs/vlm-30b-megatron.yaml --ranks 128 --rank 0 --steps 3

The rank's real model and engine run real steps of random texts and pictures on this machine's GPU
(or CPU), and the planner's prediction of the same stands beside what is measured. Communication is
faked: nothing is sent and nobody is waited for. A gather copies this rank's own part into the place
of each other one (a write, as NCCL's would be); what a pipeline rank receives is noise, so that
multiplying it costs what real states cost.

Memory: on a GPU, the peak of all tensors; on a CPU, roughly, by how much the process has grown.
"""

import argparse
import gc
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from timing import Row, machine, markdown_table, write_results
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from megavlm.config.load import load_plan
from megavlm.config.objectives import is_pretraining
from megavlm.config.run import RunSettings, data_parallel_ranks, samples_per_micro_batch
from megavlm.data.packing import Batch, PackedText, Span, pack
from megavlm.dryrun.fake import alone_of_many
from megavlm.dryrun.record import Recorder
from megavlm.dryrun.run import with_micro_batches
from megavlm.engine.start import start_engine
from megavlm.errors import ConfigError, MegavlmError
from megavlm.planner.calibrate import gpu_here, measure
from megavlm.planner.compute import block_seconds
from megavlm.planner.cut import TOKENS_PER_TEXT, with_cut
from megavlm.planner.hardware import GIB, GPUS, H100_80, Cluster, Gpu, cluster_of
from megavlm.planner.memory import memory_of
from megavlm.planner.predict import cut_blocks
from megavlm.planner.step import ADAM_BYTES
from megavlm.planner.work import model_blocks, tokens_of, value_bytes

RECEIVED = 0.02
"""Standard deviation of the noise that stands for what other pipeline ranks send."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of one rank's step, communication left out."""

    compute_seconds: float
    """Forward and backward passes, what is recomputed, and the gradient's norm."""
    optimizer_seconds: float
    memory_bytes: float | None

    @property
    def step_seconds(self) -> float:
        return self.compute_seconds + self.optimizer_seconds


def stage_of(run: RunSettings, rank: int, ranks: int) -> int:
    """The rank's place in its pipeline, whose ranks lie farthest apart."""
    return rank // (ranks // run.model_parallel.pipeline_parallel)


def predicted(run: RunSettings, gpu: Gpu, rank: int, ranks: int) -> tuple[Figures, float]:
    """The planner's figures of a rank, and its share of the model's FLOPs in a step."""
    copies = data_parallel_ranks(run, ranks)
    tokens = tokens_of(run, samples_per_micro_batch(run.train, copies), TOKENS_PER_TEXT)
    parallel, stage = with_cut(run), stage_of(run, rank, ranks)
    blocks = model_blocks(run, tokens, parallel)
    chunks = cut_blocks(run, blocks, parallel)
    own = [b for chunk in chunks[stage :: parallel.pipeline_parallel] for b in chunk]
    seconds = [block_seconds(gpu, block) for block in own]
    compute = sum(s.forward + s.backward for s in seconds)
    compute += sum(s.recomputed(run.train.recompute) for s in seconds if s.backward)
    shards = copies if run.engine != "fsdp2" else run.fsdp2.shard_ranks or ranks
    updated = sum(block.parameters for block in own if block.trained) / shards
    memory_rate = gpu.memory_bytes_per_second * gpu.memory_efficiency
    cluster = Cluster(gpu=gpu, hosts=1, gpus_per_host=ranks)
    seen = sum(block.seen_training_flops for block in own)
    figures = Figures(
        compute_seconds=run.train.micro_batches * compute,
        optimizer_seconds=ADAM_BYTES * updated / memory_rate,
        memory_bytes=memory_of(run, cluster, TOKENS_PER_TEXT)[stage].tensors,
    )
    return figures, run.train.micro_batches * seen / parallel.tensor_parallel


def measured(run: RunSettings, rank: int, ranks: int, steps: int, device: torch.device) -> Figures:
    """Medians over steps, after one that warms up.

    Raises FloatingPointError where a gradient is no number: such a step takes another time.
    """
    import_module(f"megavlm.engine.{run.engine}")  # no part of the memory that is measured
    # As if alone on its host: this process has the first GPU, whatever its rank.
    with alone_of_many(run, rank, ranks, 1, Recorder()), noise_received():
        gc.collect()
        before = _resident_bytes("VmRSS")
        engine = start_engine(run, device)
        samples = samples_per_micro_batch(run.train, data_parallel_ranks(run, ranks))
        micro_batches = [random_batch(run, samples) for _ in range(run.train.micro_batches)]
        times: list[tuple[float, float]] = []
        with optimizer_times(device) as in_optimizer:
            for number in range(1 + steps):
                in_optimizer.clear()
                started = _now(device)
                result = engine.step(micro_batches, 1e-5)
                whole, optimizer = _now(device) - started, sum(in_optimizer)
                if not math.isfinite(result.gradient_norm):
                    raise FloatingPointError(f"step {number}: the gradient is no number")
                print(f"step {number}: {whole:.3f} s{'' if number else ', warms up'}", flush=True)
                times.append((whole - optimizer, optimizer))
                if number == 0:
                    _restart_peak(device)
        peak = _peak_bytes(device, before)
        engine.close()
    compute, optimizer = (statistics.median(column) for column in zip(*times[1:], strict=True))
    return Figures(compute_seconds=compute, optimizer_seconds=optimizer, memory_bytes=peak)


def random_batch(run: RunSettings, samples: int) -> Batch:
    """A micro-batch as the planner counts on: a picture for each sample, texts of its length."""
    encoder, data = run.model.encoder, run.data
    length = min(TOKENS_PER_TEXT, data.row_tokens)
    texts = [
        PackedText(
            torch.randint(10, run.model.decoder.vocabulary, (length + 1,)).tolist(),
            [Span(1, length + 1)],
            [(0, Span(slot, slot + 1))],
        )
        for slot in range(samples)
        for _ in range(data.texts_per_sample)
    ]
    side = encoder.image_pixels
    pixels = torch.randint(0, 256, (samples, 3, side, side), dtype=torch.uint8)
    return pack(texts, pixels, data, image_tokens=encoder.tokens)


@contextmanager
def noise_received() -> Iterator[None]:
    """Fill what a pipeline rank receives: memory as it was could hold anything, NaN included."""
    receive = dist.irecv

    def receive_noise(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        tensor.detach().normal_(0.0, RECEIVED)
        return receive(tensor, *args, **kwargs)

    # In both places, since torch compares a batch's operations with its own.
    with ExitStack() as stack:
        for owner in (dist, dist.distributed_c10d):
            stack.enter_context(patch.object(owner, "irecv", receive_noise))
        yield


@contextmanager
def optimizer_times(device: torch.device) -> Iterator[list[float]]:
    """Fill the list with the seconds of every optimiser's step while the body runs."""
    seconds: list[float] = []
    started = [0.0]

    def before(*_: Any) -> None:
        started[0] = _now(device)

    def after(*_: Any) -> None:
        seconds.append(_now(device) - started[0])

    hooks = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()


def _now(device: torch.device) -> float:
    """When the device has done all that it was told to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _restart_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _STATUS.exists():
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak becomes what there is now


def _peak_bytes(device: torch.device, resident_before: int) -> float | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _resident_bytes("VmHWM") - resident_before if _STATUS.exists() else None


_STATUS = Path("/proc/self/status")


def _resident_bytes(name: str) -> int:
    """VmRSS: now; VmHWM: at most. 0 where the system does not tell."""
    lines = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def rows_of(found: Figures, expected: Figures, seen_flops: float, peak_flops: float) -> list[Row]:
    """Each figure, measured and predicted."""

    def utilisation(figures: Figures) -> float:
        return seen_flops / (figures.step_seconds * peak_flops)

    figures: dict[str, Any] = {
        "forward, backward, recomputation, s": lambda f: f.compute_seconds,
        "optimiser, s": lambda f: f.optimizer_seconds,
        "step without communication, s": lambda f: f.step_seconds,
        "model-FLOPs utilisation of that": utilisation,
        "peak memory of tensors, GiB": lambda f: f.memory_bytes and f.memory_bytes / GIB,
    }
    return [
        {"figure": name, "measured": of(found), "predicted": of(expected)}
        for name, of in figures.items()
    ]


def table_of(rows: Sequence[Row]) -> str:
    lines: list[dict[str, str]] = []
    for row in rows:
        is_known = row["measured"] is not None
        lines.append(
            {
                "": row["figure"],
                "measured": f"{row['measured']:.4g}" if is_known else "-",
                "predicted": f"{row['predicted']:.4g}",
                "ratio": f"{row['measured'] / row['predicted']:.3f}" if is_known else "-",
            }
        )
    return markdown_table(lines)


def gpu_of(name: str | None, precision: str) -> Gpu:
    """What the prediction is for: the named GPU, or this machine's device."""
    if name is not None:
        return cluster_of(name, 1, 1).gpu
    return gpu_here() or measure(H100_80, 1, precision)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run_file", type=Path)
    parser.add_argument("overrides", nargs="*", help="such as train.recompute=selective")
    parser.add_argument("--ranks", type=int, required=True, help="of the run")
    parser.add_argument("--rank", type=int, default=0, help="the one to run; 0 unless given")
    parser.add_argument("--steps", type=int, default=3, help="after one that warms up")
    parser.add_argument("--micro-batches", type=int, help="of a step, if fewer")
    parser.add_argument(
        "--gpu",
        help=f"predict for this one ({', '.join(GPUS)}, or a file of `megavlm plan --calibrate`); "
        "unless given for the GPU that is here, which is measured if it is another",
    )
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    options = parser.parse_args(arguments)
    try:
        run = load_plan(options.run_file, options.overrides).last
        if is_pretraining(run.objectives):
            raise ConfigError("the planner predicts no pre-training; its last stage is another")
        if options.micro_batches:
            run = with_micro_batches(run, options.micro_batches)
        if not 0 <= options.rank < options.ranks:
            raise ConfigError(f"--rank {options.rank} must be below --ranks {options.ranks}")
        device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
        gpu = gpu_of(options.gpu, run.train.precision)
        peak = gpu.peak_flops_per_second(value_bytes(run))
        expected, seen_flops = predicted(run, gpu, options.rank, options.ranks)
        found = measured(run, options.rank, options.ranks, options.steps, device)
    except (MegavlmError, FloatingPointError) as error:
        sys.exit(f"bench_rank: {error}")
    rows = rows_of(found, expected, seen_flops, peak)
    about = machine(device) | {
        "run": str(options.run_file),
        "engine": run.engine,
        "overrides": " ".join(options.overrides) or "none",
        "rank": f"{options.rank} of {options.ranks}",
        "micro-batches": str(run.train.micro_batches),
        "steps": str(options.steps),
        "predicted for": gpu.name,
    }
    print(f"{about}\n{table_of(rows)}")
    if options.out:
        note = "\nCommunication is faked: see tools/bench_rank.py.\n"
        write_results(options.out, "One rank of many", about, table_of(rows) + note, rows)


if __name__ == "__main__":
    main()
