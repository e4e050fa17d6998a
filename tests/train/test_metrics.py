import pytest

from megavlm.train.events import Events
from megavlm.train.metrics import METRICS_FILE, MetricsLog, read_metrics


def log_steps(folder, first_step, steps, enabled=True):
    events = Events(folder, enabled=enabled)
    with MetricsLog(folder, first_step, 10, events, {}, enabled=enabled) as log:
        for step in steps:
            values = {"step": step, "loss": 1.0 / (step + 1), "gradient_norm": 1.0}
            log.step(
                {**values, "learning_rate": 1e-3, "samples_per_second": 8.0}, say=step % 2 == 1
            )


def test_steps_that_are_done_again_are_logged_once(tmp_path):
    log_steps(tmp_path, 0, range(5))
    log_steps(tmp_path, 3, range(3, 7))
    metrics = read_metrics(tmp_path)
    assert [m["step"] for m in metrics] == list(range(7))
    assert [m["loss"] for m in metrics] == pytest.approx([1 / (s + 1) for s in range(7)])
    assert not list(tmp_path.glob("*.partial"))


def test_a_torn_last_line_is_dropped(tmp_path):
    log_steps(tmp_path, 0, range(3))
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 3, "lo')
    assert len(read_metrics(tmp_path)) == 3


def test_other_ranks_are_silent(tmp_path, capfd):
    log_steps(tmp_path / "run", 0, range(3), enabled=False)
    assert not (tmp_path / "run").exists()
    assert capfd.readouterr() == ("", "")
