"""Megatron-core: tensor, sequence, pipeline and data parallelism, sharded optimiser states.

megatron-core does the work: its layers (in `model/`), its schedules, its DistributedDataParallel
and its distributed optimiser. This file puts them together, and takes states out and in.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
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
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megavlm.checkpoint.shards import MOMENTS, Shards, State, shards_of_range
from megavlm.config.run import RunSettings
from megavlm.data.packing import Batch
from megavlm.dist import groups
from megavlm.engine.base import DTYPES, StepResult
from megavlm.engine.optim import decays
from megavlm.model.initial import materialise
from megavlm.model.params import Parameter
from megavlm.model.pipeline import blank, joined_tokens, same_shapes
from megavlm.model.vlm import VisionLanguageModel
from megavlm.planner.cut import with_cut
from megavlm.stages.captioning import loss_sum_of, token_losses


class MegatronEngine:
    """Trains a model that is divided over tensor- and pipeline-parallel ranks, and its copies."""

    def __init__(self, run: RunSettings, device: torch.device) -> None:
        self._run = run
        self._device = device
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
        self._optimizer: Any = self._build_optimizer()
        self._create_optimizer_states()
        self._held: dict[str, tuple[Parameter, nn.Parameter]] = {}
        for model in self._models:
            ledger = model.ledger()
            for name, parameter in model.named_parameters():
                self._held[ledger[name].name] = (ledger[name], parameter)

    def step(self, micro_batches: Sequence[Batch], learning_rate: float) -> StepResult:
        for chunk in self._chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
            group["weight_decay"] = self._run.optimizer.weight_decay * group["wd_mult"]
        loss_sum, learned = self._run_schedule(micro_batches, forward_only=False)
        _, gradient_norm, _ = self._optimizer.step()
        return StepResult(
            loss=loss_sum / max(1, learned),
            gradient_norm=float(gradient_norm),
            learned_tokens=learned,
        )

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, int]:
        for chunk in self._chunks:
            chunk.eval()
        remaining = iter(batches)
        loss_sum, learned = 0.0, 0
        # As many at once as keep all stages busy; the interleaved schedule needs a full set.
        while group := list(islice(remaining, self._parallel.pipeline_parallel)):
            missing = self._parallel.pipeline_parallel - len(group)
            group += [blank(group[0])] * missing
            group_loss, group_learned = self._run_schedule(group, forward_only=True)
            loss_sum, learned = loss_sum + group_loss, learned + group_learned
        return loss_sum, learned

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
    def load_state(self, fill: Callable[[State], None], steps_done: int) -> None:
        fill(self.state())
        for group in self._optimizer.param_groups:
            group["step"] = steps_done  # where TransformerEngine's or Apex's Adam counts
        for optimizer in self._optimizers():
            for state in optimizer.optimizer.state.values():
                state["step"] = torch.tensor(float(steps_done))
            optimizer._copy_main_params_to_model_params()
        for chunk in self._chunks:
            chunk.start_param_sync(force_sync=True)

    def close(self) -> None:
        pass

    def _build(self, vp_stage: int | None) -> VisionLanguageModel:
        train = self._run.train
        with torch.device("meta"):
            model = VisionLanguageModel(
                self._run.model,
                dtype=DTYPES[train.precision],
                recompute=train.recompute,
                frozen=train.frozen,
                parallel=self._parallel,
                vp_stage=vp_stage,
            )
        materialise(model, self._run.seed, self._device)
        return model

    def _data_parallel(self, model: VisionLanguageModel) -> DistributedDataParallel:
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
        kept = ParamWithNamePredicate("kept", lambda p, name: not decays(name, p.ndim))
        return get_megatron_optimizer(
            config,
            cast(Any, self._chunks),
            config_overrides={
                ParamKey(with_name_predicate=kept): cast(ParamGroupOverride, {"wd_mult": 0.0})
            },
            use_gloo_process_groups=False,
        )

    def _run_schedule(self, batches: Sequence[Batch], *, forward_only: bool) -> tuple[float, int]:
        """Forward, and backward, over micro-batches; summed loss and learned tokens of all."""
        batches = same_shapes([batch.to(self._device) for batch in batches])
        tokens_per_image = self._run.model.encoder.tokens
        losses = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=[iter(batches) for _ in self._chunks],
            model=cast(Any, self._chunks),
            num_microbatches=len(batches),
            seq_length=joined_tokens(batches[0], tokens_per_image, self._parallel),
            micro_batch_size=1,
            forward_only=forward_only,
        )
        # The last stage has the losses; its tensor-parallel ranks have the same ones.
        mine: tuple[Tensor | float, float] = (0.0, 0)
        if losses and _tensor_rank() == 0:
            learned = sum(int(batch.learned_bt.sum()) for batch in batches)
            mine = (torch.stack(losses).double().sum(), learned)
        loss_of_all, learned_of_all = groups.sum_over_ranks(*mine)
        return loss_of_all, int(learned_of_all)

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
                for main in group["params"]:
                    optimizer.optimizer.state[main] = {
                        "step": torch.tensor(0.0),
                        **{moment: torch.zeros_like(main.detach()) for moment in MOMENTS},
                    }


def _forward_step(batches: Iterator[Batch], chunk: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
    """One micro-batch through one chunk; the schedule calls the loss function on the last stage."""
    batch = next(batches)

    def loss(losses_bt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss_sum = loss_sum_of(losses_bt, batch)
        return loss_sum, batch.learned_bt.sum().int(), loss_sum.detach().clone()

    return token_losses(chunk, batch), loss


def _tensor_rank() -> int:
    return parallel_state.get_tensor_model_parallel_rank()
