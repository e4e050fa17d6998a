"""What a run leaves to be seen, in real runs."""

import json
import os
import signal
import socket
import urllib.request
from dataclasses import replace

import pytest
import torch

from megavlm.checkpoint.storage import folder_name
from megavlm.config.guard import GuardSettings
from megavlm.config.metrics import MetricsSettings, ProfileSettings
from megavlm.engine.fsdp2 import Fsdp2Engine
from megavlm.eval.report import write_report
from megavlm.stages.language import LanguageObjective
from megavlm.train.events import EVENTS_FILE, read_events
from megavlm.train.exporters import _prometheus
from megavlm.train.goodput import goodput
from megavlm.train.loop import train
from megavlm.train.metrics import read_metrics
from megavlm.train.record import read_record
from tests.ranks import run_on_ranks
from tests.runs import plan_of
from tests.train.test_resume import LAYOUTS, MEGATRON

SECRETS = ("hunter2/x", "AKIASECRETKEY", "tok3n-in-environment", "signature0815")


@pytest.fixture
def run(tiny_run):
    return replace(tiny_run, engine="fsdp2")


def events_of(run):
    return read_events(run.run_folder / EVENTS_FILE)


def test_a_run_that_was_killed_and_goes_on(run):
    """Killed in step 5, of 6, with a checkpoint at 4."""
    # In the foreground, so that the one at 4 is there when it is killed.
    run = replace(run, checkpoint=replace(run.checkpoint, asynchronous=False))

    def killed(_):
        original = Fsdp2Engine.step

        def step(self, *arguments):
            step.calls += 1
            if step.calls == 6:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, *arguments)

        step.calls = 0
        Fsdp2Engine.step = step
        train(plan_of(run))

    with pytest.raises(AssertionError, match=f"ended with status {signal.SIGKILL}"):
        run_on_ranks(1, killed, groups=False)
    before = (run.run_folder / EVENTS_FILE).read_bytes()
    write_report(plan_of(run), run.run_folder / "run.yaml")
    run_on_ranks(1, lambda _: train(plan_of(run)), groups=False)
    assert (run.run_folder / EVENTS_FILE).read_bytes().startswith(before)
    events = events_of(run)
    names = [event["event"] for event in events]
    assert names[:5] == ["start", "built", "loaded", "held_out", "first_step_done"]
    assert names.count("checkpoint_begun") == names.count("checkpoint_committed") == 3
    [resumed] = [event for event in events if event["event"] == "resumed"]
    assert resumed["step"] == 4
    found = goodput(events)
    # Nothing was written of step 5: the process was killed before it had written its steps.
    assert (found.steps, found.starts, found.ended) == (6, 2, "done")
    assert found.seconds["down"] > 0 and found.seconds["productive"] > 0
    assert sum(found.seconds.values()) == pytest.approx(found.wall_seconds)
    in_steps = sum(m["step_seconds"] for m in read_metrics(run.run_folder) if "loss" in m)
    assert found.seconds["productive"] == pytest.approx(in_steps)
    records = read_record(run.run_folder)
    assert [record["restart"] for record in records] == [0, 1]
    assert [record["step"] for record in records] == [0, 4]
    assert records[1]["data"]["samples_seen"] == 4 * run.train.samples_per_step
    assert records[1]["packages"]["torch"] == torch.__version__


def test_figures_of_a_step(run):
    run = run_with_norms(run, every=2)
    scaled = replace(run.optimizer, scales={"decoder": 0.5})
    run = replace(run, optimizer=scaled, profile=ProfileSettings(steps=(1, 3), ranks=(1,)))
    norms = norms_of(run)
    assert [len(of_step) for of_step in norms] == [0, 3, 0] and all(n > 0 for n in norms[1])
    lines = [m for m in read_metrics(run.run_folder) if "loss" in m]
    for line in lines:
        assert line["learning_rate_decoder"] == pytest.approx(line["learning_rate"] / 2)
        assert line["learning_rate_encoder"] == pytest.approx(line["learning_rate"])
        seconds = line["step_seconds"]
        assert line["text_tokens_per_second"] == pytest.approx(line["text_tokens"] / seconds)
        assert line["images_per_second"] == pytest.approx(line["images"] / seconds)
        assert line["model_flops_per_second"] > 0 and line["model_flops_utilisation"] is None
        assert line["process_rss_bytes"] > 1e7 and line["gpu_peak_allocated_bytes"] is None
    [trace] = (run.run_folder / "profiles").iterdir()
    assert trace.name == "step-00000001-rank-0001.json.gz"


@pytest.mark.slow
def test_events_of_bad_steps(run):
    run = replace(run, guard=GuardSettings(on_nonfinite="skip"))

    def poisoned(_):
        original = LanguageObjective.losses

        def losses(self, outputs, batch, prepared=None):
            losses.calls += 1
            found = original(self, outputs, batch, prepared)
            bad = losses.calls == 3 + 2 * run.train.micro_batches
            return found._replace(backward=found.backward * float("nan")) if bad else found

        losses.calls = 0
        LanguageObjective.losses = losses
        train(plan_of(run))

    run_on_ranks(1, poisoned, groups=False)
    found = goodput(events_of(run))
    assert len(found.skipped) == 1 and found.steps == 5
    assert found.seconds["skipped steps"] > 0


def test_prometheus_fetches_the_newest_figures():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def served(_):
        with _prometheus(MetricsSettings(prometheus_port=port)) as record:
            record({"step": 3, "loss": 2.5, "stage": "captioning", "gradient_norm": None})
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()

    [text] = run_on_ranks(1, served, groups=False)
    assert "megavlm_training_loss 2.5" in text and "megavlm_training_step 3.0" in text
    assert "megavlm_training_gradient_norm NaN" in text and "captioning" not in text


def leaks(folder):
    """Files below a folder that hold a planted secret."""
    return [
        (str(path), secret)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        for secret in SECRETS
        if secret.encode() in path.read_bytes()
    ]


def test_nothing_tells_credentials(run, tmp_path, monkeypatch, capfd):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "tok3n-in-environment" + "0" * 24)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2/x")
    monkeypatch.setenv("NCCL_SECRET", "tok3n-in-environment")
    monkeypatch.setattr("sys.argv", ["megavlm", "checkpoint.start_from=s3://me:hunter2/x@b"])
    # A later start has another place to begin from, which is not used any more.
    places = ("s3://AKIASECRETKEY:hunter2/x@bucket/run", "https://h/w?sig=signature0815")
    run = replace(run, metrics=MetricsSettings(wandb_project="tests"))
    run = replace(run, train=replace(run.train, steps=2))
    short = replace(run, train=replace(run.train, steps=1))
    run_on_ranks(1, lambda _: train(plan_of(short)), groups=False)
    run = replace(run, checkpoint=replace(run.checkpoint, start_from=places))
    run_on_ranks(1, lambda _: train(plan_of(run)), groups=False)
    write_report(plan_of(run), run.run_folder / "run.yaml")
    assert (run.run_folder / "report.html").is_file()
    assert list((run.run_folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert (run.run_folder / "checkpoints" / folder_name(2) / "state.json").is_file()
    assert "s3://***@bucket/run" in (run.run_folder / "record.json").read_text()
    assert leaks(run.run_folder) == []
    said = capfd.readouterr()
    assert not [secret for secret in SECRETS if secret in said.out + said.err]
    (tmp_path / "planted").write_text(json.dumps(places))
    assert len(leaks(tmp_path)) == 3  # the test can see them


def norms_of(run):
    """Of each step, by part."""
    run_on_ranks(LAYOUTS[run.engine], lambda _: train(plan_of(run)), groups=False)
    norms = []
    for line in read_metrics(run.run_folder):
        if "loss" in line:
            of_parts = [v for n, v in line.items() if n.startswith("gradient_norm_")]
            norms.append(of_parts)
            if of_parts:  # worst measured 1.2e-7
                whole = sum(norm**2 for norm in of_parts) ** 0.5
                assert whole == pytest.approx(line["gradient_norm"], rel=1e-6)
    return norms


def run_with_norms(run, every):
    return replace(
        run,
        fsdp2=replace(run.fsdp2, shard_ranks=1),
        metrics=MetricsSettings(module_norms_every=every),
        train=replace(run.train, steps=3, frozen=("projector",)),
        optimizer=replace(run.optimizer, encoder_layer_decay=0.5, epsilon=1e-5),
    )


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero3", "megatron"])
def test_norms_of_the_parts_are_those_of_other_engines(run, engine):
    run = run_with_norms(run, every=1)
    other = replace(run, engine=engine, run_folder=run.run_folder / "other")
    if engine == "megatron":
        other = replace(other, megatron=MEGATRON)
    (expected, _, later), (found, _, found_later) = norms_of(run), norms_of(other)
    assert found == pytest.approx(expected, rel=5e-6)  # worst measured 4.2e-7
    assert found_later == pytest.approx(later, rel=1e-3)
