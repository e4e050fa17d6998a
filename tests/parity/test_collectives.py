"""Whatever the mix of images and text over ranks, all ranks issue the same collectives."""

import random
from collections import Counter

import pytest

from megavlm.data.packing import Batch
from megavlm.dist import groups
from megavlm.engine.start import start_engine
from tests.batches import random_batch
from tests.parity.collectives import Collective, recorded
from tests.parity.runs import CPU, LAYOUTS, MICRO_BATCHES, Layout, settings
from tests.ranks import run_on_ranks

STEPS = 2
FAST = ("TP2 x PP2 interleaved SP", "ZeRO-3 x2", "FSDP2 x2")
POINT_TO_POINT = ("send", "recv_")


def slow(value: object):
    return pytest.param(value, marks=pytest.mark.slow)


def any_batch(chance: random.Random) -> Batch:
    """Text-only, one image or many; short or long."""
    return random_batch(
        chance.randrange(10**6), samples=chance.randint(1, 5), images=chance.random() < 0.5
    )


def collectives(layout: Layout, seed: int, overrides: list[str]) -> list[list[Collective]]:
    """What each rank issues in steps of a random mix, and in an evaluation."""
    run = settings(layout, STEPS, *overrides)

    def on_rank(_: int) -> list[Collective]:
        engine = start_engine(run, CPU)
        chance = random.Random(seed)
        with recorded() as calls:
            for _ in range(STEPS):
                batches = [any_batch(chance) for _ in range(MICRO_BATCHES)]
                engine.step(batches[groups.data_rank() :: groups.data_ranks()], 1e-3)
            batches = [any_batch(chance) for _ in range(4)]
            engine.evaluate(batches[groups.data_rank() :: groups.data_ranks()])
        engine.close()
        return calls

    return run_on_ranks(layout.ranks, on_rank, parallel=run.model_parallel)


@pytest.mark.parametrize(
    "layout",
    [
        layout if layout.name in FAST else slow(layout)
        for layout in LAYOUTS
        if layout.ranks == 2 or layout.name in FAST
    ],
    ids=lambda layout: layout.name,
)
def test_all_ranks_issue_the_same_collectives(layout):
    check(layout, seeds=2)


@pytest.mark.parametrize("frozen", ["encoder", slow("decoder")])
@pytest.mark.parametrize("name", [slow(FAST[0]), slow(FAST[1]), FAST[2]])
def test_nor_under_recomputation_with_frozen_parts(name, frozen):
    [layout] = [layout for layout in LAYOUTS if layout.name == name]
    check(layout, "train.recompute=full", f"train.frozen=[{frozen}]", seeds=2)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_many_mixes(layout):
    check(layout, seeds=20)


def check(layout: Layout, *overrides: str, seeds: int) -> None:
    by_seed = [collectives(layout, seed, list(overrides)) for seed in range(seeds)]
    for by_rank in by_seed:
        assert all(by_rank)
        for group in {call.ranks for calls in by_rank for call in calls}:
            members = [[c for c in by_rank[rank] if c.ranks == group] for rank in group]
            together = [[c for c in m if c.operation not in POINT_TO_POINT] for m in members]
            assert all(calls == together[0] for calls in together), group
            sent, received = (
                Counter(c.shapes for m in members for c in m if c.operation == operation)
                for operation in POINT_TO_POINT
            )
            assert sent == received, group
    # Nor does what a rank issues depend on what is in its batches, beyond their shapes.
    for rank in range(layout.ranks):
        orders = [[(c.operation, c.ranks) for c in by_rank[rank]] for by_rank in by_seed]
        assert all(order == orders[0] for order in orders), rank
