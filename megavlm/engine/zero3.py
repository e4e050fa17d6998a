"""DeepSpeed ZeRO-3: weights, gradients and optimiser states are partitioned over all ranks."""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partition_parameters import (
    DeepSpeedTensorOverride,
    MultipleAllGatherHandles,
    ZeroParamStatus,
)
from deepspeed.utils import (
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn
from torch.nn import functional

from megavlm.checkpoint.shards import MOMENTS, Shards, State, shards_of_range, whole
from megavlm.config.deepspeed_json import deepspeed_config
from megavlm.config.objectives import Part
from megavlm.config.run import RunSettings
from megavlm.dist import cpu, groups
from megavlm.engine.base import (
    DTYPES,
    Accepts,
    Kind,
    StepResult,
    always,
    evaluate_on_each_rank,
    free,
    losses_of,
    step_result,
)
from megavlm.engine.optim import adamw, set_learning_rate
from megavlm.model.cross_attention import CrossAttentionLayer
from megavlm.model.initial import initial_values
from megavlm.planner.zero3 import with_bucket_sizes
from megavlm.stages.base import no_losses
from megavlm.stages.start import objective_of


class Zero3Engine:
    """Trains a model under ZeRO-3 on all ranks of the world."""

    def __init__(self, run: RunSettings, device: torch.device) -> None:
        self._device = device
        self._trained_parts = run.trained_parts
        self._objective = objective_of(run)
        cpu.use_gloo_for_deepspeed()
        config = deepspeed_config(with_bucket_sizes(run))
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed wants it of a process alone, too
        # Every module is divided as soon as it is built, so the whole model never exists.
        with deepspeed.zero.Init(
            config_dict_or_path=config,
            # Not the dtype: that would round the rotary frequencies.
            tensor_overrides=[DeepSpeedTensorOverride.device],
        ):
            model: Any = self._objective.build(
                dtype=DTYPES[run.train.precision], recompute=run.train.recompute
            )
        for module in model.modules():
            if isinstance(module, TransformerLayer | CrossAttentionLayer):
                # DeepSpeed learns from arguments by position alone when a layer's backward pass is
                # over. The hook must come before DeepSpeed's.
                module.register_forward_pre_hook(_by_position, with_kwargs=True)
        self._ledger = model.ledger()
        for name, parameter in model.named_parameters():
            values = initial_values(self._ledger[name], run.seed, device)
            _write(parameter, _partition(values, parameter))
        self._engine: Any = deepspeed.initialize(
            model=model, optimizer=_optimizer(model, run), config=config, dist_init_required=False
        )[0]
        self._norms: list[Any] = []
        """Of the gradients of DeepSpeed's groups, over all ranks; as its loss is, scaled."""
        self._accepts_norm: Callable[[float], bool] = lambda norm: True
        self._ask_before_updates()
        self._create_optimizer_states({})
        if run.zero3.quantized_weights:
            for parameter in model.parameters():
                _quantize_only_matrices(parameter)

    def step(
        self, micro_batches: Sequence[Any], learning_rate: float, accepts: Accepts = always
    ) -> StepResult:
        objective = self._objective
        [items] = groups.sum_over_ranks(sum(objective.items(batch) for batch in micro_batches))
        # DeepSpeed averages over micro-batches and ranks; we want the mean over the items.
        scale = len(micro_batches) * dist.get_world_size() / max(1.0, items)
        # It is taken from the fp32 sums: a scaled loss would round otherwise through all of bf16.
        self._engine.optimizer.override_loss_scale(1 / scale)
        set_learning_rate(self._engine.optimizer, learning_rate)
        self._engine.train()
        reported = no_losses(objective, self._device)
        results: list[StepResult] = []

        def asked(gradient_norm: float) -> bool:
            sums = groups.sum_over_ranks(*reported.tolist())
            results.append(step_result(objective, sums, items, gradient_norm))
            return accepts(results[0])

        self._accepts_norm = asked
        for losses in losses_of(objective, self._engine, micro_batches, self._device):
            reported += losses.reported
            self._engine.backward(losses.backward * scale)
            self._engine.step()
        # Recomputation stops inside of a module when it has all that it needs; DeepSpeed's hook
        # that would take the module off again does not run.
        parameter_offload.FWD_MODULE_STACK.clear()
        return results[0]

    def gradient_norms(self) -> dict[Part, float]:
        zero = self._engine.optimizer
        squares = dict.fromkeys(self._trained_parts, 0.0)
        for number, norm in enumerate(self._norms):
            group = zero.optimizer.param_groups[zero.sub_group_to_group_id[number]]
            squares[group["part"]] += (float(norm) / zero.loss_scale) ** 2
        return {part: math.sqrt(square) for part, square in squares.items()}

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Any]) -> dict[str, float]:
        return evaluate_on_each_rank(self._objective, self._engine, self._engine, batches)

    def state(self) -> State:
        return self._shards(self._partitions())

    def replicated(self) -> State:
        return {
            f"weights/{name}": whole(parameter.data)
            for name, parameter in self._parameters()
            if parameter.ds_status == ZeroParamStatus.AVAILABLE  # it stays gathered
        }

    @torch.no_grad()
    def load_state(self, fill: Callable[[State], None], steps_done: Mapping[Part, int]) -> None:
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

    def held(self) -> dict[Kind, list[Tensor]]:
        zero = self._engine.optimizer
        flats = zero.fp32_partitioned_groups_flat
        parameters: list[Tensor | None] = []
        for _, parameter in self._parameters():
            # The first one is empty unless it stays gathered.
            parameters += [parameter.data, parameter.ds_tensor, parameter.ds_secondary_tensor]
        moments = [zero.optimizer.state[flat][moment] for flat in flats for moment in MOMENTS]
        held: dict[Kind, list[Tensor | None]] = {
            "parameters": parameters,
            "gradients": [zero.grad_partitions_flat_buffer, *(flat.grad for flat in flats)],
            "optimizer": [*flats, *moments],
        }
        return {kind: [t for t in tensors if t is not None] for kind, tensors in held.items()}

    def close(self) -> None:
        held = self.held()
        self._engine.destroy()
        free(held)
        # It must be gone before another engine makes its own, which DeepSpeed leaves to us.
        deepspeed.utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None

    def _ask_before_updates(self) -> None:
        """Have DeepSpeed leave out what is not accepted, as it does at overflows in fp16."""
        zero = self._engine.optimizer
        norms_of_groups = zero._get_norm_groups
        skip_at_overflow = zero._loss_scale_update_and_overflow_cleanup
        norms = self._norms

        def get_norm_groups() -> list[Any]:
            norms[:] = norms_of_groups()
            return norms

        def skip_unless_accepted() -> bool:
            norm = float(combine_grad_norm_groups(norms)) / zero.loss_scale
            zero.overflow = not self._accepts_norm(norm)
            return skip_at_overflow()

        zero._get_norm_groups = get_norm_groups
        zero._loss_scale_update_and_overflow_cleanup = skip_unless_accepted

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

    def _create_optimizer_states(self, steps_done: Mapping[Part, int]) -> None:
        """Adam makes its state at its first step; make it now, so that it can be loaded."""
        zero = self._engine.optimizer
        counts_in_tensor = isinstance(zero.optimizer, torch.optim.AdamW)
        for number, flat in enumerate(zero.fp32_partitioned_groups_flat):
            on_nvme = zero._swappable_optimizer_subgroup(number)
            if on_nvme:
                zero._optimizer_states_and_gradient_swap_in(number)
            group = zero.optimizer.param_groups[zero.sub_group_to_group_id[number]]
            steps = steps_done.get(group["part"], 0)
            zero.optimizer.state[flat] = {
                "step": (
                    torch.full((), float(steps), device=flat.device) if counts_in_tensor else steps
                ),
                **{moment: torch.zeros_like(flat) for moment in MOMENTS},
            }
            if on_nvme:
                zero._optimizer_states_and_gradient_swap_out(number)


def _optimizer(model: Any, run: RunSettings) -> torch.optim.Optimizer:
    """AdamW; DeepSpeed's vectorised one for states that wait in the memory of a host with GPUs.

    On hosts without GPUs torch's serves, which needs no compiler.
    """
    in_host = run.zero3.offload_optimizer != "none" and torch.cuda.is_available()
    implementation = DeepSpeedCPUAdam if in_host else torch.optim.AdamW
    # ZeRO-3 flattens parameters; the ledger knows their shapes.
    return adamw(model.named_parameters(), model.ledger(), run, implementation)


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


def _by_position(
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """megatron-core's blocks name the hidden states, which come first."""
    others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    return (kwargs["hidden_states"], *args), others


def _partition(whole: Tensor, parameter: Any) -> Tensor:
    """This rank's part of a whole tensor, flat, padded with zeros at the end."""
    size = parameter.ds_tensor.ds_numel
    start = size * parameter.ds_zero_partition_rank
    part = whole.flatten()[start : start + size]
    return functional.pad(part, (0, size - part.numel()))
