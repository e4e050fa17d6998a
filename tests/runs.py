"""Settings of runs, from files."""

from collections.abc import Sequence
from pathlib import Path

from megavlm.config.load import load_plan
from megavlm.config.plan import Plan, Stage
from megavlm.config.run import RunSettings

RUN = Path(__file__).parent / "run.yaml"
"""A run of one stage."""


def plan_of(*runs: RunSettings) -> Plan:
    """A plan of these stages, named after their objectives."""
    stages: list[Stage] = []
    for run in runs:
        name = "_".join(run.objectives)
        stages.append(Stage(name, run, stages[-1].end_step if stages else 0))
    return Plan(tuple(stages))


def load_run(path: Path, overrides: Sequence[str] = ()) -> RunSettings:
    """The settings of a run that has one stage."""
    [stage] = load_plan(path, overrides).stages
    return stage.run
