"""A run of several stages: what carries over, and stopping anywhere."""

from dataclasses import replace

import pytest
import torch

from megavlm.checkpoint.folder import Folder
from megavlm.checkpoint.storage import folder_name, read_state
from megavlm.config.engines import MegatronSettings
from megavlm.train.metrics import read_metrics
from tests.runs import plan_of
from tests.train.test_resume import LAYOUTS, MEGATRON, losses, saved, trained

PRETRAINING = {"mim": 0.5, "contrastive": 1.0}


def curriculum(run, engine, steps=3):
    """Pre-training, captioning with a frozen encoder, instruction tuning."""
    run = replace(
        run,
        engine=engine,
        megatron=MEGATRON if engine == "megatron" else MegatronSettings(),
        checkpoint=replace(run.checkpoint, every=2, keep_every=1),
        train=replace(run.train, steps=steps, ema_decay=0.5),
    )
    return plan_of(
        replace(run, objectives=PRETRAINING),
        replace(run, train=replace(run.train, frozen=("encoder",))),
        replace(run, objectives={"instruction": 1.0}, data=replace(run.data, texts_per_sample=2)),
    )


@pytest.mark.parametrize(
    "engine",
    [name if name == "fsdp2" else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS],
)
def test_resuming_anywhere_is_bit_identical(tiny_run, engine):
    """In the middle of every stage, and exactly at both boundaries."""
    plan, ranks = curriculum(tiny_run, engine), LAYOUTS[engine]
    trained(plan, ranks)
    last, unbroken_losses = plan.steps, losses(plan.first)
    unbroken = {step: saved(plan.first, step) for step in (3, 4, 6, 8, 9)}
    folder = plan.first.run_folder / "checkpoints"
    assert sorted(path.name for path in folder.glob("step-*")) == [
        folder_name(step) for step in (2, 3, 4, 6, 8, 9)
    ]
    for stopped in (8, 6, 4, 3, 2):
        for path in folder.glob("step-*"):
            if path.name > folder_name(stopped):
                (path / "state.json").unlink()
        trained(plan, ranks)
        assert losses(plan.first) == unbroken_losses, stopped
        for step in (s for s in unbroken if s > stopped):
            tensors = saved(plan.first, step)
            assert tensors.keys() == unbroken[step].keys()
            for name, tensor in tensors.items():
                assert torch.equal(tensor, unbroken[step][name]), (stopped, name)
    held_out = [m for m in read_metrics(plan.first.run_folder) if "heldout_loss" in m]
    assert [(m["step"], m["last"]) for m in held_out] == [
        *((0, False), (3, True)),
        *((3, False), (6, True)),
        *((6, False), (last, True)),
    ]
    # What was frozen stayed to the bit.
    for name, weight in unbroken[6].items():
        if name.startswith("weights/encoder."):
            assert torch.equal(weight, unbroken[3][name]), name
    assert [optimizer_steps(plan, step) for step in (3, 6, 9)] == [
        {"encoder": 3, "text_tower": 3, "heads": 3},
        {"projector": 3, "decoder": 3, "cross_attention": 3},
        {"encoder": 3, "projector": 6, "decoder": 6, "cross_attention": 6},
    ]


def optimizer_steps(plan, step):
    folder = Folder(plan.first.run_folder / "checkpoints" / folder_name(step))
    return read_state(folder)["optimizer_steps"]


def test_moments_go_on_for_parts_that_were_trained_whole(tiny_run):
    """The contrastive head is new, so all heads start afresh; AdamW corrects its bias by part."""
    run = replace(tiny_run, engine="fsdp2", train=replace(tiny_run.train, steps=1))
    plan = plan_of(
        replace(run, objectives={"mim": 1.0}),
        replace(run, objectives=PRETRAINING),
        replace(run, objectives={"contrastive": 1.0}, train=replace(run.train, frozen=("heads",))),
    )
    trained(plan, 1)
    assert [optimizer_steps(plan, step) for step in (1, 2, 3)] == [
        {"encoder": 1, "heads": 1},
        {"encoder": 2, "text_tower": 1, "heads": 1},
        {"encoder": 3, "text_tower": 2},
    ]
