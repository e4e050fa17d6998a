"""Bad steps in real runs: one sample's loss is no number."""

import gc
import os
from dataclasses import replace

import pytest
import torch

from megavlm.checkpoint.storage import CheckpointWriter, folder_name
from megavlm.config.engines import MegatronSettings
from megavlm.config.guard import GuardSettings
from megavlm.data.sources import id_of, training_sources
from megavlm.errors import CheckpointError, DivergenceError
from megavlm.stages.language import LanguageObjective
from megavlm.train.guard import Guard
from megavlm.train.loop import train
from megavlm.train.metrics import read_metrics
from tests.ranks import run_on_ranks
from tests.runs import plan_of
from tests.train.test_resume import LAYOUTS, MEGATRON, losses, saved

BAD_STEP = 3


def trained(run, ranks, *, poisoned):
    """Train; a sample of the bad step makes the loss of the rank that has it no number."""
    position = BAD_STEP * run.train.samples_per_step + 5
    [bad] = [
        id_of(place) for place in training_sources(run).shuffled(torch.tensor([position]).numpy())
    ]

    def on_rank(_):
        original = LanguageObjective.losses

        def losses_of(self, outputs, batch, prepared=None):
            found = original(self, outputs, batch, prepared)
            is_bad = poisoned and bad in batch.sample_ids
            return found._replace(backward=found.backward * float("nan")) if is_bad else found

        LanguageObjective.losses = losses_of
        train(plan_of(run))

    return run_on_ranks(ranks, on_rank, groups=False)


@pytest.mark.slow
def test_a_run_goes_back_after_a_failed_save_and_holds_no_more_than_before(tiny_run):
    """The save of step 4 fails; steps 2 to 5 are done four times."""
    run = run_of(tiny_run, "fsdp2", on_nonfinite="rollback")
    run = replace(run, checkpoint=replace(run.checkpoint, on_failure="continue"))

    def on_rank(_):
        write, fault_of, calls, files = CheckpointWriter.write_data, Guard._fault_of, [], []

        def failing(self, plan, planner):
            if self._state["step"] == 4:
                raise CheckpointError("no space")
            return write(self, plan, planner)

        def fault(self, result):
            calls.append(1)
            bad = len(calls) in (6, 10, 14)
            if bad:
                gc.collect()  # errors hold on to what they come from
                files.append(len(os.listdir("/proc/self/fd")))
            return "nonfinite" if bad else fault_of(self, result)

        CheckpointWriter.write_data, Guard._fault_of = failing, fault
        train(plan_of(run))
        return files

    for _, second, third in run_on_ranks(2, on_rank, groups=False):
        assert third <= second
    assert [step for step, *_ in losses(run)] == list(range(6))


def run_of(tiny_run, engine, **guard):
    return replace(
        tiny_run,
        engine=engine,
        megatron=MEGATRON if engine == "megatron" else MegatronSettings(),
        checkpoint=replace(tiny_run.checkpoint, keep_every=1),
        guard=GuardSettings(**guard),
    )


@pytest.mark.parametrize(
    ("engine", "stops"),
    [
        ("fsdp2", False),
        *(pytest.param(engine, True, marks=pytest.mark.slow) for engine in LAYOUTS),
    ],
)
def test_a_run_that_went_back_is_one_that_never_saw_the_samples(tiny_run, engine, stops):
    ranks = LAYOUTS[engine]
    run = run_of(tiny_run, engine, on_nonfinite="rollback")
    trained(run, ranks, poisoned=True)
    # From the checkpoint of step 2 to the bad step.
    data = replace(run.data, skip_samples=((16, 32),))
    other = replace(run, run_folder=run.run_folder / "other", data=data)
    trained(other, ranks, poisoned=False)
    assert losses(run) == losses(other)
    expected = saved(other, 6)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in saved(run, 6).items())
    if not stops:
        return
    # A run that is stopped after it went back goes on without them, too.
    (run.run_folder / "checkpoints" / folder_name(6) / "state.json").unlink()
    trained(run, ranks, poisoned=True)
    assert losses(run) == losses(other)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in saved(run, 6).items())


@pytest.mark.slow
@pytest.mark.parametrize("engine", LAYOUTS)
def test_a_skipped_step_changes_nothing(tiny_run, engine):
    run = run_of(tiny_run, engine)
    run = replace(run, checkpoint=replace(run.checkpoint, every=1))
    trained(run, LAYOUTS[engine], poisoned=True)
    before, after = saved(run, BAD_STEP), saved(run, BAD_STEP + 1)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    lines = [m for m in read_metrics(run.run_folder) if "loss" in m]
    assert [m["skipped_step"] for m in lines] == [int(step == BAD_STEP) for step in range(6)]
    assert lines[BAD_STEP]["gradient_norm"] is None
    expected = losses(run)
    for step in (5, 6):
        (run.run_folder / "checkpoints" / folder_name(step) / "state.json").unlink()
    trained(run, LAYOUTS[engine], poisoned=True)
    assert losses(run) == expected


def test_a_run_that_is_to_stop_saves_nothing_of_it(tiny_run):
    run = run_of(tiny_run, "fsdp2", on_nonfinite="stop")
    with pytest.raises(AssertionError, match=rf"{DivergenceError.__name__}: step {BAD_STEP + 1}: "):
        trained(run, 2, poisoned=True)
    assert [*saved(run, 2)]
    assert not (run.run_folder / "checkpoints" / folder_name(4)).exists()
