"""What the training loop asks of an engine."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from megavlm.checkpoint.shards import State
from megavlm.config.objectives import Part
from megavlm.dist import groups
from megavlm.stages.base import Forward, Losses, Objective, no_losses, weighted

Kind = Literal["parameters", "gradients", "optimizer"]
"""Of what an engine holds between steps; the optimizer has moments and master weights."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimiser step did, the same on every rank."""

    loss: float
    """The objectives' losses, weighted and added up."""
    losses: dict[str, float]
    """Of each objective: the mean over the items of all micro-batches and ranks."""
    gradient_norm: float
    """Global, before clipping."""
    items: int
    """What the losses are means over: learned tokens or pictures."""
    losses_of_groups: dict[str, float] = field(default_factory=lambda: {})
    """Means over the items of a group alone; of no group that has none, or all."""


Accepts = Callable[[StepResult], bool]
"""Whether the weights are to follow a step's gradients; the same on every rank."""


def always(_: StepResult) -> bool:
    """Accept every step."""
    return True


def step_result(
    objective: Objective, sums: Sequence[float], items: float, gradient_norm: float
) -> StepResult:
    """The result of a step, from what its micro-batches have reported, summed over all ranks."""
    losses = means(objective, sums, items)
    of_groups = sums[len(losses) :]
    return StepResult(
        loss=weighted(objective, losses.values()),
        losses=losses,
        gradient_norm=gradient_norm,
        items=int(items),
        losses_of_groups={
            name: loss_sum / count
            for name, loss_sum, count in zip(
                objective.groups, of_groups[::2], of_groups[1::2], strict=True
            )
            if 0 < count < items
        },
    )


def norms_of_parts(
    trained: Sequence[Part], gradients: Iterable[tuple[Part, Tensor]], scale: float
) -> dict[Part, float]:
    """The norm of each part's gradients, `scale` times, from those that each rank holds alone."""
    by_part: dict[Part, list[Tensor]] = {part: [] for part in trained}
    for part, gradient in gradients:
        by_part[part].append(gradient)
    squares = [get_total_norm(held).double().square() if held else 0.0 for held in by_part.values()]
    totals = groups.sum_over_ranks(*squares)
    return {part: scale * math.sqrt(s) for part, s in zip(by_part, totals, strict=True)}


def means(objective: Objective, sums: Sequence[float], items: float) -> dict[str, float]:
    """Losses by objective, from reported sums over all items."""
    return {name: s / max(1.0, items) for name, s in zip(objective.names, sums, strict=False)}


def losses_of(
    objective: Objective, forward: Forward, batches: Sequence[Any], device: torch.device
) -> Iterator[Losses]:
    """Run the micro-batches of a step one after the other; collective."""
    for host_batch, prepared in zip(batches, objective.prepare(forward, batches), strict=True):
        batch = host_batch.to(device)
        yield objective.losses(objective.outputs(forward, batch, prepared), batch, prepared)


def evaluate_on_each_rank(
    objective: Objective, model: nn.Module, forward: Forward, batches: Iterable[Any]
) -> dict[str, float]:
    """`Engine.evaluate` for a model that runs whole on every rank."""
    model.eval()
    sums, items = no_losses(objective, groups.device()), 0
    remaining = iter(batches)
    while group := list(islice(remaining, objective.held_out_together)):
        items += sum(objective.items(batch) for batch in group)
        for losses in losses_of(objective, forward, group, groups.device()):
            sums += losses.reported
    *sums_of_all, items_of_all = groups.sum_over_ranks(*sums.tolist(), items)
    return means(objective, sums_of_all, items_of_all)


def free(held: Mapping[Kind, Iterable[Tensor]]) -> None:
    """Give back the memory of what an engine holds, whoever still refers to it.

    DeepSpeed and megatron-core refer to a model's tensors from caches and hooks for good, so a run
    of several stages would keep the states of all.
    """
    for tensor in chain.from_iterable(held.values()):
        storage = tensor.untyped_storage()
        # Memory of others is not ours to give back, nor is what `Tensor.numpy()` has ever shown.
        if storage.resizable():
            storage.resize_(0)


class Engine(Protocol):
    """Runs one model over all ranks. Every method is collective."""

    def step(
        self, micro_batches: Sequence[Any], learning_rate: float, accepts: Accepts = always
    ) -> StepResult:
        """Accumulate this rank's micro-batches, then update the weights once.

        Where the result is not accepted, weights and the optimiser's states stay as they are.
        """
        ...

    def gradient_norms(self) -> dict[Part, float]:
        """Of each trained part of the model; together they are the step's `gradient_norm`.

        Only while `step` asks whether its result is accepted: else there are no gradients.
        """
        ...

    def evaluate(self, batches: Iterable[Any]) -> dict[str, float]:
        """Each objective's mean loss over all batches and ranks, without a gradient."""
        ...

    def state(self) -> State:
        """What this rank holds of the model and its optimiser, sharing memory where it can.

        Keys are `weights/NAME`, and for trained parameters `exp_avg/NAME` and `exp_avg_sq/NAME`,
        all fp32; names are the ledger's. What is not trained has the type that the engine keeps it
        in. Several ranks may hold the same.
        """
        ...

    def replicated(self) -> State:
        """What this rank holds, and its counterparts in other copies of the model hold as well.

        Boxes of one name that several of them have are to be the same, bit by bit.
        """
        ...

    def load_state(self, fill: Callable[[State], None], steps_done: Mapping[Part, int]) -> None:
        """Have `fill` write into what `state` returns, in place, and go on from there.

        steps_done: steps that the optimiser has taken of each trained part, 0 where none is named.
        """
        ...

    def held(self) -> dict[Kind, list[Tensor]]:
        """What lies on this rank between steps, by kind; several tensors may share memory.

        Counts of the optimiser's steps are left out, and so is what waits on NVMe.
        """
        ...

    def close(self) -> None:
        """Give back the memory that the engine holds: what `state` has returned is gone, too."""
        ...
