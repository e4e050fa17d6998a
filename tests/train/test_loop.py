import pytest

from megavlm.engine.base import StepResult
from megavlm.errors import DivergenceError, LaunchError
from megavlm.train.loop import _alone_in, _check_finite


def test_two_runs_cannot_share_a_folder(tmp_path):
    with _alone_in(tmp_path):
        with pytest.raises(LaunchError, match="another run is writing to"), _alone_in(tmp_path):
            pass
    with _alone_in(tmp_path):
        pass  # free again


def test_weights_that_are_no_numbers_are_never_saved():
    numbers = {"loss": 1.0, "gradient_norm": 1.0, "items": 3, "losses": {}}
    _check_finite(7, StepResult(**numbers))
    for name in ("loss", "gradient_norm"):
        for value in (float("nan"), float("inf")):
            with pytest.raises(DivergenceError, match=r"step 7: loss .* is saved"):
                _check_finite(7, StepResult(**(numbers | {name: value})))
