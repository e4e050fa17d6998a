from dataclasses import replace

import pytest

from megavlm.config.engines import Fsdp2Settings, MegatronSettings
from megavlm.config.presets import PRESETS
from megavlm.config.run import RunSettings, data_parallel_ranks
from megavlm.config.sizes import ModelSizes
from megavlm.errors import ConfigError
from tests.runs import RUN, load_run

TINY = PRESETS["vlm-tiny"]  # 6 decoder layers, 4 heads, 2 key/value heads, 24 encoder tokens


@pytest.mark.parametrize(
    ("override", "value", "rule", "remedy"),
    [
        ("tensor_parallel=0", "megatron.tensor_parallel=0", "must be at least 1", ""),
        ("pipeline_parallel=-1", "megatron.pipeline_parallel=-1", "must be at least 1", ""),
        ("virtual_pipeline=0", "megatron.virtual_pipeline=0", "must be at least 1", ""),
        (
            "context_parallel=2",
            "megatron.context_parallel=2",
            "is not supported",
            "set it to 1 and use megatron.sequence_parallel",
        ),
        (
            "sequence_parallel=true",
            "megatron.sequence_parallel",
            "splits tokens over the tensor-parallel ranks",
            "set megatron.tensor_parallel above 1 or switch it off",
        ),
        (
            "virtual_pipeline=2",
            "megatron.virtual_pipeline=2",
            "interleaves chunks over pipeline ranks",
            "set megatron.pipeline_parallel above 1 or virtual_pipeline to 1",
        ),
        (
            "chunk_layers=[3,3]",
            "megatron.chunk_layers has 2 numbers",
            "pipeline_parallel x virtual_pipeline = 1 are needed",
            "",
        ),
        (
            "expert_parallel=2",
            "megatron.expert_parallel",
            "is not a known setting",
            "did you mean context_parallel?",
        ),
    ],
)
def test_megatron_settings_that_contradict_themselves(override, value, rule, remedy):
    # They are read, and refused, whatever the engine.
    with pytest.raises(ConfigError) as caught:
        load_run(RUN, [f"megatron.{override}"])
    for part in (value, rule, remedy):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"tensor_parallel": 8},
            "megatron.tensor_parallel=8 does not divide model.encoder.heads=2",
        ),
        ({"tensor_parallel": 3}, "does not divide model.encoder.heads=2; try [1, 2]"),
    ],
)
def test_a_tensor_size_that_does_not_divide_the_tiny_model(settings, says):
    with pytest.raises(ConfigError) as caught:
        MegatronSettings(**settings).check_model(TINY, row_tokens=16)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("encoder", {"heads": 2}, "model.encoder.heads=2; try [1, 2]"),
        ("encoder", {"mlp_width": 66}, "model.encoder.mlp_width=66; try [1, 2, 3, 6"),
        ("decoder", {"heads": 6, "kv_heads": 2}, "model.decoder.heads=6; try [1, 2, 3, 6]"),
        ("decoder", {"kv_heads": 2}, "model.decoder.kv_heads=2; try [1, 2]"),
        ("decoder", {"mlp_width": 98}, "model.decoder.mlp_width=98; try [1, 2, 7"),
        ("decoder", {"vocabulary": 514}, "model.decoder.vocabulary=514; try [1, 2, 257, 514]"),
    ],
)
def test_the_tensor_size_divides_whatever_is_split(part, change, says):
    fits = replace(
        TINY,
        encoder=replace(TINY.encoder, heads=4),
        decoder=replace(TINY.decoder, heads=4, kv_heads=4),
    )
    parallel = MegatronSettings(tensor_parallel=4)
    parallel.check_model(fits, row_tokens=18)  # without sequence parallelism, any row length
    with pytest.raises(ConfigError) as caught:
        parallel.check_model(replace(fits, **{part: replace(getattr(fits, part), **change)}), 16)
    assert str(caught.value).startswith(f"megatron.tensor_parallel=4 does not divide {says}")


def test_sequence_parallelism_splits_the_tokens():
    parallel = MegatronSettings(tensor_parallel=2, sequence_parallel=True)
    parallel.check_model(TINY, row_tokens=16)
    with pytest.raises(ConfigError, match=r"=2 does not divide data.row_tokens=15; try \[1, 3"):
        parallel.check_model(TINY, row_tokens=15)
    # Inside the encoder, an image's tokens are a multiple of 8, registers included.
    parallel = MegatronSettings(tensor_parallel=3, sequence_parallel=True)
    encoder = replace(TINY.encoder, width=48, heads=3, mlp_width=96)  # 24 tokens
    decoder = replace(TINY.decoder, width=54, heads=27, kv_heads=9, vocabulary=513)
    sizes = ModelSizes(encoder=encoder, decoder=decoder)
    parallel.check_model(sizes, row_tokens=18)
    encoder = replace(encoder, image_pixels=40)  # 32 tokens
    with pytest.raises(ConfigError, match=r"=3 does not divide tokens of an image in the encoder"):
        parallel.check_model(replace(sizes, encoder=encoder), row_tokens=18)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"pipeline_parallel": 7},
            "pipeline_parallel x virtual_pipeline = 7 chunks exceed the 6 decoder layers",
        ),
        ({"pipeline_parallel": 2, "virtual_pipeline": 4}, "= 8 chunks exceed the 6 decoder layers"),
        (
            {"pipeline_parallel": 2, "chunk_layers": (3, 4)},
            "megatron.chunk_layers=[3, 4] must add up to the 6 decoder layers, not 7",
        ),
        (
            {"pipeline_parallel": 2, "chunk_layers": (0, 6)},
            "megatron.chunk_layers=[0, 6]: every chunk needs at least 1",
        ),
    ],
)
def test_every_chunk_has_its_layers(settings, says):
    with pytest.raises(ConfigError) as caught:
        MegatronSettings(**settings).check_model(TINY, row_tokens=16)
    assert says in str(caught.value)


def demo(*overrides: str) -> RunSettings:
    """A run of 64 samples in 2 micro-batches; 6 decoder layers."""
    batch = ["train.samples_per_step=64", "train.micro_batches=2"]
    return load_run(RUN, ["engine=megatron", *batch, *overrides])


def test_a_run_checks_its_model_and_its_micro_batches():
    with pytest.raises(ConfigError, match=r"megatron.tensor_parallel=4 does not divide model"):
        demo("megatron.tensor_parallel=4")
    interleaved = ["megatron.pipeline_parallel=2", "megatron.virtual_pipeline=2"]
    assert demo(*interleaved).model_parallel.chunks == 4
    with pytest.raises(ConfigError) as caught:
        demo(*interleaved, "train.micro_batches=1")
    assert str(caught.value).endswith(
        "train.micro_batches=1 is not divisible by megatron.pipeline_parallel=2, which the "
        "interleaved schedule needs; change it or set megatron.virtual_pipeline=1"
    )
    # The plain schedule takes any number.
    demo("megatron.pipeline_parallel=2", "train.micro_batches=1")


def test_other_engines_ignore_how_megatron_would_divide_the_model():
    run = demo("engine=zero3", "megatron.pipeline_parallel=5")
    assert run.model_parallel == MegatronSettings()
    assert data_parallel_ranks(run, 6) == 6


def test_ranks_are_a_multiple_of_those_of_one_model():
    run = demo("megatron.tensor_parallel=2", "megatron.pipeline_parallel=3")
    assert data_parallel_ranks(run, 12) == 2
    with pytest.raises(ConfigError) as caught:
        data_parallel_ranks(run, 8)
    assert str(caught.value) == (
        "8 ranks are not divisible by megatron.tensor_parallel=2 x pipeline_parallel=3 = 6; use a "
        "multiple of 6 ranks"
    )


def test_hybrid_shards_divide_the_ranks():
    run = demo("engine=fsdp2", "fsdp2.shard_ranks=4")
    assert data_parallel_ranks(run, 8) == 8
    with pytest.raises(ConfigError) as caught:
        data_parallel_ranks(run, 6)
    assert str(caught.value) == (
        "fsdp2.shard_ranks=4 does not divide the 6 ranks; try [1, 2, 3, 6]"
    )
    assert data_parallel_ranks(demo("fsdp2.shard_ranks=4"), 6) == 6  # another engine


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"shard_ranks": 0}, "fsdp2.shard_ranks=0 must be at least 1"),
        ({"prefetch_layers": -1}, "fsdp2.prefetch_layers=-1 must not be negative"),
    ],
)
def test_fsdp2_settings(settings, says):
    with pytest.raises(ConfigError, match=says):
        Fsdp2Settings(**settings)


def test_sizes_that_follow_from_the_settings():
    parallel = MegatronSettings(
        tensor_parallel=4, sequence_parallel=True, pipeline_parallel=2, virtual_pipeline=3
    )
    assert (parallel.chunks, parallel.model_ranks, parallel.token_shards) == (6, 8, 4)
    assert replace(parallel, sequence_parallel=False).token_shards == 1
