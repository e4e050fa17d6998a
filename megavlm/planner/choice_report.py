"""Prints how a plan would best run on a cluster, and what starts it. All is predicted."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megavlm.config.load import ONLY_STAGE
from megavlm.config.objectives import is_pretraining
from megavlm.config.plan import Plan, Stage
from megavlm.config.run import RunSettings, data_parallel_ranks, samples_per_micro_batch
from megavlm.dist.launch import check_hosts, environment, launch_command, torchrun_lines
from megavlm.errors import ConfigError, LaunchError
from megavlm.planner.choice import (
    MEAN_ERROR,
    best_of_each_layout,
    largest_part,
    layout_name,
    overrides,
    remedies,
    waits_for_communication,
    why_not,
)
from megavlm.planner.choice_files import HOSTFILE, write_choice
from megavlm.planner.hardware import GIB, Cluster
from megavlm.planner.memory import host_bytes
from megavlm.planner.report import words
from megavlm.planner.search import (
    FILLED,
    Candidate,
    Found,
    candidate_of,
    planned_stage,
    search,
)
from megavlm.planner.work import tokens_of
from megavlm.terminal import counted

MOST_FITTING, MOST_TOO_LARGE = 12, 3
"""Rows of the table."""
MUCH_PADDING = 0.3
"""Share of the text tokens from which on it is worth a word."""


def print_choice(
    plan: Plan,
    cluster: Cluster,
    tokens_per_text: float,
    hosts: dict[str, int],
    run_file: Path,
    given: Sequence[str],
    *,
    hostfile: Path | None,
    folder: Path | None,
) -> None:
    """Print a ranked table of layouts for the longest stage, and the settings of the fastest.

    hosts: slots by host, those of the hostfile if there is one. given: overrides of the run file.
    folder: where pictures, DeepSpeed's settings, a hostfile and a batch script go, if anywhere.
    Raises ConfigError where nothing divides or fits.
    """
    console = Console()
    planned = planned_stage(plan)
    run, others = planned.run, [stage for stage in plan.stages if stage is not planned]
    found = search(run, cluster, tokens_per_text, other_stages=others)
    try:
        check_hosts(run, hosts, cluster.ranks)
        # Of the search's the other stages may be changed.
        own = candidate_of(run, cluster, tokens_per_text, others)
        told = _about_the_run(own, found, tokens_per_text)
    except (ConfigError, LaunchError) as error:
        own, told = None, [f"As it stands, it is not compared: {error}"]
    console.print(_ranking(found, cluster, own))
    legend = _legend(planned, others, found, tokens_per_text)
    _print_lines(console, [*legend, "", *told])
    best = found.best
    console.print(f"\nChosen: {layout_name(best.run)}", style="bold")
    by_stage = {planned.name: best, **best.other_stages}
    _print_lines(console, [*_stage_lines(plan, by_stage), *_in_hosts(best)])
    changes = _changes(plan, by_stage, given)
    named = hostfile or (folder / HOSTFILE if folder else Path("HOSTFILE"))
    _print_lines(console, _launch_lines(best, hosts, named, run_file, changes))
    if hostfile is None:
        host, slots = next(iter(hosts.items()))
        how = f"{named} has lines such as `{host} slots={slots}`: put the names of your hosts there"
        if not folder:
            how = f"replace {named} by your own; --out DIR writes a template"
        _print_lines(console, [how])
    if folder is not None:
        template = hosts if hostfile is None else None
        written = write_choice(best, tokens_per_text, template, run_file, changes, folder)
        _print_lines(console, [f"wrote {path}" for path in written])


def _changes(plan: Plan, by_stage: dict[str, Candidate], given: Sequence[str]) -> list[str]:
    """The overrides that were given, but for those that the chosen layout changes, and its own."""
    changes: dict[str, str] = {}
    lists_stages = [stage.name for stage in plan.stages] != [ONLY_STAGE]
    for stage in plan.stages:
        if stage.name in by_stage:
            prefix = f"stages.{stage.name}." if lists_stages else ""
            found = overrides(by_stage[stage.name].run, stage.run, prefix)
            changes |= {change.partition("=")[0]: change for change in found}
    return [*(o for o in given if o.partition("=")[0] not in changes), *changes.values()]


def _stage_lines(plan: Plan, by_stage: dict[str, Candidate]) -> list[str]:
    """What each stage takes in the chosen layout."""
    told: list[str] = []
    for stage in plan.stages:
        candidate = by_stage.get(stage.name)
        if candidate is None:
            told.append(f"  {stage.name}: not predicted")
            continue
        _, batch, recompute, _, seconds, _ = _cells(candidate)
        gib = max(memory.total for memory in candidate.memory) / GIB
        days = candidate.prediction.seconds * stage.run.train.steps / 86_400
        told.append(
            f"  {stage.name}: {batch} samples, recompute {recompute}, {gib:.1f} GiB; {seconds} s a "
            f"step, {days:,.1f} days for {stage.run.train.steps:,} steps"
        )
    return told


def _print_lines(console: Console, lines: Sequence[str]) -> None:
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _ranking(found: Found, cluster: Cluster, own: Candidate | None) -> Table:
    best = found.chosen
    layouts = best_of_each_layout(found.ranked)
    fitting = [candidate for candidate in layouts if candidate.fits][:MOST_FITTING]
    too_large = [candidate for candidate in layouts if not candidate.fits][:MOST_TOO_LARGE]
    which = "the best of each layout"
    if best is None:
        smallest = sorted(found.ranked, key=lambda candidate: candidate.fullest.total)
        too_large = best_of_each_layout(smallest)[:MOST_FITTING]
        fitting, which = [], "none fits; the smallest of each layout"
    table = Table(
        *("layout", "batch", "recompute", "GiB", "s a step", "MFU", "why"),
        title=f"Predicted for {counted(cluster.hosts, 'host')} of "
        f"{cluster.gpus_per_host} x {cluster.gpu.name} "
        f"({cluster.gpu.memory_bytes / GIB:.0f} GiB): {which}",
    )
    for column in (3, 4, 5):
        table.columns[column].justify = "right"
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


def _legend(
    planned: Stage, others: Sequence[Stage], found: Found, tokens_per_text: float
) -> list[str]:
    """What was compared, on which assumptions, and what the columns mean."""
    too_large = sum(not candidate.fits for candidate in found.ranked)
    told = [f"{len(found.ranked):,} layouts compared; {too_large:,} of them do not fit"]
    if found.refused:
        rule, count = found.refused.most_common(1)[0]
        rest = sum(found.refused.values())
        such = f"such as {count:,} in which" if count < rest else "all because"
        told.append(f"{rest:,} more are refused, {such} {rule}")
    ranks = found.ranked[0].cluster.ranks
    samples = planned.run.train.samples_per_step
    if samples % ranks:
        below, above = samples // ranks * ranks or ranks, (samples // ranks + 1) * ranks
        told.append(
            f"train.samples_per_step={samples} does not divide among {ranks} GPUs, so that ZeRO-3, "
            f"FSDP2 and all copies of one GPU are out; compare with {below} or {above}"
        )
    told.append(
        "batch: micro-batches x samples of one; GiB: of the fullest GPU, CUDA and NCCL included; "
        "MFU: model FLOPs on real tokens over the GPUs' peak"
    )
    if found.chosen is not None:
        told.append(
            "why: the part by which a layout loses most to the chosen one, others may gain "
            "(computing includes padding); within the planner's error: at most "
            f"{MEAN_ERROR:.1%} slower, by which predictions of published runs err on average"
        )
    every = ", in every stage" if others else ""
    told.append(
        f"texts: {tokens_per_text:g} tokens each on average, with the prompt{every}; "
        "--tokens-per-text sets it to your data's"
    )
    if others:
        checks = [
            f"{stage.name} is checked to divide"
            + (" only" if is_pretraining(stage.run.objectives) else " and to fit")
            for stage in others
        ]
        told.append(
            f"stages: {planned.name} is planned, the longest that is predicted; {'; '.join(checks)}"
        )
    return told


def _about_the_run(own: Candidate, found: Found, tokens_per_text: float) -> list[str]:
    """Whether the run fits, where it waits, in words, and what would help."""
    step, prediction = own.prediction.step, own.prediction
    told: list[str] = []
    stands = "As it stands"
    if not own.fits:
        told.append(
            f"As it stands, it does not fit: the fullest GPU would hold "
            f"{own.fullest.total / GIB:.1f} GiB, {largest_part(own)} among them, and a plan fills "
            f"at most {FILLED:.0%} of {own.cluster.gpu.memory_bytes / GIB:.0f} GiB"
        )
        stands = "Had it room"
    # z: what rounds to 0 has no sign.
    told.append(
        f"{stands}, a step is predicted to take {prediction.seconds:.2f} s: "
        f"{step.compute_seconds:z.2f} s of computing, {step.recompute_seconds:z.2f} of "
        f"recomputing, {step.communication_seconds:z.2f} that communication adds, "
        f"{step.bubble_seconds:z.2f} of pipeline bubble, {step.optimizer_seconds:z.2f} of the "
        f"optimiser, {prediction.checkpoint_seconds:z.3f} of checkpoints; loading takes "
        f"{prediction.data_seconds:.2f} s beside it"
    )
    told += _in_hosts(own)
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
    if waits_for_communication(own):
        of_one = 1e3 / run.train.micro_batches
        told.append(
            f"It is bound by communication: a rank computes for "
            f"{of_one * step.compute_seconds:.0f} ms on the "
            f"{counted(samples, 'sample')} of a micro-batch, and communication adds "
            f"{of_one * step.communication_seconds:.0f} ms, because {_what_travels(run)}"
        )
    helps = remedies(own, found)
    if helps:
        told.append("What helps, predicted:")
    for name, candidate in helps:
        seconds = candidate.prediction.seconds
        gain = prediction.seconds / seconds
        told.append(f"  {name}: {seconds:.2f} s a step, {gain:.2f} times as fast")
    return told


def _in_hosts(candidate: Candidate) -> list[str]:
    """What hosts must hold in any stage, besides loaders and the system."""
    stages = (candidate, *candidate.other_stages.values())
    held = max(host_bytes(stage.run, stage.cluster) for stage in stages)
    told = f"Each host is predicted to hold {held / GIB:,.0f} GiB of what is offloaded"
    return [told] if held else []


def _what_travels(run: RunSettings) -> str:
    if run.engine == "megatron":
        if run.megatron.tensor_parallel > 1:
            return "tensor-parallel ranks exchange every layer's activations"
        return "copies of the model exchange gradients and weights in every step"
    backward, gradients = "backward", "all gradients"
    if run.train.frozen:
        backward = "backward where gradients pass"
        gradients = f"the gradients of {words(run.trained_parts)}"
    if run.engine == "zero3" and run.zero3.secondary_partition > 1:
        near = run.zero3.secondary_partition
        backward += f" (among {near} neighbours, but for a step's first forward pass)"
    return (
        f"each micro-batch gathers all weights anew, forward and {backward}, and reduces "
        f"{gradients}"
    )


def _launch_lines(
    best: Candidate,
    hosts: dict[str, int],
    hostfile: Path,
    run_file: Path,
    changes: Sequence[str],
) -> list[str]:
    train = ["megavlm", "train", str(run_file), *changes, "--hostfile", str(hostfile)]
    first, slots = next(iter(hosts.items()))
    where = f"or on every host, {first} being one of them:"
    note = "which checks hosts and settings, and becomes"
    if len(hosts) == 1:
        where = f"or on {first}:"
        note = (
            "which checks hosts and settings, starts all ranks where it is typed, whatever the "
            "hostfile calls that machine, and becomes"
        )
    told = [
        f"  {shlex.join(train)}",
        note,
        f"  {shlex.join(launch_command(hostfile, hosts, run_file, changes))}",
        where,
        f"  {torchrun_lines(hosts, run_file, changes)[first]}",
    ]
    variables = environment(best.run, f"<cores of a host / {slots}>")
    told.append("Environment: `megavlm train` sets, unless you have:")
    told += [f"  {v.name}={v.value}: {v.reason}" for v in variables if v.value is not None]
    told.append("and you, where needed, in .deepspeed_env (for torchrun exported on each host):")
    told += [f"  {v.name}: {v.reason}" for v in variables if v.value is None]
    return told
