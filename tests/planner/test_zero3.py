from pathlib import Path

import pytest

from megavlm.config.load import load_plan
from megavlm.model.params import SELF_LAYERS, parameters
from megavlm.planner.zero3 import SMALLEST_BUCKET, with_bucket_sizes

CONFIGS = Path(__file__).parents[2] / "configs"


def planned(name, *overrides):
    return with_bucket_sizes(load_plan(CONFIGS / f"{name}.yaml", overrides).last)


def test_the_reference_run_gathers_a_layer_ahead_and_keeps_every_vector():
    run = planned("vlm-30b")
    zero3, ledger = run.zero3, parameters(run.model)
    layers = run.model.decoder.self_layers
    self_layer = sum(e.numel for e in ledger if e.part == SELF_LAYERS) / layers
    assert zero3.prefetch_bucket == zero3.reduce_bucket
    assert zero3.prefetch_bucket == pytest.approx(self_layer, rel=0.01)
    assert zero3.max_live_parameters > zero3.prefetch_bucket + max(e.numel for e in ledger)
    assert zero3.max_live_parameters * 2 < 3e9  # bytes of bf16: little of a GPU's memory
    kept = [e for e in ledger if e.numel <= zero3.persistence_threshold]
    assert all(len(e.shape) == 1 for e in kept)
    assert len(kept) == sum(len(e.shape) == 1 for e in ledger)
    assert sum(e.numel for e in kept) < sum(e.numel for e in ledger) / 1000


def test_a_small_model_has_buckets_worth_a_message():
    zero3 = planned("demo").zero3
    assert zero3.reduce_bucket == zero3.prefetch_bucket == SMALLEST_BUCKET


@pytest.mark.parametrize(
    "name", ["reduce_bucket", "prefetch_bucket", "persistence_threshold", "max_live_parameters"]
)
def test_a_size_that_is_given_stands(name):
    free, given = planned("vlm-30b").zero3, planned("vlm-30b", f"zero3.{name}=1234").zero3
    for other in vars(free):
        if other == name:
            assert getattr(given, other) == 1234
        elif (name, other) != ("persistence_threshold", "max_live_parameters"):
            assert getattr(given, other) == getattr(free, other)
