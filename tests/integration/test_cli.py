"""The command line as a user meets it."""

import json
import shutil
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import numpy as np
import pytest

# The commands import these when they run; forked ranks shall find them imported.
import megavlm.eval.report
import megavlm.infer.load
import megavlm.train.loop  # noqa: F401
from megavlm.__main__ import main
from megavlm.data.index import PICTURE
from megavlm.data.tokenizer import train_tokenizer
from megavlm.train.metrics import read_metrics
from tests.conftest import picture as coloured_square
from tests.ranks import run_on_ranks


def error_of(capsys, *arguments):
    """Run a command that must end in one line and exit code 2; returns the line."""
    assert main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr().err
    assert captured.startswith("megavlm: error: ")
    assert captured.count("\n") == 1, captured
    return captured


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.train=nowhere", "data folder nowhere does not exist"),
        ("data.tokenizer=none.model", "tokenizer none.model does not exist"),
        ("train.samples_per_step=6", "not divisible by train.micro_batches=2 x data_parallel=2"),
        ("train.setps=6", "train.setps is not a known setting; did you mean steps?"),
        ("model.decoder.vocabulary=500", "vocabulary=500 must equal the 512 pieces"),
    ],
)
def test_mistakes_are_told_before_anything_starts(capsys, tiny_run_file, tmp_path, override, says):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("localhost slots=2\n")
    assert says in error_of(capsys, "train", tiny_run_file, "--hostfile", hostfile, override)


def test_a_hostfile_with_a_host_twice(capsys, tiny_run_file, tmp_path):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("localhost slots=1\nlocalhost slots=1\n")
    says = error_of(capsys, "train", tiny_run_file, "--hostfile", hostfile)
    assert "hostfile:2: host localhost is listed twice" in says
    assert says == error_of(capsys, "plan", tiny_run_file, "--hostfile", hostfile)


@pytest.mark.parametrize(
    ("hosts", "overrides", "says"),
    [
        # Ranks 2 and 3 would be one tensor-parallel group on two hosts.
        (
            {"a": 3, "b": 5},
            ["megatron.tensor_parallel=2"],
            "host a has slots=3, not a multiple of megatron.tensor_parallel=2, whose "
            "ranks must share a host; change its slots, or try megatron.tensor_parallel in [1]",
        ),
        (
            {"a": 2, "b": 1},
            ["megatron.tensor_parallel=2"],
            "host b has slots=1, not a multiple of megatron.tensor_parallel=2",
        ),
        (
            {"a": 2, "b": 2},
            ["megatron.tensor_parallel=2", "megatron.pipeline_parallel=3"],
            "4 ranks are not divisible by megatron.tensor_parallel=2 x pipeline_parallel=3 = 6; "
            "use a multiple of 6 ranks",
        ),
        (
            {"a": 2, "b": 4},
            ["megatron.tensor_parallel=2"],
            "train.samples_per_step=8 is not divisible by train.micro_batches=2 x "
            "data_parallel=3 = 6; try 6 or 12",
        ),
        (
            {"a": 3},
            ["engine=fsdp2", "fsdp2.shard_ranks=2"],
            "host a has slots=3, not a multiple of fsdp2.shard_ranks=2, whose ranks must share a "
            "host or fill several of equal slots; change its slots, or try fsdp2.shard_ranks in "
            "[1, 3]",
        ),
        (
            {"a": 2, "b": 2, "c": 2},
            ["engine=fsdp2", "fsdp2.shard_ranks=4"],
            "fsdp2.shard_ranks=4 does not divide the 6 ranks; try [1, 2, 3, 6]",
        ),
    ],
)
def test_hosts_that_do_not_fit_the_run(capsys, tiny_run_file, tmp_path, hosts, overrides, says):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("".join(f"{host} slots={slots}\n" for host, slots in hosts.items()))
    arguments = [tiny_run_file, "--hostfile", hostfile, "engine=megatron", *overrides]
    told = error_of(capsys, "train", *arguments)
    assert says in told
    assert told == error_of(capsys, "plan", *arguments)


def test_a_missing_or_broken_picture(capsys, tiny_run_file, tmp_path):
    missing = tmp_path / "none.png"
    says = error_of(capsys, "generate", tiny_run_file, "--picture", missing)
    assert f"cannot read picture {missing}" in says
    broken = tmp_path / "broken.png"
    broken.write_bytes(coloured_square("red")[:50])
    assert str(broken) in error_of(capsys, "generate", tiny_run_file, "--picture", broken)


def test_settings_of_generation_that_mean_nothing_are_told_at_once(capsys, tiny_run_file):
    says = error_of(capsys, "generate", tiny_run_file, "--temperature", "-1")
    assert "temperature=-1.0 must lie" in says
    says = error_of(capsys, "generate", tiny_run_file, "--chat", "--max-new-tokens", 5_000)
    assert "--max-new-tokens 5000 must be below the 4096 tokens" in says


def test_the_tokenizer_reads_the_texts_of_all_tasks(coloured_squares, tiny_run_file, tmp_path):
    train = coloured_squares / "train"
    models = []
    for source in (str(train), f"{{folder: {train}, tasks: [caption]}}"):
        path = tmp_path / f"{len(models)}.model"
        overrides = [f"data.train={source}", f"data.tokenizer={path}"]
        overrides.append("model.decoder.vocabulary=320")
        assert main(["tokenizer", "train", str(tiny_run_file), *overrides]) == 0
        models.append(path.read_bytes())
    assert models[0] == models[1]


def trained(run_file, *overrides, ranks=2):
    """Train in forked ranks, as the launcher would start them; returns the exit codes."""
    command = ["train", str(run_file), *overrides]
    return run_on_ranks(ranks, lambda _: main(command), groups=False)


def test_a_run_from_training_to_report(capsys, tiny_run, tiny_run_file):
    assert trained(tiny_run_file) == [0, 0]
    metrics = read_metrics(tiny_run.run_folder)
    losses = [m["loss"] for m in metrics if "loss" in m]
    heldout = [m["heldout_loss"] for m in metrics if "heldout_loss" in m]
    assert len(losses) == tiny_run.train.steps and len(heldout) == 2
    assert heldout[1] < heldout[0]
    assert [m["samples"] for m in metrics if "loss" in m] == [8] * 6
    assert list((tiny_run.run_folder / "tensorboard").iterdir())

    def evaluate_and_report(_):
        folder = tiny_run.run_folder / "pictures"
        folder.mkdir()
        picture = folder / "b.png"
        picture.write_bytes(coloured_square("red"))
        (folder / "a.png").write_bytes(coloured_square("red")[:50])
        with redirect_stdout(StringIO()) as said, redirect_stderr(StringIO()) as errors:
            assert main(["generate", str(tiny_run_file), "--folder", str(folder)]) == 2
        assert said.getvalue().startswith(f"{picture}\t") and said.getvalue().count("\n") == 1
        assert str(folder / "a.png") in errors.getvalue()
        assert "1 of 2 pictures could not be read" in errors.getvalue()
        return [
            main(["eval", str(tiny_run_file)]),
            main(["report", str(tiny_run_file)]),
            main(["generate", str(tiny_run_file), "--picture", str(picture)]),
            main(["generate", str(tiny_run_file), "--picture", str(picture), "--together"]),
            main(["generate", str(tiny_run_file), "--quantization", "int8"]),
            main(["generate", str(tiny_run_file), "--quantization", "int4"]),
        ]

    assert run_on_ranks(1, evaluate_and_report, groups=False) == [[0, 0, 0, 0, 0, 2]]
    evaluation = json.loads((tiny_run.run_folder / "evaluation.json").read_text())
    measures = {row["measure"] for row in evaluation["training"]["scores"]}
    assert measures == {"caption, en, exact match", "caption, en, CIDEr"}
    page = (tiny_run.run_folder / "report.html").read_text()
    assert "<svg" in page and page.count('class="card"') == 8

    # Another tokenizer, or another model, does not fit the checkpoint.
    other = tiny_run.run_folder / "other.model"
    train_tokenizer([f"{a}{b}" for a in "klmnopqr" for b in "abcdefghij"] * 2, other, 300)
    overrides = [f"data.tokenizer={other}", "model.decoder.vocabulary=300"]
    assert "has model.decoder.vocabulary=512" in error_of(
        capsys, "train", tiny_run_file, *overrides
    )
    says = error_of(capsys, "train", tiny_run_file, "model.encoder.layers=3")
    assert "has model.encoder.layers=2, the run file says 3" in says
    longer = ["train.steps=9", "train.samples_per_step=16"]
    says = error_of(capsys, "train", tiny_run_file, *longer)
    assert "trained with train.samples_per_step=8, now 16" in says
    says = error_of(capsys, "train", tiny_run_file, "train.steps=5")
    assert "step-00000006 is past the end of stage training at step 5; raise its train" in says
    # gloo must not start in this process; see tests/ranks.py.
    other_model = ["eval", str(tiny_run_file), "model.encoder.layers=3"]
    assert run_on_ranks(1, lambda _: main(other_model), groups=False) == [2]


@pytest.mark.slow
def test_every_engine_sees_the_same_samples_and_learns_the_same(tiny_run, tiny_run_file):
    """From the same shards to the same curves; the last run continues the one before."""
    small_steps = ["optimizer.epsilon=1e-5"]
    megatron = [
        "engine=megatron",
        "megatron.tensor_parallel=2",
        "megatron.pipeline_parallel=2",
        "megatron.virtual_pipeline=2",
        "megatron.sequence_parallel=true",
    ]
    curves = []
    for ranks, overrides in (
        (2, ["engine=zero3"]),
        (4, megatron),
        (2, ["engine=fsdp2"]),
    ):
        shutil.rmtree(tiny_run.run_folder, ignore_errors=True)
        assert trained(tiny_run_file, *small_steps, *overrides, ranks=ranks) == [0] * ranks
        curves.append(read_metrics(tiny_run.run_folder))
    shutil.rmtree(tiny_run.run_folder / "checkpoints" / "step-00000006")
    assert trained(tiny_run_file, *small_steps, *megatron, ranks=4) == [0] * 4
    curves.append(read_metrics(tiny_run.run_folder))
    for name in ("loss", "heldout_loss", "gradient_norm"):
        first, *others = [[m[name] for m in metrics if name in m] for metrics in curves]
        for other in others:
            assert other == pytest.approx(first, rel=5e-6), name  # worst measured 5e-7
    for name in ("samples", "items", "skipped_samples", "truncated_texts"):
        first, *others = [[m[name] for m in metrics if name in m] for metrics in curves]
        assert others == [first] * 3, name


@pytest.mark.slow
def test_stopping_and_resuming_changes_nothing(tiny_run, tiny_run_file):
    assert trained(tiny_run_file) == [0, 0]
    whole = read_metrics(tiny_run.run_folder)
    # As after a crash in step 5: the checkpoints are those of step 4 and before.
    checkpoints = tiny_run.run_folder / "checkpoints"
    shutil.rmtree(checkpoints / "step-00000006")
    assert trained(tiny_run_file) == [0, 0]
    resumed = read_metrics(tiny_run.run_folder)
    for name in ("loss", "heldout_loss", "gradient_norm", "learning_rate"):
        assert [(m["step"], m[name]) for m in whole if name in m] == [
            (m["step"], m[name]) for m in resumed if name in m
        ]


def test_bad_samples_are_skipped_or_stop_the_run(capfd, tiny_run, tiny_run_file, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_run.data.train[0].folder, damaged)
    shard = damaged / "000001.tar"
    content = bytearray(shard.read_bytes())
    [member] = (m for m in np.load(damaged / "000001.index.npy")[2:4] if m["kind"] == PICTURE)
    offset, size = int(member["offset"]), int(member["size"])
    content[offset + size // 2 : offset + size] = bytes(size - size // 2)
    shard.write_bytes(content)
    overrides = ["engine=fsdp2", f"data.train={damaged}", "train.steps=5"]  # one epoch
    assert trained(tiny_run_file, *overrides) == [0, 0]
    metrics = [m for m in read_metrics(tiny_run.run_folder) if "loss" in m]
    assert sum(m["skipped_samples"] for m in metrics) == 1
    assert sum(m["samples"] for m in metrics) == 39
    assert "skipped 000001.tar:000011: picture of 000011 cannot be used" in capfd.readouterr().err

    shutil.rmtree(tiny_run.run_folder)
    assert trained(tiny_run_file, *overrides, "data.on_bad_sample=stop") == [2, 2]
    errors = [e for e in capfd.readouterr().err.splitlines() if e.startswith("megavlm: error")]
    assert len(errors) == 2 and all("set data.on_bad_sample=skip" in e for e in errors)
