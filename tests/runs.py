"""Settings of runs, from files."""

from collections.abc import Sequence
from pathlib import Path

from megavlm.config.load import load_plan
from megavlm.config.plan import Plan, Stage
from megavlm.config.run import RunSettings

RUN = Path(__file__).parent / "run.yaml"
"""A run of one stage."""


def plan_of(*runs: RunSettings) -> Plan:
    """A plan of these stages, named after their objectives, and numbered where those recur."""
    stages: list[Stage] = []
    for run in runs:
        name = "_".join(run.objectives)
        if any(stage.name == name for stage in stages):
            name += f"_{len(stages)}"
        first = (stages[-1].end_step, stages[-1].end_sample) if stages else (0, 0)
        stages.append(Stage(name, run, *first))
    return Plan(tuple(stages))


def load_run(path: Path, overrides: Sequence[str] = ()) -> RunSettings:
    """The settings of a run that has one stage."""
    [stage] = load_plan(path, overrides).stages
    return stage.run
