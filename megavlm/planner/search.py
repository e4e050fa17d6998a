"""All ways to run a model on a cluster, and which is fastest of those that fit."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, NamedTuple

from megavlm.config.engines import MegatronSettings, Zero3Settings
from megavlm.config.objectives import is_pretraining
from megavlm.config.plan import Plan, Stage
from megavlm.config.run import RunSettings, data_parallel_ranks, samples_per_micro_batch
from megavlm.config.sizes import divisors
from megavlm.dist.launch import check_hosts, named_hosts
from megavlm.errors import ConfigError, LaunchError
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
    other_stages: "Mapping[str, Candidate]" = field(default_factory=dict)
    """Of the same plan, in the same layout, by name; those that are predicted."""

    @property
    def fullest(self) -> Memory:
        """Of the rank that holds most, in the stage in which it does."""
        others = (other.fullest for other in self.other_stages.values())
        return max((*self.memory, *others), key=lambda memory: memory.total)

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
    """How many ways do not divide or are not predicted, by the rule that they break."""

    @property
    def chosen(self) -> Candidate | None:
        """The fastest that fits and rounds nothing, if there is one."""
        return next((c for c in self.ranked if c.fits and not c.rounds), None)

    @property
    def best(self) -> Candidate:
        """The same. Raises ConfigError if there is none."""
        if self.chosen is not None:
            return self.chosen
        cluster = self.ranked[0].cluster
        least = min(c.fullest.total for c in self.ranked if not c.rounds)
        raise ConfigError(
            f"no layout fits {cluster.ranks} x {cluster.gpu.name}: the smallest needs "
            f"{least / GIB:.0f} GiB a GPU; take more hosts or GPUs with more memory"
        )


def predicted_stages(plan: Plan) -> list[Stage]:
    """All but pre-training. Raises ConfigError if there is no other."""
    stages = [stage for stage in plan.stages if not is_pretraining(stage.run.objectives)]
    if not stages:
        _require_predictable(plan.last)
    return stages


def planned_stage(plan: Plan) -> Stage:
    """Of those that are predicted, the one of most steps, which the layout is chosen for."""
    return max(predicted_stages(plan), key=lambda stage: stage.run.train.steps)


def candidate_of(
    run: RunSettings,
    cluster: Cluster,
    tokens_per_text: float,
    other_stages: Sequence[Stage] = (),
) -> Candidate:
    """A run as it stands.

    other_stages: of the same plan; they run in its layout, whatever their own is.
    Raises ConfigError where one of them does not divide over the cluster's ranks.
    """
    _require_predictable(run)
    others = _others_in(run, other_stages, cluster, tokens_per_text, adapted=False)
    return _candidate(run, cluster, tokens_per_text, others)


def _candidate(
    run: RunSettings,
    cluster: Cluster,
    tokens_per_text: float,
    other_stages: Mapping[str, Candidate],
) -> Candidate:
    prediction = predict(run, cluster, tokens_per_text)
    return Candidate(
        run=run,
        cluster=cluster,
        memory=tuple(memory_of(run, cluster, tokens_per_text)),
        # Of a thousand candidates the spans alone would take hundreds of megabytes.
        prediction=prediction._replace(step=replace(prediction.step, spans=())),
        other_stages=other_stages,
    )


def _others_in(
    layout: RunSettings,
    stages: Sequence[Stage],
    cluster: Cluster,
    tokens_per_text: float,
    *,
    adapted: bool,
) -> dict[str, Candidate]:
    """Other stages in a layout; pre-training is not predicted.

    adapted: in the micro-batches and with the recomputation that suit them there. Raises
    ConfigError, pre-training's too, where a stage does not divide.
    """
    found: dict[str, Candidate] = {}
    for stage in stages:
        try:
            if is_pretraining(stage.run.objectives):
                run = replace(stage.run, **_engine_of(layout))
                samples_per_micro_batch(run.train, data_parallel_ranks(run, cluster.ranks))
            elif adapted:
                found[stage.name] = fastest_in(layout, stage.run, cluster, tokens_per_text)
            else:
                run = replace(stage.run, **_engine_of(layout))
                found[stage.name] = candidate_of(run, cluster, tokens_per_text)
        except ConfigError as error:
            raise ConfigError(f"stages.{stage.name}: {error}") from error
    return found


def _engine_of(run: RunSettings) -> dict[str, Any]:
    return {name: getattr(run, name) for name in ("engine", "zero3", "fsdp2", "megatron")}


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
    other_stages: Sequence[Stage] = (),
) -> Found:
    """Every layout, the run's own among them. Raises ConfigError if none divides.

    other_stages: of the same plan; they share engine and layout, so these must divide them and
    have room for them, too, if need be in other micro-batches and with other recomputation.
    """
    _require_predictable(run)
    ranked: list[Candidate] = []
    refused: Counter[str] = Counter()
    told: dict[str, str] = {}
    for ways in _layouts(run, cluster):
        if not ways or ways[0].engine not in engines:
            continue
        try:
            others = _others_in(ways[0], other_stages, cluster, tokens_per_text, adapted=True)
        except ConfigError as error:
            refused[_rule(error)] += len(ways)
            told.setdefault(_rule(error), str(error))
            continue
        for way in ways:
            try:
                ranked.append(_candidate(way, cluster, tokens_per_text, others))
            except ConfigError as error:
                refused[_rule(error)] += 1
                told.setdefault(_rule(error), str(error))
    if not ranked:
        rule, _ = refused.most_common(1)[0]
        raise ConfigError(f"no layout divides: {told[rule]}; or change the hosts")
    return Found(sorted(ranked, key=_place), refused)


def fastest_in(
    layout: RunSettings, run: RunSettings, cluster: Cluster, tokens_per_text: float
) -> Candidate:
    """A run in the layout of another, with the micro-batches and recomputation that suit it there.

    If none fits, the smallest. Raises ConfigError, for the run as it stands, where none divides.
    """
    found: list[Candidate] = []
    for way in _ways(run, **_engine_of(layout)):
        try:
            found.append(candidate_of(way, cluster, tokens_per_text))
        except ConfigError:
            continue
    if not found:
        return candidate_of(replace(run, **_engine_of(layout)), cluster, tokens_per_text)
    fitting = [candidate for candidate in found if candidate.fits]
    return min(fitting, key=_place) if fitting else min(found, key=lambda c: c.fullest.total)


def _rule(error: ConfigError) -> str:
    """That is broken, without the remedy."""
    return str(error).partition(";")[0]


def _place(candidate: Candidate) -> tuple[bool, float, float]:
    """What fits first, then the fastest; of those that wait for the loader alike, without it."""
    prediction = candidate.prediction
    return not candidate.fits, prediction.seconds, prediction.step.seconds


def _layouts(run: RunSettings, cluster: Cluster) -> Iterator[list[RunSettings]]:
    """Of each engine and layout, the runs that differ in micro-batches and recomputation."""
    engines: list[dict[str, Any]] = [
        {"engine": "fsdp2", "fsdp2": replace(run.fsdp2, shard_ranks=shard_ranks)}
        for shard_ranks in (None, *_some_hosts(cluster))
    ]
    engines += [{"engine": "zero3", "zero3": zero3} for zero3 in _zero3(run, cluster)]
    engines += [{"engine": "megatron", "megatron": m} for m in _divisions(run, cluster)]
    own: dict[str, Any] = {"engine": run.engine, run.engine: getattr(run, run.engine)}
    if own not in engines and _can_start(run, cluster):
        engines.append(own)
    for engine in engines:
        yield list(_ways(run, **engine))


def _ways(run: RunSettings, **engine: Any) -> Iterator[RunSettings]:
    """A run with all micro-batches and modes of recomputation."""
    for micro_batches, recompute in product(_micro_batches(run), ("none", "selective", "full")):
        train = replace(run.train, micro_batches=micro_batches, recompute=recompute)
        try:
            yield replace(run, train=train, **engine)
        except ConfigError:
            continue  # this model has no such parts


def _can_start(run: RunSettings, cluster: Cluster) -> bool:
    """Whether ranks that must share a host do."""
    try:
        check_hosts(run, named_hosts(cluster.hosts, cluster.gpus_per_host), cluster.ranks)
    except LaunchError:
        return False
    return True


def _some_hosts(cluster: Cluster) -> list[int]:
    """GPUs of one host and of several, but not of all."""
    return [n * cluster.gpus_per_host for n in divisors(cluster.hosts)[:-1]]


def _zero3(run: RunSettings, cluster: Cluster) -> Iterator[Zero3Settings]:
    """Plain, with a secondary partition, quantised, and with states or all in the host."""
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
    yield replace(plain, offload_optimizer="cpu", offload_parameters="cpu")
    near = plain
    if 1 < cluster.gpus_per_host < cluster.ranks:  # all ranks hold the weights once already
        near = replace(plain, secondary_partition=cluster.gpus_per_host)
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
