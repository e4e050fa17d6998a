"""A run that a signal stops is saved, on all ranks, and goes on as if nothing had happened."""

import os
import signal
import time
from dataclasses import replace

import pytest
import torch

from megavlm.__main__ import main
from megavlm.checkpoint.storage import folder_name
from megavlm.config.engines import MegatronSettings
from megavlm.data.loader import MicroBatches, Share, load
from megavlm.data.sources import training_sources
from megavlm.data.tokenizer import Tokenizer
from megavlm.errors import StoppedError
from megavlm.stages.start import objective_of
from megavlm.train import stop
from megavlm.train.loop import train
from megavlm.train.metrics import MetricsLog
from tests.ranks import run_on_ranks
from tests.runs import plan_of
from tests.train.test_resume import LAYOUTS, MEGATRON, losses, saved

STOP_AFTER = 3  # between two checkpoints


def trained(run, ranks, signals=()):
    """Train; the ranks named send themselves a signal in a step; returns how each ended."""

    def on_rank(rank):
        original = MetricsLog.step

        def step(self, values, *, say):
            if values["step"] == STOP_AFTER - 2 and rank in signals:
                os.kill(os.getpid(), signals[rank])
                while not stop.groups.Hand.raised:  # a thread hears it
                    time.sleep(0.001)
            original(self, values, say=say)

        MetricsLog.step = step
        try:
            train(plan_of(run))
        except StoppedError as stopped:
            return str(stopped)
        return "done"

    return run_on_ranks(ranks, on_rank, groups=False)


def run_of(tiny_run, engine):
    return replace(
        tiny_run,
        engine=engine,
        megatron=MEGATRON if engine == "megatron" else MegatronSettings(),
        checkpoint=replace(tiny_run.checkpoint, keep_every=1),
    )


@pytest.mark.slow
@pytest.mark.parametrize("engine", LAYOUTS)
def test_a_signal_to_one_rank_stops_all_and_loses_nothing(tiny_run, engine):
    run, ranks = run_of(tiny_run, engine), LAYOUTS[engine]
    unbroken = replace(run, run_folder=run.run_folder / "unbroken")
    assert trained(unbroken, ranks) == ["done"] * ranks
    ended = trained(run, ranks, {ranks - 1: signal.SIGTERM})
    said = f"stopped by a signal (on 1 of {ranks} ranks); step {STOP_AFTER} is saved: run again"
    assert all(said in text for text in ended), ended
    assert len(losses(run)) == STOP_AFTER
    assert sorted(p.name for p in (run.run_folder / "checkpoints").glob("step-*")) == [
        folder_name(2),
        folder_name(STOP_AFTER),
    ]
    assert trained(run, ranks) == ["done"] * ranks
    assert losses(run) == losses(unbroken)
    expected = saved(unbroken, 6)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in saved(run, 6).items())


@pytest.mark.parametrize("apart", [0.0, 0.2])
def test_a_second_signal_ends_at_once_unless_it_is_the_first_again(apart):
    def on_rank(_):
        child = os.fork()
        if not child:
            stop.SECONDS_APART = 0.1 if apart else 60.0
            with stop.StopSignals() as signals:
                signals.listen()
                for number in (signal.SIGUSR1, signal.SIGTERM):
                    os.kill(os.getpid(), number)
                    time.sleep(apart)
                time.sleep(2 if apart else 0.1)
                os._exit(9)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert run_on_ranks(1, on_rank) == [128 + signal.SIGTERM if apart else 9]


def test_a_signal_too_late_for_the_last_step_is_not_lost():
    def on_rank(_):
        child = os.fork()
        if not child:
            with stop.StopSignals() as signals:
                signals.listen()
                os.kill(os.getpid(), signal.SIGTERM)
                while not stop.groups.Hand.raised:
                    time.sleep(0.001)
            os._exit(9)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert run_on_ranks(1, on_rank) == [-signal.SIGTERM]


def test_the_command_ends_with_a_code_of_its_own(tiny_run_file, monkeypatch, capsys):
    def stopped(*_, **__):
        raise StoppedError("stopped by a signal")

    monkeypatch.setattr("megavlm.train.loop.train", stopped)
    assert main(["train", str(tiny_run_file)]) == 75
    assert capsys.readouterr().err == "megavlm: stopped by a signal\n"


def test_workers_heed_their_rank_alone(tiny_run):
    """Launchers signal whole process groups, and multiprocessing its own workers."""

    def on_rank(_):
        run = replace(tiny_run, data=replace(tiny_run.data, workers=1))
        sources, tokenizer = training_sources(run), Tokenizer(run.data.tokenizer)
        collate = objective_of(run).collate
        batches = MicroBatches(sources, tokenizer, run, Share(0, 1), collate, training=True)
        iterator = load(batches, range(50), 1)
        next(iterator)
        [worker] = torch.multiprocessing.active_children()
        other = os.fork()
        if not other:
            for number in stop.SIGNALS:
                os.kill(worker.pid or 0, number)
            os._exit(0)
        os.waitpid(other, 0)
        read = 1 + sum(1 for _ in zip(range(20), iterator, strict=False))
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the loader's raises
        worker.terminate()
        worker.join(10)
        return read, worker.exitcode

    assert run_on_ranks(1, on_rank) == [(21, 1)]
