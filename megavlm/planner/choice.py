"""Why one way to run a model is better than another, in words and in settings."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import NamedTuple

from megavlm.config.run import RunSettings
from megavlm.planner.hardware import GIB
from megavlm.planner.predict import Prediction
from megavlm.planner.search import Candidate, Found
from megavlm.terminal import counted

MEAN_ERROR = 0.035
"""Of predicted step times, against the published runs that chose no constant: docs/planner.md."""


class Remedy(NamedTuple):
    """A change of a run, and what it would do."""

    name: str
    candidate: Candidate


def layout_name(run: RunSettings) -> str:
    """An engine and how it divides the model, as the field writes it."""
    match run.engine:
        case "megatron":
            parallel = run.megatron
            name = f"TP{parallel.tensor_parallel} x PP{parallel.pipeline_parallel}"
            if parallel.virtual_pipeline > 1:
                name += f" x VP{parallel.virtual_pipeline}"
            return f"Megatron {name}"
        case "fsdp2":
            shards = run.fsdp2.shard_ranks
            return "FSDP2" if shards is None else f"FSDP2 hybrid {shards}"
        case "zero3":
            zero3 = run.zero3
            partition = zero3.secondary_partition
            names = [f"hpZ {partition}"] * (partition > 1)
            names += ["quantised"] * (zero3.quantized_weights or zero3.quantized_gradients)
            names += [f"optimiser on {zero3.offload_optimizer}"] * (
                zero3.offload_optimizer != "none"
            )
            names += [f"parameters on {zero3.offload_parameters}"] * (
                zero3.offload_parameters != "none"
            )
            return ", ".join(["ZeRO-3", *names])


def best_of_each_layout(ranked: Sequence[Candidate]) -> list[Candidate]:
    """Of those that differ only in micro-batches, recomputation and interleaving, the first."""
    first: dict[str, Candidate] = {}
    for candidate in ranked:
        run = candidate.run
        if run.zero3.secondary_partition == candidate.cluster.ranks:  # of all ranks: plain ZeRO-3
            run = replace(run, zero3=replace(run.zero3, secondary_partition=1))
        first.setdefault(layout_name(run).partition(" x VP")[0], candidate)
    return list(first.values())


def why_not(candidate: Candidate, best: Candidate | None) -> str:
    """What a candidate loses by, in a few words. best: None if none fits that rounds nothing."""
    if best is not None and candidate.run == best.run and candidate.fits:
        return "chosen"
    reasons: list[str] = []
    if not candidate.fits:
        reasons.append(f"does not fit: {largest_part(candidate)}")
    if candidate.rounds:
        reasons.append("rounds weights and gradients: results differ")
    if reasons or best is None:
        return "; ".join(reasons)
    if not _slower(candidate, best):
        return "within the planner's error"
    its = _seconds_by_part(best.prediction)
    mine = _seconds_by_part(candidate.prediction)
    more = {name: seconds - its[name] for name, seconds in mine.items()}
    name = max(more, key=lambda name: more[name])
    return f"{more[name] * 1e3:+.0f} ms of {name}"


def _slower(candidate: Candidate, other: Candidate) -> bool:
    """Whether by more than predictions err."""
    return candidate.prediction.seconds > (1 + MEAN_ERROR) * other.prediction.seconds


def _seconds_by_part(prediction: Prediction) -> dict[str, float]:
    """What a step is made of; it adds up."""
    step, checkpoints = prediction.step, prediction.checkpoint_seconds
    return {
        "computing": step.compute_seconds,
        "recomputing": step.recompute_seconds,
        "communication": step.communication_seconds,
        "pipeline bubble": step.bubble_seconds,
        "the optimiser": step.optimizer_seconds,
        "loading": prediction.seconds - step.seconds - checkpoints,
        "checkpoints": checkpoints,
    }


def largest_part(candidate: Candidate) -> str:
    """What fills most of the fullest GPU, and in which stage if not in the one that is planned."""
    fullest = candidate.fullest
    sizes = asdict(fullest)
    name = max(sizes, key=lambda name: sizes[name])
    stages = [stage for stage, c in candidate.other_stages.items() if c.fullest is fullest]
    part = name.replace("gathered", "gathered weights").replace("optimizer", "optimiser states")
    return f"{sizes[name] / GIB:.0f} GiB of {part}" + "".join(f" in {stage}" for stage in stages)


def waits_for_communication(candidate: Candidate) -> bool:
    """Whether communication takes longer than all computing."""
    step = candidate.prediction.step
    return step.communication_seconds > step.compute_seconds + step.recompute_seconds


def remedies(candidate: Candidate, found: Found) -> list[Remedy]:
    """What would make a run faster, by more than predictions err, of what fits."""
    run = candidate.run
    faster = [c for c in found.ranked if c.fits and _slower(candidate, c)]

    def tried(name: str, changed: RunSettings) -> list[Remedy]:
        return [Remedy(name, other) for other in faster if other.run == changed]

    helps: list[Remedy] = []
    packed = _fewest_micro_batches(candidate, found.ranked)
    if packed is not None:
        fewer = counted(packed.train.micro_batches, "micro-batch", "micro-batches")
        name = f"a rank's samples packed into {fewer}{_recompute_changed(packed, run)}"
        helps += tried(name, packed)
    if run.engine == "zero3" and run.zero3.secondary_partition == 1:
        near = replace(run.zero3, secondary_partition=candidate.cluster.gpus_per_host)
        name = f"zero3.secondary_partition={near.secondary_partition}"
        helps += tried(name, replace(run, zero3=near))
        if packed is not None and len(helps) == 2:
            best = min(remedy.candidate.prediction.seconds for remedy in helps)
            both = tried("both", replace(packed, zero3=near))
            helps += [remedy for remedy in both if remedy.candidate.prediction.seconds < best]
    same = [c for c in faster if c.run.train.micro_batches == run.train.micro_batches]
    megatron = [c for c in same if c.run.engine == "megatron"][:1]
    chosen = [c for c in faster if c is found.chosen]
    for other in [*megatron, *chosen]:
        if all(remedy.candidate is not other for remedy in helps):
            count = counted(other.run.train.micro_batches, "micro-batch", "micro-batches")
            changed = _recompute_changed(other.run, run)
            helps.append(Remedy(f"{layout_name(other.run)}, in {count}{changed}", other))
    return helps


def _recompute_changed(run: RunSettings, before: RunSettings) -> str:
    mode = run.train.recompute
    return f", train.recompute={mode}" if mode != before.train.recompute else ""


def _fewest_micro_batches(candidate: Candidate, ranked: Sequence[Candidate]) -> RunSettings | None:
    """The run with as few as fit, if that is fewer."""
    run = candidate.run
    own = getattr(run, run.engine)
    same = [
        other.run
        for other in ranked
        if (other.run.engine, getattr(other.run, run.engine)) == (run.engine, own)
        and other.fits
        and other.run.train.micro_batches < run.train.micro_batches
    ]
    return min(same, key=lambda run: run.train.micro_batches, default=None)


def overrides(chosen: RunSettings, run: RunSettings, stage: str = "") -> list[str]:
    """What turns a run into the chosen one, as the command line takes it.

    stage: what stands before the names of settings that stages do not share.
    """
    before, after = asdict(run), asdict(chosen)
    found = [] if chosen.engine == run.engine else [f"engine={chosen.engine}"]
    for section in ("train", chosen.engine):
        for name, value in after[section].items():
            if value != before[section][name]:
                prefix = stage if section == "train" else ""
                found.append(f"{prefix}{section}.{name}={json.dumps(value)}".replace('"', ""))
    return found
