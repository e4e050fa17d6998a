"""A rank that is run without data holds and sends what the same rank does among real ones."""

import gc
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from functools import cache
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import nn

from megavlm.config.run import RunSettings
from megavlm.data.packing import Batch
from megavlm.dryrun.compare import disagreements
from megavlm.dryrun.run import DryRun, Shapes, dry_run, warm_up
from megavlm.engine.start import start_engine
from megavlm.model.cross_attention import CrossAttentionLayer
from megavlm.model.params import parameters
from tests.batches import ROW_TOKENS, TINY, random_batch
from tests.parity.collectives import Collective, recorded
from tests.parity.runs import CPU, LAYOUTS, Layout, settings
from tests.ranks import run_on_ranks
from tests.seen import seen

LAYOUT = {layout.name: layout for layout in LAYOUTS}
NAMES = [
    "PP2 interleaved",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("TP2 x PP2 interleaved SP", "ZeRO-3 hpZ 2x2", "FSDP2 hybrid 2x2")
    ),
]
BATCH = random_batch(1, samples=2)
SHAPES = Shapes(rows=len(BATCH.tokens_bt), row_tokens=ROW_TOKENS, images=len(BATCH.pixels))


class Real(NamedTuple):
    """What a real rank does in a step."""

    calls: list[Collective]
    growth_bytes: int
    """By which the peak exceeds what is held before."""


def copied(batch: Batch) -> Batch:
    """With tensors of its own, which are seen."""
    values = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return replace(
        batch, **{n: v.clone() for n, v in values.items() if isinstance(v, torch.Tensor)}
    )


def run_of(layout: Layout, *overrides: str) -> RunSettings:
    return settings(layout, 1, "train.recompute=full", *overrides)


@cache
def real(layout: Layout) -> list[Real]:
    run = run_of(layout)
    assert run.data.row_tokens == ROW_TOKENS

    def on_rank(_: int) -> Real:
        with seen() as recorder:
            engine = start_engine(run, CPU)
            if run.engine == "zero3":
                warm_up(engine, run, copied(BATCH))
            gc.collect()
            held = recorder.memory.total
            recorder.memory.start_peak()
            batches = [copied(BATCH) for _ in range(run.train.micro_batches)]
            with recorded() as calls:
                engine.step(batches, 1e-3)
        engine.close()
        return Real(calls, recorder.memory.peak - held)

    return run_on_ranks(layout.ranks, on_rank, parallel=run.model_parallel)


def dry(
    layout: Layout,
    run: RunSettings,
    *,
    images: dict[int, int] | None = None,
    faulty: int | None = None,
) -> dict[int, DryRun]:
    """All ranks, each by itself, or the faulty one, which leaves out cross-attention."""
    ranks = range(layout.ranks) if faulty is None else [faulty]

    def on_rank(number: int) -> DryRun:
        rank = ranks[number]
        shapes = replace(SHAPES, images=(images or {}).get(rank, SHAPES.images))
        with skipped_cross_attention(run) if rank == faulty else nullcontext():
            return dry_run(run, rank=rank, ranks=layout.ranks, shapes=shapes)

    return dict(zip(ranks, run_on_ranks(len(ranks), on_rank, groups=False), strict=True))


def skipped_cross_attention(run: RunSettings) -> AbstractContextManager[Any]:
    """As if text alone did not need it: always, or, under FSDP2, in the first micro-batch.

    FSDP2 itself fails if there is no gradient at all.
    """
    left = len(run.model.decoder.cross_layers) if run.engine == "fsdp2" else 10**9

    def call(layer: Any, hidden_states: Any, *args: Any, context: Any = None, **kwargs: Any):
        nonlocal left
        left -= 1
        if left < 0:
            return nn.Module.__call__(layer, hidden_states, *args, context=context, **kwargs)
        return hidden_states, context

    return patch.object(CrossAttentionLayer, "__call__", call, create=True)


@cache
def without_fault(layout: Layout) -> dict[int, DryRun]:
    return dry(layout, run_of(layout))


def steps(results: dict[int, DryRun]) -> dict[int, Any]:
    return {rank: result.step for rank, result in results.items()}


@pytest.mark.parametrize("name", NAMES)
def test_sends_what_a_real_rank_sends(name):
    results = without_fault(LAYOUT[name])
    for rank, expected in enumerate(real(LAYOUT[name])):
        actual = [(c.operation, c.ranks, sum(n for _, n in c.tensors)) for c in results[rank].step]
        assert actual == [
            (c.operation, c.ranks, sum(math.prod(shape) for shape in c.shapes))
            for c in expected.calls
        ]
    assert disagreements(steps(results)) == []


# To the byte, but for 1,168 of 757,216 under FSDP2 on ranks that hold nothing of some parameters.
@pytest.mark.parametrize("name", NAMES)
def test_its_peak_is_that_of_a_real_rank(name):
    results = without_fault(LAYOUT[name])
    for rank, expected in enumerate(real(LAYOUT[name])):
        growth = sum(results[rank].at_peak.values()) - sum(results[rank].held.values())
        tolerance = 2e-3 if "FSDP2" in name else 0
        assert growth == pytest.approx(expected.growth_bytes, rel=tolerance, abs=0)


@pytest.mark.parametrize("name", NAMES)
def test_all_ranks_together_hold_the_model(name):
    boxes = frozenset().union(*(result.weights for result in without_fault(LAYOUT[name]).values()))
    sizes = dict.fromkeys((entry.name for entry in parameters(TINY)), 0)
    for parameter, _, shape in boxes:
        sizes[parameter] += math.prod(shape)
    assert sizes == {entry.name: entry.numel for entry in parameters(TINY)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ZeRO-3 x4", "FSDP2 x4"])
def test_text_alone_comes_with_a_picture_but_a_rank_that_skips_cross_attention_is_named(name):
    """The model needs one slot for pictures at least, and runs it through everything."""
    run = run_of(LAYOUT[name])
    run = replace(run, train=replace(run.train, micro_batches=2, samples_per_step=24))
    right = steps(dry(LAYOUT[name], run, images={2: 1}))
    assert disagreements(right) == []
    wrong = steps(dry(LAYOUT[name], run, faulty=2))
    problems = disagreements({**right, **wrong})
    assert problems and problems[0].startswith("rank 2 "), problems


@pytest.mark.slow
def test_so_is_one_of_a_pipeline():
    # Without overlap: megatron-core itself notices on this rank that gradients are missing.
    layout = LAYOUT["TP2 x PP2"]
    run = run_of(layout, "megatron.overlap_communication=false")
    right = steps(dry(layout, run))
    assert disagreements(right) == []
    problems = disagreements({**right, **steps(dry(layout, run, faulty=1))})
    # Its neighbour alone shares its collectives: which of the two is wrong, nobody can tell.
    assert problems and "rank 1 " in problems[0] and "rank 0 " in problems[0], problems
