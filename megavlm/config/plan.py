"""The plan of a run: its stages, one after the other."""

from collections.abc import Callable
from typing import NamedTuple

from megavlm.config.run import RunSettings, on_ranks
from megavlm.errors import MegavlmError


class Stage(NamedTuple):
    """One stage of a run, with the settings that hold while it lasts."""

    name: str
    run: RunSettings
    first_step: int
    """Steps of all stages before it. Steps are counted over the whole run."""
    first_sample: int = 0
    """Samples of all stages before it, which draw what comes first in the order of the data."""

    @property
    def end_step(self) -> int:
        """Steps done when it is done."""
        return self.first_step + self.run.train.steps

    @property
    def end_sample(self) -> int:
        """Samples drawn when it is done."""
        return self.sample_at(self.end_step)

    def sample_at(self, steps_done: int) -> int:
        """Samples that the run has drawn when so many of its steps are done."""
        return self.first_sample + (steps_done - self.first_step) * self.run.train.samples_per_step


class Plan(NamedTuple):
    """A run from its first step to its last."""

    stages: tuple[Stage, ...]

    @property
    def first(self) -> RunSettings:
        """The settings of the first stage; all have its folder, seed, model and engine."""
        return self.stages[0].run

    @property
    def last(self) -> RunSettings:
        """The settings of the last stage."""
        return self.stages[-1].run

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return self.stages[-1].end_step

    def on(self, ranks: int) -> "Plan":
        """As so many ranks train it (`on_ranks`)."""
        stages = [stage._replace(run=on_ranks(stage.run, ranks)) for stage in self.stages]
        return Plan(tuple(stages))

    def check(self, check: Callable[[RunSettings], object]) -> None:
        """Check every stage; an error says in which of several it arose."""
        for stage in self.stages:
            try:
                check(stage.run)
            except MegavlmError as error:
                if len(self.stages) == 1:
                    raise
                raise type(error)(f"stages.{stage.name}: {error}") from error

    def at(self, steps_done: int) -> Stage:
        """The stage that the last of so many steps belongs to; the first one before any."""
        return next(stage for stage in self.stages if steps_done <= stage.end_step)

    def named(self, name: str) -> Stage | None:
        """The stage of this name, if there is one."""
        return next((stage for stage in self.stages if stage.name == name), None)
