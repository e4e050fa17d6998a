"""Megatron-core: tensor, sequence, pipeline and data parallelism, sharded optimiser states.

megatron-core does the work: its layers (in `model/`), its schedules, its DistributedDataParallel
and its distributed optimiser. This file puts them together, and takes states out and in.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, cast

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor, nn

from megavlm.checkpoint.shards import MOMENTS, Shards, State, shards_of_range
from megavlm.config.objectives import Part
from megavlm.config.run import RunSettings
from megavlm.dist import groups
from megavlm.engine.base import (
    DTYPES,
    Accepts,
    Kind,
    StepResult,
    always,
    free,
    means,
    norms_of_parts,
    step_result,
)
from megavlm.engine.optim import group_of, set_learning_rate
from megavlm.model.initial import materialise
from megavlm.model.params import Parameter
from megavlm.model.pipeline import blank, joined_tokens, same_shapes
from megavlm.planner.cut import with_cut
from megavlm.stages.base import Objective, no_losses
from megavlm.stages.start import objective_of

CPU = torch.device("cpu")


class MegatronEngine:
    """Trains a model that is divided over tensor- and pipeline-parallel ranks, and its copies."""

    def __init__(self, run: RunSettings, device: torch.device) -> None:
        self._run = run
        self._device = device
        self._objective = objective_of(run)
        self._parallel = with_cut(run)
        virtual = self._parallel.virtual_pipeline
        stages = range(virtual) if virtual > 1 else [None]
        self._models = [self._build(stage) for stage in stages]
        self._config: Any = self._models[0].config
        self._chunks = [self._data_parallel(model) for model in self._models]
        self._config.finalize_model_grads_func = finalize_model_grads
        if run.megatron.overlap_communication:
            no_sync = [chunk.no_sync for chunk in self._chunks]
            self._config.no_sync_func = no_sync if virtual > 1 else no_sync[0]
        self._held: dict[str, tuple[Parameter, nn.Parameter]] = {}
        for model in self._models:
            ledger = model.ledger()
            for name, parameter in model.named_parameters():
                self._held[ledger[name].name] = (ledger[name], parameter)
        self._optimizer: Any = self._build_optimizer()
        self._create_optimizer_states()

    def step(
        self, micro_batches: Sequence[Any], learning_rate: float, accepts: Accepts = always
    ) -> StepResult:
        for chunk in self._chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        set_learning_rate(self._optimizer, learning_rate)
        for group in self._optimizer.param_groups:
            group["weight_decay"] = self._run.optimizer.weight_decay * group["wd_mult"]
        sums, items = self._run_schedule(micro_batches, forward_only=False)
        # What the optimiser's own `step` does, with a question in its middle.
        self._optimizer.prepare_grads()
        gradient_norm = float(self._optimizer.get_grad_norm())
        result = step_result(self._objective, sums.tolist(), items, gradient_norm)
        if accepts(result):
            for optimizer in self._optimizers():
                clip_grad_by_total_norm_fp32(
                    optimizer.get_parameters(), optimizer.config.clip_grad, gradient_norm
                )
            self._optimizer.step_with_ready_grads()
        return result

    def gradient_norms(self) -> dict[Part, float]:
        gradients = (
            (group["part"], main.grad)
            for optimizer in self._optimizers()
            for group in optimizer.optimizer.param_groups
            for main in group["params"]
            # As in megatron-core's `get_main_grads_for_grad_norm`.
            if main.grad is not None
            and param_is_not_shared(main)
            and param_is_not_tensor_parallel_duplicate(main)
        )
        return norms_of_parts(self._run.trained_parts, gradients, 1.0)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Any]) -> dict[str, float]:
        for chunk in self._chunks:
            chunk.eval()
        stages = self._parallel.pipeline_parallel
        # As many at once as keep all stages busy; the interleaved schedule needs a full set.
        together = stages if stages > 1 else self._objective.held_out_together
        remaining = iter(batches)
        sums, items = no_losses(self._objective, CPU).double(), 0
        while group := list(islice(remaining, together)):
            if stages > 1:
                group += [blank(group[0])] * (together - len(group))
            group_sums, group_items = self._run_schedule(group, forward_only=True)
            sums, items = sums + group_sums, items + group_items
        return means(self._objective, sums.tolist(), items)

    def state(self) -> State:
        state: dict[str, Shards] = {}
        for entry, parameter in self._held.values():
            if not parameter.requires_grad:
                state[f"weights/{entry.name}"] = self._shards(entry, parameter, 0)
                continue
            for optimizer, main, first in self._main_parameter(parameter):
                state[f"weights/{entry.name}"] = self._shards(entry, main, first)
                for kind in MOMENTS:
                    moment = optimizer.state[main][kind]
                    state[f"{kind}/{entry.name}"] = self._shards(entry, moment, first)
        return state

    @torch.no_grad()
    def replicated(self) -> State:
        for chunk in self._chunks:  # the forward pass would gather them
            chunk.start_param_sync(force_sync=True)
        return {
            f"weights/{entry.name}": self._shards(entry, parameter, 0)
            for entry, parameter in self._held.values()
        }

    @torch.no_grad()
    def load_state(self, fill: Callable[[State], None], steps_done: Mapping[Part, int]) -> None:
        fill(self.state())
        for optimizer in self._optimizers():
            for group in optimizer.optimizer.param_groups:
                steps = steps_done.get(group["part"], 0)
                group["step"] = steps  # where TransformerEngine's or Apex's Adam counts
                for main in group["params"]:
                    optimizer.optimizer.state[main]["step"].fill_(steps)
            optimizer._copy_main_params_to_model_params()
        for chunk in self._chunks:
            chunk.start_param_sync(force_sync=True)

    def held(self) -> dict[Kind, list[Tensor]]:
        chunks: list[Any] = self._chunks  # `buffers` is a list here, not nn.Module's method
        buffers = [b for chunk in chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        optimizer: list[Tensor] = []
        for _, parameter in self._held.values():
            for adam, main, _ in self._main_parameter(parameter):
                optimizer += [main.detach(), *(adam.state[main][moment] for moment in MOMENTS)]
        return {
            # Of what is trained, the buffers have the memory.
            "parameters": [p.data for _, p in self._held.values()],
            "gradients": [buffer.grad_data for buffer in buffers],
            "optimizer": optimizer,
        }

    def close(self) -> None:
        free(self.held())

    def _build(self, vp_stage: int | None) -> Any:
        train = self._run.train
        with torch.device("meta"):
            model: Any = self._objective.build(
                dtype=DTYPES[train.precision],
                recompute=train.recompute,
                parallel=self._parallel,
                vp_stage=vp_stage,
            )
        materialise(model, self._run.seed, self._device)
        return model

    def _data_parallel(self, model: Any) -> DistributedDataParallel:
        overlap = self._run.megatron.overlap_communication
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=True,
            overlap_grad_reduce=overlap,
            overlap_param_gather=overlap,
        )
        return DistributedDataParallel(self._config, settings, model)

    def _build_optimizer(self) -> Any:
        settings = self._run.optimizer
        bf16 = self._run.train.precision == "bf16"
        config = OptimizerConfig(
            optimizer="adam",
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.beta1,
            adam_beta2=settings.beta2,
            adam_eps=settings.epsilon,
            clip_grad=settings.clip_norm or float("inf"),
            bf16=bf16,
            params_dtype=DTYPES[self._run.train.precision],
            use_distributed_optimizer=True,
            overlap_param_gather=self._run.megatron.overlap_communication,
        )
        group_by_parameter = {
            parameter: group_of(entry, self._run) for entry, parameter in self._held.values()
        }
        overrides: dict[ParamKey, ParamGroupOverride] = {}
        for group in set(group_by_parameter.values()):
            belongs = ParamWithNamePredicate(
                str(group), lambda p, _, group=group: group_by_parameter[p] == group
            )
            override = {"wd_mult": float(group.decays), "scale": group.scale, "part": group.part}
            overrides[ParamKey(with_name_predicate=belongs)] = cast(ParamGroupOverride, override)
        return get_megatron_optimizer(
            config,
            cast(Any, self._chunks),
            config_overrides=overrides,
            use_gloo_process_groups=False,
        )

    def _run_schedule(self, batches: Sequence[Any], *, forward_only: bool) -> tuple[Tensor, int]:
        """Forward, and backward, over micro-batches; what they report, and the items, in sum."""
        items = sum(self._objective.items(batch) for batch in batches)
        sent_tokens = 0
        if self._parallel.pipeline_parallel > 1:
            batches = same_shapes(batches)
            tokens_per_image = self._run.model.encoder.tokens
            sent_tokens = joined_tokens(batches[0], tokens_per_image, self._parallel)
        prepared = self._objective.prepare(self._chunks[0], batches)
        reported = get_forward_backward_func()(
            forward_step_func=partial(_forward_step, self._objective),
            data_iterator=[self._on_device(batches, prepared) for _ in self._chunks],
            model=cast(Any, self._chunks),
            num_microbatches=len(batches),
            seq_length=sent_tokens,
            micro_batch_size=1,
            forward_only=forward_only,
        )
        # The last stage has the losses; its tensor-parallel ranks have the same ones.
        mine: list[Any] = [*no_losses(self._objective, CPU), 0.0]
        if reported and _tensor_rank() == 0:
            mine = [*torch.stack(reported).double().sum(0), items]
        *sums, items_of_all = groups.sum_over_ranks(*mine)
        return torch.tensor(sums, dtype=torch.float64), int(items_of_all)

    def _on_device(
        self, batches: Sequence[Any], prepared: Sequence[Any]
    ) -> Iterator[tuple[Any, Any]]:
        """Each micro-batch when its turn comes, and what it must know of the step."""
        for batch, ready in zip(batches, prepared, strict=True):
            yield batch.to(self._device), ready

    def _optimizers(self) -> Iterator[Any]:
        """megatron-core's optimisers that hold something."""
        for optimizer in getattr(self._optimizer, "chained_optimizers", [self._optimizer]):
            if not optimizer.is_stub_optimizer:
                yield optimizer

    def _main_parameter(self, parameter: nn.Parameter) -> Iterator[tuple[Any, Tensor, int]]:
        """This rank's range of the fp32 weights, if any: its optimiser, the range, its start."""
        for optimizer in self._optimizers():
            if parameter in optimizer.model_param_group_index_map:
                group, place = optimizer.model_param_group_index_map[parameter]
                own_range = optimizer._get_model_param_range_map(parameter)["param"]
                main = optimizer.optimizer.param_groups[group]["params"][place]
                yield optimizer.optimizer, main, own_range.start

    def _shards(self, entry: Parameter, values: Tensor, first: int) -> Shards:
        ranks = self._parallel.tensor_parallel
        flat = values.detach().view(-1)
        return shards_of_range(entry, flat, first, ranks, _tensor_rank())

    def _create_optimizer_states(self) -> None:
        """AdamW makes its state at its first step; make it now, so that it can be loaded."""
        for optimizer in self._optimizers():
            for group in optimizer.optimizer.param_groups:
                group["fused"] = True  # for torch's AdamW; as in `optim.adamw`
                for main in group["params"]:
                    optimizer.optimizer.state[main] = {
                        "step": torch.zeros((), device=main.device),
                        **{moment: torch.zeros_like(main.detach()) for moment in MOMENTS},
                    }


def _forward_step(
    objective: Objective, batches: Iterator[tuple[Any, Any]], chunk: nn.Module
) -> tuple[Any, Callable[..., Any]]:
    """One micro-batch through one chunk; the schedule calls the loss function on the last stage."""
    batch, prepared = next(batches)

    def loss(outputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        losses = objective.losses(outputs, batch, prepared)
        items = torch.tensor(objective.items(batch), dtype=torch.int, device=losses.backward.device)
        return losses.backward, items, losses.reported

    return objective.outputs(chunk, batch, prepared), loss


def _tensor_rank() -> int:
    return parallel_state.get_tensor_model_parallel_rank()
