import functools
import math
import re
import shutil
from argparse import Namespace

import deepspeed
import pytest
import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from torch import nn

from megavlm.convert.deepspeed import newest, universal_tensors, zero3_tensors
from megavlm.convert.torch_files import reserve
from megavlm.dist import cpu
from megavlm.engine import zero3
from megavlm.errors import CheckpointError
from megavlm.model.params import parameters
from tests.batches import TINY
from tests.convert.test_torch_files import OpensAFile
from tests.memory import peak_bytes
from tests.parity.runs import CPU, LAYOUTS, my_micro_batches, settings
from tests.ranks import run_on_ranks
from tests.states import whole_tensors

LAYOUT = {layout.name: layout for layout in LAYOUTS}
X2, X4, HPZ = "ZeRO-3 x2", "ZeRO-3 x4", "ZeRO-3 hpZ 2x2"
BF16, PERSISTENT = "train.precision=bf16", "zero3.persistence_threshold=1000"
FROZEN = {part: f"train.frozen=[{part}]" for part in ("encoder", "decoder")}
OFFLOAD = "zero3.offload_optimizer=cpu"
SMALL_SUB_GROUPS = 5_000
STEPS = 2
TAG, UNIVERSAL = "global_step2", "global_step2_universal"
# Layout, parameters of a sub-group (None: DeepSpeed's billion), settings.
CASES = [
    (X2, None, ()),
    (X2, SMALL_SUB_GROUPS, (PERSISTENT, FROZEN["decoder"])),
    (X2, None, (BF16, OFFLOAD, FROZEN["decoder"])),
    (X4, None, (BF16, PERSISTENT, FROZEN["encoder"])),
    (X4, SMALL_SUB_GROUPS, (FROZEN["encoder"],)),
    (HPZ, None, (BF16,)),
]
MODEL_0, MODEL_1 = (f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(2))
OPTIMIZER_0, OPTIMIZER_1 = (f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2))


def slow(case):
    return pytest.param(case, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Train and save once under DeepSpeed; the folder, and the tensors that the engine gives."""

    @functools.cache
    def save(layout, sub_group, overrides):
        folder = tmp_path_factory.mktemp("deepspeed")
        run = settings(LAYOUT[layout], 4, *overrides)

        def on_rank(_):
            if sub_group is not None:
                config = zero3.deepspeed_config

                def with_sub_groups(run):
                    tree = config(run)
                    tree["zero_optimization"]["sub_group_size"] = sub_group
                    return tree

                zero3.deepspeed_config = with_sub_groups
            engine = zero3.Zero3Engine(run, CPU)
            for step in range(STEPS):
                engine.step(my_micro_batches(step), 1e-3)
            engine._engine.save_checkpoint(str(folder))
            tensors = whole_tensors(engine)
            engine.close()
            return tensors

        return folder, run_on_ranks(LAYOUT[layout].ranks, on_rank)[0]

    return save


@pytest.fixture
def copy(saved, tmp_path):
    """A checkpoint of 2 ranks to spoil: its step's folder."""
    folder, _ = saved(*CASES[0])
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return tmp_path / "global_step2"


def to_universal(folder, tag):
    ds_to_universal.main(
        Namespace(
            input_folder=str(folder / tag),
            output_folder=str(folder / f"{tag}_universal"),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )


def change(path, edit):
    """Edit a file of torch.save."""
    content = torch.load(path, weights_only=False)
    edit(content)
    torch.save(content, path)


def assert_same(tensors, expected, dtype_of_frozen=torch.float32):
    assert tensors.keys() == expected.keys()
    for key, value in expected.items():
        kind, _, name = key.partition("/")
        trained = kind != "weights" or f"exp_avg/{name}" in expected
        assert tensors[key].dtype == (torch.float32 if trained else dtype_of_frozen), key
        read = tensors[key].read()
        assert read.dtype == tensors[key].dtype
        assert tuple(read.shape) == tensors[key].shape
        assert torch.equal(read.float(), value), key


@pytest.mark.parametrize("case", [slow(case) if case[0] == X4 else case for case in CASES], ids=str)
def test_tensors_are_those_of_the_engine(saved, case):
    _, sub_group, overrides = case
    folder, expected = saved(*case)
    assert newest(folder, "latest") == TAG
    tensors, steps = zero3_tensors(folder, TAG)
    assert steps == STEPS
    assert_same(tensors, expected, torch.bfloat16 if BF16 in overrides else torch.float32)
    assert {f"weights/{entry.name}" for entry in parameters(TINY)} <= tensors.keys()
    # The case is what it says.
    content = torch.load(next((folder / "global_step2").glob("*0_*optim*")), weights_only=False)
    groups = content["optimizer_state_dict"]["fp32_flat_groups"]
    parts = 4 - sum("frozen" in override for override in overrides)
    by_part_and_decay = 2 * parts
    assert (len(groups) > by_part_and_decay) == (sub_group is not None)


@pytest.mark.parametrize("case", [CASES[1], slow(CASES[3])], ids=str)
def test_universal_tensors_are_those_of_the_engine(saved, tmp_path, case):
    folder, expected = saved(*case)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    to_universal(tmp_path, "global_step2")
    assert newest(tmp_path, "latest_universal") == UNIVERSAL
    tensors, steps = universal_tensors(tmp_path, UNIVERSAL)
    assert steps == STEPS
    assert_same(tensors, expected, torch.bfloat16 if BF16 in case[2] else torch.float32)


@pytest.mark.parametrize("stage", [1, 2])
def test_universal_checkpoints_of_lower_stages(tmp_path, stage):
    def on_rank(_):
        cpu.use_gloo_for_deepspeed()
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
        model[0].weight.requires_grad_(False)
        trained = [p for p in model.parameters() if p.requires_grad]
        config = {"train_batch_size": 8, "zero_optimization": {"stage": stage}}
        engine = deepspeed.initialize(
            model=model, optimizer=torch.optim.AdamW(trained), config=config
        )[0]
        engine.backward(engine(torch.randn(4, 3)).square().mean())
        engine.step()
        engine.save_checkpoint(str(tmp_path))
        weights = {n: p.detach() for n, p in model.named_parameters()}
        engine.destroy()
        return weights

    weights = run_on_ranks(2, on_rank)[0]
    with pytest.raises(CheckpointError, match="stage below 3"):
        zero3_tensors(tmp_path, "global_step1")
    to_universal(tmp_path, "global_step1")
    tensors, steps = universal_tensors(tmp_path, "global_step1_universal")
    assert steps == 1
    moments = {
        f"{kind}/{n}" for n in weights if n != "0.weight" for kind in ("exp_avg", "exp_avg_sq")
    }
    assert tensors.keys() == {f"weights/{name}" for name in weights} | moments
    for name, value in weights.items():
        assert torch.equal(tensors[f"weights/{name}"].read(), value), name
    assert all(tensors[key].read().any() for key in moments)


def test_memory_is_that_of_one_tensor(tmp_path):
    # 8 matrices of 40 MiB and their moments on 2 ranks, in sparse files. The C library returns to
    # the system at once what is larger than 32 MiB.
    shapes = {str(i): torch.Size([1024, 10_240]) for i in range(8)}
    tensor_bytes = 4 * math.prod(shapes["0"])
    folder = tmp_path / "step"
    folder.mkdir()
    for model, optimizer in ((MODEL_0, OPTIMIZER_0), (MODEL_1, OPTIMIZER_1)):
        content = {"param_shapes": [shapes], "frozen_param_shapes": None, "global_steps": 1}
        torch.save(content, folder / model)
        flat = torch.empty(8 * math.prod(shapes["0"]) // 2, device="meta")
        states = {
            "zero_stage": 3,
            "partition_count": 2,
            "fp32_flat_groups": {0: flat},
            "optimizer_state_dict": {"state": {0: {"exp_avg": flat, "exp_avg_sq": flat}}},
        }
        reserve(folder / optimizer, {"optimizer_state_dict": states})

    def read_all():
        tensors, _ = zero3_tensors(tmp_path, "step")
        assert len(tensors) == 24
        for tensor in tensors.values():
            assert tensor.read().shape == (1024, 10_240)

    # Worst measured 1.29 tensors; the checkpoint has 24.
    assert peak_bytes(read_all) < 2 * tensor_bytes


@pytest.mark.parametrize("name", [MODEL_1, OPTIMIZER_0])
def test_code_is_never_run(copy, tmp_path, name):
    change(copy / name, lambda content: content.update(extra=OpensAFile(tmp_path / "run")))
    (tmp_path / "run").unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match=rf"{name} is not loaded .* it needs io\.open;"):
        zero3_tensors(tmp_path, TAG)
    assert not (tmp_path / "run").exists()


def test_code_in_a_universal_checkpoint_is_never_run(copy, tmp_path):
    to_universal(tmp_path, "global_step2")
    path = tmp_path / "global_step2_universal" / "zero" / "projector.bias" / "exp_avg.pt"
    torch.save(OpensAFile(tmp_path / "run"), path)
    with pytest.raises(CheckpointError, match=r"it needs io\.open;"):
        universal_tensors(tmp_path, UNIVERSAL)
    assert not (tmp_path / "run").exists()


def test_the_scaler_of_fp16_is_no_obstacle(copy, tmp_path):
    scaler = DynamicLossScaler(2.0**16, 2.0, 1000, 1, 1, dtype=torch.float16)
    edit = lambda content: content["optimizer_state_dict"].update(loss_scaler=scaler)  # noqa: E731
    change(copy / OPTIMIZER_0, edit)
    assert zero3_tensors(tmp_path, TAG)[1] == STEPS


def test_missing_checkpoints(tmp_path):
    for pointer in ("latest", "latest_universal"):
        with pytest.raises(CheckpointError, match=f"no file '{pointer}'"):
            newest(tmp_path, pointer)
        (tmp_path / pointer).write_text("global_step7\n")
        with pytest.raises(CheckpointError, match=r"no checkpoint 'global_step7'; it has \[\]"):
            newest(tmp_path, pointer)
    (tmp_path / "global_step5").mkdir()
    with pytest.raises(CheckpointError, match=r"'global_step6'; it has \['global_step5'\]"):
        zero3_tensors(tmp_path, "global_step6")
    with pytest.raises(CheckpointError, match=r"no optim_states file of ranks \[0\]"):
        zero3_tensors(tmp_path, "global_step5")
    with pytest.raises(CheckpointError, match="no checkpoint 'global_step5'"):
        zero3_tensors(tmp_path / "nowhere", "global_step5")


@pytest.mark.parametrize("name", ["../outside", "/", "..", "", "a\0b"])
def test_only_its_own_folders_are_read(copy, tmp_path, name):
    (tmp_path.parent / "outside").mkdir(exist_ok=True)
    (tmp_path / "latest").write_text(name)
    with pytest.raises(CheckpointError, match=f"gives the name {re.escape(repr(name))}"):
        newest(tmp_path, "latest")
    for read in (zero3_tensors, universal_tensors):
        with pytest.raises(CheckpointError, match=f"gives the name {re.escape(repr(name))}"):
            read(tmp_path, name)
    to_universal(tmp_path, TAG)
    change(
        tmp_path / UNIVERSAL / MODEL_0, lambda c: c["param_shapes"].append({name: torch.Size([1])})
    )
    with pytest.raises(CheckpointError, match=f"gives the name {re.escape(repr(name))}"):
        universal_tensors(tmp_path, UNIVERSAL)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (MODEL_0, r"no model_states file of ranks \[0\]"),
        (OPTIMIZER_0, r"no optim_states file of ranks \[0\]"),
        (MODEL_1, "by 2 ranks but has the optim_states of 2 and the model_states of 1"),
        (OPTIMIZER_1, "by 2 ranks but has the optim_states of 1 and the model_states of 2"),
    ],
)
def test_missing_rank_files(copy, tmp_path, name, message):
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=message):
        zero3_tensors(tmp_path, TAG)


def test_files_left_from_other_saves(copy, tmp_path):
    bf16 = copy / f"bf16_{OPTIMIZER_1}"
    shutil.copy(copy / OPTIMIZER_1, bf16)
    with pytest.raises(CheckpointError, match="of the same rank"):
        zero3_tensors(tmp_path, TAG)
    bf16.unlink()
    change(copy / MODEL_1, lambda content: content.update(global_steps=1))
    with pytest.raises(CheckpointError, match=r"different saves, after steps \[1, 2\]"):
        zero3_tensors(tmp_path, TAG)


def test_a_truncated_file(copy, tmp_path):
    content = (copy / OPTIMIZER_1).read_bytes()
    (copy / OPTIMIZER_1).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=rf"{OPTIMIZER_1} is damaged"):
        zero3_tensors(tmp_path, TAG)


def test_other_ways_to_divide_a_model(copy, tmp_path):
    change(copy / OPTIMIZER_0, lambda c: c["optimizer_state_dict"].update(zero_stage=2))
    with pytest.raises(CheckpointError, match="ZeRO stage 2; only stage 3"):
        zero3_tensors(tmp_path, TAG)
    (copy / "offloaded_tensors").mkdir()
    with pytest.raises(CheckpointError, match="NVMe"):
        zero3_tensors(tmp_path, TAG)
    (copy / "offloaded_tensors").rmdir()
    shutil.copy(copy / OPTIMIZER_0, copy / "zero_pp_rank_0_mp_rank_01_optim_states.pt")
    with pytest.raises(CheckpointError, match="mp_rank 1"):
        zero3_tensors(tmp_path, TAG)


def test_shapes_that_do_not_add_up(copy, tmp_path):
    def grow(content):
        for shapes in content["param_shapes"]:
            if "projector.bias" in shapes:
                shapes["projector.bias"] = torch.Size([5000])

    change(copy / MODEL_0, grow)
    message = r"weights of sub-group \d on rank 0 has \d+ elements, the shapes .* add up to \d+"
    with pytest.raises(CheckpointError, match=message):
        zero3_tensors(tmp_path, TAG)


def test_fragments_that_do_not_add_up(saved, tmp_path):
    folder, _ = saved(*CASES[1])
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)

    def cut(content):
        fragments = content["frozen_param_fragments"]
        fragments["language.output_layer.weight"] = torch.zeros(3)

    change(tmp_path / "global_step2" / MODEL_1, cut)
    with pytest.raises(CheckpointError, match=r"language\.output_layer\.weight on rank 1 has 3 el"):
        zero3_tensors(tmp_path, TAG)


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        (MODEL_0, lambda c: c.pop("param_shapes")),
        (MODEL_0, lambda c: c.update(param_shapes=[["projector.bias"]])),
        (MODEL_0, lambda c: c["param_shapes"][1].update({"projector.bias": "x"})),
        (MODEL_0, lambda c: c["param_shapes"][1].update({"projector.bias": [9.5]})),
        (MODEL_0, lambda c: c["param_shapes"][1].update({"projector.bias": [-6, -8]})),
        (MODEL_0, lambda c: c["param_shapes"][1].update({3: [0]})),
        (MODEL_0, lambda c: c.update(frozen_param_shapes=[1])),
        (MODEL_0, lambda c: c.update(frozen_param_shapes={"a": [1]})),
        (MODEL_1, lambda c: c.update(global_steps=torch.ones(1))),
        (OPTIMIZER_0, lambda c: c.update(optimizer_state_dict=[1])),
        (OPTIMIZER_0, lambda c: c["optimizer_state_dict"].update(fp32_flat_groups=["x", "y"])),
        (OPTIMIZER_0, lambda c: c["optimizer_state_dict"].update(optimizer_state_dict="x")),
    ],
)
def test_an_unknown_layout(copy, tmp_path, name, edit):
    change(copy / name, edit)
    with pytest.raises(CheckpointError, match="not laid out as by DeepSpeed"):
        zero3_tensors(tmp_path, TAG)


def test_steps_that_are_no_number(copy, tmp_path):
    for name in (MODEL_0, MODEL_1):
        change(copy / name, lambda content: content.update(global_steps="x"))
    with pytest.raises(CheckpointError, match=r"not laid out .*global_steps='x'"):
        zero3_tensors(tmp_path, TAG)


def test_ranks_of_different_types(copy, tmp_path):
    def halve(content):
        groups = content["optimizer_state_dict"]["fp32_flat_groups"]
        content["optimizer_state_dict"]["fp32_flat_groups"] = [group.half() for group in groups]

    change(copy / OPTIMIZER_1, halve)
    with pytest.raises(CheckpointError, match=r"torch\.float16 on rank 1 and torch\.float32 on"):
        zero3_tensors(tmp_path, TAG)
