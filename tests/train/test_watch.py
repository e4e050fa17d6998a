"""A run that hangs says which rank stands where, and ends."""

import os
import signal
import time
from dataclasses import replace

import pytest

from megavlm.config.guard import GuardSettings
from megavlm.data.loader import MicroBatches
from megavlm.train import watch
from megavlm.train.loop import train
from megavlm.train.metrics import MetricsLog
from tests.ranks import run_on_ranks
from tests.runs import plan_of


def codes_of(ranks, function):
    """How each rank's process ends; what runs is a child of it, as a rank of `tests.ranks`."""

    def on_rank(rank):
        child = os.fork()
        if not child:
            os.environ["TORCH_FR_BUFFER_SIZE"] = "2000"
            watch.ANSWER_SECONDS = 1.0
            function(rank)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    return run_on_ranks(ranks, on_rank, groups=False)


def hanging(run, hang):
    """Train on two ranks; the second one hangs when it draws samples of the second step."""

    def on_rank(rank):
        original = MicroBatches.__getitem__

        def drawn(self, number):
            if rank == 1 and self.training and number == 3:
                hang()
            return original(self, number)

        MicroBatches.__getitem__ = drawn
        train(plan_of(run))

    return codes_of(2, on_rank)


@pytest.mark.slow
def test_the_report_shows_who_did_not_take_part(tiny_run, capfd):
    run = replace(tiny_run, engine="fsdp2", guard=GuardSettings(hang_seconds=2.0))
    assert hanging(run, lambda: time.sleep(100)) == [watch.HUNG] * 2
    folder = run.run_folder / "hangs"
    said = capfd.readouterr().err
    for rank, where in ((0, "step 2, the model; in megavlm."), (1, "step 2, its samples; in ")):
        line = [x for x in said.splitlines() if x.startswith(f"megavlm: rank {rank} on ")]
        assert len(line) == 1 and where in line[0], said
        stacks = (folder / f"rank-{rank}.txt").read_text()
        assert where in stacks and "Thread 0x" in stacks and "in _run_steps" in stacks
        assert "gloo:all_reduce number " in stacks.partition("Thread 0x")[0]
    summary = (folder / watch.SUMMARY_FILE).read_text()
    assert summary.splitlines()[0].startswith("the run hangs; rank 0 at step 2, the model; ")
    assert summary.splitlines()[1].startswith("elsewhere: rank 1 at step 2, its samples; ")
    assert all(f"megavlm: {line}" in said for line in summary.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_cannot_answer_is_named(tiny_run, capfd, stopped):
    """The first one is also the host of the store."""
    run = replace(tiny_run, engine="fsdp2", guard=GuardSettings(hang_seconds=1.0))

    def on_rank(rank):
        original = MetricsLog.step

        def step(self, values, *, say):
            if rank == stopped and values["step"] == 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            original(self, values, say=say)

        MetricsLog.step = step
        train(plan_of(run))

    def on_watched_rank(rank):
        child = os.fork()
        if not child:
            watch.ANSWER_SECONDS = 1.0
            on_rank(rank)
            os._exit(0)
        status = os.waitpid(child, os.WUNTRACED)[1]
        if os.WIFSTOPPED(status):
            while "rank" not in "".join(p.name for p in (run.run_folder / "hangs").glob("rank-*")):
                time.sleep(0.1)
            time.sleep(3)
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
        return os.waitstatus_to_exitcode(status)

    codes = run_on_ranks(2, on_watched_rank, groups=False)
    assert codes[1 - stopped] == watch.HUNG
    assert f"no answer: rank {stopped} (ended, stopped" in capfd.readouterr().err


def test_progress_of_any_rank_is_no_hang(tmp_path):
    def on_rank(rank):
        with watch.Watch(tmp_path, 0.4) as mine:
            for _ in range(10):
                time.sleep(0.1)
                if rank == 1:
                    mine.progress()
        return sorted(tmp_path.iterdir())

    assert run_on_ranks(2, on_rank) == [[], []]


@pytest.mark.parametrize("calm", [True, False])
def test_who_is_stopped_waits_for_no_rank_that_is_gone_but_for_the_disk(tmp_path, calm):
    def on_rank(_):
        watch.HURRIED_SECONDS = 0.3
        with watch.Watch(tmp_path, 4.0) as mine:
            if calm:
                mine.calm()
            mine.hurry()  # a launcher may tell this rank after the others
            time.sleep(2)

    assert codes_of(1, on_rank) == [0 if calm else watch.HUNG]


@pytest.mark.slow
def test_a_run_whose_saves_and_evaluations_take_long_goes_on(tiny_run):
    """Each picture and each written tensor takes a while; a step none."""

    def on_rank(_):
        original_draw, original_read = MicroBatches._draw, watch.Watch.progress
        run = replace(tiny_run, engine="fsdp2", guard=GuardSettings(hang_seconds=3.0))
        run = replace(run, train=replace(run.train, steps=1))

        def drawn(self, place, content, position):
            if not self.training:
                time.sleep(0.4)
            return original_draw(self, place, content, position)

        def progress(self):
            time.sleep(0.03)
            original_read(self)

        MicroBatches._draw, watch.Watch.progress = drawn, progress
        started = time.monotonic()
        train(plan_of(run))
        return time.monotonic() - started

    [seconds] = run_on_ranks(1, on_rank, groups=False)
    assert seconds > 2 * 3, "it is long enough to be seen"


def test_off():
    def on_rank(_):
        with watch.Watch(None, 0) as mine:  # pyright: ignore[reportArgumentType]
            mine.at("somewhere")
            return mine._thread.is_alive()

    assert run_on_ranks(1, on_rank) == [False]


def test_ranks_in_words():
    assert watch._ranks([3]) == "rank 3"
    assert watch._ranks([0, 1, 2, 5, 7, 8]) == "ranks 0-2, 5, 7-8"
