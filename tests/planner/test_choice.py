from dataclasses import replace
from statistics import mean

import pytest

from megavlm.config.load import load_plan
from megavlm.planner.choice import (
    MEAN_ERROR,
    best_of_each_layout,
    largest_part,
    layout_name,
    overrides,
    remedies,
    waits_for_communication,
    why_not,
)
from megavlm.planner.hardware import cluster_of
from megavlm.planner.search import candidate_of, search
from tests.planner import recipe
from tests.planner.published import ROWS
from tests.planner.test_cut import RUN
from tests.runs import load_run

# Searched in no time, and divided as the larger one is.
HEADS = ("encoder.heads", "decoder.heads", "decoder.kv_heads")
SMALL = ["model.preset=vlm-tiny", *(f"model.{name}=8" for name in HEADS)]
SMALL += ["train.samples_per_step=64"]
CURRICULUM = RUN.with_name("vlm-30b-curriculum.yaml")


@pytest.mark.parametrize("gpu", ["h200", "a100-40"])
@pytest.mark.parametrize("path", [RUN, CURRICULUM, RUN.with_name("vlm-30b-megatron.yaml")])
def test_overrides_of_the_file_give_the_chosen_settings(path, gpu):
    plan = load_plan(path, SMALL)
    found = search(plan.last, cluster_of(gpu, 4, 2), 64)
    stages = len(plan.stages)
    stage = f"stages.{plan.stages[-1].name}." if stages > 1 else ""
    chosen = best_of_each_layout(found.ranked)
    assert {c.run.engine for c in chosen} == {"zero3", "fsdp2", "megatron"} and len(chosen) > 10
    for candidate in chosen:
        changes = overrides(candidate.run, plan.last, stage)
        again = load_plan(path, [*SMALL, *changes])
        assert again.last == candidate.run, changes
        # Other stages keep what is their own.
        assert [s.run.train for s in again.stages[:-1]] == [s.run.train for s in plan.stages[:-1]]
    assert overrides(plan.last, plan.last, stage) == []


@pytest.mark.slow
def test_of_alike_layouts_the_first_is_shown():
    ranked = recipe.searched().ranked
    shown = best_of_each_layout(ranked)
    names = [layout_name(candidate.run).partition(" x VP")[0] for candidate in shown]
    assert len(set(names)) == len(names)
    for name, candidate in zip(names, shown, strict=True):
        same = [c for c in ranked if layout_name(c.run).partition(" x VP")[0] == name]
        assert candidate is same[0]


def test_what_a_layout_loses_by():
    found = recipe.searched()
    best, slower = found.best, [c for c in found.ranked if c.fits and not c.rounds][1:]
    assert why_not(best, best) == why_not(replace(best), best) == "chosen"
    keys = {
        "computing": "compute_seconds",
        "recomputing": "recompute_seconds",
        "communication": "communication_seconds",
        "pipeline bubble": "bubble_seconds",
        "the optimiser": "optimizer_seconds",
    }
    reasons = set()
    ties = [c for c in slower if c.prediction.seconds <= (1 + MEAN_ERROR) * best.prediction.seconds]
    assert {why_not(candidate, best) for candidate in ties} == {"within the planner's error"}
    for candidate in slower[len(ties) :]:
        told, _, name = why_not(candidate, best).partition(" ms of ")
        steps = candidate.prediction.step, best.prediction.step
        more = {k: getattr(steps[0], key) - getattr(steps[1], key) for k, key in keys.items()}
        more["loading"] = max(0, candidate.prediction.data_seconds - steps[0].seconds)
        assert more[name] == max(more.values()) > 0
        assert float(told) == pytest.approx(1e3 * more[name], abs=0.5) and told[0] == "+"
        reasons.add(name)
    assert reasons >= {"computing", "recomputing", "communication", "pipeline bubble"}


def test_the_planners_error_is_that_of_published_runs():
    held_back = [row for row in ROWS if row.held_back]
    errors = [abs(row.predicted() / row.tokens_per_second - 1) for row in held_back]
    assert mean(errors) == pytest.approx(MEAN_ERROR, abs=0.0005)  # measured 0.0348


def test_what_does_not_fit_names_what_is_largest():
    found = recipe.searched()
    for candidate in [c for c in found.ranked if not c.fits][::20]:
        memory = max(candidate.memory, key=lambda m: m.total)
        parts = {"weights": memory.weights, "gradients": memory.gradients}
        parts |= {"optimiser states": memory.optimizer, "activations": memory.activations}
        parts |= {"gathered weights": memory.gathered, "buffers": memory.buffers}
        told, _, name = why_not(candidate, found.best).partition(" GiB of ")
        assert parts[name] == max(parts.values())
        assert told == f"does not fit: {parts[name] / 2**30:.0f}"


def test_a_slow_loader_is_what_a_layout_loses_by():
    best = recipe.candidate("data.workers=64")
    slow = recipe.candidate("data.workers=1", "train.micro_batches=2")
    assert slow.prediction.data_seconds < best.prediction.seconds  # 16 samples take 0.1 s
    less = replace(slow, prediction=slow.prediction._replace(data_seconds=60.0))
    told = f"+{1e3 * (60 - slow.prediction.step.seconds):.0f} ms of loading"
    assert why_not(less, best) == told


def test_what_rounds_is_never_a_tie():
    found = recipe.searched()
    quantised = found.ranked[0]
    assert quantised.rounds and quantised is not found.best
    says = "rounds weights and gradients: results differ"
    for factor in (0.5, 1.01, 2):
        seconds = factor * found.best.prediction.seconds - quantised.prediction.checkpoint_seconds
        step = quantised.prediction._replace(data_seconds=seconds)
        assert why_not(replace(quantised, prediction=step), found.best) == says
    assert why_not(quantised, None) == says
    large = replace(quantised, memory=(replace(quantised.fullest, activations=2**50),))
    assert why_not(large, found.best).endswith(f"GiB of activations; {says}")


def test_what_helps_the_recipe():
    """Plain ZeRO-3, 2 short captions in each of 8 micro-batches: bound by communication."""
    own = recipe.candidate("zero3.secondary_partition=1")
    assert own.prediction.step.communication_seconds > 3 * own.prediction.step.compute_seconds
    assert waits_for_communication(own)
    found = remedies(own, recipe.searched())
    packed, near, both, megatron = (remedy.candidate for remedy in found)
    names = [remedy.name for remedy in found]
    assert names[:3] == [
        "a rank's samples packed into 1 micro-batch, train.recompute=none",
        "zero3.secondary_partition=8",
        "both",
    ]
    assert own.run.train.recompute == "full"
    assert {c.run.train.recompute for c in (packed, both, megatron)} == {"none"}
    assert names[3] == f"{layout_name(megatron.run)}, in 8 micro-batches, train.recompute=none"
    assert "Megatron TP" in names[3]
    gains = [own.prediction.seconds / c.prediction.seconds for c in (packed, near, both, megatron)]
    assert min(gains) > 1.1 and max(gains) == gains[2]
    assert all(remedy.candidate.fits for remedy in found)
    for candidate, partition, micro_batches in ((packed, 1, 1), (near, 8, 8), (both, 8, 1)):
        run = candidate.run
        assert (run.engine, run.zero3.secondary_partition) == ("zero3", partition)
        assert run.train.micro_batches == micro_batches
    assert near.run == replace(own.run, zero3=near.run.zero3)  # it changes nothing else


def test_what_would_not_help_is_not_told():
    found, best = recipe.searched(), recipe.searched().best
    assert not waits_for_communication(best)
    assert remedies(best, found) == []
    packed = recipe.candidate("train.micro_batches=1", "zero3.secondary_partition=1")
    names = [remedy.name for remedy in remedies(packed, found)]
    assert names and not any("packed" in name or name == "both" for name in names)


@pytest.mark.parametrize(
    "layout", [["zero3.secondary_partition=4"], ["engine=fsdp2", "fsdp2.shard_ranks=24"]]
)
def test_a_layout_of_the_users_own_has_remedies(layout):
    """One that is no host's nor several hosts' is compared because it is the run's own."""
    cluster = cluster_of("h100-80", 6, 8)
    run = load_run(RUN, [*layout, "train.samples_per_step=768"])
    own = candidate_of(run, cluster, 64)
    assert waits_for_communication(own)
    packed, *_ = remedies(own, search(run, cluster, 64, [run.engine]))
    assert packed.name.startswith("a rank's samples packed into ")
    assert replace(packed.candidate.run, train=run.train) == run


def test_a_partition_of_all_ranks_is_plain_zero3():
    cluster = cluster_of("h100-80", 1, 8)
    run = load_run(RUN, ["train.samples_per_step=64"])
    assert run.zero3.secondary_partition == cluster.ranks
    shown = best_of_each_layout(search(run, cluster, 64, ["zero3"]).ranked)
    names = {layout_name(candidate.run) for candidate in shown}
    offloaded = {"ZeRO-3, optimiser on cpu", "ZeRO-3, optimiser on cpu, parameters on cpu"}
    assert names == {"ZeRO-3", "ZeRO-3, quantised", *offloaded}


def test_another_stage_that_is_too_large_is_named():
    best = recipe.searched().best
    larger = replace(best, memory=(replace(best.fullest, activations=1000 * 2**30),))
    candidate = replace(best, other_stages={"pairs": best, "chats": larger})
    assert best.fits and not candidate.fits
    assert largest_part(candidate) == "1000 GiB of activations in chats"
    says = "does not fit: 1000 GiB of activations in chats"
    assert why_not(candidate, best) == why_not(candidate, None) == says


def test_a_run_that_computes_too_long_is_told_the_chosen_layout():
    found = recipe.searched()
    slow = recipe.candidate(
        "engine=megatron", "megatron.pipeline_parallel=4", "train.micro_batches=16"
    )
    assert slow.run.train.recompute == "full" and not waits_for_communication(slow)
    helps = remedies(slow, found)
    assert helps[-1].candidate is found.best
    name = f"{layout_name(found.best.run)}, in 1 micro-batch, train.recompute=none"
    assert helps[-1].name == name
    before = slow.prediction.seconds
    assert all(before > (1 + MEAN_ERROR) * r.candidate.prediction.seconds for r in helps)
    assert len({id(remedy.candidate) for remedy in helps}) == len(helps)


def test_both_is_told_if_each_helps_and_both_more():
    own = recipe.candidate("zero3.secondary_partition=1")
    found = recipe.searched()
    packed, _, both, _ = (remedy.candidate for remedy in remedies(own, found))
    slower = replace(both, prediction=both.prediction._replace(data_seconds=3.0))
    assert packed.prediction.seconds < slower.prediction.seconds < own.prediction.seconds
    ranked = [slower if c is both else c for c in found.ranked]
    names = [remedy.name for remedy in remedies(own, found._replace(ranked=ranked))]
    assert any("packed" in name for name in names) and "both" not in names
