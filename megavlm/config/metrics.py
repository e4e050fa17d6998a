"""What is told of a run while it trains."""

import math

from pydantic.dataclasses import dataclass

from megavlm.config.sizes import STRICT
from megavlm.errors import ConfigError


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MetricsSettings:
    """Where figures go beside `metrics.jsonl` and TensorBoard."""

    module_norms_every: int | None = None
    """Steps between gradient norms of each part of the model; None measures none."""
    rank_times_every: int | None = 100
    """Steps between measurements of how long each rank works, waits for data and waits for other
    ranks, by torch's profiler; None measures none."""
    straggler_percent: float = 20.0
    """Ranks that are busy so much longer than the median of their peers are told of, until it is
    less than half as much."""
    prometheus_port: int | None = None
    """Of the first rank's host, where Prometheus may fetch the newest figures; None opens none."""
    prometheus_host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets everyone who reaches the host read the figures."""
    wandb_project: str | None = None
    """Project of Weights & Biases; `pip install megavlm[monitoring]`. Key, entity and mode are
    those of the environment (`WANDB_API_KEY`, `WANDB_ENTITY`, `WANDB_MODE=offline`)."""

    def __post_init__(self) -> None:
        for name in ("module_norms_every", "rank_times_every"):
            every = getattr(self, name)
            if every is not None and every < 1:
                raise ConfigError(f"metrics.{name}={every} must be at least 1, or null")
        if not 0 < self.straggler_percent < math.inf:
            raise ConfigError(
                f"metrics.straggler_percent={self.straggler_percent} must lie above 0"
            )
        port = self.prometheus_port
        if port is not None and not 0 < port < 65536:
            raise ConfigError(f"metrics.prometheus_port={port} must lie between 1 and 65535")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ProfileSettings:
    """A window of steps of which torch's profiler writes a trace."""

    steps: tuple[int, int] | None = None
    """From the first to before the second, counted from 0 over the whole run; None: no trace."""
    ranks: tuple[int, ...] = (0,)
    """Each of them writes one."""

    def __post_init__(self) -> None:
        if self.steps is not None and not 0 <= self.steps[0] < self.steps[1]:
            raise ConfigError(
                f"profile.steps={list(self.steps)} must be a first step and a later one, before "
                "which the trace ends"
            )
        if any(rank < 0 for rank in self.ranks):
            raise ConfigError(f"profile.ranks={list(self.ranks)} must not be negative")
