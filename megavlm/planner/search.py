"""All ways to run a model on a cluster, and which is fastest of those that fit."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

from megavlm.config.engines import MegatronSettings, Zero3Settings
from megavlm.config.objectives import is_pretraining
from megavlm.config.run import RunSettings, data_parallel_ranks, samples_per_micro_batch
from megavlm.config.sizes import divisors
from megavlm.errors import ConfigError
from megavlm.planner.hardware import GIB, Cluster
from megavlm.planner.memory import Memory, memory_of
from megavlm.planner.predict import Prediction, predict

MOST_VIRTUAL = 4
"""Chunks on each pipeline rank: more cut a model of 72 layers too finely."""
MOST_CHUNKS = 24
FILLED = 0.93
"""Share of a GPU's memory that a plan may fill: predictions err, and batches differ."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run a model on a cluster."""

    run: RunSettings
    cluster: Cluster
    memory: tuple[Memory, ...]
    """Of each pipeline rank."""
    prediction: Prediction
    """Without the spans of its step."""

    @property
    def fullest(self) -> Memory:
        """Of the rank that holds most."""
        return max(self.memory, key=lambda memory: memory.total)

    @property
    def fits(self) -> bool:
        """Whether no GPU is predicted to run out of memory."""
        return self.fullest.total <= FILLED * self.cluster.gpu.memory_bytes

    @property
    def rounds(self) -> bool:
        """Whether weights or gradients are quantised on their way, so that results differ."""
        zero3 = self.run.zero3
        return self.run.engine == "zero3" and (zero3.quantized_weights or zero3.quantized_gradients)


class Found(NamedTuple):
    """What a search has found."""

    ranked: list[Candidate]
    """Those that fit, the fastest first; then the others, likewise."""
    refused: Counter[str]
    """How many ways do not divide, by the rule that they break."""

    @property
    def best(self) -> Candidate:
        """The fastest that fits and rounds nothing. Raises ConfigError if there is none."""
        for candidate in self.ranked:
            if candidate.fits and not candidate.rounds:
                return candidate
        cluster = self.ranked[0].cluster
        least = min(self.ranked, key=lambda c: c.fullest.total).fullest.total
        raise ConfigError(
            f"no layout fits {cluster.ranks} x {cluster.gpu.name}: the smallest needs "
            f"{least / GIB:.0f} GiB a GPU; take more hosts or GPUs with more memory"
        )


def candidate_of(run: RunSettings, cluster: Cluster, tokens_per_text: float) -> Candidate:
    """A run as it stands. Raises ConfigError where it does not divide over the cluster's ranks."""
    _require_predictable(run)
    prediction = predict(run, cluster, tokens_per_text)
    return Candidate(
        run=run,
        cluster=cluster,
        memory=tuple(memory_of(run, cluster, tokens_per_text)),
        # Of a thousand candidates the spans alone would take hundreds of megabytes.
        prediction=prediction._replace(step=replace(prediction.step, spans=())),
    )


def _require_predictable(run: RunSettings) -> None:
    if is_pretraining(run.objectives):
        raise ConfigError(
            f"a stage of {', '.join(run.objectives)} is not predicted; plan one of captioning or "
            "instruction, which are larger"
        )


def search(
    run: RunSettings,
    cluster: Cluster,
    tokens_per_text: float,
    engines: Sequence[str] = ("zero3", "fsdp2", "megatron"),
    *,
    other_stages: Sequence[RunSettings] = (),
) -> Found:
    """Every layout, whatever the run's own is. Raises ConfigError if none divides.

    other_stages: of the same plan; they share engine and layout, so these must divide them, too.
    """
    _require_predictable(run)
    ranked: list[Candidate] = []
    refused: Counter[str] = Counter()
    for layout in _layouts(run, cluster):
        if layout.engine not in engines:
            continue
        try:
            for stage in other_stages:
                _require_divides(stage, layout, cluster.ranks)
            ranked.append(candidate_of(layout, cluster, tokens_per_text))
        except ConfigError as error:
            refused[str(error).partition(";")[0]] += 1
    if not ranked:
        raise ConfigError(
            f"no layout divides: {refused.most_common(1)[0][0]}; change the batch or the hosts"
        )
    # Of those that wait for the loader alike, the one that would be fastest without it.
    ranked.sort(key=lambda c: (not c.fits, c.prediction.seconds, c.prediction.step.seconds))
    return Found(ranked, refused)


def _require_divides(stage: RunSettings, layout: RunSettings, ranks: int) -> None:
    """Raise ConfigError unless a stage can run in the layout of another."""
    run = replace(
        stage,
        engine=layout.engine,
        zero3=layout.zero3,
        fsdp2=layout.fsdp2,
        megatron=layout.megatron,
    )
    samples_per_micro_batch(run.train, data_parallel_ranks(run, ranks))


def _layouts(run: RunSettings, cluster: Cluster) -> Iterator[RunSettings]:
    """Runs that differ in engine, layout, recomputation and micro-batches."""
    engines: list[dict[str, Any]] = [
        {"engine": "fsdp2", "fsdp2": replace(run.fsdp2, shard_ranks=shard_ranks)}
        for shard_ranks in (None, *_some_hosts(cluster))
    ]
    engines += [{"engine": "zero3", "zero3": zero3} for zero3 in _zero3(run, cluster)]
    engines += [{"engine": "megatron", "megatron": m} for m in _divisions(run, cluster)]
    modes = ("none", "selective", "full")
    for engine, micro_batches, recompute in product(engines, _micro_batches(run), modes):
        train = replace(run.train, micro_batches=micro_batches, recompute=recompute)
        try:
            yield replace(run, train=train, **engine)
        except ConfigError:
            continue  # this model has no such parts


def _some_hosts(cluster: Cluster) -> list[int]:
    """GPUs of one host and of several, but not of all."""
    return [n * cluster.gpus_per_host for n in divisors(cluster.hosts)[:-1]]


def _zero3(run: RunSettings, cluster: Cluster) -> Iterator[Zero3Settings]:
    """Plain, with a secondary partition, quantised, and with the optimiser in the host."""
    plain = replace(
        run.zero3,
        secondary_partition=1,
        quantized_weights=False,
        quantized_gradients=False,
        offload_optimizer="none",
        offload_parameters="none",
        nvme_folder=None,
    )
    yield plain
    yield replace(plain, offload_optimizer="cpu")
    near = replace(plain, secondary_partition=cluster.gpus_per_host)
    if cluster.gpus_per_host > 1:
        yield near
        yield replace(near, offload_optimizer="cpu")
    yield replace(near, quantized_weights=True, quantized_gradients=True)


def _micro_batches(run: RunSettings) -> Sequence[int]:
    """The run's own number, and powers of two."""
    most = run.train.samples_per_step
    return sorted({run.train.micro_batches, *(2**n for n in range(8) if most % 2**n == 0)})


def _divisions(run: RunSettings, cluster: Cluster) -> Iterator[MegatronSettings]:
    overlap = run.megatron.overlap_communication
    for tensor in divisors(cluster.gpus_per_host):
        for pipeline in divisors(cluster.ranks // tensor):
            for virtual in range(1, MOST_VIRTUAL + 1) if pipeline > 1 else (1,):
                if pipeline * virtual <= MOST_CHUNKS:
                    yield MegatronSettings(
                        tensor_parallel=tensor,
                        sequence_parallel=tensor > 1,
                        pipeline_parallel=pipeline,
                        virtual_pipeline=virtual,
                        overlap_communication=overlap,
                    )
