"""DeepSpeed ZeRO-3: weights, gradients and optimiser states are partitioned over all ranks."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor
from torch.nn import functional

from megavlm.config.deepspeed_json import deepspeed_config
from megavlm.config.run import RunSettings
from megavlm.data.packing import Batch
from megavlm.dist import cpu
from megavlm.engine.base import DTYPES, MOMENTS, StepResult
from megavlm.engine.optim import adamw
from megavlm.model.initial import materialise
from megavlm.model.vlm import VisionLanguageModel
from megavlm.stages.captioning import loss_sum


class Zero3Engine:
    """Trains a model under ZeRO-3 on all ranks of the world."""

    def __init__(self, run: RunSettings, device: torch.device) -> None:
        self._device = device
        with torch.device("meta"):
            model = VisionLanguageModel(
                run.model,
                dtype=DTYPES[run.train.precision],
                recompute=run.train.recompute,
                frozen=run.train.frozen,
            )
        materialise(model, run.seed, device)
        cpu.use_gloo_for_deepspeed()
        self._engine: Any = deepspeed.initialize(
            model=model,
            optimizer=adamw(model, run.optimizer),
            config=deepspeed_config(run),
            dist_init_required=False,
        )[0]

    def step(self, micro_batches: Sequence[Batch], learning_rate: float) -> StepResult:
        learned = self._sum_over_ranks(sum(int(b.learned_bt.sum()) for b in micro_batches))
        # DeepSpeed averages over micro-batches and ranks; we want the mean over learned tokens.
        scale = len(micro_batches) * dist.get_world_size() / max(1.0, learned)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.train()
        loss_total = torch.zeros((), device=self._device)
        for batch in micro_batches:
            loss = loss_sum(self._engine, batch.to(self._device))
            loss_total += loss.detach()
            self._engine.backward(loss * scale)
            self._engine.step()
        return StepResult(
            loss=self._sum_over_ranks(loss_total) / max(1.0, learned),
            gradient_norm=float(self._engine.get_global_grad_norm()),
            learned_tokens=int(learned),
        )

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, int]:
        self._engine.eval()
        loss_total, learned = torch.zeros((), device=self._device), 0
        for batch in batches:
            loss_total += loss_sum(self._engine, batch.to(self._device))
            learned += int(batch.learned_bt.sum())
        return self._sum_over_ranks(loss_total), int(self._sum_over_ranks(learned))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._engine.module.named_parameters():
            weights: Any = safe_get_full_fp32_param(parameter)
            yield f"weights/{name}", weights.cpu()
            for moment in MOMENTS if parameter.requires_grad else ():
                full: Any = safe_get_full_optimizer_state(parameter, moment)
                yield f"{moment}/{name}", full.cpu()

    def load_tensors(self, read: Callable[[str], Tensor], steps_done: int) -> None:
        self._create_optimizer_states(steps_done)
        for name, parameter in self._engine.module.named_parameters():
            weights = read(f"weights/{name}")
            partition = self._partition(weights, parameter)
            safe_set_local_fp32_param(parameter, partition)
            parameter.ds_tensor.data.copy_(partition)  # the copy that the forward pass gathers
            if parameter.numel() == parameter.ds_numel:  # gathered now, and perhaps for good
                parameter.data.copy_(weights)
            for moment in MOMENTS if parameter.requires_grad else ():
                partition = self._partition(read(f"{moment}/{name}"), parameter)
                safe_set_local_optimizer_state(parameter, partition, moment)

    def close(self) -> None:
        self._engine.destroy()

    def _create_optimizer_states(self, steps_done: int) -> None:
        """AdamW makes its state at its first step; make it now, so that it can be loaded."""
        zero = self._engine.optimizer
        for flat in zero.fp32_partitioned_groups_flat:
            zero.optimizer.state[flat] = {
                "step": torch.tensor(float(steps_done)),
                **{moment: torch.zeros_like(flat) for moment in MOMENTS},
            }

    def _partition(self, full: Tensor, parameter: Any) -> Tensor:
        """This rank's part of a whole tensor, flat, padded with zeros at the end."""
        size = parameter.ds_tensor.numel()
        flat = full.to(self._device).flatten()
        padded = functional.pad(flat, (0, size * dist.get_world_size() - flat.numel()))
        return padded[size * dist.get_rank() :][:size]

    def _sum_over_ranks(self, value: Tensor | float) -> float:
        total = torch.as_tensor(value, dtype=torch.float64, device=self._device).clone()
        dist.all_reduce(total)
        return float(total)
