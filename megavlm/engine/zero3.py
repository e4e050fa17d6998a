"""DeepSpeed ZeRO-3: weights, gradients and optimiser states are partitioned over all ranks."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.zero.partition_parameters import (
    DeepSpeedTensorOverride,
    MultipleAllGatherHandles,
    ZeroParamStatus,
)
from deepspeed.utils import (
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor
from torch.nn import functional

from megavlm.checkpoint.shards import MOMENTS, Shards, State, shards_of_range
from megavlm.config.deepspeed_json import deepspeed_config
from megavlm.config.run import RunSettings
from megavlm.data.packing import Batch
from megavlm.dist import cpu, groups
from megavlm.engine.base import DTYPES, StepResult, evaluate_on_each_rank
from megavlm.engine.optim import adamw
from megavlm.model.initial import initial_values
from megavlm.model.vlm import VisionLanguageModel
from megavlm.planner.zero3 import with_bucket_sizes
from megavlm.stages.captioning import loss_sum


class Zero3Engine:
    """Trains a model under ZeRO-3 on all ranks of the world."""

    def __init__(self, run: RunSettings, device: torch.device) -> None:
        self._device = device
        cpu.use_gloo_for_deepspeed()
        config = deepspeed_config(with_bucket_sizes(run))
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed wants it of a process alone, too
        # Every module is divided as soon as it is built, so the whole model never exists.
        with deepspeed.zero.Init(
            config_dict_or_path=config,
            # Not the dtype: that would round the rotary frequencies.
            tensor_overrides=[DeepSpeedTensorOverride.device],
        ):
            model = VisionLanguageModel(
                run.model,
                dtype=DTYPES[run.train.precision],
                recompute=run.train.recompute,
                frozen=run.train.frozen,
            )
        self._ledger = model.ledger()
        for name, parameter in model.named_parameters():
            values = initial_values(self._ledger[name], run.seed, device)
            _write(parameter, _partition(values, parameter))
        self._engine: Any = deepspeed.initialize(
            model=model, optimizer=_optimizer(model, run), config=config, dist_init_required=False
        )[0]
        self._create_optimizer_states(steps_done=0)
        if run.zero3.quantized_weights:
            for parameter in model.parameters():
                _quantize_only_matrices(parameter)

    def step(self, micro_batches: Sequence[Batch], learning_rate: float) -> StepResult:
        [learned] = groups.sum_over_ranks(sum(int(b.learned_bt.sum()) for b in micro_batches))
        # DeepSpeed averages over micro-batches and ranks; we want the mean over learned tokens.
        scale = len(micro_batches) * dist.get_world_size() / max(1.0, learned)
        # It is taken from the fp32 sums: a scaled loss would round otherwise through all of bf16.
        self._engine.optimizer.override_loss_scale(1 / scale)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.train()
        loss_total = torch.zeros((), device=self._device)
        for batch in micro_batches:
            loss = loss_sum(self._engine, batch.to(self._device))
            loss_total += loss.detach()
            self._engine.backward(loss * scale)
            self._engine.step()
        [loss_of_all] = groups.sum_over_ranks(loss_total)
        return StepResult(
            loss=loss_of_all / max(1.0, learned),
            gradient_norm=float(self._engine.get_global_grad_norm()),
            learned_tokens=int(learned),
        )

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, int]:
        return evaluate_on_each_rank(self._engine, batches)

    def state(self) -> State:
        return self._shards(self._partitions())

    @torch.no_grad()
    def load_state(self, fill: Callable[[State], None], steps_done: int) -> None:
        self._create_optimizer_states(steps_done)
        partitions = self._partitions()
        fill(self._shards(partitions))
        for name, parameter in self._parameters():
            _write(parameter, partitions[f"weights/{name}"])
            if parameter.requires_grad:  # what waits on a disk was only copied
                safe_set_local_fp32_param(parameter, partitions[f"weights/{name}"])
                for moment in MOMENTS:
                    part = partitions[f"{moment}/{name}"]
                    safe_set_local_optimizer_state(parameter, part, moment)

    def close(self) -> None:
        self._engine.destroy()

    def _parameters(self) -> Iterator[tuple[str, Any]]:
        return self._engine.module.named_parameters()

    def _partitions(self) -> dict[str, Tensor]:
        """This rank's part of every tensor: flat, padded at the end, shared unless on NVMe."""
        zero = self._engine.optimizer
        partitions: dict[str, Tensor] = {}
        for name, parameter in self._parameters():
            if not parameter.requires_grad:
                partitions[f"weights/{name}"] = parameter.ds_tensor.detach().view(-1)
                continue
            for kind, key in (("weights", None), *((moment, moment) for moment in MOMENTS)):
                part, group = zero._get_fp32_opt_state_partition(
                    parameter, release_swap_buffers=True, optim_state_key=key
                )
                on_nvme = zero._swappable_optimizer_subgroup(group)
                partitions[f"{kind}/{name}"] = part.clone() if on_nvme else part.detach()
        return partitions

    def _shards(self, partitions: Mapping[str, Tensor]) -> State:
        shards: dict[str, Shards] = {}
        for name, parameter in self._parameters():
            first = parameter.ds_tensor.ds_numel * parameter.ds_zero_partition_rank
            for kind in ("weights", *(MOMENTS if parameter.requires_grad else ())):
                part = partitions[f"{kind}/{name}"]
                shards[f"{kind}/{name}"] = shards_of_range(self._ledger[name], part, first)
        return shards

    def _create_optimizer_states(self, steps_done: int) -> None:
        """Adam makes its state at its first step; make it now, so that it can be loaded."""
        zero = self._engine.optimizer
        counts_in_tensor = isinstance(zero.optimizer, torch.optim.AdamW)
        for number, flat in enumerate(zero.fp32_partitioned_groups_flat):
            on_nvme = zero._swappable_optimizer_subgroup(number)
            if on_nvme:
                zero._optimizer_states_and_gradient_swap_in(number)
            zero.optimizer.state[flat] = {
                "step": torch.tensor(float(steps_done)) if counts_in_tensor else steps_done,
                **{moment: torch.zeros_like(flat) for moment in MOMENTS},
            }
            if on_nvme:
                zero._optimizer_states_and_gradient_swap_out(number)


def _optimizer(model: VisionLanguageModel, run: RunSettings) -> torch.optim.Optimizer:
    """AdamW; DeepSpeed's vectorised one for states that wait in the memory of a host with GPUs.

    On hosts without GPUs torch's serves, which needs no compiler.
    """
    if run.zero3.offload_optimizer == "none" or not torch.cuda.is_available():
        return adamw(model, run.optimizer)
    return adamw(model, run.optimizer, DeepSpeedCPUAdam)


def _quantize_only_matrices(parameter: Any) -> None:
    """Gather norms, biases and gates as they are.

    DeepSpeed's quantiser fails on parts whose size is no multiple of 8, such as those of a gate.
    """
    gather = parameter.all_gather_coalesced

    def gather_in_two(
        parameters: Iterable[Any], safe_mode: bool = False, quantize: bool = False
    ) -> Any:
        exact, rounded = [], []
        for p in parameters:
            fits = quantize and not p.ds_persist and p.ds_tensor.ds_numel % 8 == 0
            (rounded if fits else exact).append(p)
        groups = [(group, group is rounded) for group in (exact, rounded) if group]
        return MultipleAllGatherHandles([gather(group, safe_mode, q) for group, q in groups])

    parameter.all_gather_coalesced = gather_in_two


@torch.no_grad()
def _write(parameter: Any, partition: Tensor) -> None:
    """Give a divided parameter new values, on every copy that the forward pass may gather from.

    Collective.
    """
    parameter.ds_tensor.view(-1).copy_(partition)
    parameter.ds_secondary_tensor = None  # DeepSpeed makes it anew from the next gather
    if parameter.ds_status == ZeroParamStatus.AVAILABLE:  # gathered now, and perhaps for good
        own = parameter.ds_tensor.to(parameter.device)
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own)
        parameter.data.copy_(torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape))


def _partition(whole: Tensor, parameter: Any) -> Tensor:
    """This rank's part of a whole tensor, flat, padded with zeros at the end."""
    size = parameter.ds_tensor.ds_numel
    start = size * parameter.ds_zero_partition_rank
    part = whole.flatten()[start : start + size]
    return functional.pad(part, (0, size - part.numel()))
