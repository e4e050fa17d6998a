import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest

from megavlm.config.guard import GuardSettings
from megavlm.engine.base import StepResult
from megavlm.errors import DivergenceError
from megavlm.files.folder import Folder
from megavlm.train.guard import Guard
from megavlm.train.start import Start, guard_of
from tests.runs import plan_of

NAN, INFINITE = float("nan"), float("inf")


def result(loss, gradient_norm=1.0):
    return StepResult(loss=loss, losses={}, gradient_norm=gradient_norm, items=3)


def noise(count, seed=1):
    chance = random.Random(seed)
    return [chance.gauss(2.0, 0.1) for _ in range(count)]


@pytest.mark.parametrize(
    "bad", [result(NAN), result(INFINITE), result(1.0, NAN), result(1.0, -NAN)]
)
def test_what_is_no_number_is_not_accepted(bad):
    guard = Guard(GuardSettings())
    assert guard.accepts(result(1.0)) and guard.fault is None
    assert not guard.accepts(bad) and guard.fault == "nonfinite"
    assert not guard.goes_back(7, bad, 0)
    assert guard.accepts(result(1.0)) and guard.fault is None
    stopping = Guard(GuardSettings(on_nonfinite="stop"))
    assert not stopping.accepts(bad)
    with pytest.raises(DivergenceError, match=r"step 8: loss .* no finite number.* is saved"):
        stopping.goes_back(7, bad, 0)


def test_spikes_are_far_above_the_steps_before():
    settings = GuardSettings(on_spike="skip", spike_window=16, spike_sigmas=4)
    guard = Guard(settings)
    losses = noise(8)
    assert all(guard.accepts(result(loss)) for loss in losses[:7])
    assert guard.accepts(result(9.0)), "there are too few steps before it"
    guard = Guard(settings)
    assert all(guard.accepts(result(loss)) for loss in losses)
    limit = np.mean(losses) + 4 * np.std(losses)
    for _ in range(3):  # a spike does not become what later steps are compared with
        assert not guard.accepts(result(limit + 1e-6)) and guard.fault == "spike"
    assert guard.accepts(result(limit - 1e-6))
    assert not guard.accepts(result(2.0, gradient_norm=1.1)), "the norms before it are all 1"
    assert guard.accepts(result(0.0)), "below is no spike"
    ignoring = Guard(GuardSettings(spike_window=16))
    assert all(ignoring.accepts(result(loss)) for loss in [*losses, 99.0])


def test_a_stage_begins_without_the_steps_of_the_one_before(tiny_run, monkeypatch):
    other = replace(tiny_run, guard=GuardSettings(spike_sigmas=9))
    first, second = plan_of(tiny_run, other).stages
    figures = {"losses": [1.0, 1.0], "gradient_norms": [1.0, 1.0], "bad_in_a_row": 0}
    monkeypatch.setattr("megavlm.train.start.read_state", lambda _: {"guard": figures})
    folder = Folder("checkpoint")
    ended = Start(first, first.end_step, folder)  # as a stage leaves it, and as it is resumed
    fresh = guard_of(second, ended)
    assert fresh.state()["losses"] == [] and fresh._settings == other.guard
    assert guard_of(second, Start(second, second.first_step + 2, folder)).state() == figures
    assert guard_of(first, Start(first, 0, None)).state()["losses"] == []


def test_too_many_in_a_row_stop_the_run():
    guard = Guard(GuardSettings(most_in_a_row=2))
    for in_a_row in (1, 2, 1, 2, 3):
        if in_a_row == 1:
            assert guard.accepts(result(1.0))
        assert not guard.accepts(result(NAN))
        if in_a_row < 3:
            assert not guard.goes_back(7, result(NAN), 0)
    with pytest.raises(DivergenceError, match=r"\(3 steps in a row\)"):
        guard.goes_back(7, result(NAN), 0)
    back = Guard(GuardSettings(on_nonfinite="rollback", most_in_a_row=2))
    assert not back.accepts(result(NAN))
    assert [back.goes_back(7, result(NAN), times) for times in (0, 1)] == [True, True]
    with pytest.raises(DivergenceError, match=r"\(3 times from the same checkpoint\)"):
        back.goes_back(7, result(NAN), 2)


def test_a_guard_goes_on_where_it_was():
    settings = GuardSettings(on_spike="skip", spike_window=16)
    results = [result(loss, norm) for loss, norm in zip(noise(60), noise(60, 2), strict=True)]
    for place in (20, 33, 34):
        results[place] = result(NAN if place == 20 else 3.0)
    whole = Guard(settings)
    expected = [whole.accepts(r) for r in results]
    assert [n for n, accepted in enumerate(expected) if not accepted] == [20, 33, 34]
    for cut in (21, 34):
        first = Guard(settings)
        verdicts = [first.accepts(r) for r in results[:cut]]
        second = Guard(settings, json.loads(json.dumps(first.state())))
        assert verdicts + [second.accepts(r) for r in results[cut:]] == expected
    assert not math.isnan(sum(whole.state()["losses"]))
