"""Runs ranks without data, compares them, and prints what they hold and send."""

import gc
import logging
import math
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from megavlm.config.run import RunSettings
from megavlm.config.sizes import divisors
from megavlm.dist.launch import check_hosts, named_hosts
from megavlm.dryrun.compare import disagreements, ranges
from megavlm.dryrun.record import HELD, Call
from megavlm.dryrun.run import (
    DryRun,
    Shapes,
    affordable,
    dry_run,
    neighbours,
    shapes_of,
    with_micro_batches,
)
from megavlm.errors import ConfigError
from megavlm.model.params import parameters_of
from megavlm.terminal import counted


def print_dry_run(
    run: RunSettings,
    ranks: int,
    *,
    chosen: Iterable[int] | None = None,
    micro_batches: int | None = None,
    gpus_per_host: int = 8,
    only_build: bool = False,
) -> None:
    """Run ranks, those that are chosen or neighbours of each kind, and print what they do.

    Raises ConfigError if they disagree, or if all ranks together do not hold the model, and
    LaunchError if ranks that must share a host do not.
    micro_batches: of the step; None leaves the choice to `affordable`.
    """
    run.zero3.check_device(has_gpu=False)
    for name in ("offload_optimizer", "offload_parameters"):
        if getattr(run.zero3, name) == "nvme":
            raise ConfigError(f"zero3.{name}=nvme needs a disk, and a dry run none; set it to cpu")
    numbers = sorted(set(chosen)) if chosen is not None else neighbours(run, ranks)
    for rank in numbers:
        if not 0 <= rank < ranks:
            raise ConfigError(f"--rank {rank}: {ranks} ranks are numbered 0 to {ranks - 1}")
    slots = min(ranks, gpus_per_host)
    if ranks % slots:
        raise ConfigError(
            f"--gpus-per-host {gpus_per_host} does not divide --ranks {ranks}; try one of "
            f"{divisors(ranks)}"
        )
    check_hosts(run, named_hosts(ranks // slots, slots), ranks)
    whole, shapes = run, shapes_of(run, ranks)
    if micro_batches is None:
        run = affordable(run)
    elif micro_batches > run.train.micro_batches:
        most = run.train.micro_batches
        raise ConfigError(f"--micro-batches {micro_batches}: a step has {most}; name at most those")
    else:
        run = with_micro_batches(run, micro_batches)
    console, start = Console(), time.monotonic()
    if not only_build:
        console.print(_what(run, whole, shapes), highlight=False)
    one = partial(
        _one, run, ranks=ranks, shapes=shapes, local_ranks=gpus_per_host, only_build=only_build
    )
    results = _run_all(one, run.engine, numbers, console)
    _print_memory(results, console)
    if not only_build:
        _print_collectives(results, console)
    _check_calls(results, console)
    if len(results) == ranks:
        _check_parameters(whole, results, console)
    slowest = max(result.build_seconds + result.step_seconds for result in results)
    console.print(
        f"{time.monotonic() - start:.0f} s; a rank took up to {slowest:.0f} s of one core and "
        f"{max(result.process_bytes for result in results) / 2**30:.1f} GiB",
        highlight=False,
    )


def _one(run: RunSettings, rank: int, **kwargs: Any) -> DryRun:
    gc.freeze()  # else each collection copies what the processes share
    gc.set_threshold(100_000)  # of the many objects that tensors are, few lie in cycles
    logging.disable(logging.INFO)  # DeepSpeed's and megatron-core's, on every rank
    return dry_run(run, rank=rank, **kwargs)


def _run_all(one: Any, engine: str, numbers: Sequence[int], console: Console) -> list[DryRun]:
    """Each rank in a process of its own, as many at once as there are cores."""
    import_module(f"megavlm.engine.{engine}")  # once, before processes are forked
    context: Any = multiprocessing.get_context("fork")
    workers = min(len(os.sched_getaffinity(0)), len(numbers))
    columns = (TextColumn("ranks"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        context.Pool(workers, maxtasksperchild=1) as pool,
        Progress(*columns, console=console, transient=True) as progress,
    ):
        return list(progress.track(pool.imap(one, numbers, chunksize=1), total=len(numbers)))


def _what(run: RunSettings, whole: RunSettings, shapes: Shapes) -> str:
    done, all_of_them = run.train.micro_batches, whole.train.micro_batches
    text = f"a step of {counted(all_of_them, 'micro-batch', 'micro-batches')}"
    if done < all_of_them:
        text = (
            f"{done} of a step's {all_of_them} micro-batches (the last stands for all later ones)"
        )
    rows = counted(shapes.rows, "row")
    return f"{text}, each of {rows} and {counted(shapes.images, 'image')}"


def _print_memory(results: Sequence[DryRun], console: Console) -> None:
    """What is held between steps, and what the peak of a step adds to it."""
    table = _table("Memory of a rank, GiB", ["params", "gradients", "optimizer", "buffers", "held"])
    if any(result.at_peak for result in results):
        for name in ("forward", "backward", "peak"):
            table.add_column(name, justify="right")
    _add_rows(table, {result.rank: [_sizes(result)] for result in results})
    console.print(table)


def _sizes(result: DryRun) -> list[str]:
    held, at_peak = result.held, result.at_peak
    sizes = [*(held.get(kind, 0) for kind in (*HELD, "buffers")), sum(held.values())]
    if at_peak:
        backward, peak = at_peak.get("backward", 0), sum(at_peak.values())
        sizes += [peak - backward - sum(held.values()), backward, peak]
    return [f"{size / 2**30:.2f}" for size in sizes]


def _print_collectives(results: Sequence[DryRun], console: Console) -> None:
    """What a step sends; `over` so many ranks."""
    table = _table("Calls of a rank in the step", ["operation", "over", "calls", "GiB"])
    table.columns[1].justify = "left"
    _add_rows(table, {result.rank: _totals(result.step) for result in results})
    console.print(table)


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table("ranks", title=title, title_justify="left", box=SIMPLE_HEAD, padding=0)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _add_rows(table: Table, rows_by_rank: Mapping[int, list[list[str]]]) -> None:
    """Ranks whose figures are the same, as far as they are shown, stand together."""
    alike: list[tuple[list[list[str]], list[int]]] = []
    for rank, rows in rows_by_rank.items():
        same = next((ranks for others, ranks in alike if others == rows), None)
        if same is None:
            alike.append((rows, [rank]))
        else:
            same.append(rank)
    for rows, ranks in alike:
        for number, row in enumerate(rows):
            table.add_row("" if number else ranges(ranks), *row)
        table.add_section()


def _totals(calls: Iterable[Call]) -> list[list[str]]:
    """Operation, ranks of the group, calls and GiB; the most bytes first."""
    counts: Counter[tuple[str, int]] = Counter()
    sizes: Counter[tuple[str, int]] = Counter()
    for call in calls:
        key = call.operation.strip("_"), len(call.ranks)
        counts[key] += 1
        sizes[key] += call.bytes
    return [
        [operation, f"{ranks}", f"{counts[operation, ranks]:,}", f"{size / 2**30:,.2f}"]
        for (operation, ranks), size in sizes.most_common()
    ]


def _check_calls(results: Sequence[DryRun], console: Console) -> None:
    for phase, calls_by_rank in (
        ("before the step", {r.rank: r.building for r in results}),
        ("in the step", {r.rank: r.step for r in results}),
    ):
        problems = disagreements(calls_by_rank)
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise ConfigError(f"ranks disagree {phase}: {problems[0]}{more}")
    if len(results) > 1:
        numbers = [result.rank for result in results]
        calls = sum(len(result.building) + len(result.step) for result in results)
        text = f"ranks {ranges(numbers)} agree on all their {calls:,} calls"
        console.print(text, highlight=False)


def _check_parameters(run: RunSettings, results: Sequence[DryRun], console: Console) -> None:
    boxes = frozenset[Any]().union(*(result.weights for result in results))
    held = sum(math.prod(shape) for _, _, shape in boxes)
    expected = sum(entry.numel for entry in parameters_of(run))
    if held != expected:
        raise ConfigError(f"all ranks hold {held:,} parameters, but the model has {expected:,}")
    console.print(f"all ranks together hold {held:,} parameters: the whole model", highlight=False)
