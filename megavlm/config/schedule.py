"""The learning rate as a function of the step."""

import math

from megavlm.config.plan import Plan, Stage
from megavlm.config.run import OptimizerSettings


def learning_rate_at(step: int, steps: int, settings: OptimizerSettings) -> float:
    """Learning rate of step 0 <= step < steps: linear warm-up, then cosine decay to the minimum.

    The peak is reached at the end of the warm-up, the minimum at the last step.
    """
    warmup_steps = math.ceil(steps * settings.warmup_fraction)
    if step < warmup_steps:
        return settings.learning_rate * (step + 1) / warmup_steps
    progress = (step + 1 - warmup_steps) / max(1, steps - warmup_steps)
    span = settings.learning_rate - settings.minimum_learning_rate
    return settings.minimum_learning_rate + span * (1 + math.cos(math.pi * progress)) / 2


def scheduled(plan: Plan, stage: Stage, step: int) -> float:
    """Learning rate of a step of the run, before the scales of the parts."""
    settings = stage.run.optimizer
    if settings.schedule == "plan":
        return learning_rate_at(step, plan.steps, settings)
    return learning_rate_at(step - stage.first_step, stage.run.train.steps, settings)
