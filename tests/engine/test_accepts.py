"""Steps that are not accepted leave no trace, whatever the engine."""

import math
from functools import partial

import pytest
import torch

from megavlm.dist import groups
from megavlm.engine.start import start_engine
from tests.parity.runs import CPU, LAYOUTS, my_micro_batches, settings
from tests.ranks import run_on_ranks
from tests.states import whole_tensors

LAYOUT = {layout.name: layout for layout in LAYOUTS}
FAST = ("ZeRO-3 x2",)
SLOW = (
    *("FSDP2 x2", "FSDP2 hybrid 2x2", "ZeRO-3 hpZ 2x2"),
    *("TP2", "PP2 interleaved", "TP2 x PP2", "TP2 x DP2"),
)
LEARNING_RATE = 1e-2


class Poisoned:
    """An objective whose gradient is no number, on the last rank alone."""

    def __init__(self, objective):
        self._objective = objective

    def __getattr__(self, name):
        return getattr(self._objective, name)

    def losses(self, *arguments):
        losses = self._objective.losses(*arguments)
        is_last = groups.rank() == groups.world_size() - 1
        return losses._replace(backward=losses.backward * (math.nan if is_last else 1))


def _refuse(seen, result):
    seen.append(result)
    return False


def after_steps(run, bad):
    """What an engine holds after two steps and a bad one before each, and its results."""
    engine = start_engine(run, CPU)
    objective = engine._objective
    results = []
    for step in range(2):
        if bad:
            seen = []
            engine._objective = Poisoned(objective) if bad == "poisoned" else objective
            refuse = partial(_refuse, seen)
            assert engine.step(my_micro_batches(7 + step), LEARNING_RATE, refuse) is seen[0]
            engine._objective = objective
            assert math.isfinite(seen[0].gradient_norm) == (bad == "refused"), seen
        results.append(engine.step(my_micro_batches(step), LEARNING_RATE))
    tensors = whole_tensors(engine)
    engine.close()
    return tensors, results


@pytest.mark.parametrize(
    "name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_refused_steps_leave_no_trace(name):
    layout = LAYOUT[name]
    run = settings(layout, 2)

    def on_each_rank(_):
        expected, results = after_steps(run, None)
        for bad in ("refused", "poisoned"):
            tensors, again = after_steps(run, bad)
            assert again == results, bad
            assert not [n for n, t in expected.items() if not torch.equal(t, tensors[n])], bad
        return len(expected)

    assert min(run_on_ranks(layout.ranks, on_each_rank, parallel=run.model_parallel)) > 100
