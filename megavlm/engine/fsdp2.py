"""PyTorch `fully_shard`: the baseline that the other engines are measured by.

Each rank keeps its shard of the fp32 weights, of their gradients and of their AdamW moments. Units
are layers and other large modules: a unit's weights are gathered, in the run's precision, while it
runs. What little is left belongs to the root, and stays gathered through a micro-batch.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import get_total_norm

from megavlm.checkpoint.shards import MOMENTS, Shards, State
from megavlm.config.engines import Fsdp2Settings
from megavlm.config.objectives import Part
from megavlm.config.run import RunSettings
from megavlm.dist import groups
from megavlm.engine.base import (
    DTYPES,
    Accepts,
    Kind,
    StepResult,
    always,
    evaluate_on_each_rank,
    free,
    losses_of,
    norms_of_parts,
    step_result,
)
from megavlm.engine.optim import adamw, set_learning_rate
from megavlm.model.initial import initial_values
from megavlm.stages.base import Objective, no_losses
from megavlm.stages.start import objective_of


class Fsdp2Engine:
    """Trains a model whose layers are sharded over ranks, and perhaps replicated beyond."""

    def __init__(self, run: RunSettings, device: torch.device) -> None:
        self._device = device
        self._clip_norm = run.optimizer.clip_norm
        self._trained_parts = run.trained_parts
        self._gradient_divisor = 1.0
        self._replicas = dist.get_world_size() // _shard_ranks(run.fsdp2)
        self._objective = objective_of(run)
        self._model = _sharded_model(run, self._objective, _mesh(run.fsdp2, device))
        *_, self._last_unit = self._model.units()
        self._fill_with_initial_values(run)
        self._trained = {name: p for name, p in self._parameters() if p.requires_grad}
        # AdamW works on each rank's own shards: DTensors would only cost time.
        self._own_shards = {
            name: _local(p).detach().requires_grad_() for name, p in self._trained.items()
        }
        self._optimizer = adamw(self._own_shards.items(), self._model.ledger(), run)
        self._create_optimizer_states()

    def step(
        self, micro_batches: Sequence[Any], learning_rate: float, accepts: Accepts = always
    ) -> StepResult:
        objective = self._objective
        self._model.train()
        items = sum(objective.items(batch) for batch in micro_batches)
        reported = no_losses(objective, self._device)
        all_losses = losses_of(objective, self._model, micro_batches, self._device)
        for number, losses in enumerate(all_losses, start=1):
            # Shards are reduced after every micro-batch, their replicas once.
            self._model.set_requires_all_reduce(number == len(micro_batches))
            losses.backward.backward()
            reported += losses.reported
        gradients = [_local(parameter.grad) for parameter in self._trained.values()]
        squared_norm = get_total_norm(gradients).double().square() / self._replicas
        *sums, items_of_all, squared = groups.sum_over_ranks(
            *reported.tolist(), items, squared_norm
        )
        # The gradients are of the summed loss; we want those of the mean over the items.
        divisor = max(1.0, items_of_all)
        gradient_norm = math.sqrt(squared) / divisor
        result = step_result(objective, sums, items_of_all, gradient_norm)
        self._gradient_divisor = divisor
        if accepts(result):
            scale = self._clip_factor(gradient_norm) / divisor
            torch._foreach_mul_(gradients, scale)  # pyright: ignore[reportPrivateImportUsage]
            for shard, gradient in zip(self._own_shards.values(), gradients, strict=True):
                shard.grad = gradient
            set_learning_rate(self._optimizer, learning_rate)
            self._optimizer.step()
            self._optimizer.zero_grad()
        self._model.zero_grad()
        return result

    def gradient_norms(self) -> dict[Part, float]:
        ledger = self._model.ledger()
        gradients = ((ledger[n].setting, _local(p.grad)) for n, p in self._trained.items())
        scale = 1 / (self._gradient_divisor * math.sqrt(self._replicas))
        return norms_of_parts(self._trained_parts, gradients, scale)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Any]) -> dict[str, float]:
        losses = evaluate_on_each_rank(self._objective, self._model, self._model, batches)
        for module in (self._model, self._last_unit):
            module.reshard()  # they wait for a backward pass that does not come
        return losses

    def state(self) -> State:
        state: dict[str, Shards] = {}
        for name, parameter in self._parameters():
            state[f"weights/{name}"] = _shards(parameter, _local(parameter))
            for moment in MOMENTS if parameter.requires_grad else ():
                state[f"{moment}/{name}"] = _shards(parameter, self._moments(name)[moment])
        return state

    def replicated(self) -> State:
        return self.state() if self._replicas > 1 else {}

    @torch.no_grad()
    def load_state(self, fill: Callable[[State], None], steps_done: Mapping[Part, int]) -> None:
        fill(self.state())
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                self._optimizer.state[parameter]["step"].fill_(steps_done.get(group["part"], 0))

    def held(self) -> dict[Kind, list[Tensor]]:
        gradients = [_local(p.grad) for p in self._trained.values() if p.grad is not None]
        return {
            "parameters": [_local(parameter) for _, parameter in self._parameters()],
            "gradients": gradients,
            "optimizer": [self._moments(n)[moment] for n in self._trained for moment in MOMENTS],
        }

    def close(self) -> None:
        free(self.held())

    def _parameters(self) -> Iterator[tuple[str, DTensor]]:
        """All parameters by the ledger's names, sharded, as they are between steps."""
        return self._model.named_parameters()

    @torch.no_grad()
    def _fill_with_initial_values(self, run: RunSettings) -> None:
        """One whole parameter at a time, so that no rank ever holds the whole model."""
        self._model.to_empty(device=self._device)
        ledger = self._model.ledger()
        for name, parameter in self._parameters():
            values = initial_values(ledger[name], run.seed, self._device)
            # Rounded as on the other engines, so that all start from the same weights.
            _keep_shard(parameter, values.to(DTYPES[run.train.precision]).float())

    def _create_optimizer_states(self) -> None:
        """AdamW makes its state at its first step; make it now, so that it can be loaded."""
        for shard in self._own_shards.values():
            self._optimizer.state[shard] = {
                "step": torch.zeros((), device=self._device),
                **{moment: torch.zeros_like(shard.detach()) for moment in MOMENTS},
            }

    def _moments(self, name: str) -> dict[str, Tensor]:
        return self._optimizer.state[self._own_shards[name]]

    def _clip_factor(self, gradient_norm: float) -> float:
        """As torch's clip_grad_norm_; a norm of 0 switches clipping off."""
        return min(1.0, self._clip_norm / (gradient_norm + 1e-6)) if self._clip_norm else 1.0


def _shard_ranks(settings: Fsdp2Settings) -> int:
    return settings.shard_ranks or dist.get_world_size()


def _mesh(settings: Fsdp2Settings, device: torch.device) -> DeviceMesh:
    """Neighbours shard, so that they share a host; replicas lie farther apart."""
    ranks, shard_ranks = dist.get_world_size(), _shard_ranks(settings)
    if shard_ranks == ranks:
        return init_device_mesh(device.type, (ranks,), mesh_dim_names=("shard",))
    shape = (ranks // shard_ranks, shard_ranks)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def _sharded_model(run: RunSettings, objective: Objective, mesh: DeviceMesh) -> Any:
    """The stage's model on the meta device, in shards: an FSDPModule, too."""
    train = run.train
    with torch.device("meta"):
        root: Any = objective.build(dtype=torch.float32, recompute=train.recompute)
    units: list[Any] = list(root.units())
    precision = MixedPrecisionPolicy(
        param_dtype=DTYPES[train.precision],
        reduce_dtype=torch.float32,
        # It would round the rotary angles, too. Activations follow the dtype of the weights.
        cast_forward_inputs=False,
    )
    for unit in units:
        # The last one's backward pass follows its forward pass.
        after_forward = unit is not units[-1]
        fully_shard(unit, mesh=mesh, mp_policy=precision, reshard_after_forward=after_forward)
        if isinstance(unit, LanguageModelEmbedding):  # its gradient does not depend on its weights
            cast(Any, unit).set_unshard_in_backward(False)
    fully_shard(root, mesh=mesh, mp_policy=precision)
    for module in (root, *units):
        # Sums, not averages: gloo has no other, and the step divides by the learned tokens.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    # No gradient goes back through a frozen encoder but to the embedding of hidden patches.
    skipped = "encoder" in train.frozen and "mim" not in run.objectives
    first_trained = run.model.encoder.layers if skipped else 0
    ahead = run.fsdp2.prefetch_layers
    for forward, *later in _windows([root, *units], ahead):
        forward.set_modules_to_forward_prefetch(later)
    for backward, *later in _windows([root, *reversed(units[first_trained:])], ahead):
        # An empty list would leave the choice to torch; the module itself is there already.
        backward.set_modules_to_backward_prefetch(later or [backward])
    return root


def _windows(modules: list[Any], ahead: int) -> Iterator[list[Any]]:
    """Each module and up to so many after it."""
    for position in range(len(modules)):
        yield modules[position : position + 1 + ahead]


def _local(sharded: Any) -> Tensor:
    """This rank's shard, sharing memory with the whole."""
    return cast(DTensor, sharded).to_local()


def _shards(sharded: DTensor, local: Tensor) -> Shards:
    """Where this rank's numbers lie in the whole."""
    local = local.detach()
    origins = [tuple(chunk.offsets) for chunk in sharded.__create_chunk_list__()]
    return Shards(tuple(sharded.shape), {o: local for o in origins if local.numel()})


def _keep_shard(sharded: DTensor, whole: Tensor) -> None:
    """Take this rank's shard of a tensor that every rank has; nothing is sent."""
    own = distribute_tensor(whole, sharded.device_mesh, sharded.placements, src_data_rank=None)
    sharded.to_local().copy_(own.to_local())
