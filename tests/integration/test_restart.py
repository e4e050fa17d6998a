"""Launchers start a run again whose rank was killed, or whose host is gone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megavlm.dist.launch import NEW_STORE
from megavlm.train.events import EVENTS_FILE, read_events
from megavlm.train.metrics import read_metrics

TIMEOUT_SECONDS = 300
OVERRIDES = ["train.steps=40", "checkpoint.every=5", "evaluation.samples=1"]
BIN = Path(sys.executable).parent


def start(words, log, **variables):
    path = f"{BIN}:{os.environ['PATH']}"
    with log.open("w") as file:
        return psutil.Popen(
            [*map(str, words)],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PATH": path, **variables},
        )


def torchrun(*options):
    return ["torchrun", "--nproc-per-node=2", "--max-restarts=2", *options, "-m", "megavlm"]


def until(condition, processes, log):
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        assert all(process.poll() is None for process in processes), log.read_text()
        time.sleep(0.05)


def trains_past(run, step):
    return lambda: any(m["step"] >= step for m in read_metrics(run.run_folder) if "loss" in m)


def ranks_of(launcher):
    """Its ranks, whose workers have the same environment, in the order of their numbers."""
    found = {}
    for process in launcher.children(recursive=True):
        variables = process.environ()
        if "RANK" in variables and process.parent().environ().get("RANK") is None:
            found[int(variables["RANK"])] = process
    return [found[rank] for rank in sorted(found)]


def end(processes):
    for process in processes:
        for one in [*process.children(recursive=True), process] if process.is_running() else []:
            one.kill()


def resumed(run):
    events = read_events(run.run_folder / EVENTS_FILE)
    return [event["step"] for event in events if event["event"] == "resumed"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun --standalone", "torchrun static", "deepspeed"])
def test_a_killed_rank_is_started_again(tiny_run, tiny_run_file, tmp_path, launcher):
    train = ["train", tiny_run_file, *OVERRIDES]
    if launcher == "deepspeed":
        hostfile = tmp_path / "hostfile"
        hostfile.write_text("localhost slots=2\n")
        restarts = ["--hostfile", hostfile, "--restarts", "2"]
        words = [sys.executable, "-m", "megavlm", *train, *restarts]
    else:
        words = [*torchrun(*launcher.split()[1:]), *train]
        words = [word for word in words if word != "static"]
    log = tmp_path / "log"
    process = start(words, log)
    try:
        until(trains_past(tiny_run, 12), [process], log)
        ranks_of(process)[1].kill()
        assert process.wait(TIMEOUT_SECONDS) == 0, log.read_text()
    finally:
        end([process])
    assert resumed(tiny_run)[0] in (5, 10, 15) and len(resumed(tiny_run)) == 1
    steps = [m["step"] for m in read_metrics(tiny_run.run_folder) if "loss" in m]
    assert steps == list(range(40))


@pytest.mark.slow
def test_a_host_that_is_gone_and_one_that_comes(tiny_run, tiny_run_file, tmp_path):
    """Nine samples a step on four ranks, on two, and on four again."""
    batch = ["train.samples_per_step=9", "train.micro_batches=1", "train.micro_batch_samples=3"]
    train = ["train", tiny_run_file, *OVERRIDES, *batch, "train.steps=4000"]
    words = torchrun("--nnodes=1:2", "--rdzv-backend=c10d", "--shutdown-timeout=60")
    port = 29500 + os.getpid() % 1000
    words.insert(3, f"--rdzv-endpoint=127.0.0.1:{port}")
    variables = dict([NEW_STORE.split("=")])
    log = tmp_path / "first.log"

    def host(log, *, has_store):  # which else whoever comes first has, as all are on one machine
        settings = f"--rdzv-conf=last_call_timeout=5,is_host={has_store:d}"
        return start([*words[:3], settings, *words[3:], *train], log, **variables)

    first = host(log, has_store=True)
    second = host(tmp_path / "second.log", has_store=False)
    third = None
    try:
        until(trains_past(tiny_run, 12), [first, second], log)
        end([second])
        until(lambda: len(resumed(tiny_run)) == 1, [first], log)
        until(trains_past(tiny_run, resumed(tiny_run)[0] + 10), [first], log)
        third = host(tmp_path / "third.log", has_store=False)
        until(lambda: len(resumed(tiny_run)) == 2, [first, third], log)
        until(trains_past(tiny_run, resumed(tiny_run)[1] + 3), [first, third], log)
        for process in (first, third):
            process.send_signal(signal.SIGTERM)
        for process in (first, third):
            process.wait(TIMEOUT_SECONDS)
    finally:
        end([process for process in (first, second, third) if process is not None])
    starts = read_events(tiny_run.run_folder / EVENTS_FILE)
    assert [event["ranks"] for event in starts if event["event"] == "start"] == [4, 2, 4]
    assert "stopped by a signal (on 2 of 2 ranks)" in log.read_text(), "when the third came"
    samples = {m["samples"] for m in read_metrics(tiny_run.run_folder) if "loss" in m}
    assert samples == {9}
