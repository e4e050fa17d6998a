"""What the stages of a run have in common: what an engine and the training loop ask of one."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megavlm.config.engines import MegatronSettings
from megavlm.data.collate import Collate

Forward = Callable[..., Any]
"""The model, or what runs it under an engine."""


class Losses(NamedTuple):
    """What one micro-batch contributes to the loss of a step, as sums over its items."""

    backward: Tensor
    """(), what is back-propagated."""
    reported: Tensor
    """(objectives + 2 x groups,), detached: each objective's loss without its weight, then of each
    group its loss and its items."""


class Objective(Protocol):
    """What a stage computes a loss on, and the model that it trains.

    An item is what the loss is averaged over: a learned token, or a picture. Engines divide sums by
    the items of the whole step.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """Of the objectives that share a step."""
        ...

    @property
    def weights(self) -> tuple[float, ...]:
        """Of each of them."""
        ...

    @property
    def groups(self) -> tuple[str, ...]:
        """Of items, whose losses are also reported by themselves; they may overlap."""
        ...

    @property
    def collate(self) -> Collate:
        """Makes a micro-batch."""
        ...

    @property
    def held_out_together(self) -> int:
        """Micro-batches that a held-out loss is computed over at once."""
        ...

    def build(
        self,
        *,
        dtype: torch.dtype,
        recompute: str,
        parallel: MegatronSettings = ...,
        vp_stage: int | None = None,
    ) -> Any:
        """The model, or what this rank holds of it; weights are not initialised.

        A module with `encoder`, `ledger`, `shard` and `units`, as VisionLanguageModel has them.
        """
        ...

    def items(self, batch: Any) -> int:
        """Items of a micro-batch."""
        ...

    def prepare(self, forward: Forward, batches: Sequence[Any]) -> Sequence[Any]:
        """What each micro-batch's loss must know of the whole step; collective, no gradients.

        The micro-batches are in the memory of the host.
        """
        ...

    def outputs(self, model: Any, batch: Any, prepared: Any) -> Any:
        """What the model says of a micro-batch; before the last pipeline stage, what it sends."""
        ...

    def losses(self, outputs: Any, batch: Any, prepared: Any) -> Losses:
        """The loss of a micro-batch from the model's outputs."""
        ...


def no_losses(objective: Objective, device: torch.device) -> Tensor:
    """Of no micro-batch at all, as `Losses.reported`."""
    return torch.zeros(len(objective.names) + 2 * len(objective.groups), device=device)


def weighted(objective: Objective, reported: Iterable[float]) -> float:
    """The loss of a step from those of its objectives."""
    return sum(w * loss for w, loss in zip(objective.weights, reported, strict=True))
