import pytest

from megavlm.engine.base import StepResult
from megavlm.errors import DataError, LaunchError
from megavlm.train import loop
from megavlm.train.loop import _alone_in, _check_items


def test_two_runs_cannot_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "LOCK_SECONDS", 0.0)
    with _alone_in(tmp_path):
        with pytest.raises(LaunchError, match="another run is writing to"), _alone_in(tmp_path):
            pass
    with _alone_in(tmp_path):
        pass  # free again


def test_a_step_that_teaches_nothing_ends_the_run():
    numbers = {"loss": 0.0, "gradient_norm": 0.0, "items": 0, "losses": {}}
    with pytest.raises(DataError, match="step 8: nothing is to be learned from any of its samples"):
        _check_items(7, StepResult(**numbers))
