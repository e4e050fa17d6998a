"""Decides which steps the model learns from. All ranks see the same figures, and decide alike."""

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from megavlm.config.guard import GuardSettings
from megavlm.engine.base import StepResult
from megavlm.errors import DivergenceError

Fault = Literal["nonfinite", "spike"]


class Guard:
    """Of one stage."""

    def __init__(self, settings: GuardSettings, saved: Mapping[str, Any] | None = None) -> None:
        """saved: what `state` has said at an earlier step of the stage."""
        self._settings = settings
        saved = saved or {"losses": [], "gradient_norms": [], "bad_in_a_row": 0}
        self._losses = deque[float](saved["losses"], settings.spike_window)
        self._gradient_norms = deque[float](saved["gradient_norms"], settings.spike_window)
        self._bad_in_a_row: int = saved["bad_in_a_row"]
        self.fault: Fault | None = None
        """Of the step that was looked at last."""

    def accepts(self, result: StepResult) -> bool:
        """Whether the weights are to follow a step's gradients."""
        fault = self._fault_of(result)
        self.fault = None if fault and self._action(fault) == "ignore" else fault
        if self.fault is None:
            self._losses.append(result.loss)
            self._gradient_norms.append(result.gradient_norm)
            self._bad_in_a_row = 0
            return True
        self._bad_in_a_row += 1
        return False

    def goes_back(self, step: int, result: StepResult, times_before: int) -> bool:
        """Whether the run goes back to a checkpoint, after a step that was not accepted.

        times_before: it has gone back to the same one. Raises DivergenceError where it is to stop.
        """
        assert self.fault is not None
        action = self._action(self.fault)
        in_a_row = self._bad_in_a_row if action == "skip" else times_before + 1
        if action != "stop" and in_a_row <= self._settings.most_in_a_row:
            return action == "rollback"
        times = "steps in a row" if action == "skip" else "times from the same checkpoint"
        several = f" ({in_a_row} {times})" if in_a_row > 1 else ""
        raise DivergenceError(
            f"step {step + 1}: {self.told(result)}{several}; nothing of it is saved. Run again to "
            "go on from the last checkpoint, with a lower optimizer.learning_rate, a longer "
            f"optimizer.warmup_fraction, or another guard.on_{self.fault}"
        )

    def told(self, result: StepResult) -> str:
        """What is wrong with a step that was not accepted."""
        what = "is no finite number" if self.fault == "nonfinite" else "is far above those before"
        figures = f"loss {result.loss:.4f} or gradient norm {result.gradient_norm:.3f}"
        return f"{figures} {what}: the step is left out"

    def state(self) -> dict[str, Any]:
        """Plain data, for a checkpoint."""
        return {
            "losses": [*self._losses],
            "gradient_norms": [*self._gradient_norms],
            "bad_in_a_row": self._bad_in_a_row,
        }

    def _action(self, fault: Fault) -> str:
        return self._settings.on_nonfinite if fault == "nonfinite" else self._settings.on_spike

    def _fault_of(self, result: StepResult) -> Fault | None:
        if not (math.isfinite(result.loss) and math.isfinite(result.gradient_norm)):
            return "nonfinite"
        figures = (self._losses, result.loss), (self._gradient_norms, result.gradient_norm)
        return "spike" if any(self._is_spike(*pair) for pair in figures) else None

    def _is_spike(self, before: deque[float], now: float) -> bool:
        if len(before) < self._settings.spike_window // 2:
            return False
        figures = np.array(before)
        return now > figures.mean() + self._settings.spike_sigmas * figures.std()
