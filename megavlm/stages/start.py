"""The one place that knows which objectives there are."""

from megavlm.config.objectives import is_pretraining
from megavlm.config.run import RunSettings
from megavlm.stages.base import Objective
from megavlm.stages.captioning import Captioning
from megavlm.stages.instruction import Instruction
from megavlm.stages.pretraining import PretrainingObjective


def objective_of(run: RunSettings) -> Objective:
    """What a stage learns."""
    if is_pretraining(run.objectives):
        return PretrainingObjective(run)
    return Captioning(run) if "captioning" in run.objectives else Instruction(run)
