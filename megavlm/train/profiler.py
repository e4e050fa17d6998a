"""Traces of some steps, by torch's profiler: open them in Perfetto or chrome://tracing."""

import os
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from megavlm.config.metrics import ProfileSettings
from megavlm.config.plan import Plan
from megavlm.dist import groups
from megavlm.errors import ConfigError

PROFILES_FOLDER = "profiles"


class ProfileWindow:
    """Profiles the steps that the settings name, on the ranks that they name.

    A run that starts inside the window profiles the rest of it; a stage that ends inside of it
    ends it, and the next one opens a window of its own.
    """

    def __init__(self, settings: ProfileSettings, run_folder: Path) -> None:
        mine = settings.steps is not None and groups.rank() in settings.ranks
        self._steps = range(*settings.steps) if mine and settings.steps else range(0)
        self._folder = run_folder / PROFILES_FOLDER
        self._profile: Any = None
        self._first = 0

    def __enter__(self) -> "ProfileWindow":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def before(self, step: int) -> None:
        """A step begins."""
        if self._profile is None and step in self._steps:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it says when it starts
            self._profile = profile(activities=activities)
            self._profile.start()
            self._first = step
        elif self._profile is not None and step not in self._steps:
            self._close()

    def _close(self) -> None:
        running, self._profile = self._profile, None
        if running is not None:
            running.stop()
            self._folder.mkdir(exist_ok=True)
            name = f"step-{self._first:08d}-rank-{groups.rank():04d}.json.gz"
            running.export_chrome_trace(str(self._folder / name))


def check_profile(plan: Plan, ranks: int) -> None:
    """Raise ConfigError where no step or no rank would ever be profiled."""
    settings = plan.first.profile
    if settings.steps is None:
        return
    if settings.steps[0] >= plan.steps:
        raise ConfigError(
            f"profile.steps={list(settings.steps)} begins after the {plan.steps} steps of the run; "
            "choose an earlier window"
        )
    if beyond := [rank for rank in settings.ranks if rank >= ranks]:
        raise ConfigError(
            f"profile.ranks names {beyond[0]}, and the {ranks} ranks are numbered from 0; leave it "
            "out"
        )
