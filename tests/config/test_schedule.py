"""The learning rate of every step, against an independent computation."""

import math
from dataclasses import replace

import numpy as np
import pytest

from megavlm.config.run import OptimizerSettings
from megavlm.config.schedule import learning_rate_at, scheduled
from tests.runs import plan_of

SETTINGS = OptimizerSettings(learning_rate=1e-3, minimum_learning_rate=1e-6)


def curve(steps, settings):
    """By numpy: a line to the peak, then half a cosine to the minimum at the last step."""
    warmup = math.ceil(steps * settings.warmup_fraction)
    line = settings.learning_rate * np.linspace(0, 1, warmup + 1)[1:]
    turn = np.cos(np.linspace(0, math.pi, steps - warmup + 1)[1:])
    low, high = settings.minimum_learning_rate, settings.learning_rate
    return np.concatenate([line, low + (high - low) * (1 + turn) / 2])


@pytest.mark.parametrize("steps", [1, 2, 3, 19, 20, 21, 1000])
@pytest.mark.parametrize("warmup_fraction", [0.0, 0.05, 0.5])
def test_every_step(steps, warmup_fraction):
    settings = replace(SETTINGS, warmup_fraction=warmup_fraction)
    rates = [learning_rate_at(step, steps, settings) for step in range(steps)]
    np.testing.assert_allclose(rates, curve(steps, settings), rtol=1e-12)


def test_the_recipe():
    """5 % linear warm-up, cosine to 1e-6."""
    rates = [learning_rate_at(step, 1000, SETTINGS) for step in range(1000)]
    assert rates[0] == pytest.approx(1e-3 / 50)
    assert max(rates) == rates[49] == 1e-3
    assert rates[49:] == sorted(rates[49:], reverse=True)
    assert rates[-1] == pytest.approx(1e-6)


@pytest.mark.parametrize("warmup_fraction", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("steps", [(100, 40, 300), (1, 7, 2), (1, 1, 1)])
def test_every_step_of_a_plan_by_stage_and_over_the_whole(tiny_run, steps, warmup_fraction):
    peaks = (1e-3, 2e-3, 5e-4)
    settings = replace(SETTINGS, warmup_fraction=warmup_fraction)
    runs = [
        replace(
            tiny_run,
            train=replace(tiny_run.train, steps=n),
            optimizer=replace(settings, learning_rate=peak),
        )
        for n, peak in zip(steps, peaks, strict=True)
    ]

    def rates(plan):
        return [
            scheduled(plan, stage, step)
            for stage in plan.stages
            for step in range(stage.first_step, stage.end_step)
        ]

    by_stage = np.concatenate([curve(r.train.steps, r.optimizer) for r in runs])
    np.testing.assert_allclose(rates(plan_of(*runs)), by_stage, rtol=1e-12)
    over_plan = [
        replace(r, optimizer=replace(r.optimizer, learning_rate=1e-3, schedule="plan"))
        for r in runs
    ]
    whole = curve(sum(steps), settings)
    np.testing.assert_allclose(rates(plan_of(*over_plan)), whole, rtol=1e-12)
