"""A moving average of the trained weights, under any engine."""

from collections.abc import Collection

import torch

from megavlm.checkpoint.shards import Shards, State


class Ema:
    """What this rank holds of the average, fp32, beside the weights it is of.

    It starts as the first weights, so there is no bias to correct. No method is collective.
    """

    def __init__(self, state: State, trained: Collection[str], decay: float) -> None:
        """Start from the weights as they are now.

        state: as `Engine.state` gives it; its memory must be the engine's own. trained: names of
        the parameters to average, also those that other ranks hold.
        """
        self._decay = decay
        names = [name for name in sorted(trained) if f"weights/{name}" in state]
        weights = {name: state[f"weights/{name}"] for name in names}
        self._state = {
            f"ema/{name}": Shards(
                shards.shape, {origin: box.clone() for origin, box in shards.boxes.items()}
            )
            for name, shards in weights.items()
        }
        self._weights = [box for s in weights.values() for box in s.boxes.values()]
        self._averages = [box for s in self._state.values() for box in s.boxes.values()]

    def update(self) -> None:
        """Take in the weights after a step: decay * average + (1 - decay) * weights."""
        if self._averages:  # a rank may hold nothing that is trained
            torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
                self._averages, self._weights, 1 - self._decay
            )

    def state(self) -> State:
        """This rank's boxes of `ema/NAME`, to be saved, or overwritten by loading."""
        return self._state
