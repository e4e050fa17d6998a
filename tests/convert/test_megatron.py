import io
import random
import shutil
import signal
from argparse import Namespace
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core.enums import ModelType
from megatron.core.rerun_state_machine import RerunMode
from megatron.core.transformer.enums import AttnBackend, CudaGraphScope

from megavlm.checkpoint.lazy import LazyTensor, in_memory
from megavlm.config.engines import MegatronSettings
from megavlm.convert.megatron import (
    chunk_parameters,
    megatron_shards,
    newest,
    write_megatron_shards,
)
from megavlm.engine.megatron import MegatronEngine
from megavlm.errors import CheckpointError, ConfigError
from megavlm.model.params import parameters
from megavlm.model.vlm import VisionLanguageModel
from megavlm.planner.cut import with_cut
from tests.batches import TINY, loss_sum, random_batch
from tests.convert.test_torch_files import OpensAFile, files_of_at_most
from tests.memory import peak_bytes
from tests.model.test_params import LAYOUTS
from tests.parity.runs import CPU, settings
from tests.parity.runs import LAYOUTS as RUN_LAYOUTS
from tests.ranks import as_rank, run_on_ranks

DIVISIONS = {"undivided": MegatronSettings(), **LAYOUTS}
GRID = "TP2 x PP2 interleaved SP"
STEP = "iter_0000100"
NAMES = {
    "undivided": ["mp_rank_00"],
    "TP2": ["mp_rank_00", "mp_rank_01"],
    GRID: ["mp_rank_00_000", "mp_rank_00_001", "mp_rank_01_000", "mp_rank_01_001"],
}


def random_weights(scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    return {
        f"weights/{entry.name}": (scale * torch.randn(entry.shape, generator=generator)).to(dtype)
        for entry in parameters(TINY)
    }


def models_of(rank: int, parallel: MegatronSettings) -> list[VisionLanguageModel]:
    """The chunks that a rank really builds, without values."""
    stages = range(parallel.virtual_pipeline) if parallel.virtual_pipeline > 1 else [None]
    with as_rank(rank, parallel.model_ranks, parallel), torch.device("meta"):
        return [
            VisionLanguageModel(TINY, dtype=torch.float32, parallel=parallel, vp_stage=stage)
            for stage in stages
        ]


def rank_file(folder, rank: int, parallel: MegatronSettings):
    """Tensor-parallel ranks are neighbours."""
    pipeline_rank, tensor_rank = divmod(rank, parallel.tensor_parallel)
    suffix = f"_{pipeline_rank:03d}" if parallel.pipeline_parallel > 1 else ""
    return folder / STEP / f"mp_rank_{tensor_rank:02d}{suffix}" / "model_optim_rng.pt"


def load(path):
    return torch.load(path, weights_only=True)


@pytest.fixture
def grid(tmp_path):
    """A checkpoint of 2 x 2 ranks."""
    write_megatron_shards(in_memory(random_weights()), TINY, LAYOUTS[GRID], tmp_path, 100)
    return tmp_path


@pytest.mark.parametrize("division", DIVISIONS)
def test_chunks_are_those_of_the_ranks(division):
    parallel = DIVISIONS[division]
    chunks = chunk_parameters(TINY, parallel)
    for rank in range(parallel.model_ranks):
        pipeline_rank = rank // parallel.tensor_parallel
        mine = chunks[pipeline_rank :: parallel.pipeline_parallel]
        assert mine == [model.ledger() for model in models_of(rank, parallel)]


@pytest.mark.parametrize("division", DIVISIONS)
def test_shards_load_into_the_ranks_models_and_come_back(tmp_path, division):
    parallel = DIVISIONS[division]
    weights = random_weights(dtype=torch.bfloat16 if division == "TP2" else torch.float32)
    write_megatron_shards(in_memory(weights), TINY, parallel, tmp_path, 100)
    names = sorted(path.name for path in (tmp_path / STEP).iterdir())
    assert names == NAMES.get(division, names)
    for rank in range(parallel.model_ranks):
        content = load(rank_file(tmp_path, rank, parallel))
        assert (content["iteration"], content["checkpoint_version"]) == (100, 3.0)
        models = models_of(rank, parallel)
        keys = [f"model{i}" for i in range(len(models))] if len(models) > 1 else ["model"]
        assert {key for key in content if key.startswith("model")} == set(keys)
        for key, model in zip(keys, models, strict=True):
            for name, parameter in model.named_parameters():
                assert content[key][name].shape == parameter.shape
            model.load_state_dict(content[key], strict=True, assign=True)
            for name, entry in model.ledger().items():
                tensor_rank = rank % parallel.tensor_parallel
                whole = weights[f"weights/{entry.name}"]
                shard = entry.shard(whole, parallel.tensor_parallel, tensor_rank)
                assert torch.equal(model.get_parameter(name), shard), name
    assert newest(tmp_path) == STEP
    tensors, iteration = megatron_shards(tmp_path, STEP, TINY)
    assert iteration == 100
    assert tensors.keys() == weights.keys()
    for key, value in weights.items():
        assert (tensors[key].shape, tensors[key].dtype) == (tuple(value.shape), value.dtype)
        assert torch.equal(tensors[key].read(), value), key


@pytest.mark.parametrize("name", ["TP2 x PP2 interleaved SP", "TP2 x PP2"])
def test_ranks_compute_the_loss_of_one_process(tmp_path, name):
    [layout] = [layout for layout in RUN_LAYOUTS if layout.name == name]
    run = settings(layout, 1)
    parallel = with_cut(run)
    weights = random_weights()
    write_megatron_shards(in_memory(weights), TINY, parallel, tmp_path, 100)
    batches = [random_batch(seed, samples=3, images=seed != 1) for seed in range(2)]

    def alone(_):
        model = VisionLanguageModel(TINY, dtype=torch.float32).eval()
        model.load_state_dict({key.removeprefix("weights/"): w for key, w in weights.items()})
        with torch.no_grad():
            loss = sum(float(loss_sum(model, batch)) for batch in batches)
            return loss / sum(int(batch.learned_bt.sum()) for batch in batches)

    def on_rank(rank):
        engine = MegatronEngine(run, CPU)
        content = load(rank_file(tmp_path, rank, parallel))
        for i, model in enumerate(engine._models):
            model.load_state_dict(content[f"model{i}" if len(engine._models) > 1 else "model"])
        return engine.evaluate(batches)["captioning"]

    expected = run_on_ranks(1, alone)[0]
    for loss in run_on_ranks(4, on_rank, parallel=parallel):
        assert loss == pytest.approx(expected, rel=1e-6)  # worst measured 5.1e-8


def test_memory_is_that_of_one_tensor(tmp_path):
    # The C library returns to the system at once what is larger than 32 MiB.
    large = {"vocabulary": 40_960, "width": 256, "mlp_width": 1_024, "self_layers": 20}
    sizes = replace(TINY, decoder=replace(TINY.decoder, **large))
    tensor_bytes = 4 * 40_960 * 256
    assert sum(4 * entry.numel for entry in parameters(sizes)) > 4.5 * tensor_bytes
    ones = {
        f"weights/{entry.name}": LazyTensor(
            entry.shape, torch.float32, lambda shape=entry.shape: torch.ones(shape)
        )
        for entry in parameters(sizes)
    }
    one = MegatronSettings()

    def read_all():
        for tensor in megatron_shards(tmp_path, newest(tmp_path), sizes)[0].values():
            tensor.read()

    # Worst measured 1.39 tensors, written, and 1.29, read; the file has 4.8.
    written = peak_bytes(lambda: write_megatron_shards(ones, sizes, one, tmp_path, 1))
    assert written < 2 * tensor_bytes
    assert peak_bytes(read_all) < 2 * tensor_bytes


def test_the_cut_must_be_chosen():
    with pytest.raises(ConfigError, match="leaves open where 2 chunks begin"):
        chunk_parameters(TINY, MegatronSettings(pipeline_parallel=2))
    with pytest.raises(ConfigError, match="must add up to the 6 decoder layers"):
        chunk_parameters(TINY, MegatronSettings(pipeline_parallel=2, chunk_layers=(3, 4)))
    with pytest.raises(ConfigError, match="does not divide"):
        chunk_parameters(TINY, MegatronSettings(tensor_parallel=3))


def test_tensors_must_be_the_model(tmp_path):
    weights = random_weights()
    cut = {**weights, "weights/projector.bias": torch.zeros(3)}
    with pytest.raises(CheckpointError, match=r"projector\.bias has the shape \(3,\); .* \(48,\)"):
        write_megatron_shards(in_memory(cut), TINY, DIVISIONS["TP2"], tmp_path, 1)
    del weights["weights/projector.bias"]
    with pytest.raises(CheckpointError, match=r"projector\.bias is missing"):
        write_megatron_shards(in_memory(weights), TINY, DIVISIONS["TP2"], tmp_path, 1)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(grid):
    with pytest.raises(CheckpointError, match="iter_0000100 exists"):
        write_megatron_shards(in_memory(random_weights()), TINY, LAYOUTS[GRID], grid, 100)


def test_a_full_disk(tmp_path):
    with (
        files_of_at_most(40_000),
        pytest.raises(CheckpointError, match=r"optim_rng\.pt: File too large"),
    ):
        write_megatron_shards(in_memory(random_weights()), TINY, LAYOUTS[GRID], tmp_path, 100)
    assert not (tmp_path / "latest_checkpointed_iteration.txt").exists()


def test_missing_checkpoints(grid):
    latest = grid / "latest_checkpointed_iteration.txt"
    latest.write_text("300\n")
    with pytest.raises(CheckpointError, match="no checkpoint 'iter_0000300'"):
        newest(grid)
    with pytest.raises(CheckpointError, match="no checkpoint 'iter_0000300'"):
        megatron_shards(grid, "iter_0000300", TINY)
    (grid / "release").mkdir()
    latest.write_text("release")
    assert newest(grid) == "release"
    with pytest.raises(CheckpointError, match="release has no mp_rank"):
        megatron_shards(grid, "release", TINY)
    latest.unlink()
    with pytest.raises(CheckpointError, match="has no file 'latest_checkpointed_iteration"):
        newest(grid)


@pytest.mark.parametrize("name", ["../outside", "/", "..", "", "9" * 5000])
def test_only_its_own_folders_are_read(grid, name):
    (grid.parent / "outside").mkdir(exist_ok=True)
    (grid / "latest_checkpointed_iteration.txt").write_text(name)
    with pytest.raises(CheckpointError, match=f"gives the name '{name[:50]}"):
        newest(grid)
    with pytest.raises(CheckpointError, match=f"gives the name '{name[:50]}"):
        megatron_shards(grid, name, TINY)


def test_a_later_save_does_not_change_what_is_read(grid):
    write_megatron_shards(in_memory(random_weights()), TINY, LAYOUTS[GRID], grid, 200)
    assert newest(grid) == "iter_0000200"
    assert megatron_shards(grid, STEP, TINY)[1] == 100


@pytest.mark.parametrize(
    ("gone", "missing"),
    [
        (["mp_rank_01_000"], r"\[\(1, 0\)\]"),
        (["mp_rank_00_001", "mp_rank_01_001"], r"\[\(0, 1\), \(1, 1\)\]"),
        (["mp_rank_01_000", "mp_rank_01_001"], r"\[\(1, 0\), \(1, 1\)\]"),
    ],
)
def test_the_ranks_must_be_a_full_grid(grid, gone, missing):
    for name in gone:
        shutil.rmtree(grid / STEP / name)
    with pytest.raises(CheckpointError, match=f"2 tensor- x 2 pipeline.*missing {missing}"):
        megatron_shards(grid, STEP, TINY)
    (grid / STEP / gone[0]).mkdir()
    with pytest.raises(CheckpointError, match=f"missing {missing}"):
        megatron_shards(grid, STEP, TINY)


def test_a_rank_too_many(grid):
    step = grid / STEP
    shutil.copytree(step / "mp_rank_01_001", step / "mp_rank_02_001")
    with pytest.raises(CheckpointError, match=r"too many \[\(2, 1\)\]"):
        megatron_shards(grid, STEP, TINY)


def change(path, edit):
    content = load(path)
    edit(content)
    torch.save(content, path)


def as_megatron_lm_saves(content) -> None:
    """What its training/checkpointing.py puts into a file beside the weights."""
    args = Namespace(
        **content["args"],
        model_type=ModelType.encoder_or_decoder,
        attention_backend=AttnBackend.flash,
        cuda_graph_scope=[CudaGraphScope.full_iteration],
        exit_signal=signal.SIGTERM,
        params_dtype=torch.bfloat16,
        data_cache_path=Path("cache"),
        lr=np.float64(1e-4),
        yaml=SimpleNamespace(layers=6),
    )
    for key in ("model0", "model1"):
        model = OrderedDict(content[key])
        model["a.core_attention._extra_state"] = io.BytesIO(b"its pickle")
        model["b._extra_state"] = torch.zeros(0, dtype=torch.uint8)
        model["c._extra_state"] = None
        model._metadata = OrderedDict({"": {"version": 1}})
        content[key] = model
    rng_state = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.get_rng_state(),
        "rng_tracker_states": {"model-parallel-rng": torch.Generator()},
    }
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.tensor_model_parallel = True
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimizer.step()
    content.update(
        args=args,
        num_floating_point_operations_so_far=0,
        optimizer={"optimizer": optimizer.state_dict(), "fp32_from_fp16_params": [[parameter]]},
        opt_param_scheduler={"max_lr": 1e-4, "num_steps": 7, "lr_decay_style": "cosine"},
        rerun_state_machine={"mode": RerunMode.VALIDATE_RESULTS},
        rng_state=[rng_state],
    )


def test_files_as_megatron_lm_saves_them(grid):
    for path in grid.glob("*/*/*.pt"):
        change(path, as_megatron_lm_saves)
    tensors, iteration = megatron_shards(grid, STEP, TINY)
    assert iteration == 100
    for key, value in random_weights().items():
        assert torch.equal(tensors[key].read(), value), key
    # The arguments count.
    for name in ("mp_rank_01_000", "mp_rank_01_001"):
        shutil.rmtree(grid / STEP / name)
    with pytest.raises(
        CheckpointError, match=r"2 tensor- x 2 pipeline.*missing \[\(1, 0\), \(1, 1\)"
    ):
        megatron_shards(grid, STEP, TINY)


def test_files_without_arguments(grid):
    """Then missing ranks show by what the others lack."""
    for path in grid.glob("*/*/*.pt"):
        change(path, lambda content: content.pop("args"))
    assert megatron_shards(grid, STEP, TINY)[1] == 100
    for name in ("mp_rank_00_001", "mp_rank_01_001"):
        shutil.rmtree(grid / STEP / name)
    with pytest.raises(CheckpointError):
        megatron_shards(grid, STEP, TINY)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["model0"].pop("projector.bias"), r"missing \['projector.bias'\]"),
        (lambda c: c["model1"].update(more=torch.zeros(1)), r"unknown \['more'\]"),
        (lambda c: c["model0"].update({"projector.bias": torch.zeros(3)}), r"shape \(3,\); .*48"),
        (lambda c: [c.pop("model0"), c.pop("model1")], "no weights under 'model'"),
        (lambda c: c["model1"].clear(), "do not hold one model"),
        (lambda c: c.update(checkpoint_version=2.0), "checkpoint_version 2.0"),
        (lambda c: c.pop("iteration"), "iteration None"),
        (lambda c: c.update(iteration="x"), "iteration 'x'"),
        (lambda c: c.update(model0=[1]), "else than weights by their names under 'model0'"),
        (lambda c: c["model0"].update({3: torch.zeros(1)}), "by their names under 'model0'"),
        (lambda c: c.pop("model1"), "do not hold one model"),
        (lambda c: c.update(model=c.pop("model1")), "do not hold one model"),
        (
            lambda c: c["model0"].update({"projector.bias": "x"}),
            r"projector\.bias, which is no ten",
        ),
        (
            lambda c: c["model0"].update({"projector.bias": torch.zeros(48).half()}),
            "as torch.float",
        ),
        (lambda c: c["args"].update(tensor_model_parallel_size="2"), "of '2' tensor- or pipeline"),
        (lambda c: c["args"].update(pipeline_model_parallel_size=-1), "of -1 tensor- or pipeline"),
        (
            lambda c: c["args"].update(tensor_model_parallel_size=10**9),
            r"1000000000 tensor- x 2 .*has 4 files; missing \[\(2, 0\), \(2, 1\), \(3, 0\)\]",
        ),
    ],
)
def test_spoilt_files(grid, edit, message):
    change(grid / STEP / "mp_rank_00_000" / "model_optim_rng.pt", edit)
    with pytest.raises(CheckpointError, match=message):
        megatron_shards(grid, STEP, TINY)


@pytest.mark.parametrize(
    "decoder", [{"width": 96}, {"self_layers": 6}, {"heads": 1, "kv_heads": 1}, {"vocabulary": 514}]
)
def test_other_sizes(grid, decoder):
    with pytest.raises(CheckpointError, match="sizes"):
        megatron_shards(grid, STEP, replace(TINY, decoder=replace(TINY.decoder, **decoder)))


def test_entries_of_transformer_engine_are_ignored(grid):
    for path in grid.glob("*/*/*.pt"):
        change(path, lambda content: content["model0"].update({"a._extra_state": None}))
    assert len(megatron_shards(grid, STEP, TINY)[0]) == len(parameters(TINY))


def test_code_is_never_run(grid, tmp_path):
    path = grid / STEP / "mp_rank_01_001" / "model_optim_rng.pt"
    change(path, lambda content: content.update(args=OpensAFile(tmp_path / "run")))
    with pytest.raises(CheckpointError, match=r"mp_rank_01_001.* it needs io\.open;"):
        megatron_shards(grid, STEP, TINY)
    assert not (tmp_path / "run").exists()
