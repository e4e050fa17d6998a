"""One optimiser step of one rank of many, on tensors without data."""

import gc
import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from megavlm.config.objectives import is_pretraining
from megavlm.config.run import RunSettings, data_parallel_ranks, samples_per_micro_batch
from megavlm.data.packing import Batch, PairBatch
from megavlm.dryrun.fake import fake_rank, with_data
from megavlm.dryrun.record import Call
from megavlm.engine.base import Engine
from megavlm.engine.start import start_engine
from megavlm.planner.cut import TOKENS_PER_TEXT
from megavlm.planner.work import tokens_of

CPU = torch.device("cpu")
FEW_MICRO_BATCHES = 2
"""The first, and one that stands for all later ones."""

Box = tuple[str, tuple[int, ...], tuple[int, ...]]
"""A parameter's name, where in it a box of numbers begins, and the box's shape."""


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Of a micro-batch."""

    rows: int
    row_tokens: int
    images: int


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What one rank holds and sends."""

    rank: int
    held: Mapping[str, int]
    """Bytes between steps, by kind."""
    at_peak: Mapping[str, int]
    """Bytes at the peak of a step, by kind; empty if only built, like what follows from a step."""
    weights: frozenset[Box]
    """What it holds of the model, without padding."""
    building: tuple[Call, ...]
    """And of what comes before the step that is reported."""
    step: tuple[Call, ...]
    operations: int
    process_bytes: int
    """The most memory that this process took."""
    build_seconds: float
    step_seconds: float


def shapes_of(run: RunSettings, ranks: int) -> Shapes:
    """A guess: every sample has one picture, and texts of the planner's length."""
    samples = samples_per_micro_batch(run.train, data_parallel_ranks(run, ranks))
    if is_pretraining(run.objectives):
        run = replace(run, data=replace(run.data, texts_per_sample=1))
    tokens = tokens_of(run, samples, TOKENS_PER_TEXT)
    return Shapes(rows=tokens.rows, row_tokens=tokens.row_tokens, images=tokens.images)


def dry_run(
    run: RunSettings,
    *,
    rank: int,
    ranks: int,
    local_ranks: int = 8,
    shapes: Shapes | None = None,
    only_build: bool = False,
) -> DryRun:
    """Build a rank's engine and run a step of it, such as all but the first one are.

    In a process of its own: DTensor remembers for good where a rank is in a mesh.
    """
    shapes = shapes or shapes_of(run, ranks)
    with fake_rank(run, rank, ranks, min(ranks, local_ranks)) as recorder:
        memory = recorder.memory
        start = time.process_time()
        memory.kind = "buffers"
        engine = start_engine(run, CPU)
        if run.engine == "zero3" and not only_build:
            warm_up(engine, run, batch_of(run, shapes))
        gc.collect()
        built = time.process_time()
        for kind, tensors in engine.held().items():
            memory.call_it(kind, tensors)
        building = tuple(recorder.calls)
        recorder.calls.clear()
        held = {kind: size for kind, size in memory.live.items() if size}
        memory.start_peak()
        if not only_build:
            memory.kind = "batches"
            batches = [batch_of(run, shapes) for _ in range(run.train.micro_batches)]
            memory.kind = ""
            engine.step(batches, 1e-4)
        return DryRun(
            rank=rank,
            held=held,
            at_peak={} if only_build else {k: size for k, size in memory.at_peak.items() if size},
            weights=with_data(_weights)(engine),
            building=building,
            step=tuple(recorder.calls),
            operations=recorder.operations,
            process_bytes=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            build_seconds=built - start,
            step_seconds=time.process_time() - built,
        )


def warm_up(engine: Any, run: RunSettings, batch: Any) -> None:
    """Take a step of one micro-batch, so that DeepSpeed does the next one as all later ones.

    In the first it has not yet seen the order in which layers need their weights. And it leaves the
    secondary partition of the weights as it was built: only once the optimiser has changed them are
    they gathered over all ranks.
    """
    engine._engine.micro_steps = run.train.micro_batches - 1  # as if the others were done
    engine.step([batch], 0.0)


def _weights(engine: Engine) -> frozenset[Box]:
    return frozenset(
        (key.removeprefix("weights/"), tuple(origin), tuple(box.shape))
        for key, shards in engine.state().items()
        if key.startswith("weights/")
        for origin, box in shards.boxes.items()
    )


def affordable(run: RunSettings) -> RunSettings:
    """The run, with few micro-batches where each takes long: where all weights are gathered."""
    few = min(FEW_MICRO_BATCHES, run.train.micro_batches)
    return run if run.engine == "megatron" else with_micro_batches(run, few)


def with_micro_batches(run: RunSettings, micro_batches: int) -> RunSettings:
    """The run with fewer micro-batches of the same size: the engine does the same for each."""
    samples = run.train.samples_per_step // run.train.micro_batches * micro_batches
    train = replace(run.train, micro_batches=micro_batches, samples_per_step=samples)
    return replace(run, train=train)


def neighbours(run: RunSettings, ranks: int) -> list[int]:
    """On each pipeline stage, a rank and the next one in each direction; and the last of all."""
    parallel = run.model_parallel
    tensor, copies = parallel.tensor_parallel, data_parallel_ranks(run, ranks)
    stages = [tensor * copies * stage for stage in range(parallel.pipeline_parallel)]
    steps = {0, 1, tensor}
    if run.engine == "zero3":
        steps.add(run.zero3.secondary_partition)
    if run.engine == "fsdp2" and run.fsdp2.shard_ranks is not None:
        steps.add(run.fsdp2.shard_ranks)
    near = {stage + step for stage in stages for step in steps if step < tensor * copies}
    return sorted({*near, ranks - 1})


def batch_of(run: RunSettings, shapes: Shapes) -> Batch | PairBatch:
    """A micro-batch of empty texts and black pictures, from which nothing is learned."""
    shape = (shapes.rows, shapes.row_tokens)
    encoder = run.model.encoder
    side = encoder.image_pixels
    tokens = torch.zeros(shape, dtype=torch.int64)
    numbers = torch.zeros(shape, dtype=torch.int32)
    pixels = torch.zeros((shapes.images, 3, side, side), dtype=torch.uint8)
    if is_pretraining(run.objectives):
        patches = (side // encoder.patch_pixels) ** 2
        return PairBatch(
            tokens_bt=tokens,
            text_numbers_bt=numbers,
            ends_n=torch.zeros(shapes.images, dtype=torch.int64),
            is_pair_n=torch.zeros(shapes.images, dtype=torch.bool),
            pixels=pixels,
            has_image_n=torch.zeros(shapes.images, dtype=torch.bool),
            masked_np=torch.zeros((shapes.images, patches), dtype=torch.bool),
        )
    return Batch(
        tokens_bt=tokens,
        labels_bt=torch.zeros_like(tokens),
        learned_bt=torch.zeros(shape, dtype=torch.bool),
        text_numbers_bt=numbers,
        sources_bt=torch.zeros_like(numbers),
        image_ranges_2bt=torch.zeros((2, *shape), dtype=torch.int32),
        pixels=pixels,
    )
