"""What an engine says that it holds between steps is what follows from the ledger."""

import math

import pytest

from megavlm.engine.start import start_engine
from megavlm.model.params import parameters
from tests.batches import TINY
from tests.parity.runs import CPU, LAYOUTS, my_micro_batches, settings
from tests.ranks import run_on_ranks

LAYOUT = {layout.name: layout for layout in LAYOUTS}
LEDGER = parameters(TINY)
BF16, FP32 = 2, 4


def held_bytes(engine) -> dict[str, int]:
    """By kind; memory that several kinds share counts as the first one's."""
    seen, sizes = set(), {}
    for kind, tensors in engine.held().items():
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        sizes[kind] = sum(size for key, size in storages.items() if key not in seen)
        seen |= storages.keys()
    return sizes


def on_each_rank(name) -> list[dict[str, int]]:
    """Before a step and after it they are the same."""
    run = settings(LAYOUT[name], 1, "train.precision=bf16")

    def on_rank(_):
        engine = start_engine(run, CPU)
        before = held_bytes(engine)
        engine.step(my_micro_batches(0), 1e-3)
        after = held_bytes(engine)
        engine.close()
        return before, after

    results = run_on_ranks(LAYOUT[name].ranks, on_rank, parallel=run.model_parallel)
    assert all(before == after for before, after in results)
    return [before for before, _ in results]


def test_zero3():
    ranks = 2
    share = sum(math.ceil(entry.numel / ranks) for entry in LEDGER)
    for held in on_each_rank("ZeRO-3 x2"):
        assert held["parameters"] == BF16 * share
        assert held["gradients"] == FP32 * share
        assert held["optimizer"] == 3 * FP32 * share


def test_fsdp2():
    ranks = 2
    rows = [[math.ceil(e.shape[0] / ranks), e.numel // e.shape[0], e.shape[0]] for e in LEDGER]
    by_rank = on_each_rank("FSDP2 x2")
    for rank, held in enumerate(by_rank):
        padded = sum(most * width for most, width, _ in rows)
        own = sum(max(0, min(most, n - rank * most)) * width for most, width, n in rows)
        assert held["parameters"] == FP32 * padded
        assert held["gradients"] == 0
        assert held["optimizer"] == 2 * FP32 * own


@pytest.mark.parametrize(("name", "tensor", "copies"), [("DP2", 1, 2), ("TP2 x DP2", 2, 2)])
def test_megatron(name, tensor, copies):
    own = [e.numel // (tensor if e.tensor_axis is not None else 1) for e in LEDGER]
    by_rank = on_each_rank(name)
    for held in by_rank:
        # megatron-core lets parameters begin at multiples of 64, and buckets end at ones of 128.
        most = sum(64 * math.ceil(size / 64) for size in own) + 128
        assert BF16 * sum(own) <= held["parameters"] <= BF16 * most
        assert held["gradients"] == 2 * held["parameters"]
    # The copies share what they optimise, whatever each one's part.
    assert sum(held["optimizer"] for held in by_rank) == tensor * 3 * FP32 * sum(own)
