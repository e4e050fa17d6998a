from dataclasses import replace

import pytest

from megavlm.config.deepspeed_json import deepspeed_config
from megavlm.config.run import data_parallel_ranks
from megavlm.errors import ConfigError
from megavlm.planner.zero3 import with_bucket_sizes
from megavlm.train.loop import train
from tests.runs import RUN, load_run, plan_of


def zero3_json(*overrides):
    return deepspeed_config(with_bucket_sizes(load_run(RUN, overrides)))


@pytest.mark.parametrize(
    ("overrides", "value", "remedy"),
    [
        (["reduce_bucket=0"], "zero3.reduce_bucket=0", "must be at least 1"),
        (["prefetch_bucket=-1"], "zero3.prefetch_bucket=-1", "must not be negative"),
        (["secondary_partition=0"], "zero3.secondary_partition=0", "must be at least 1"),
        (["offload_optimizer=nvme"], "zero3.offload_optimizer=nvme", "set zero3.nvme_folder"),
        (
            ["offload_optimizer=cpu", "nvme_folder=/disk"],
            "zero3.nvme_folder=/disk",
            "set zero3.offload_optimizer=nvme",
        ),
        (["offload_parameters=nvme"], "zero3.offload_parameters='nvme'", "'none' or 'cpu'"),
    ],
)
def test_settings_that_cannot_be(overrides, value, remedy):
    with pytest.raises(ConfigError) as caught:
        load_run(RUN, [f"zero3.{override}" for override in overrides])
    assert value in str(caught.value)
    assert remedy in str(caught.value)


def test_the_secondary_partition_divides_the_ranks():
    run = load_run(RUN, ["zero3.secondary_partition=8"])
    assert data_parallel_ranks(run, 128) == 128
    with pytest.raises(ConfigError, match=r"secondary_partition=8 does not divide the 12 ranks"):
        data_parallel_ranks(run, 12)
    with pytest.raises(ConfigError, match=r"does not divide the 4 ranks; try \[1, 2, 4\]"):
        data_parallel_ranks(run, 4)
    assert data_parallel_ranks(replace(run, engine="fsdp2"), 12) == 12


@pytest.mark.parametrize("name", ["quantized_weights", "quantized_gradients"])
def test_quantised_messages_need_gpus(tiny_run, name):
    run = replace(tiny_run, zero3=replace(tiny_run.zero3, **{name: True}))
    with pytest.raises(ConfigError, match=f"zero3.{name}=true needs GPUs .* set it to false"):
        train(plan_of(run))  # before any process group starts
    run.zero3.check_device(has_gpu=True)


def test_settings_reach_deepspeed():
    config = zero3_json(
        "zero3.secondary_partition=4",
        "zero3.quantized_weights=true",
        "zero3.quantized_gradients=true",
        "zero3.offload_optimizer=nvme",
        "zero3.offload_parameters=cpu",
        "zero3.nvme_folder=/disk",
        "zero3.prefetch_bucket=7",
    )
    zero = config["zero_optimization"]
    assert zero["zero_hpz_partition_size"] == 4
    assert zero["zero_quantized_weights"]
    assert zero["zero_quantized_gradients"]
    assert zero["offload_optimizer"] == {"device": "nvme", "nvme_path": "/disk"}
    assert zero["offload_param"] == {"device": "cpu"}
    assert zero["stage3_prefetch_bucket_size"] == 7
    assert config["communication_data_type"] == "fp16"
    assert "communication_data_type" not in zero3_json()


@pytest.mark.parametrize("overrides", [[], ["zero3.quantized_gradients=true"]], ids=str)
def test_deepspeed_knows_every_key(overrides):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = zero3_json(*overrides)["zero_optimization"]
    known = DeepSpeedZeroConfig.model_fields
    names = known.keys() | {field.alias for field in known.values()}
    assert zero.keys() <= names
    assert DeepSpeedZeroConfig(**zero).stage == 3


def test_sizes_must_be_chosen_first():
    with pytest.raises(AssertionError, match="must be chosen first"):
        deepspeed_config(load_run(RUN))
