"""One rank of many runs for real, and what is predicted of it is the planner's prediction."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest

from megavlm.config.run import data_parallel_ranks, samples_per_micro_batch
from megavlm.planner.cut import TOKENS_PER_TEXT
from megavlm.planner.hardware import H100_80, Cluster, save_gpu
from megavlm.planner.predict import predict
from megavlm.planner.work import tokens_of
from tests.ranks import run_on_ranks
from tests.runs import RUN, load_run

TOOLS = Path(__file__).parents[2] / "tools"
TINY = ["model={preset: vlm-tiny}", "train.samples_per_step=16", "train.micro_batches=2"]
PIPELINE = [
    *TINY,
    "engine=megatron",
    "megatron.tensor_parallel=2",
    "megatron.sequence_parallel=true",
    "megatron.pipeline_parallel=2",
    "megatron.virtual_pipeline=2",
    "train.recompute=full",
    "train.precision=bf16",
]
ZERO3 = [*TINY, "engine=zero3", "zero3.persistence_threshold=0", "train.recompute=selective"]
FSDP2 = [*TINY, "engine=fsdp2", "fsdp2.shard_ranks=2"]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("bench_rank", TOOLS / "bench_rank.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(TOOLS))
        patched.setitem(sys.modules, "bench_rank", module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        yield module


def run_tool(tool, tmp_path, overrides, *options):
    """Run the tool in a process of its own; returns the message that it ends with, if any."""
    save_gpu(H100_80, tmp_path / "machine.json")
    arguments = [str(RUN), *overrides, "--ranks", "4", "--gpu", str(tmp_path / "machine.json")]

    def on_rank(_):
        try:
            tool.main([*arguments, *options])
        except SystemExit as ended:
            return str(ended.code)
        return ""

    return run_on_ranks(1, on_rank, groups=False)[0]


@pytest.mark.parametrize(
    ("overrides", "rank"),
    [
        (PIPELINE, 0),
        ([*PIPELINE, "megatron.virtual_pipeline=1"], 3),  # receives in batches
        (ZERO3, 1),
        (FSDP2, 2),
    ],
    ids=["first stage", "last stage", "zero3", "fsdp2"],
)
def test_each_engine_is_measured(tool, tmp_path, overrides, rank):
    out = tmp_path / "out"
    options = ["--rank", str(rank), "--steps", "1", "--out", str(out)]
    assert run_tool(tool, tmp_path, overrides, *options) == ""
    tree = json.loads(out.with_suffix(".json").read_text())
    assert tree["machine"]["rank"] == f"{rank} of 4"
    *rates, memory = tree["rows"]
    for row in rates:
        assert all(math.isfinite(row[k]) and row[k] > 0 for k in ("measured", "predicted"))
    assert math.isfinite(memory["measured"])
    compute, optimizer, step, *_ = (row["measured"] for row in rates)
    assert step == compute + optimizer
    table = out.with_suffix(".md").read_text()
    assert all(row["figure"] in table for row in tree["rows"])


@pytest.mark.parametrize("overrides", [PIPELINE, ZERO3, FSDP2], ids=["megatron", "zero3", "fsdp2"])
def test_the_prediction_is_the_planners(tool, overrides):
    run = load_run(RUN, overrides)
    whole = predict(run, Cluster(gpu=H100_80, hosts=1, gpus_per_host=4), TOKENS_PER_TEXT)
    ranks = [tool.predicted(run, H100_80, rank, 4) for rank in range(4)]
    slowest = max(figures.compute_seconds for figures, _ in ranks)
    step = whole.step
    assert slowest == pytest.approx(step.compute_seconds + step.recompute_seconds)
    updates = max(figures.optimizer_seconds for figures, _ in ranks)
    assert updates == pytest.approx(step.optimizer_seconds)
    assert sum(flops for _, flops in ranks) == pytest.approx(whole.seen_flops)


def test_batches_are_what_the_planner_counts_on(tool):
    run = load_run(RUN, ["train.samples_per_step=24", "data.row_tokens=256"])
    samples = samples_per_micro_batch(run.train, data_parallel_ranks(run, 4))
    batch, tokens = tool.random_batch(run, samples), tokens_of(run, samples, TOKENS_PER_TEXT)
    assert batch.tokens_bt.shape == (tokens.rows, tokens.row_tokens)
    assert batch.pixels.shape[0] == tokens.images
    assert int(batch.learned_bt.sum()) == tokens.text_tokens
    low, high = batch.image_ranges_2bt
    pairs = int((high - low).sum())
    assert pairs == tokens.text_tokens * run.model.encoder.tokens


def test_what_is_received_is_filled_and_no_number_ends_the_run(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "RECEIVED", math.inf)
    assert "no number" in run_tool(tool, tmp_path, PIPELINE, "--rank", "3")


def test_a_rank_that_is_not_there_is_refused(tool, tmp_path):
    assert "--rank 4" in run_tool(tool, tmp_path, ZERO3, "--rank", "4")
