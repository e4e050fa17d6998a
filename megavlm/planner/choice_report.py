"""Prints how a plan would best run on a cluster, and writes what starts it. All is predicted."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megavlm.config.load import load_plan
from megavlm.config.plan import Plan
from megavlm.config.run import data_parallel_ranks, samples_per_micro_batch
from megavlm.dist.launch import check_hosts, environment, sbatch_script, torchrun_lines
from megavlm.errors import ConfigError, LaunchError
from megavlm.planner.choice import (
    best_of_each_layout,
    layout_name,
    overrides,
    remedies,
    waits_for_communication,
    why_not,
)
from megavlm.planner.hardware import GIB, Cluster
from megavlm.planner.memory_picture import draw_memory, labels_of
from megavlm.planner.predict import predict
from megavlm.planner.report import deepspeed_json
from megavlm.planner.search import Candidate, Found, candidate_of, search
from megavlm.planner.step_picture import draw_step
from megavlm.planner.work import tokens_of

MOST_FITTING, MOST_TOO_LARGE = 12, 3
"""Rows of the table."""
MUCH_PADDING = 0.3
"""Share of the text tokens from which on it is worth a word."""


def print_choice(
    plan: Plan,
    cluster: Cluster,
    tokens_per_text: float,
    run_file: Path,
    given: Sequence[str],
    folder: Path | None,
) -> None:
    """Print a ranked table of layouts for the last stage, and the settings of the fastest.

    given: overrides of the run file. folder: where pictures, DeepSpeed's settings, a hostfile and
    a batch script go. Raises ConfigError where nothing divides or fits.
    """
    console = Console()
    run = plan.last
    others = [stage.run for stage in plan.stages[:-1]]
    found = search(run, cluster, tokens_per_text, other_stages=others)
    try:
        check_hosts(run, hosts_of(cluster), cluster.ranks)
        own = candidate_of(run, cluster, tokens_per_text)
        told = _about_the_run(own, found, tokens_per_text)
    except (ConfigError, LaunchError) as error:
        own, told = None, [f"\nAs it stands, it cannot run there: {error}"]
    console.print(_ranking(found, cluster, own))
    console.print(_counts(found), highlight=False)
    for line in told:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    best = found.best
    stage = f"stages.{plan.stages[-1].name}." if len(plan.stages) > 1 else ""
    changes = overrides(best.run, run, stage)
    names = {change.partition("=")[0] for change in changes}
    changes = [*(o for o in given if o.partition("=")[0] not in names), *changes]
    console.print(f"\nChosen: {layout_name(best.run)}", style="bold")
    for line in _launch_lines(best, run_file, changes):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    if folder is not None:
        try:
            written = _write(best, tokens_per_text, run_file, changes, folder)
        except OSError as error:
            raise ConfigError(f"cannot write to {folder}: {error}; choose another --out") from error
        for path in written:
            console.print(f"wrote {path}", highlight=False, soft_wrap=True)


def _ranking(found: Found, cluster: Cluster, own: Candidate | None) -> Table:
    table = Table(
        *("layout", "batch", "recompute", "GiB", "s a step", "MFU", "why"),
        title=f"Predicted for {cluster.hosts} hosts of {cluster.gpus_per_host} x "
        f"{cluster.gpu.name} ({cluster.gpu.memory_bytes / GIB:.0f} GiB): the best of each layout",
    )
    for column in (3, 4, 5):
        table.columns[column].justify = "right"
    best = found.best
    layouts = best_of_each_layout(found.ranked)
    fitting = [candidate for candidate in layouts if candidate.fits][:MOST_FITTING]
    too_large = [candidate for candidate in layouts if not candidate.fits][:MOST_TOO_LARGE]
    for rows in (fitting, too_large):
        for candidate in rows:
            style = "bold green" if candidate is best else ""
            table.add_row(*_cells(candidate), why_not(candidate, best), style=style)
        table.add_section()
    if own is not None:
        name, *cells = _cells(own)
        table.add_row(f"{name} (as it stands)", *cells, why_not(own, best), style="yellow")
    return table


def _cells(candidate: Candidate) -> list[str]:
    run, ranks = candidate.run, candidate.cluster.ranks
    samples = samples_per_micro_batch(run.train, data_parallel_ranks(run, ranks))
    return [
        layout_name(run),
        f"{run.train.micro_batches} x {samples}",
        run.train.recompute,
        f"{candidate.fullest.total / GIB:.1f}",
        f"{candidate.prediction.seconds:.3f}",
        f"{candidate.prediction.utilisation(candidate.cluster):.1%}",
    ]


def _counts(found: Found) -> str:
    too_large = sum(not candidate.fits for candidate in found.ranked)
    lines = [
        f"{len(found.ranked):,} layouts compared; {too_large:,} of them do not fit",
        "batch: micro-batches x samples of one; GiB: of the fullest GPU, CUDA and NCCL included; "
        "MFU: model FLOPs on real tokens over the GPUs' peak",
    ]
    if found.refused:
        rule, count = found.refused.most_common(1)[0]
        rest = sum(found.refused.values())
        lines.insert(1, f"{rest:,} more do not divide, such as {count:,} in which {rule}")
    return "\n".join(lines)


def _about_the_run(own: Candidate, found: Found, tokens_per_text: float) -> list[str]:
    """Where the run waits, in words, and what would help."""
    step, prediction = own.prediction.step, own.prediction
    told = [
        f"\nAs it stands, a step is predicted to take {prediction.seconds:.2f} s: "
        f"{step.compute_seconds:.2f} s of computing, {step.recompute_seconds:.2f} of recomputing, "
        f"{step.communication_seconds:.2f} of waiting for communication, "
        f"{step.bubble_seconds:.2f} of pipeline bubble, {step.optimizer_seconds:.2f} of the "
        f"optimiser, {prediction.checkpoint_seconds:.3f} of checkpoints; loading takes "
        f"{prediction.data_seconds:.2f} s beside it"
    ]
    run = own.run
    samples = samples_per_micro_batch(run.train, data_parallel_ranks(run, own.cluster.ranks))
    tokens = tokens_of(run, samples, tokens_per_text)
    padding = 1 - tokens.text_tokens / tokens.row_total
    if padding > MUCH_PADDING:
        told.append(
            f"{padding:.0%} of its text tokens are padding: {tokens.texts:,.0f} texts of a "
            f"micro-batch fill {tokens.rows} x {tokens.row_tokens:,} places. Fewer, larger "
            "micro-batches or a smaller data.row_tokens fill them."
        )
    if prediction.data_seconds > step.seconds:
        told.append("It is bound by loading: raise data.workers.")
    if not waits_for_communication(own):
        return told
    of_one = 1e3 / run.train.micro_batches
    told.append(
        f"It is bound by communication: a rank computes for {of_one * step.compute_seconds:.0f} ms "
        f"on the {samples} samples of a micro-batch, and waits for "
        f"{of_one * step.communication_seconds:.0f} ms, because {_what_travels(own)}"
    )
    helps = remedies(own, found.ranked, tokens_per_text)
    if helps:
        told.append("What helps, predicted:")
    for name, candidate in helps:
        seconds = candidate.prediction.seconds
        gain = prediction.seconds / seconds
        told.append(f"  {name}: {seconds:.2f} s a step, {gain:.1f} times as fast")
    return told


def _what_travels(own: Candidate) -> str:
    run = own.run
    if run.engine == "megatron":
        return "tensor-parallel ranks exchange every layer's activations"
    return (
        "each micro-batch gathers all weights anew, forward and backward, and reduces all gradients"
    )


def hosts_of(cluster: Cluster) -> dict[str, int]:
    """Slots by host, with names that stand for those of the real hosts."""
    return {f"node-{n:02d}": cluster.gpus_per_host for n in range(1, cluster.hosts + 1)}


def _launch_lines(best: Candidate, run_file: Path, changes: Sequence[str]) -> list[str]:
    cluster = best.cluster
    words = shlex.join(["megavlm", "train", str(run_file), *changes])
    [torchrun, *_] = torchrun_lines(hosts_of(cluster), run_file, changes).values()
    deepspeed = shlex.join(["--module", "megavlm", "train", str(run_file), *changes])
    told = [
        f"  {words} --hostfile hostfile",
        "which checks hosts and settings, and becomes",
        f"  deepspeed --hostfile hostfile {deepspeed}",
        "or on every host, node-01 being one of them:",
        f"  {torchrun}",
        "Environment:",
    ]
    for name, value, reason in environment(best.run, "CORES"):
        told.append(f"  {name}={value}: {reason}" if value else f"  {name}: {reason}")
    return told


def _write(
    best: Candidate,
    tokens_per_text: float,
    run_file: Path,
    changes: Sequence[str],
    folder: Path,
) -> list[Path]:
    """Pictures and files of the chosen layout."""
    folder.mkdir(parents=True, exist_ok=True)
    run, cluster = best.run, best.cluster
    step, memory = folder / "step.svg", folder / "memory.svg"
    draw_step(predict(run, cluster, tokens_per_text), run, cluster, step)
    draw_memory(best.memory, labels_of(run, cluster), cluster, memory)
    texts = {
        "hostfile": "".join(f"{host} slots={slots}\n" for host, slots in hosts_of(cluster).items()),
        "run.sbatch": sbatch_script(
            load_plan(run_file, changes), cluster.hosts, cluster.gpus_per_host, run_file, changes
        ),
    }
    if run.engine == "zero3":
        texts["deepspeed.json"] = deepspeed_json(run)
    for name, text in texts.items():
        (folder / name).write_text(text)
    return [step, memory, *(folder / name for name in texts)]
