"""What the training loop asks of an engine."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from megavlm.checkpoint.shards import State
from megavlm.data.packing import Batch
from megavlm.dist import groups
from megavlm.stages.captioning import loss_sum

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimiser step did, the same on every rank."""

    loss: float
    """Mean over the learned tokens of all micro-batches and ranks, in nats."""
    gradient_norm: float
    """Global, before clipping."""
    learned_tokens: int
    """Labels that counted, over all micro-batches and ranks."""


def evaluate_on_each_rank(model: nn.Module, batches: Iterable[Batch]) -> tuple[float, int]:
    """`Engine.evaluate` for a model that runs whole on every rank."""
    model.eval()
    loss_total, learned = torch.zeros((), device=groups.device()), 0
    for batch in batches:
        loss_total += loss_sum(model, batch.to(groups.device()))
        learned += int(batch.learned_bt.sum())
    loss_sum_of_all, learned_of_all = groups.sum_over_ranks(loss_total, learned)
    return loss_sum_of_all, int(learned_of_all)


class Engine(Protocol):
    """Runs one model over all ranks. Every method is collective."""

    def step(self, micro_batches: Sequence[Batch], learning_rate: float) -> StepResult:
        """Accumulate this rank's micro-batches, then update the weights once."""
        ...

    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """Summed loss and learned tokens over all batches and ranks, without a gradient."""
        ...

    def state(self) -> State:
        """What this rank holds of the model and its optimiser, sharing memory where it can.

        Keys are `weights/NAME`, and for trained parameters `exp_avg/NAME` and `exp_avg_sq/NAME`,
        all fp32; names are the ledger's. What is not trained has the type that the engine keeps it
        in. Several ranks may hold the same.
        """
        ...

    def load_state(self, fill: Callable[[State], None], steps_done: int) -> None:
        """Have `fill` write into what `state` returns, in place, and go on from there."""
        ...

    def close(self) -> None:
        """Release what the engine holds."""
        ...
