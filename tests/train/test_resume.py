"""A run that is stopped and goes on is the run that was never stopped."""

from dataclasses import replace

import pytest
import torch

from megavlm.checkpoint.load import lazy_tensors
from megavlm.checkpoint.storage import CheckpointReader, folder_name
from megavlm.config.engines import MegatronSettings
from megavlm.data.shards import ShardFolder
from megavlm.files.folder import Folder
from megavlm.train.loop import train
from megavlm.train.metrics import read_metrics
from tests.ranks import run_on_ranks
from tests.runs import plan_of

MEGATRON = MegatronSettings(tensor_parallel=2, pipeline_parallel=2)
LAYOUTS = {"zero3": 2, "fsdp2": 2, "megatron": 4}


def trained(plan, ranks):
    """Train; returns the numbers of the samples that each rank read for training, in order."""

    def on_rank(_):
        read = []
        original = ShardFolder.parse

        def recorded(folder, number, content):
            if str(folder) == str(plan.last.data.train[0].folder):
                read.append(number)
            return original(folder, number, content)

        ShardFolder.parse = recorded
        train(plan)
        return read

    return run_on_ranks(ranks, on_rank, groups=False)


def saved(run, step):
    reader = CheckpointReader(Folder(run.run_folder / "checkpoints" / folder_name(step)))
    return {name: lazy.read() for name, lazy in lazy_tensors(reader).items()}


def losses(run):
    return [
        (m["step"], m["loss"], m["gradient_norm"])
        for m in read_metrics(run.run_folder)
        if "loss" in m
    ]


@pytest.mark.parametrize(
    ("engine", "precision"),
    [
        ("fsdp2", "fp32"),
        pytest.param("fsdp2", "bf16", marks=pytest.mark.slow),
        *(
            pytest.param(engine, precision, marks=pytest.mark.slow)
            for engine in ("zero3", "megatron")
            for precision in ("fp32", "bf16")
        ),
    ],
)
def test_a_resumed_run_is_bit_identical(tiny_run, tmp_path, engine, precision):
    ranks = LAYOUTS[engine]
    run = replace(
        tiny_run,
        engine=engine,
        megatron=MEGATRON if engine == "megatron" else MegatronSettings(),
        train=replace(tiny_run.train, precision=precision),
        checkpoint=replace(tiny_run.checkpoint, keep_every=1),
    )
    whole = trained(plan_of(run), ranks)
    unbroken, unbroken_losses = saved(run, 6), losses(run)
    for step in (4, 6):  # a step at which a checkpoint lies, and one between two
        (run.run_folder / "checkpoints" / folder_name(step) / "state.json").unlink()
    resumed = trained(plan_of(run), ranks)
    assert losses(run) == unbroken_losses
    tensors = saved(run, 6)
    assert tensors.keys() == unbroken.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, unbroken[name]), name
    for before, after in zip(whole, resumed, strict=True):
        assert after == before[len(before) - len(after) :]
    per_step = run.train.samples_per_step
    assert [sum(map(len, read)) for read in (whole, resumed)] == [6 * per_step, 4 * per_step]


@pytest.mark.slow
def test_every_sample_once_whatever_the_number_of_ranks(tiny_run):
    """One epoch of 40 samples, 8 a step, over 1, 4 and 2 ranks and three engines."""
    seen = []
    run = replace(tiny_run, checkpoint=replace(tiny_run.checkpoint, every=1))
    plan = [(1, 1, "zero3"), (3, 4, "megatron"), (5, 2, "fsdp2")]
    for steps, ranks, engine in plan:
        part = replace(run, engine=engine, train=replace(run.train, steps=steps))
        seen += [number for read in trained(plan_of(part), ranks) for number in read]
    assert sorted(seen) == list(range(40))


@pytest.mark.slow
def test_the_curve_goes_on_over_every_engine(tiny_run):
    """ZeRO-3 x4 -> TP2 x PP2 -> FSDP2 x2 -> one process, moments and all, as one process alone."""
    run = replace(tiny_run, checkpoint=replace(tiny_run.checkpoint, every=1, keep_every=1))
    alone = replace(run, run_folder=run.run_folder / "alone")
    trained(plan_of(alone), 1)
    checkpoints = run.run_folder / "checkpoints"
    for first, ranks, engine in (
        (0, 4, "zero3"),
        (2, 4, "megatron"),
        (4, 2, "fsdp2"),
        (5, 1, "zero3"),
    ):
        for later in range(first + 1, 7):
            (checkpoints / folder_name(later) / "state.json").unlink(missing_ok=True)
        megatron = MEGATRON if engine == "megatron" else MegatronSettings()
        trained(plan_of(replace(run, engine=engine, megatron=megatron)), ranks)
    worst = 0.0
    for (step, *actual), (other_step, *expected) in zip(losses(run), losses(alone), strict=True):
        assert step == other_step
        worst = max(worst, *(abs(a / e - 1) for a, e in zip(actual, expected, strict=True)))
    assert worst < 5e-6  # worst measured 8.3e-8
    unbroken = saved(alone, 6)
    # Where a gradient is near zero, rounding decides which way Adam goes: moments tell more.
    for kind, tolerance in (("weights/", 2e-4), ("exp_avg/", 5e-7)):
        differences = [
            float((tensor - unbroken[name]).abs().max())
            for name, tensor in saved(run, 6).items()
            if name.startswith(kind)
        ]
        assert max(differences) < tolerance  # worst measured 5.7e-5 and 1.4e-7
