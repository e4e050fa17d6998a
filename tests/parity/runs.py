"""A few training steps of a tiny model under any engine, and under none."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from megavlm.checkpoint.load import load_checkpoint
from megavlm.config.run import CheckpointSettings, RunSettings
from megavlm.config.schedule import learning_rate_at
from megavlm.config.sizes import EncoderSizes, ModelSizes
from megavlm.data.packing import Batch
from megavlm.dist import groups
from megavlm.engine.base import DTYPES
from megavlm.engine.optim import adamw, set_learning_rate
from megavlm.engine.start import start_engine
from megavlm.files.folder import Folder
from megavlm.model.initial import materialise
from megavlm.model.params import PARTS, parameters
from megavlm.model.vlm import VisionLanguageModel
from tests.batches import ROW_TOKENS, TINY, loss_sum, random_batch
from tests.ranks import run_on_ranks
from tests.runs import RUN, load_run
from tests.states import save_checkpoint, whole_tensors

MICRO_BATCHES = 4  # of a step, over all copies of the model
SAMPLES = 3
CPU = torch.device("cpu")
SAVING = CheckpointSettings(every=1, asynchronous=False)


@dataclass(frozen=True)
class Layout:
    """How a run is divided."""

    name: str
    ranks: int
    overrides: tuple[str, ...]


def _megatron(name: str, ranks: int, **settings: object) -> Layout:
    overrides = [f"megatron.{key}={value}" for key, value in settings.items()]
    return Layout(name, ranks, ("engine=megatron", *overrides))


# Small buckets and no persistent parameters, so that everything is partitioned.
_ZERO3 = (
    "engine=zero3",
    "zero3.reduce_bucket=20000",
    "zero3.prefetch_bucket=10000",
    "zero3.persistence_threshold=0",
)
_INTERLEAVED = {"pipeline_parallel": 2, "virtual_pipeline": 2}
LAYOUTS = [
    _megatron("TP2", 2, tensor_parallel=2),
    _megatron("TP2 SP", 2, tensor_parallel=2, sequence_parallel=True),
    _megatron("PP2", 2, pipeline_parallel=2),
    _megatron("PP2 interleaved", 2, **_INTERLEAVED),
    _megatron("DP2", 2),
    _megatron("TP2 x PP2", 4, tensor_parallel=2, pipeline_parallel=2),
    _megatron(
        "TP2 x PP2 interleaved SP", 4, tensor_parallel=2, sequence_parallel=True, **_INTERLEAVED
    ),
    _megatron("TP2 x DP2", 4, tensor_parallel=2),
    _megatron("PP2 x DP2", 4, pipeline_parallel=2),
    _megatron("PP4 uneven", 4, pipeline_parallel=4, chunk_layers="[1,1,2,2]"),
    Layout("ZeRO-3 x2", 2, _ZERO3),
    Layout("ZeRO-3 x4", 4, _ZERO3),
    Layout("ZeRO-3 hpZ 2x2", 4, (*_ZERO3, "zero3.secondary_partition=2")),
    Layout("FSDP2 x2", 2, ("engine=fsdp2",)),
    Layout("FSDP2 x4", 4, ("engine=fsdp2",)),
    Layout("FSDP2 hybrid 2x2", 4, ("engine=fsdp2", "fsdp2.shard_ranks=2")),
]

# Images of each of a step's micro-batches: of how many of its samples, and how many slots.
MIXES: dict[str, Callable[[int], dict[str, int]]] = {
    "mixed": lambda i: {"samples": SAMPLES, "images": i % 2 == 0},
    "image-only": lambda _: {"samples": SAMPLES},
    "text-only": lambda _: {"samples": SAMPLES, "images": False},
    "many images": lambda i: {"samples": 1 + 3 * i},
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run computed."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]
    """Of the first step, clipped."""
    weights: dict[str, Tensor]
    """After the last step."""


def settings(
    layout: Layout | None, steps: int, *overrides: str, model: ModelSizes = TINY
) -> RunSettings:
    """The settings of a parity run; without a layout, those of the single process."""
    common = [
        f"model={json.dumps(asdict(model))}",
        f"data.row_tokens={ROW_TOKENS}",
        f"train.steps={steps}",
        f"train.samples_per_step={MICRO_BATCHES * SAMPLES}",
        f"train.micro_batches={MICRO_BATCHES}",
        "optimizer.learning_rate=1e-3",
        *(layout.overrides if layout else ()),
        *overrides,
    ]
    run = load_run(RUN, common)
    copies = layout.ranks // run.model_parallel.model_ranks if layout else 1
    return load_run(RUN, [*common, f"train.micro_batches={MICRO_BATCHES // copies}"])


def micro_batches(step: int, mix: str, encoder: EncoderSizes) -> list[Batch]:
    """The same micro-batches of a step, however many ranks share them."""
    return [
        random_batch(100 * step + i, **MIXES[mix]((step + i) % MICRO_BATCHES), encoder=encoder)
        for i in range(MICRO_BATCHES)
    ]


def my_micro_batches(
    step: int, mix: str = "mixed", encoder: EncoderSizes = TINY.encoder
) -> list[Batch]:
    """This copy's share of them."""
    return micro_batches(step, mix, encoder)[groups.data_rank() :: groups.data_ranks()]


def run_steps(
    layout: Layout,
    run: RunSettings,
    steps: range,
    *,
    resume: Folder | None = None,
    save: Folder | None = None,
    saved_at: int = 0,
) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """Losses and gradient norms of some steps under an engine, and all tensors after them.

    Starts from the checkpoint `resume`; writes one to the folder `save` before step `saved_at`.
    """

    def on_rank(_: int) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
        engine = start_engine(run, CPU)
        if resume is not None:
            taken = dict.fromkeys(run.trained_parts, steps.start)
            engine.load_state(partial(load_checkpoint, resume), taken)
        results = []
        for step in steps:
            if save is not None and step == saved_at:
                save_checkpoint(save, step, engine.state(), {}, SAVING)
            rate = learning_rate_at(step, run.train.steps, run.optimizer)
            result = engine.step(my_micro_batches(step), rate)
            results.append((result.loss, result.gradient_norm))
        tensors = whole_tensors(engine)
        engine.close()
        return results, tensors

    return run_on_ranks(layout.ranks, on_rank, parallel=run.model_parallel)[0]


def engine_outcome(layout: Layout, run: RunSettings, mix: str) -> Outcome:
    """Train under an engine on real ranks; what all of them agree on."""

    def on_rank(_: int) -> Outcome:
        engine = start_engine(run, CPU)
        results, gradients = [], {}
        for step in range(run.train.steps):
            rate = learning_rate_at(step, run.train.steps, run.optimizer)
            results.append(engine.step(my_micro_batches(step, mix, run.model.encoder), rate))
            if step == 0:
                gradients = _gradients(whole_tensors(engine), run)
        weights = _weights(whole_tensors(engine))
        engine.close()
        return Outcome(
            losses=[result.loss for result in results],
            norms=[result.gradient_norm for result in results],
            gradients=gradients,
            weights=weights,
        )

    outcomes = run_on_ranks(layout.ranks, on_rank, parallel=run.model_parallel)
    for outcome in outcomes[1:]:
        assert outcome.losses == outcomes[0].losses, "ranks disagree"
        assert outcome.norms == outcomes[0].norms, "ranks disagree"
    return outcomes[0]


def plain_outcome(run: RunSettings, mix: str) -> Outcome:
    """The oracle: one process, plain torch, fp32 master weights, no engine."""
    return run_on_ranks(1, lambda _: _train_plainly(run, mix))[0]


def _train_plainly(run: RunSettings, mix: str) -> Outcome:
    train = run.train
    model, masters = (
        VisionLanguageModel(run.model, dtype=d, recompute=train.recompute, frozen=train.frozen)
        for d in (DTYPES[train.precision], torch.float32)
    )
    materialise(model, run.seed, CPU)
    pairs = list(zip(model.parameters(), masters.parameters(), strict=True))
    for parameter, master in pairs:
        master.data.copy_(parameter.data)
    optimizer = adamw(masters.named_parameters(), masters.ledger(), run)
    losses, norms, gradients = [], [], {}
    for step in range(train.steps):
        batches = micro_batches(step, mix, run.model.encoder)
        learned = sum(int(batch.learned_bt.sum()) for batch in batches)
        optimizer.zero_grad()
        loss = 0.0
        for batch in batches:
            batch_loss = loss_sum(model, batch)
            batch_loss.backward()
            loss += float(batch_loss.detach()) / learned
            for parameter, master in pairs:
                if parameter.requires_grad:
                    gradient = cast(Tensor, parameter.grad).float() / learned
                    master.grad = gradient if master.grad is None else master.grad + gradient
                    parameter.grad = None
        norm = clip_grad_norm_(masters.parameters(), run.optimizer.clip_norm)
        set_learning_rate(optimizer, learning_rate_at(step, train.steps, run.optimizer))
        if step == 0:
            gradients = {
                name: p.grad.clone() for name, p in masters.named_parameters() if p.grad is not None
            }
        optimizer.step()
        for parameter, master in pairs:
            parameter.data.copy_(master.data)
        losses.append(loss)
        norms.append(float(norm))
    weights = {name: p.detach() for name, p in masters.named_parameters()}
    return Outcome(losses=losses, norms=norms, gradients=gradients, weights=weights)


def _gradients(tensors: dict[str, Tensor], run: RunSettings) -> dict[str, Tensor]:
    """The first step's clipped gradients: AdamW's first moment has seen nothing else."""
    return {
        name.removeprefix("exp_avg/"): moment / (1 - run.optimizer.beta1)
        for name, moment in tensors.items()
        if name.startswith("exp_avg/")
    }


def _weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix("weights/"): weight
        for name, weight in tensors.items()
        if name.startswith("weights/")
    }


def differences(actual: Outcome, expected: Outcome, model: ModelSizes = TINY) -> dict[str, float]:
    """Worst differences: relative, of parts' gradients by their norms, of weights absolute."""
    row = {
        "loss": _worst_relative(actual.losses, expected.losses),
        "gradient norm": _worst_relative(actual.norms, expected.norms),
    }
    assert actual.gradients.keys() == expected.gradients.keys()
    for part in PARTS:
        names = [p.name for p in parameters(model) if p.part == part]
        pairs = [
            (actual.gradients[n], expected.gradients[n]) for n in names if n in actual.gradients
        ]
        if pairs:
            difference = _norm([a - e for a, e in pairs])
            scale = _norm([e for _, e in pairs])
            row[part] = difference / scale if scale else difference
    row["weights"] = worst(
        float((actual.weights[name] - weight).abs().max())
        for name, weight in expected.weights.items()
    )
    return row


def worst(values: Iterable[float]) -> float:
    """The largest; unlike `max`, a NaN if there is one."""
    return float(torch.tensor(list(values), dtype=torch.float64).max())


def _worst_relative(actual: list[float], expected: list[float]) -> float:
    return worst(abs(a - e) / (abs(e) or 1.0) for a, e in zip(actual, expected, strict=True))


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([tensor.double().square().sum() for tensor in tensors]).sum().sqrt())
