import json
from contextlib import nullcontext
from dataclasses import replace

import pytest

from megavlm.checkpoint.state import (
    changes,
    check_checkpoint,
    check_data_position,
    check_model,
    check_moments,
    check_weights,
    checkpoint_root,
    checkpoint_state,
)
from megavlm.checkpoint.storage import folder_name, read_state, write_state
from megavlm.data.sources import training_sources
from megavlm.data.tokenizer import Tokenizer
from megavlm.errors import CheckpointError, TokenizerError
from megavlm.files.folder import Folder
from megavlm.model.params import parameters_of
from tests.batches import OTHER_FORM
from tests.runs import plan_of


def written(run, step=4, without=(), plan=None, **changed):
    """A checkpoint of a run, without its files."""
    plan = plan or plan_of(run)
    folder = checkpoint_root(run) / folder_name(step)
    folder.create()
    tokenizer = Tokenizer(run.data.tokenizer)
    training = training_sources(run)
    state = checkpoint_state(plan.at(step), tokenizer, step, training, {"encoder": step})
    tensors = {
        f"{kind}/{p.name}": {"dtype": "F32", "shape": list(p.shape)}
        for kind in ("weights", "exp_avg", "exp_avg_sq")
        for p in parameters_of(plan.at(step).run)
    }
    state = {"step": step, **state, "files": {}, "tensors": tensors, **changed}
    write_state(folder, {name: value for name, value in state.items() if name not in without})
    return folder


def test_sizes_that_json_writes_otherwise_fit_the_checkpoint(tiny_run):
    run = replace(tiny_run, model=OTHER_FORM)
    tokenizer = Tokenizer(run.data.tokenizer)
    checkpoint = written(run)
    check_checkpoint(checkpoint, plan_of(run), tokenizer)
    elsewhere = replace(OTHER_FORM, decoder=replace(OTHER_FORM.decoder, cross_at=(1, 3, 4)))
    told = r"decoder.cross_layers=\(0, 3, 4\), the run file says"
    with pytest.raises(CheckpointError, match=told):
        check_checkpoint(checkpoint, plan_of(replace(run, model=elsewhere)), tokenizer)


def test_a_checkpoint_from_before_a_setting_has_its_default(tiny_run):
    tokenizer = Tokenizer(tiny_run.data.tokenizer)
    checkpoint = written(tiny_run)
    settings = json.loads(checkpoint.read("state.json"))["settings"]
    del settings["model"]["encoder"]["attention_bias"]
    del settings["model"]["text_tower"]
    check_checkpoint(written(tiny_run, settings=settings), plan_of(tiny_run), tokenizer)


def test_what_is_no_checkpoint_of_the_run_is_told(tiny_run, tmp_path):
    tokenizer = Tokenizer(tiny_run.data.tokenizer)
    plan = plan_of(tiny_run)
    with pytest.raises(CheckpointError, match="holds a model, not the state of a run"):
        check_checkpoint(written(tiny_run, without=("samples_seen",)), plan, tokenizer)
    with pytest.raises(CheckpointError, match="is of step 5; name its folder step-00000005"):
        check_checkpoint(_misnamed(tiny_run), plan, tokenizer)
    with pytest.raises(TokenizerError, match="another tokenizer"):
        check_checkpoint(written(tiny_run, tokenizer_sha256="0" * 64), plan, tokenizer)
    with pytest.raises(TokenizerError, match="another tokenizer"):
        check_weights(written(tiny_run, tokenizer_sha256="0" * 64), tiny_run.model, tokenizer)
    with pytest.raises(CheckpointError, match="is no checkpoint of ours"):
        check_weights(Folder(tmp_path / "nothing"), tiny_run.model, tokenizer)
    check_weights(written(tiny_run, tokenizer_sha256=None), tiny_run.model, tokenizer)


def _misnamed(run):
    written(run, step=5)
    root = run.run_folder / "checkpoints"
    (root / folder_name(5)).rename(root / folder_name(7))
    return checkpoint_root(run) / folder_name(7)


def two_stages(run, first=6):
    pretraining = replace(
        run, objectives={"contrastive": 1.0}, train=replace(run.train, steps=first)
    )
    return plan_of(pretraining, run)


def test_a_checkpoint_belongs_to_a_stage_of_the_plan(tiny_run):
    tokenizer, plan = Tokenizer(tiny_run.data.tokenizer), two_stages(tiny_run)
    for step, stage in ((4, "contrastive"), (6, "contrastive"), (7, "captioning")):
        checkpoint = written(tiny_run, step, plan=plan)
        assert check_checkpoint(checkpoint, plan, tokenizer).name == stage
    told = r"in stage captioning when it began at step 6, now it would at 5; restore the lengths"
    with pytest.raises(CheckpointError, match=told):
        check_checkpoint(checkpoint, two_stages(tiny_run, first=5), tokenizer)
    # Who only uses the model need not know how long the stages were.
    assert check_model(checkpoint, two_stages(tiny_run, first=5), tokenizer).name == "captioning"
    checkpoint = written(tiny_run, 4, plan=plan)
    told = "stage contrastive, which the run file has not; its stages are captioning"
    with pytest.raises(CheckpointError, match=told):
        check_checkpoint(checkpoint, plan_of(tiny_run), tokenizer)
    told = "is past the end of stage contrastive at step 3"
    with pytest.raises(CheckpointError, match=told):
        check_checkpoint(checkpoint, two_stages(tiny_run, first=3), tokenizer)


def test_weights_of_pre_training_fit_a_new_run(tiny_run):
    tokenizer = Tokenizer(tiny_run.data.tokenizer)
    checkpoint = written(tiny_run, 4, plan=two_stages(tiny_run))
    check_weights(checkpoint, tiny_run.model, tokenizer)


def test_other_samples_are_refused(tiny_run):
    checkpoint = written(tiny_run)
    training = training_sources(replace(tiny_run, seed=1))
    check_data_position(checkpoint, tiny_run, training)
    [folder] = training.folders
    folder.shard_samples[0] -= 1
    with pytest.raises(CheckpointError, match="trained with shards of SHA-256="):
        check_data_position(checkpoint, tiny_run, training)
    again = training_sources(replace(tiny_run, seed=1))
    with pytest.raises(CheckpointError, match="trained with seed=1, now 2"):
        check_data_position(checkpoint, replace(tiny_run, seed=2), again)


@pytest.mark.parametrize(
    ("then", "now", "fits"),
    [
        ([], [[40, 50]], True),  # 2 steps of 8: the checkpoint lies before it
        ([[3, 5]], [[3, 5], [18, 30]], True),
        ([], [[15, 20]], False),
        ([[3, 5]], [], False),
        ([[3, 5]], [[3, 6]], False),
        ([[3, 5]], [[3, 5], [17, 30]], False),
    ],
)
def test_what_was_passed_over_must_stay_so(tiny_run, then, now, fits):
    def skipping(ranges):
        return replace(tiny_run, data=replace(tiny_run.data, skip_samples=ranges))

    checkpoint, after = written(skipping(then), step=2), skipping(now)
    assert read_state(checkpoint)["samples_seen"] == 16
    with (
        nullcontext()
        if fits
        else pytest.raises(CheckpointError, match=r"data\.skip_samples up to its place=")
    ):
        check_data_position(checkpoint, after, training_sources(after))


def test_what_has_changed_is_told(tiny_run):
    checkpoint = written(tiny_run)
    assert changes(checkpoint, tiny_run) == []
    train = replace(tiny_run.train, steps=9, frozen=("encoder",))
    data = replace(tiny_run.data, row_tokens=30)
    other = replace(tiny_run, train=train, data=data, engine="fsdp2")
    lines = changes(checkpoint, other)
    assert lines[:3] == [
        "data.row_tokens has changed: 24 -> 30",
        "train.steps has changed: 6 -> 9",
        "train.frozen has changed: [] -> ['encoder']",
    ]
    assert lines[3].startswith("moments of ") and len(lines) == 4
    check_moments(checkpoint, other)


def test_what_was_frozen_cannot_go_on(tiny_run):
    frozen = replace(tiny_run, train=replace(tiny_run.train, frozen=("encoder",)))
    checkpoint = written(frozen)
    state = json.loads(checkpoint.read("state.json"))
    tensors = {n: t for n, t in state["tensors"].items() if "exp_avg/encoder" not in n}
    checkpoint = written(frozen, tensors=tensors)
    check_moments(checkpoint, frozen)
    told = r"was trained with train.frozen=\['encoder'\], now \[\]: it has no moments of encoder"
    with pytest.raises(CheckpointError, match=told):
        check_moments(checkpoint, tiny_run)
