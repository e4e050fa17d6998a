"""What failures cost a long run: its goodput as arithmetic predicts it."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class FailureCosts:
    """Seconds, of a run that goes on from its newest copy after each failure."""

    detected_seconds: float
    """From a failure until the launcher knows."""
    restart_seconds: float
    """From then until the first new step is done: processes, groups, model, state."""
    stall_seconds: float
    """That the training stands still for each copy, or checkpoint."""
    done_seconds: float
    """From the beginning of a copy until it can be gone on from."""


def best_interval_seconds(costs: FailureCosts, mttf_seconds: float) -> float:
    """Between copies: longer repeats more steps after a failure, shorter stands still more often.

    Young 1974, "A first order approximation to the optimum checkpoint interval".
    """
    return math.sqrt(2 * costs.stall_seconds * mttf_seconds)


def predicted_goodput(costs: FailureCosts, mttf_seconds: float, interval_seconds: float) -> float:
    """Productive time over wall time, 0 to 1, where failures come after `mttf_seconds` on average.

    What watching and measuring take of a step counts as productive, as in `goodput`.

    A failure costs its detection, the restart, and the steps since the newest copy: half an
    interval on average, and what the copy took. Failures while a run recovers are left out.
    """
    lost_seconds = (
        costs.detected_seconds + costs.restart_seconds + costs.done_seconds + interval_seconds / 2
    )
    stalls = costs.stall_seconds / interval_seconds
    return max(0.0, 1 - lost_seconds / mttf_seconds) / (1 + stalls)
