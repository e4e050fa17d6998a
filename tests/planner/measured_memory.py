"""Memory that real ranks on CPUs take for a step, against the planner: a table, as Markdown.

python -m tests.planner.measured_memory
"""

import gc
from dataclasses import dataclass, replace

import torch

from megavlm.config.run import RunSettings
from megavlm.config.sizes import DecoderSizes, EncoderSizes, ModelSizes
from megavlm.dryrun.record import HELD
from megavlm.dryrun.run import batch_of, shapes_of, warm_up
from megavlm.engine.start import start_engine
from megavlm.planner.cut import TOKENS_PER_TEXT
from megavlm.planner.hardware import A100_40, Cluster
from megavlm.planner.memory import Memory, memory_of
from tests.ranks import run_on_ranks
from tests.runs import RUN, load_run
from tests.seen import seen

CPU = torch.device("cpu")
# Wide enough that tensors, not the allocator, make up the process.
SMALL = ModelSizes(
    encoder=EncoderSizes(width=512, layers=6, heads=8, mlp_width=2048, patch_pixels=14),
    decoder=DecoderSizes(
        width=1024,
        self_layers=8,
        cross_every=4,
        heads=16,
        kv_heads=8,
        mlp_width=2816,
        vocabulary=8192,
    ),
)
CASES: dict[str, tuple[int, tuple[str, ...]]] = {
    "Megatron TP2": (2, ("engine=megatron", *("megatron.tensor_parallel=2",))),
    "Megatron TP2 SP x PP2": (
        4,
        (
            *("engine=megatron", "megatron.tensor_parallel=2", "megatron.pipeline_parallel=2"),
            "megatron.sequence_parallel=true",
        ),
    ),
    "Megatron PP2": (2, ("engine=megatron", "megatron.pipeline_parallel=2")),
    "ZeRO-3": (2, ("engine=zero3",)),
    "FSDP2": (2, ("engine=fsdp2",)),
}


@dataclass(frozen=True)
class Row:
    """Of the rank that takes most."""

    name: str
    states: int
    """Weights, gradients and optimiser between steps."""
    beside: int
    """Of all other tensors when most are alive; FSDP2's gradients live during a step alone."""
    planned: Memory

    @property
    def planned_states(self) -> float:
        gradients = 0 if self.name.startswith("FSDP2") else self.planned.gradients
        return self.planned.weights + gradients + self.planned.optimizer

    @property
    def planned_beside(self) -> float:
        return self.planned.tensors - self.planned_states


def run_of(overrides: tuple[str, ...], ranks: int, recompute: str) -> RunSettings:
    """Two micro-batches of 4 samples on each copy of the model."""
    changed = [f"train.recompute={recompute}", "train.precision=bf16", "data.row_tokens=256"]
    small = load_run(RUN, [*overrides, *changed])
    copies = ranks // small.model_parallel.model_ranks
    train = replace(small.train, micro_batches=2, samples_per_step=2 * 4 * copies)
    return replace(small, model=SMALL, train=train)


def rows_of(name: str, recompute: str) -> list[Row]:
    """Of each pipeline rank."""
    ranks, overrides = CASES[name]
    run = run_of(overrides, ranks, recompute)
    planned = memory_of(run, Cluster(gpu=A100_40, hosts=1, gpus_per_host=ranks), TOKENS_PER_TEXT)
    taken = run_on_ranks(ranks, lambda _: _taken(run, ranks), parallel=run.model_parallel)
    each = ranks // len(planned)
    return [
        Row(f"{name}, {recompute}, rank {number * each}", *taken[number * each], memory)
        for number, memory in enumerate(planned)
    ]


def _taken(run: RunSettings, ranks: int) -> tuple[int, int]:
    """What the engine holds between steps, and what the peak of a step has beside it."""
    shapes = shapes_of(run, ranks)
    with seen() as recorder:
        engine = start_engine(run, CPU)
        if run.engine == "zero3":
            warm_up(engine, run, batch_of(run, shapes))
        gc.collect()
        memory = recorder.memory
        for kind, tensors in engine.held().items():
            memory.call_it(kind, tensors)
        states = sum(memory.live[kind] for kind in HELD)
        memory.kind = "batches"
        batches = [batch_of(run, shapes) for _ in range(run.train.micro_batches)]
        memory.kind = ""
        memory.start_peak()
        engine.step(batches, 1e-4)
    engine.close()
    beside = memory.peak - memory.at_peak["batches"] - states
    return states, beside


def main() -> None:
    """Print the table."""
    print("| run | states, MB | planned | beside, MB | planned |")
    print("|---|---|---|---|---|")
    for name in CASES:
        for recompute in ("none", "full"):
            for row in rows_of(name, recompute):
                print(
                    f"| {row.name} | {row.states / 1e6:.0f} | "
                    f"{row.planned_states / row.states - 1:+.1%} | {row.beside / 1e6:.0f} | "
                    f"{row.planned_beside / row.beside - 1:+.1%} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
