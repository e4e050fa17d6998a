import pytest

from megavlm.config.load import load_plan
from megavlm.config.metrics import MetricsSettings, ProfileSettings
from megavlm.errors import ConfigError
from tests.runs import RUN


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (lambda: MetricsSettings(module_norms_every=0), "module_norms_every=0 must be at least 1"),
        (
            lambda: MetricsSettings(rank_times_every=0),
            "rank_times_every=0 must be at least 1, or null",
        ),
        (lambda: MetricsSettings(straggler_percent=0), "straggler_percent=0.0 must lie above 0"),
        (lambda: MetricsSettings(prometheus_port=70_000), "must lie between 1 and 65535"),
        (lambda: ProfileSettings(steps=(3, 3)), r"profile.steps=\[3, 3\] must be a first step"),
        (lambda: ProfileSettings(ranks=(-1,)), r"profile.ranks=\[-1\] must not be negative"),
    ],
)
def test_mistakes(settings, says):
    with pytest.raises(ConfigError, match=says):
        settings()


def test_a_run_file_says_it():
    overrides = ["metrics.prometheus_port=9400", "profile.steps=[5, 8]", "profile.ranks=[0, 3]"]
    run = load_plan(RUN, overrides).first
    assert run.metrics.prometheus_port == 9400 and run.metrics.wandb_project is None
    assert run.profile.steps == (5, 8) and run.profile.ranks == (0, 3)
