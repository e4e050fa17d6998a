from pathlib import Path

import pytest
import yaml

from megavlm.config.load import load_plan, run_as_tree
from megavlm.config.presets import PRESETS
from megavlm.config.run import on_ranks, samples_per_micro_batch
from megavlm.errors import ConfigError
from tests.runs import RUN, load_run

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_run_file_loads(path):
    assert load_plan(path).steps > 0


def test_overrides_reach_every_level():
    overrides = ["train.steps=7", "model.decoder.self_layers=6", "optimizer.learning_rate=3e-5"]
    run = load_run(RUN, overrides)
    assert run.train.steps == 7
    assert run.model.decoder.self_layers == 6
    assert run.model.encoder == PRESETS["vlm-demo"].encoder
    assert run.optimizer.learning_rate == 3e-5


def test_a_model_may_be_a_preset_by_its_name_alone():
    assert load_run(RUN, ["model=vlm-1b"]).model == PRESETS["vlm-1b"]


def test_a_preset_may_have_its_cross_attention_elsewhere():
    changes = "model={preset: vlm-demo, decoder: {cross_every: null, cross_at: [0, 3, 4]}}"
    decoder = load_run(RUN, [changes]).model.decoder
    assert decoder.cross_layers == (0, 3, 4)
    assert decoder.layers == 7


def test_settings_survive_a_round_trip_through_plain_data(tmp_path):
    run = load_run(RUN)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_as_tree(run)))
    assert load_run(path) == run


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.stepz=5", "train.stepz is not a known setting; did you mean steps?"),
        ("model.decoder.widht=8", "model.decoder.widht is not a known setting; did you mean width"),
        ("nonsense=1", "nonsense is not a known setting; known: run_folder,"),
        (
            "data.train={folder: x, part: 3}",
            "data.train.0.part is not a known setting; did you",
        ),
        (
            "data.heldout_questions={folder: x, part: 3}",
            "part is not a known setting; did you mea",
        ),
        (
            "model.text_tower={wdth: 3}",
            "text_tower.wdth is not a known setting; did you mean wi",
        ),
        (
            "train.steps=many",
            "override 'train.steps=many': train.steps='many' must be a whole",
        ),
        ("train.steps", "override 'train.steps': it must have the form section.name=value"),
        ("train.steps.x=1", "steps is a value, not a section"),
        ("train.precision=fp8", "train.precision='fp8' must be 'bf16' or 'fp32'"),
        ("model.preset=vlm-9000b", "model.preset='vlm-9000b' is unknown; choose from"),
        ("train.micro_batches=3", "not divisible by train.micro_batches=3; try [1, 2, 4"),
        ("train.steps=0", "train.steps=0 must be at least 1"),
        ("optimizer.warmup_fraction=1", "must be at least 0 and below 1"),
        ("optimizer.minimum_learning_rate=1", "must lie between 0 and optimizer.learning_rate"),
        ("data.augment.magnitude=31", "must lie in 0 to 30"),
        ("data.row_tokens=0", "data.row_tokens=0 must be at least 1"),
        ("seed=-1", "seed=-1 must not be negative"),
        ("optimizer.beta1=2", "optimizer.beta1=2.0 must be at least 0 and below 1"),
        ("optimizer.epsilon=-1", "optimizer.epsilon=-1.0 must not be negative"),
        ("zero3.reduce_bucket=-1", "zero3.reduce_bucket=-1 must be at least 1"),
        (
            "model.encoder.activation=relu",
            "activation='relu' must be 'gelu', 'quick_gelu' or",
        ),
        ("model.decoder.cross_at=[1]", "cross_every=2 and decoder.cross_at=(1,): give one of them"),
        ("model.decoder.initial_gate=.nan", "decoder.initial_gate=nan must be finite"),
        ("model.preset=[a]", "model.preset=['a'] is unknown"),
        (
            "data.caption_prompts=[x]",
            "data.caption_prompts is not a known setting; caption_prompts belongs to "
            "data.train (each entry), data.heldout or data.heldout_questions",
        ),
        ("model.decoder.layers=3", "did you mean self_layers? layers belongs to model.encoder or"),
        (
            "data.augment=3",
            "(operations, magnitude, colour_operations, minimum_area); write `aug",
        ),
        ("data.heldout=true", "caption_prompts); write `heldout: {folder: ...}`"),
        (
            "data.train=[3]",
            "data.train.0=3 must be a section of settings (folder, parts, t",
        ),
        ("data.skip_samples=[[1]]", "data.skip_samples.0.1 is missing; it must be a whole number"),
        ("data.skip_samples=[[1, 2, 3]]", "must be a list of 2: a whole number, a whole number"),
        (
            "objectives.talk=1",
            "objectives.talk is not a known name; it must be 'mim', 'contr",
        ),
        ("train.frozen=encoder", "'text_tower' or 'heads'; write `frozen: [encoder]`"),
        ("data.tokenizer=3", "data.tokenizer=3 must be a path; put it in quotes, as in '3'"),
    ],
)
def test_a_mistake_is_told_in_one_line(override, says):
    with pytest.raises(ConfigError) as caught:
        load_run(RUN, [override])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mistake_is_blamed_on_the_file_or_on_the_overrides_that_make_it(tmp_path):
    harmless, wrong = "train.log_every=3", "train.micro_batches=3"

    def told(path, *overrides):
        with pytest.raises(ConfigError) as caught:
            load_run(path, overrides)
        return str(caught.value)

    assert told(RUN, harmless, wrong).startswith(
        f"override '{wrong}': train.samples_per_step=32 is"
    )
    assert told(RUN, wrong, wrong).startswith(f"override '{wrong}': ")
    both = ["optimizer.learning_rate=1e-5", "optimizer.minimum_learning_rate=1e-4"]
    assert told(RUN, harmless, *both).startswith(f"overrides '{both[0]}' and '{both[1]}': ")
    path = tmp_path / "run.yaml"
    path.write_text(RUN.read_text().replace("micro_batches:", "micro_batches: 3 #"))
    assert told(path, harmless).startswith(f"{path}: train.samples_per_step=32 is not divisible")


@pytest.mark.parametrize("content", ["- a list", "a: [", "", "a: \x1b", "a: b: c", "a: \u00e4"])
def test_broken_files(tmp_path, content):
    path = tmp_path / "run.yaml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value) and "unicode string" not in str(caught.value)


def test_missing_file_and_missing_setting(tmp_path):
    with pytest.raises(ConfigError, match="cannot read run file"):
        load_run(tmp_path / "none.yaml")
    path = tmp_path / "run.yaml"
    path.write_text("run_folder: x")
    with pytest.raises(ConfigError, match="model is missing"):
        load_run(path)


def test_the_batch_must_divide_over_the_ranks():
    train = load_run(RUN, ["train.samples_per_step=64", "train.micro_batches=2"]).train
    assert samples_per_micro_batch(train, 2) * 2 * train.micro_batches == train.samples_per_step
    with pytest.raises(ConfigError, match=r"x data_parallel=3 = 6; try 60 or 66"):
        samples_per_micro_batch(train, 3)


def test_the_same_batch_on_any_number_of_ranks():
    batch = ["train.samples_per_step=2048", "train.micro_batches=8", "train.micro_batch_samples=2"]
    run = load_run(RUN, ["engine=fsdp2", *batch])
    shapes: dict[int, tuple[int, int]] = {}
    for ranks in (128, 120, 64, 100, 1):
        adapted = on_ranks(run, ranks)
        assert adapted.train.samples_per_step == 2048
        shapes[ranks] = adapted.train.micro_batches, samples_per_micro_batch(adapted.train, ranks)
    assert shapes == {128: (8, 2), 120: (9, 2), 64: (16, 2), 100: (11, 2), 1: (1024, 2)}
    with pytest.raises(ConfigError, match=r"too few for train.micro_batches=8 x data_parallel=512"):
        samples_per_micro_batch(on_ranks(run, 512).train, 512)
    run = load_run(RUN, ["engine=fsdp2", *batch[:1], "train.micro_batch_samples=1"])
    one_by_one = on_ranks(run, 120).train
    assert (one_by_one.micro_batches, samples_per_micro_batch(one_by_one, 120)) == (18, 1)
    interleaved = [
        "megatron={pipeline_parallel: 4, virtual_pipeline: 2}",
        "model.decoder.self_layers=8",
    ]
    pipelined = load_run(RUN, ["engine=megatron", *interleaved, *batch])
    assert on_ranks(pipelined, 60).train.micro_batches == 72, "69 are needed, in groups of 4"
    plain = load_run(RUN)
    assert on_ranks(plain, 3) == plain
