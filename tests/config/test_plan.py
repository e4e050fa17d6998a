"""Run files of several stages."""

import pytest
import yaml

from megavlm.config.load import load_plan
from megavlm.dist.launch import ranks_of
from megavlm.errors import ConfigError, LaunchError
from tests.runs import RUN

STAGES = {
    "pretraining": {
        "objectives": {"mim": 0.5, "contrastive": 1},
        "train": {"steps": 10, "samples_per_step": 64, "micro_batches": 8},
        "optimizer": {"scales": {"encoder": 0.5}},
    },
    "captioning": {"train": {"steps": 20, "frozen": ["encoder", "decoder"]}},
    "instruction": {"objectives": {"instruction": 1}, "train": {"steps": 30}},
}


def write(folder, stages=None, **common):
    tree = yaml.safe_load(RUN.read_text()) | common
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(tree | {"stages": stages or STAGES}, sort_keys=False))
    return path


def changed(name, **settings):
    return STAGES | {name: STAGES[name] | settings}


def test_a_stage_differs_in_what_it_says_and_shares_the_rest(tmp_path):
    plan = load_plan(write(tmp_path), ["train.log_every=3", "stages.instruction.train.steps=40"])
    assert [s.name for s in plan.stages] == ["pretraining", "captioning", "instruction"]
    assert [(s.first_step, s.end_step) for s in plan.stages] == [(0, 10), (10, 30), (30, 70)]
    first, second, third = (stage.run for stage in plan.stages)
    assert first.objectives == {"contrastive": 1.0, "mim": 0.5}
    assert second.objectives == {"captioning": 1.0}
    assert third.objectives == {"instruction": 1.0}
    assert (first.train.samples_per_step, second.train.samples_per_step) == (64, 32)
    assert first.trained_parts == ("encoder", "text_tower", "heads")
    assert second.trained_parts == ("projector", "cross_attention")
    assert {run.train.log_every for run in (first, second, third)} == {3}
    assert first.run_folder == second.run_folder == third.run_folder
    assert plan.steps == 70
    assert plan.at(0) == plan.at(10) == plan.stages[0] and plan.at(11) == plan.stages[1]


def test_a_file_without_stages_has_one():
    plan = load_plan(RUN)
    assert [stage.name for stage in plan.stages] == ["training"]


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ({"Mixed Case": {}}, "must be a name of lower-case letters"),
        ({"captioning": 3}, "stages.captioning must hold a mapping of settings"),
        ([3], "stages must map names of stages"),
        ({1: {}}, "stages: 1 must be a name of lower-case letters"),
        (changed("captioning", seed=2), "stages.captioning.seed: all stages of a run share seed"),
        (changed("captioning", engine="fsdp2"), "all stages of a run share engine"),
        (
            changed("captioning", data={"tokenizer": "other.model"}),
            "stages.captioning.data.tokenizer: all stages of a run share data.tokenizer",
        ),
        (changed("captioning", trian={}), "stages.captioning: trian is not a known setting"),
        (changed("captioning", objectives={}), "stages.captioning: objectives is empty"),
        (
            changed("captioning", objectives={"captioning": 1, "mim": 1}),
            "stages.captioning: objectives captioning, mim cannot share a step",
        ),
        (changed("captioning", objectives={"captioning": 0}), "must be a weight above 0"),
        (
            changed("pretraining", train={"frozen": ["decoder"]}),
            "train.frozen names decoder, which a stage of mim, contrastive has not (its parts are",
        ),
        (
            changed("captioning", optimizer={"scales": {"heads": 2}}),
            "optimizer.scales names heads, which a stage of captioning has not",
        ),
        (
            changed(
                "captioning",
                train={"frozen": ["encoder", "projector", "decoder", "cross_attention"]},
            ),
            "leaves nothing to train",
        ),
        (
            changed("captioning", optimizer={"scales": {"encoder": 0}}),
            "must lie above 0; name what",
        ),
        (changed("captioning", optimizer={"encoder_layer_decay": 1.5}), "at most 1"),
        (changed("pretraining", mim={"masked_fraction": 1}), "must lie between 0 and 1"),
        (changed("pretraining", mim={"block_patches": 0}), "must be at least 1"),
        (changed("pretraining", mim={"block_patches": 99}), "hides all or nothing of a picture"),
        (changed("captioning", train={"z_loss": -1}), "train.z_loss=-1.0 must not be negative"),
        (changed("captioning", train={"ema_decay": 1}), "must be at least 0 and below 1"),
        (
            changed("captioning", train={"samples_per_step": 30, "micro_batches": 4}),
            "stages.captioning: train.samples_per_step=30 is not divisible by "
            "train.micro_batches=4; try [1, 2, 3,",
        ),
    ],
)
def test_a_mistake_is_told_in_one_line_with_its_stage(tmp_path, stages, says):
    with pytest.raises(ConfigError) as caught:
        load_plan(write(tmp_path, stages))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_contrastive_learning_needs_a_text_tower(tmp_path):
    with pytest.raises(ConfigError, match=r"give the sizes of model\.text_tower"):
        load_plan(write(tmp_path), ["model.text_tower=null"])


def test_an_override_that_no_stage_would_follow_is_refused(tmp_path):
    path = write(tmp_path)
    says = r"would change nothing: .* say stages.pretraining.train.steps=5, for one of pretraining,"
    for override in ("train.steps=5", "train={steps: 5}"):
        with pytest.raises(ConfigError, match=says if "=5" in override else "would change nothing"):
            load_plan(path, [override])
    scaled = load_plan(path, ["optimizer.scales={encoder: 0.7}"]).last
    assert scaled.optimizer.scales == {"encoder": 0.7}


def test_a_stage_replaces_objectives_whole(tmp_path):
    stages = changed("captioning", objectives={"captioning": 1})
    with pytest.raises(ConfigError, match="would change nothing: every stage sets objectives"):
        load_plan(write(tmp_path, stages), ["objectives.captioning=3"])
    plan = load_plan(write(tmp_path), ["objectives.captioning=3"])
    assert [s.run.objectives.get("captioning") for s in plan.stages] == [None, 3.0, None]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("stages.captoining.train.steps=5", "no stage captoining; its stages are pretraining, cap"),
        ("stages.captioning.train.stpes=5", "did you mean steps"),
    ],
)
def test_an_override_of_a_stage_that_is_not_there(tmp_path, override, says):
    with pytest.raises(ConfigError, match=says):
        load_plan(write(tmp_path), [override])
    if "captoining" in override:
        with pytest.raises(ConfigError, match="the run file lists no stages; leave out"):
            load_plan(RUN, [override])


def test_a_stage_that_stands_there_twice(tmp_path):
    path = write(tmp_path)
    path.write_text(path.read_text() + "  captioning:\n    train: {steps: 3}\n")
    with pytest.raises(ConfigError, match="captioning stands there twice"):
        load_plan(path)


def test_batches_that_do_not_divide_over_the_ranks_are_refused_with_the_remedy(tmp_path):
    path, hostfile = write(tmp_path), tmp_path / "hostfile"
    hostfile.write_text("a slots=8\n")
    assert ranks_of(load_plan(path), hostfile) == 8
    hostfile.write_text("a slots=3\n")
    with pytest.raises(ConfigError) as caught:
        ranks_of(load_plan(path), hostfile)
    assert str(caught.value) == (
        "stages.pretraining: train.samples_per_step=64 is not divisible by train.micro_batches=8 x "
        "data_parallel=3 = 24; try 48 or 72, or train.micro_batch_samples"
    )
    hostfile.write_text("a slots=2\nb slots=1\n")
    with pytest.raises(LaunchError, match=r"stages\.pretraining: host b has slots=1"):
        ranks_of(load_plan(path, ["zero3.secondary_partition=2"]), hostfile)


def test_a_pipeline_holds_copies_of_what_has_no_decoder(tmp_path):
    split = ["megatron.tensor_parallel=2", "megatron.pipeline_parallel=4"]
    plan = load_plan(write(tmp_path), ["engine=megatron", *split])
    ranks = [stage.run.model_parallel.model_ranks for stage in plan.stages]
    assert ranks == [2, 8, 8]
