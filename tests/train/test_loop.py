import pytest

from megavlm.engine.base import StepResult
from megavlm.errors import DataError, DivergenceError, LaunchError
from megavlm.train.loop import _alone_in, _check_result


def test_two_runs_cannot_share_a_folder(tmp_path):
    with _alone_in(tmp_path):
        with pytest.raises(LaunchError, match="another run is writing to"), _alone_in(tmp_path):
            pass
    with _alone_in(tmp_path):
        pass  # free again


def test_weights_that_are_no_numbers_are_never_saved():
    numbers = {"loss": 1.0, "gradient_norm": 1.0, "items": 3, "losses": {}}
    _check_result(7, StepResult(**numbers))
    for name in ("loss", "gradient_norm"):
        for value in (float("nan"), float("inf")):
            with pytest.raises(DivergenceError, match=r"step 7: loss .* is saved"):
                _check_result(7, StepResult(**(numbers | {name: value})))


def test_a_step_that_teaches_nothing_ends_the_run():
    numbers = {"loss": 0.0, "gradient_norm": 0.0, "items": 0, "losses": {}}
    with pytest.raises(DataError, match="step 7: nothing is to be learned from any of its samples"):
        _check_result(7, StepResult(**numbers))
