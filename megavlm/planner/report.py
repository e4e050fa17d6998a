"""What a run is, in numbers, before it starts."""

import json
import math
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megavlm.config.deepspeed_json import deepspeed_config
from megavlm.config.run import RunSettings, data_parallel_ranks, samples_per_micro_batch
from megavlm.model.params import count_by_part
from megavlm.planner.cut import TOKENS_PER_TEXT
from megavlm.planner.layout import Chunk, layout_of
from megavlm.planner.zero3 import with_bucket_sizes


def print_plan(run: RunSettings, ranks: int) -> None:
    """Print parameters by part, the batch and the schedule; `ranks` 0 leaves the split open.

    Raises ConfigError when the batch does not divide over the ranks.
    """
    counts = count_by_part(run.model)
    table = Table("part", "parameters", title="Model")
    table.columns[1].justify = "right"
    for part, count in counts.items():
        table.add_row(part, f"{count:,}")
    table.add_section()
    table.add_row("all", f"{sum(counts.values()):,}")
    console = Console()
    console.print(table)

    train, decoder = run.train, run.model.decoder
    warmup = math.ceil(train.steps * run.optimizer.warmup_fraction)
    lines = [
        f"{decoder.self_layers} self-attention and {len(decoder.cross_layers)} cross-attention "
        f"layers; {run.model.encoder.tokens} tokens per image",
        f"{train.steps:,} steps of {train.samples_per_step:,} samples "
        f"= {train.steps * train.samples_per_step:,} samples",
        f"learning rate up to {run.optimizer.learning_rate:g} over {warmup:,} steps, then cosine "
        f"to {run.optimizer.minimum_learning_rate:g}",
    ]
    if ranks:
        copies = data_parallel_ranks(run, ranks)
        lines.append(
            f"{copies} copies of the model x {train.micro_batches} micro-batches "
            f"x {samples_per_micro_batch(train, copies)} samples"
        )
    console.print("\n".join(lines), highlight=False, soft_wrap=True)
    if run.engine == "megatron":
        print_layout(run, ranks, console)


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


def write_deepspeed_json(run: RunSettings, path: Path) -> None:
    """Write the DeepSpeed configuration that the run uses."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(deepspeed_config(with_bucket_sizes(run)), indent=2) + "\n")
