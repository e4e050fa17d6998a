"""What a run is, in numbers, before it starts."""

import json
import math
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megavlm.config.deepspeed_json import deepspeed_config
from megavlm.config.run import RunSettings, data_parallel_ranks, samples_per_micro_batch
from megavlm.model.params import count_by_part


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


def write_deepspeed_json(run: RunSettings, path: Path) -> None:
    """Write the DeepSpeed configuration that the run uses."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(deepspeed_config(run), indent=2) + "\n")
