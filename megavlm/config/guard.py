"""What is done about steps that would harm the model."""

import math
from typing import Literal

from pydantic.dataclasses import dataclass

from megavlm.config.sizes import STRICT
from megavlm.errors import ConfigError


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GuardSettings:
    """skip: the weights stay as they are, and the step's samples are not learned from.

    rollback: to the newest checkpoint, from where the run goes on with the samples after the bad
    step (as in PaLM, Chowdhery et al. 2022, section 5.1). stop: with an error.
    """

    on_nonfinite: Literal["skip", "rollback", "stop"] = "skip"
    """At a loss or gradient norm that is no finite number."""
    on_spike: Literal["ignore", "skip", "rollback", "stop"] = "ignore"
    """At a loss or gradient norm far above those of the steps before it."""
    spike_sigmas: float = 6.0
    """So many standard deviations above their mean are far (OLMo 2, 2025, skips from 6)."""
    spike_window: int = 128
    """So many good steps are looked back at; no step is a spike after fewer than half of them."""
    most_in_a_row: int = 5
    """Bad steps one after the other, or rollbacks to one checkpoint; the next stops the run."""
    compare_replicas_every: int = 500
    """Steps after which copies of the model are compared, and before each checkpoint; the run stops
    where they differ. 0: never."""
    hang_seconds: float = 540.0
    """Without progress of any rank the run ends, and each says where it stands; 0: never. NCCL ends
    its process after 600 s, without saying it."""

    def __post_init__(self) -> None:
        if not self.spike_sigmas > 0:
            raise ConfigError(f"guard.spike_sigmas={self.spike_sigmas} must lie above 0")
        if self.spike_window < 4:
            raise ConfigError(f"guard.spike_window={self.spike_window} must be at least 4")
        if not 0 <= self.hang_seconds < math.inf:
            raise ConfigError(f"guard.hang_seconds={self.hang_seconds} must not be negative")
        for name in ("most_in_a_row", "compare_replicas_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"guard.{name}={getattr(self, name)} must not be negative")
