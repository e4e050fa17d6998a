"""Which ranks hold up the others, on four real ranks."""

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megavlm.config.metrics import MetricsSettings, ProfileSettings
from megavlm.data.loader import MicroBatches
from megavlm.stages.language import LanguageObjective
from megavlm.train.events import EVENTS_FILE, Events, read_events
from megavlm.train.loop import train
from megavlm.train.metrics import MetricsLog, read_metrics
from megavlm.train.stragglers import (
    RankTimes,
    Stragglers,
    communication_wait_seconds,
    covered,
    medians,
    peers_of,
    read_ranks,
)
from tests.ranks import run_on_ranks
from tests.runs import plan_of
from tests.train.test_resume import MEGATRON

SLOW_RANK = 2


def measured(run, all_seconds):
    """Steps that sleep, meet and are measured on this rank.

    all_seconds: of each step, asleep at work and asleep at loading. Returns figures by step.
    """
    first = dist.get_rank() == 0
    found = []
    with Events(run.run_folder, enabled=first) as events:
        log = MetricsLog(run.run_folder, 0, len(all_seconds), events, {}, enabled=first)
        with log:
            stragglers = Stragglers(run, log)
            for step, (work_seconds, data_seconds) in enumerate(all_seconds):
                stragglers.begin(step)
                time.sleep(data_seconds)
                numbers = torch.ones(1000) * 2
                time.sleep(work_seconds)
                dist.all_reduce(numbers)
                found.append(stragglers.end(step, data_seconds))
    return found


def straggler_events(run):
    events = read_events(run.run_folder / EVENTS_FILE)
    return [event for event in events if event["event"].startswith("straggler")]


def test_ranks_are_named_while_they_hold_up_others(tiny_run, capfd):
    """None, rank 2 by its work, none again, rank 1 by its data, and none again."""
    metrics = MetricsSettings(rank_times_every=1, straggler_percent=100.0)
    run = replace(tiny_run, metrics=metrics, profile=ProfileSettings(steps=(1, 2)))
    usual, slow, late = (0.04, 0.0), (0.2, 0.0), (0.04, 0.16)
    steps_of = {
        1: [usual] * 12 + [late] * 4 + [usual] * 4,
        2: [usual] * 4 + [slow] * 4 + [usual] * 12,
    }
    results = run_on_ranks(4, lambda rank: measured(run, steps_of.get(rank, [usual] * 20)))
    told = straggler_events(run)
    assert [(event["event"], event["rank"]) for event in told] == [
        ("straggler", 2),
        ("straggler_over", 2),
        ("straggler", 1),
        ("straggler_over", 1),
    ]
    by_work, _, by_data, _ = told
    assert by_work["work_seconds"] > 0.19 > by_work["peers_work_seconds"]
    assert by_data["data_seconds"] == 0.16 and by_data["peers_data_seconds"] == 0.0
    assert by_data["work_seconds"] < by_data["data_seconds"]
    said = capfd.readouterr().err
    assert said.count("holds up others:") == said.count("no longer holds up others") == 2
    assert "USDT" not in said
    # Torch profiles step 1 for somebody else.
    assert results[0][1] == results[3][1] == {}
    assert results[0][5]["communication_wait_seconds"] > 0.16 * 3 / 4 * 0.9
    found = read_ranks(run.run_folder)
    assert found is not None and found["step"] == 19 and found["stragglers"] == []
    assert len(found["ranks"]) == 4 and found["measured_steps"] == 5


def times(work, data=0.0, stage=0):
    return RankTimes("node", stage, work, data, 0.0, None, None)


def test_ranks_are_compared_with_those_that_have_the_same_to_do():
    ranks = [times(1.0), times(9.0), times(1.2), times(5.0, stage=1), times(4.0, 2.0, stage=1)]
    assert [peers.busy_seconds for peers in peers_of(ranks)] == [1.2, 1.2, 1.2, 5.0, 5.0]
    window = [[times(1.0), times(2.0)], [times(5.0), times(2.5)], [times(1.5), times(2.25)]]
    assert [rank.work_seconds for rank in medians(window)] == [1.5, 2.25]


def event(name, activity, start, end):
    return SimpleNamespace(
        name=lambda: name,
        activity_type=lambda: activity,
        start_ns=lambda: start * 10**9,
        end_ns=lambda: end * 10**9,
    )


def test_waiting_is_communication_without_computation():
    assert covered([]) == 0 and covered([(5, 9), (0, 3), (1, 2), (2, 6)]) == 9
    assert covered([(0, 1), (4, 6)]) == 3
    kernels = [
        event("ncclDevKernel_AllGather_RING_LL", "kernel", 0, 4),
        event("ampere_bf16_s16816gemm", "kernel", 1, 3),
        event("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL", "kernel", 6, 9),
        event("Memcpy HtoD", "gpu_memcpy", 8, 10),
        event("FSDP::post_backward", "gpu_user_annotation", 0, 20),
        event("Context Sync", "cuda_sync", 0, 20),
    ]
    assert communication_wait_seconds(kernels) == 2 + 2
    # What another profiler keeps from us is not taken for nothing.
    assert communication_wait_seconds(kernels[-2:]) is None


def slowed(original, rank, slow_seconds):
    """What sleeps first, on the slow rank, in training."""

    def method(self, *arguments):
        if rank == SLOW_RANK and getattr(self, "training", torch.is_grad_enabled()):
            time.sleep(slow_seconds)
        return original(self, *arguments)

    return method


def told_of(run, *, outputs=0.0, samples=0.0):
    """Train; returns the events of stragglers. Seconds: of the slow rank's micro-batches."""
    metrics = MetricsSettings(rank_times_every=1, straggler_percent=50.0)
    run = replace(run, train=replace(run.train, steps=4), metrics=metrics)

    def on_rank(rank):
        LanguageObjective.outputs = slowed(LanguageObjective.outputs, rank, outputs)
        MicroBatches.__getitem__ = slowed(MicroBatches.__getitem__, rank, samples)
        train(plan_of(run))

    run_on_ranks(4, on_rank, groups=False)
    lines = [line for line in read_metrics(run.run_folder) if "loss" in line]
    assert all(0 <= m["communication_wait_seconds"] < m["step_seconds"] for m in lines)
    return straggler_events(run)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero3", "fsdp2", "megatron"])
def test_a_rank_that_is_slow(tiny_run, engine):
    run = replace(tiny_run, engine=engine, megatron=MEGATRON)
    told = told_of(run, outputs=1.0)
    assert [(event["rank"], event["event"]) for event in told] == [(SLOW_RANK, "straggler")]
    found = read_ranks(run.run_folder)
    assert found is not None and found["stragglers"] == [SLOW_RANK]
    # Under a pipeline its peers alone: another stage may wait less, and works less.
    peers = [rank for rank in found["ranks"] if rank["stage"] == told[0]["stage"]]
    waits = [rank["communication_wait_seconds"] for rank in peers]
    assert min(waits) == found["ranks"][SLOW_RANK]["communication_wait_seconds"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero3", "fsdp2", "megatron"])
def test_a_rank_whose_samples_come_late(tiny_run, engine):
    """Under tensor parallelism rank 2 draws for rank 3, too, which is not to blame."""
    parallel = replace(MEGATRON, pipeline_parallel=1)
    told = told_of(replace(tiny_run, engine=engine, megatron=parallel), samples=1.0)
    assert [(event["rank"], event["event"]) for event in told] == [(SLOW_RANK, "straggler")]
    assert told[0]["data_seconds"] > 2.0 > told[0]["peers_data_seconds"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero3", "fsdp2", "megatron"])
def test_none_is_named_where_all_are_alike(tiny_run, engine):
    assert told_of(replace(tiny_run, engine=engine, megatron=MEGATRON)) == []
