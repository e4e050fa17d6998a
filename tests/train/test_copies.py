"""A run that is killed goes on from the copies in its hosts' memory, as if nothing had happened."""

import os
import shutil
import signal
import socket
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from megavlm.checkpoint import recovery
from megavlm.checkpoint.copies import Copies, _CopyWriter
from megavlm.checkpoint.storage import CheckpointWriter, file_name, folder_name
from megavlm.config.engines import Fsdp2Settings, MegatronSettings
from megavlm.engine.base import always
from megavlm.engine.fsdp2 import Fsdp2Engine
from megavlm.train.events import EVENTS_FILE, read_events
from megavlm.train.goodput import goodput_of
from megavlm.train.loop import train
from megavlm.train.metrics import MetricsLog
from tests.ranks import run_on_ranks
from tests.runs import plan_of
from tests.train.test_resume import LAYOUTS, MEGATRON, losses, saved

ALL = [pytest.param(engine, marks=pytest.mark.slow) for engine in ("zero3", "megatron")]


def run_of(tiny_run, engine="fsdp2", **changes):
    return replace(
        tiny_run,
        engine=engine,
        megatron=MEGATRON if engine == "megatron" else MegatronSettings(),
        checkpoint=replace(tiny_run.checkpoint, **{"every": 4, "memory_every": 1, **changes}),
    )


def trained(run, ranks, hosts=2, prepare: Callable[[int], None] = lambda rank: None):
    """Train, the ranks divided over so many hosts, of which each has a memory of its own."""

    def on_rank(rank):
        host = rank * hosts // ranks
        memory = run.run_folder.parent / f"host-{host}"
        memory.mkdir(exist_ok=True)
        socket.gethostname = lambda: f"host-{host}"
        prepare(rank)
        own = replace(run, checkpoint=replace(run.checkpoint, memory_folder=memory))
        train(plan_of(own if run.checkpoint.memory_every else run))

    run_on_ranks(ranks, on_rank, groups=False)


def killed(run, ranks, victim, owner, method, call, hosts=2):
    """Train until one rank is killed when it has come so often to a place; then all are."""

    struck = run.run_folder.with_name("struck")

    def prepare(rank):
        original, calls = getattr(owner, method), 0

        def killing(*arguments, **named):
            nonlocal calls
            calls += 1
            if rank == victim and calls == call:
                struck.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **named)

        setattr(owner, method, killing)

    with pytest.raises(AssertionError, match=r"rank \d ended with status"):
        trained(run, ranks, hosts, prepare)
    struck.unlink()


def events_of(run, *names):
    events = read_events(run.run_folder / EVENTS_FILE)
    return [event for event in events if event["event"] in names]


def newest_safe_step(run):
    told = events_of(run, "memory_copy_made", "checkpoint_committed")
    return max((event["step"] for event in told), default=0)


def assert_identical(run, unbroken):
    assert losses(run) == losses(unbroken)
    expected, tensors = saved(unbroken, 6), saved(run, 6)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


MOMENTS = {
    "after a step": (MetricsLog, "step", 4),
    "before its file": (_CopyWriter, "write_data", 3),
    "before its neighbour has it": (Copies, "_exchange", 3),
    "while the disk is written": (CheckpointWriter, "write_data", 1),
}


@pytest.mark.parametrize("engine", ["fsdp2", *ALL])
def test_a_killed_run_goes_on_from_memory(tiny_run, engine):
    run, ranks = run_of(tiny_run, engine, asynchronous=False), LAYOUTS[engine]
    unbroken = replace(run, run_folder=run.run_folder.with_name("unbroken"))
    unbroken = replace(unbroken, checkpoint=replace(run.checkpoint, memory_every=None))
    trained(unbroken, ranks)
    killed(run, ranks, ranks - 1, *MOMENTS["after a step"])  # of which three are copied
    shutil.rmtree(run.run_folder.parent / "host-0")
    trained(run, ranks)
    [recovered] = events_of(run, "recovered")
    assert (recovered["step"], recovered["on_disk"]) == (3, 0) and recovered["seconds"] > 0
    assert [event["step"] for event in events_of(run, "resumed")] == [3]
    assert_identical(run, unbroken)
    found = goodput_of(run.run_folder)
    assert found is not None and found.steps == 6 and found.repeated_steps <= 1
    assert not [*run.run_folder.parent.glob("host-*/megavlm-*/*/*/*")]


@pytest.mark.slow
@pytest.mark.parametrize("moment", [*MOMENTS, "while it is recovered"])
@pytest.mark.parametrize("engine", LAYOUTS)
def test_killed_at_any_moment(tiny_run, engine, moment):
    """On two hosts, and once on one."""
    run, ranks, hosts = run_of(tiny_run, engine), LAYOUTS[engine], 1 + ("file" not in moment)
    unbroken = replace(run, run_folder=run.run_folder.with_name("unbroken"))
    unbroken = replace(unbroken, checkpoint=replace(run.checkpoint, memory_every=None))
    trained(unbroken, ranks)
    last = ranks - 1
    killed(run, ranks, last, *MOMENTS.get(moment, MOMENTS["after a step"]), hosts)
    safe = newest_safe_step(run)
    if moment == "while it is recovered":
        killed(run, ranks, 0, recovery, "_copy", 1, hosts)
    trained(run, ranks, hosts)
    [recovered] = events_of(run, "recovered")
    assert recovered["step"] >= safe > 0
    assert_identical(run, unbroken)


@pytest.mark.slow
def test_fewer_ranks_and_another_engine_go_on_from_memory(tiny_run):
    run = run_of(tiny_run, "megatron", asynchronous=False)
    alone = replace(
        run_of(tiny_run, memory_every=None), run_folder=run.run_folder.with_name("alone")
    )
    trained(alone, 1, hosts=1)
    killed(run, 4, 2, *MOMENTS["after a step"])
    shutil.rmtree(run.run_folder.parent / "host-1")
    trained(replace(run, engine="fsdp2", megatron=MegatronSettings()), 1, hosts=1)
    assert [event["step"] for event in events_of(run, "resumed")] == [3]
    for (step, *actual), (other, *expected) in zip(losses(run), losses(alone), strict=True):
        assert step == other
        assert actual == pytest.approx(expected, rel=5e-6)  # as the test of all engines has it


@pytest.mark.slow
@pytest.mark.parametrize("file", ["state.json", file_name(1, 2)])
@pytest.mark.parametrize("copied", [True, False])
def test_a_damaged_checkpoint_is_passed(tiny_run, file, copied):
    run = run_of(tiny_run, asynchronous=False, on_damage="earlier", every=2, keep_last=3)
    run = replace(run, checkpoint=replace(run.checkpoint, memory_every=1 if copied else None))
    killed(run, 2, 1, MetricsLog, "step", 6)  # 5 is in memory, 4 on the disk
    path = run.run_folder / "checkpoints" / folder_name(4) / file
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    trained(run, 2)
    assert [event["step"] for event in events_of(run, "recovered")] == ([5] if copied else [])
    assert [event["step"] for event in events_of(run, "resumed")] == [5 if copied else 2]
    assert len(events_of(run, "damaged")) == (not copied)


@pytest.mark.slow
def test_copies_of_a_model_that_has_drifted_apart_are_not_used(tiny_run):
    run = run_of(tiny_run, asynchronous=False)
    run = replace(run, fsdp2=Fsdp2Settings(shard_ranks=1))

    def prepare(rank):
        update = Fsdp2Engine.step

        def step(self, micro_batches, learning_rate, accepts=always):
            result = update(self, micro_batches, learning_rate, accepts)
            if rank == 0:
                with torch.no_grad():
                    next(iter(self._own_shards.values())).view(-1)[0] += 1
            return result

        Fsdp2Engine.step = step

    with pytest.raises(AssertionError, match="copies of the model differ"):
        trained(run, 2, prepare=prepare)
    assert [event["step"] for event in events_of(run, "memory_copy_made")] == [1, 2, 3]
    trained(run, 2)
    assert not events_of(run, "recovered", "resumed")


@pytest.mark.slow
@pytest.mark.parametrize("deleted", ["run", "checkpoints"])
def test_copies_of_a_deleted_run_are_not_used(tiny_run, deleted):
    run = run_of(tiny_run, asynchronous=False)
    killed(run, 2, 1, *MOMENTS["after a step"])
    shutil.rmtree(run.run_folder if deleted == "run" else run.run_folder / "checkpoints")
    trained(run, 2)
    assert not events_of(run, "recovered", "resumed")
