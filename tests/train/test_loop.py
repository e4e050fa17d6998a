import pytest

from megavlm.config.load import load_plan
from megavlm.engine.base import StepResult
from megavlm.errors import ConfigError, DataError, LaunchError
from megavlm.train import loop
from megavlm.train.loop import _alone_in, _check_items, train
from tests.ranks import run_on_ranks


def test_a_mistake_of_the_settings_is_told_by_one_rank(tiny_run_file, capfd):
    def on_rank(_):
        with pytest.raises(ConfigError, match="is not divisible by") as raised:
            train(load_plan(tiny_run_file, ["train.samples_per_step=8", "train.micro_batches=2"]))
        return raised.value.is_told

    assert run_on_ranks(3, on_rank, groups=False) == [True] * 3
    lines = capfd.readouterr().err.splitlines()
    assert len([line for line in lines if "megavlm: error (rank" in line]) == 1, lines


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
