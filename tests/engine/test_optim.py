import math

import pytest
import torch

from megavlm.config.presets import PRESETS
from megavlm.config.run import OptimizerSettings
from megavlm.engine.optim import learning_rate_at, parameter_groups
from megavlm.model.vlm import VisionLanguageModel
from tests.ranks import alone

SETTINGS = OptimizerSettings(learning_rate=1e-3, minimum_learning_rate=1e-6)


def test_linear_warm_up_over_the_first_five_percent():
    rates = [learning_rate_at(step, 1000, SETTINGS) for step in range(50)]
    assert rates == pytest.approx([1e-3 * (step + 1) / 50 for step in range(50)])


def test_cosine_to_the_minimum():
    rates = [learning_rate_at(step, 1000, SETTINGS) for step in range(49, 1000)]
    assert max(rates) == rates[0] == 1e-3
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(1e-6)
    half = learning_rate_at(49 + 475, 1000, SETTINGS)
    assert half == pytest.approx((1e-3 + 1e-6) / 2)


@pytest.mark.parametrize("steps", [1, 2, 3, 19, 21])
def test_short_runs_end_at_the_minimum_or_the_peak(steps):
    rates = [learning_rate_at(step, steps, SETTINGS) for step in range(steps)]
    assert all(0 < rate <= 1e-3 and math.isfinite(rate) for rate in rates)
    assert rates[-1] == pytest.approx(1e-6 if steps > 1 else 1e-3)


def test_only_matrices_decay():
    with alone(), torch.device("meta"):
        model = VisionLanguageModel(PRESETS["vlm-tiny"], dtype=torch.float32)
    model.projector.weight.requires_grad_(False)
    decayed, kept = parameter_groups(model, weight_decay=0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed_names = {names[id(p)] for p in decayed["params"]}
    kept_names = {names[id(p)] for p in kept["params"]}
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert decayed_names | kept_names | {"projector.weight"} == set(names.values())
    assert all(name.endswith("weight") for name in decayed_names)
    for part in ("norm", "bias", "gate", "positions", "class_token"):
        assert not any(part in name for name in decayed_names), part
