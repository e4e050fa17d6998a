"""What a run is, in numbers, before it starts."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megavlm.config.deepspeed_json import deepspeed_config
from megavlm.config.objectives import Part, is_pretraining, parts_of
from megavlm.config.plan import Plan, Stage
from megavlm.config.run import RunSettings, data_parallel_ranks, samples_per_micro_batch
from megavlm.errors import ConfigError
from megavlm.model.params import (
    Parameter,
    all_parameters,
    carried_parts,
    count_by_part,
    parameters_of,
)
from megavlm.planner.cut import TOKENS_PER_TEXT
from megavlm.planner.layout import Chunk, layout_of
from megavlm.planner.zero3 import with_bucket_sizes
from megavlm.terminal import counted

COLOURS = ("blue", "yellow", "green", "magenta", "cyan", "red")


def print_plan(plan: Plan, ranks: int) -> None:
    """Print the model's parameters, and of each stage what it learns and how.

    `ranks` 0 leaves the split of the batch open. Raises ConfigError when it does not divide.
    """
    console = Console()
    console.print(_model(plan))
    run = plan.last
    console.print(
        f"{run.model.decoder.self_layers} self-attention and {len(run.model.decoder.cross_layers)} "
        f"cross-attention layers; {run.model.encoder.tokens} tokens per image",
        highlight=False,
    )
    console.print(_stages(plan, ranks))
    if len(plan.stages) > 1:
        console.print(_strip(plan, console.width))
    if run.engine == "megatron" and not is_pretraining(run.objectives):
        print_layout(run, ranks, console)


def _model(plan: Plan) -> Table:
    """Parameters by part: of the model, and of what its pre-training has beside it."""
    pretrains = any(is_pretraining(stage.run.objectives) for stage in plan.stages)
    language = any(not is_pretraining(stage.run.objectives) for stage in plan.stages)
    table = Table("part", "parameters", title="Model")
    table.columns[1].justify = "right"
    entries = all_parameters(plan.first.model) if pretrains else parameters_of(plan.first)
    for part, count in count_by_part(entries).items():
        table.add_row(part, f"{count:,}")
    if language:
        final = next(s.run for s in plan.stages if not is_pretraining(s.run.objectives))
        table.add_section()
        whole = "all" if not pretrains else "vision-language model"
        table.add_row(whole, f"{sum(e.numel for e in parameters_of(final)):,}")
    return table


def _stages(plan: Plan, ranks: int) -> Table:
    """A column for each stage."""
    several = len(plan.stages) > 1
    table = Table("", *(stage.name for stage in plan.stages), title="Stages" if several else "Run")
    columns = [_column(plan, stage, ranks) for stage in plan.stages]
    if several:
        for stage, column in zip(plan.stages, columns, strict=True):
            column.update(_carried(plan, stage))
    for name in columns[0]:
        # As Text, since folders may have brackets, which rich takes for markup.
        table.add_row(name, *(Text(column[name]) for column in columns))
    return table


def _column(plan: Plan, stage: Stage, ranks: int) -> dict[str, str]:
    run, train, settings = stage.run, stage.run.train, stage.run.optimizer
    several = len(run.objectives) > 1
    names = (f"{weight:g} x {o}" if several else o for o, weight in run.objectives.items())
    loss = f" ({run.contrastive.loss})" if "contrastive" in run.objectives else ""
    steps = plan.steps if settings.schedule == "plan" else train.steps
    micro_batches = counted(train.micro_batches, "micro-batch", "micro-batches")
    batch = f"{counted(train.samples_per_step, 'sample')} in {micro_batches}"
    if ranks:
        copies = data_parallel_ranks(run, ranks)
        samples = counted(samples_per_micro_batch(train, copies), "sample")
        batch = f"{counted(copies, 'copy', 'copies')} of the model x {micro_batches} x {samples}"
    scales = [f"{part} x {scale:g}" for part, scale in settings.scales.items()]
    if settings.encoder_layer_decay < 1:
        scales.append(f"x {settings.encoder_layer_decay:g} for each encoder layer below the last")
    extras = [f"recompute {train.recompute}", train.precision]
    extras += [f"z-loss {train.z_loss:g}"] if train.z_loss else []
    extras += [f"average of weights {train.ema_decay:g}"] if train.ema_decay else []
    return {
        "objectives": " + ".join(names) + loss,
        "steps": f"{train.steps:,} ({stage.first_step:,} to {stage.end_step:,})",
        "batch": batch,
        "samples": f"{train.steps * train.samples_per_step:,}",
        "data": "\n".join(_sources(run)),
        "pictures": _pictures(run),
        "trained": _parts(run, run.trained_parts),
        "frozen": _parts(run, train.frozen) or "nothing",
        "learning rate": f"up to {settings.learning_rate:g} over "
        f"{counted(math.ceil(steps * settings.warmup_fraction), 'step')}, then cosine to "
        f"{settings.minimum_learning_rate:g}"
        + (" over the plan" if settings.schedule == "plan" and len(plan.stages) > 1 else "")
        + "".join(f"\n{scale}" for scale in scales),
        "further": ", ".join(extras),
        "measured after": ", ".join(run.measures) or "nothing",
    }


def _sources(run: RunSettings) -> list[str]:
    parts = sum(source.parts for source in run.data.train)
    return [
        (f"{source.parts / parts:.0%} " if len(run.data.train) > 1 else "")
        + str(source.folder)
        + (f": {', '.join(source.tasks)}" if source.tasks else "")
        for source in run.data.train
    ]


def _pictures(run: RunSettings) -> str:
    """How pictures are varied, in short."""
    augment = run.data.augment
    told = [f"{run.model.encoder.image_pixels} pixels"]
    if augment.minimum_area < 1:
        told.append(f"crops of {augment.minimum_area:.0%} and more")
    if augment.operations:
        colours = "" if augment.colour_operations else " without colours"
        told.append(f"RandAugment({augment.operations}, {augment.magnitude}){colours}")
    return ", ".join(told)


def _parts(run: RunSettings, parts: tuple[Part, ...]) -> str:
    entries: list[Parameter] = parameters_of(run)
    counts: dict[Part, int] = {p: sum(e.numel for e in entries if e.setting == p) for p in parts}
    return "\n".join(f"{words([part])} ({short_count(n)})" for part, n in counts.items())


def _strip(plan: Plan, width: int) -> Text:
    """The stages' steps as one line of blocks, each stage with at least one."""
    blocks = max(0, width - sum(len(stage.name) + 2 for stage in plan.stages) - len(plan.stages))
    strip = Text(no_wrap=True, overflow="ellipsis")
    for number, stage in enumerate(plan.stages):
        length = 1 + int(blocks * stage.run.train.steps / plan.steps)
        strip.append(f"{stage.name} ")
        strip.append("█" * length + " ", style=COLOURS[number % len(COLOURS)])
    return strip


def _carried(plan: Plan, stage: Stage) -> dict[str, str]:
    """What a stage goes on with, and what is new in it.

    Weights are the newest of any stage before; moments are those of the stage right before.
    """
    number = plan.stages.index(stage)
    before, run = plan.stages[:number], stage.run
    seen = {entry.name for earlier in before for entry in parameters_of(earlier.run)}
    weights = _by_whether_in(run, seen)
    kept_moments = carried_parts(before[-1].run, run) if before else ()
    new_moments: list[Part] = [part for part in run.trained_parts if part not in kept_moments]
    # What start_from holds is not looked at before training.
    origin = "start_from or initial" if run.checkpoint.start_from else "initial"
    return {
        "goes on with": _told(("weights", weights[0]), ("moments", kept_moments)) or "nothing",
        "new in it": _told((f"weights ({origin})", weights[1]), ("moments", new_moments))
        or "nothing",
    }


def _by_whether_in(run: RunSettings, names: set[str]) -> tuple[list[Part], list[Part]]:
    """Parts of which a parameter is among the names, and of which one is not."""
    entries = parameters_of(run)
    inside = {entry.setting for entry in entries if entry.name in names}
    outside = {entry.setting for entry in entries if entry.name not in names}
    parts = parts_of(run.objectives)
    return [p for p in parts if p in inside], [p for p in parts if p in outside]


def _told(*kinds: tuple[str, Sequence[Part]]) -> str:
    return "\n".join(f"{kind}: {words(parts)}" for kind, parts in kinds if parts)


def words(parts: Iterable[Part]) -> str:
    """Parts of the model in plain words."""
    return ", ".join(part.replace("_", " ") for part in parts)


def short_count(count: int) -> str:
    """A number in three digits."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def print_layout(run: RunSettings, ranks: int, console: Console) -> None:
    """Print what each pipeline rank holds and computes, and which ranks are its own."""
    layout = layout_of(run)
    columns = ("pipeline", "chunk", "layers", "holds", "parameters", "cost")
    table = Table(*columns, title=f"Layout: each of {layout.tensor} tensor-parallel ranks")
    for column in (0, 1, 4, 5):
        table.columns[column].justify = "right"
    for rank in range(layout.pipeline):
        for chunk in layout.on(rank):
            layers = f"{chunk.layers.start}-{chunk.layers.stop - 1}"
            count, cost = f"{chunk.parameters:,}", f"{chunk.cost:.1%}"
            table.add_row(str(rank), str(chunk.number), layers, _contents(run, chunk), count, cost)
        if layout.virtual > 1:
            count = sum(chunk.parameters for chunk in layout.on(rank))
            table.add_row(str(rank), "all", "", "", f"{count:,}", f"{layout.cost(rank):.1%}")
            table.add_section()
    console.print(table)

    copies = data_parallel_ranks(run, ranks) if ranks else 0
    stride = str(copies * layout.tensor) if ranks else f"(copies x {layout.tensor})"
    lines = [
        f"rank = {stride} x pipeline + {layout.tensor} x data + tensor rank: tensor-parallel ranks "
        "are neighbours, pipeline stages lie farthest apart",
        f"cost: share of training FLOPs, for {TOKENS_PER_TEXT} tokens a text, without recompute; "
        f"the costliest pipeline rank has {layout.costliest_over_mean - 1:.1%} more than the mean",
        f"pipeline bubble, idle over busy time, (p - 1) / (m v) = ({layout.pipeline} - 1) / "
        f"({layout.micro_batches} x {layout.virtual}) = {layout.bubble:.1%}, were all chunks equal",
    ]
    if ranks:
        worst = max(layout.state_bytes(rank, copies) for rank in range(layout.pipeline))
        lines.append(
            f"weights, gradients and optimiser states: at most {worst / 1e9:.1f} GB a rank, "
            "without activations"
        )
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


def _contents(run: RunSettings, chunk: Chunk) -> str:
    """A chunk's modules in words."""
    self_layers = len(chunk.layers) - chunk.cross_layers
    contents = [f"{self_layers} self"] if self_layers else []
    if chunk.cross_layers:
        contents.append(f"{chunk.cross_layers} cross")
    if chunk.layers.start == 0:
        contents = ["encoder", *contents]
    if chunk.layers.stop == run.model.decoder.layers:
        contents.append("head")
    return ", ".join(contents)


def deepspeed_json(run: RunSettings) -> str:
    """The DeepSpeed configuration that the run uses."""
    return json.dumps(deepspeed_config(with_bucket_sizes(run)), indent=2) + "\n"


def write_deepspeed_json(run: RunSettings, path: Path) -> None:
    """Write the DeepSpeed configuration that the run uses. Raises ConfigError if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(deepspeed_json(run))
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}; choose another --ds-json") from error
