"""Checkpoints in figures: how long a save blocks the step, and what a conversion costs.

    python tools/bench_checkpoint.py save --ranks 2 --gb 2
    python tools/bench_checkpoint.py convert --gb 10

`save`: a training-like loop on real ranks over gloo saves its state, a synchronous and a background
save in turns; prints what each blocks. `convert`: a synthetic model of the shape of `vlm-30b` is
converted ours -> Mllama -> ours in a process of its own whose memory is read from the kernel, at
several sizes, beside `cp` of the same files in the same run. Files may still lie in the page cache
when they are read, for both.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch.multiprocessing.spawn import spawn

from megavlm.checkpoint.lazy import LazyTensor
from megavlm.checkpoint.save import CheckpointSaver
from megavlm.checkpoint.shards import shards_of_range
from megavlm.config.presets import PRESETS
from megavlm.config.run import CheckpointSettings
from megavlm.config.sizes import ModelSizes
from megavlm.convert.files import write_native
from megavlm.dist.groups import process_groups
from megavlm.files.folder import Folder
from megavlm.model.params import Parameter, parameters

REPEATS = 5
GB = 1e9
LARGEST_MATRIX_BYTES = 64_000 * 1_024 * 2


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("save", "convert"))
    parser.add_argument("--gb", type=float, default=2.0, help="of the state, or of the model")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        if options.what == "save":
            spawn(_measure_saves, (options.ranks, options.gb, name), nprocs=options.ranks)
        else:
            _measure_conversions(Path(name), options.gb)


def _measure_saves(rank: int, ranks: int, gigabytes: float, folder: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29577")
    torch.set_num_threads(1)
    columns = 4096
    rows = max(ranks, int(gigabytes * GB / 4 / columns / 60))
    entries = [Parameter(f"weights/{i}", (rows, columns)) for i in range(60)]
    with process_groups(seed=1):
        state = {}
        for entry in entries:
            size = -(-entry.numel // ranks)
            state[entry.name] = shards_of_range(entry, torch.randn(size), rank * size)
        savers = {
            kind: CheckpointSaver(
                Folder(Path(folder) / kind),
                CheckpointSettings(every=1, keep_last=1, asynchronous=kind == "background"),
            )
            for kind in ("synchronous", "background")
        }
        blocked: dict[str, list[float]] = {kind: [] for kind in savers}
        whole: dict[str, list[float]] = {kind: [] for kind in savers}
        for step in range(1, REPEATS + 2):
            for kind, saver in savers.items():
                torch.distributed.barrier()
                started = time.perf_counter()
                saver.save(step, state, {})
                blocked[kind].append(time.perf_counter() - started)
                saver.wait()
                whole[kind].append(time.perf_counter() - started)
        if rank == 0:
            print(f"| {gigabytes:g} GB on {ranks} ranks | blocked, s | until it is on disk, s |")
            print("|---|---|---|")
            for kind in savers:  # the first allocates
                cells = (statistics.median(times[kind][1:]) for times in (blocked, whole))
                print(f"| {kind} | {' | '.join(f'{cell:.3f}' for cell in cells)} |")
            ratio = statistics.median(blocked["synchronous"][1:]) / statistics.median(
                blocked["background"][1:]
            )
            print(f"\na background save blocks {ratio:.1f} times less")


def _measure_conversions(folder: Path, gigabytes: float) -> None:
    print("| model, GB | conversion | peak memory, MB | seconds | GB/s | cp, GB/s | cp's share |")
    print("|---|---|---|---|---|---|---|")
    points: list[tuple[float, float]] = []
    for size in (gigabytes / 4, gigabytes / 2, gigabytes):
        native, mllama, back = (folder / name for name in ("native", "mllama", "back"))
        sizes = _sizes_of(size)
        model_gb = _write_model(native, sizes) / GB
        for source, target, to in ((native, mllama, "mllama"), (mllama, back, "native")):
            copy_seconds = _seconds_of_copy(source, folder / "copy")
            seconds, peak_bytes = _convert(source, target, to)
            speed, copy_speed = model_gb / seconds, model_gb / copy_seconds
            points.append((model_gb, peak_bytes / 1e6))
            print(
                f"| {model_gb:.2f} | to {to} | {peak_bytes / 1e6:.0f} | {seconds:.1f} | "
                f"{speed:.2f} | {copy_speed:.2f} | {speed / copy_speed:.2f} |",
                flush=True,
            )
            os.sync()  # the disk is done with it before the next one
        for place in (native, mllama, back):
            shutil.rmtree(place)
    slope, base = _line(points)
    largest = LARGEST_MATRIX_BYTES / 1e6
    print(
        f"\nThe largest tensor has {largest:.0f} MB in every size. Projected, not measured, for "
        f"61 GB from the slope of {slope:.1f} MB a GB: {base + 61 * slope:.0f} MB, and what the "
        "larger tensors of such a model add."
    )


def _sizes_of(gigabytes: float) -> ModelSizes:
    """The preset's form at width 1,024, with as many layers as make so many GB in bf16."""
    sizes = PRESETS["vlm-30b"]
    encoder = replace(sizes.encoder, width=1024, mlp_width=4096, heads=16, layers=8)
    decoder = replace(sizes.decoder, width=1024, heads=8, kv_heads=2, mlp_width=8192)
    unit = replace(decoder, self_layers=5)
    one, two = (
        sum(2 * p.numel for p in parameters(ModelSizes(encoder=encoder, decoder=d)))
        for d in (unit, replace(decoder, self_layers=10))
    )
    units = max(1, round((gigabytes * GB - (2 * one - two)) / (two - one)))
    return ModelSizes(encoder=encoder, decoder=replace(decoder, self_layers=5 * units))


def _write_model(folder: Path, sizes: ModelSizes) -> int:
    """Random bf16 weights; returns their bytes."""
    generator = torch.Generator().manual_seed(1)

    def values(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(generator=generator)

    tensors = {
        f"weights/{p.name}": LazyTensor(p.shape, torch.bfloat16, lambda p=p: values(p.shape))
        for p in parameters(sizes)
    }
    folder.mkdir()
    state = {"step": 0, "settings": {"model": asdict(sizes)}, "tokenizer_sha256": None}
    write_native(Folder(folder), tensors, state, max_file_bytes=2_000_000_000)
    return sum(2 * p.numel for p in parameters(sizes))


def _convert(source: Path, target: Path, to: str) -> tuple[float, int]:
    """Seconds and peak resident bytes of `megavlm convert` in a process of its own."""
    script = (
        "import resource, sys; from megavlm.__main__ import main; "
        "code = main(sys.argv[1:]); "
        "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
    )
    command = [sys.executable, "-W", "ignore", "-c", script]
    command += ["convert", str(source), "--out", str(target), "--to", to, "--no-compare"]
    command += ["--no-tokenizer"] if to == "mllama" else []
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    assert done.returncode == 0, done.stderr
    assert json.loads((target / "certificate.json").read_text())["target"]["tensors"]
    return seconds, 1024 * int(done.stdout.split("peak ")[1])


def _seconds_of_copy(source: Path, target: Path) -> float:
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    os.sync()
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def _line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Slope and intercept of a least-squares line."""
    x, y = (torch.tensor(values, dtype=torch.float64) for values in zip(*points, strict=True))
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    return slope, float(y.mean()) - slope * float(x.mean())


if __name__ == "__main__":
    main()
