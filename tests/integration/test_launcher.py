"""The `deepspeed` launcher starts real ranks; killing them loses nothing."""

import os
import signal
import subprocess
import sys
import time

import pytest

from megavlm.checkpoint.listing import latest_checkpoint
from megavlm.checkpoint.storage import read_state
from megavlm.files.folder import Folder
from megavlm.train.metrics import read_metrics

TIMEOUT_SECONDS = 200


def launch(run_file, hostfile, *overrides):
    command = [sys.executable, "-m", "megavlm", "train", str(run_file), "--hostfile", str(hostfile)]
    return subprocess.Popen(
        [*command, *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def kill_all(process):
    """Kill the launcher and its ranks as a power cut would."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_a_killed_run_continues_from_its_last_checkpoint(tiny_run, tiny_run_file, tmp_path):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("localhost slots=2\n")
    checkpoints = Folder(tiny_run.run_folder / "checkpoints")
    overrides = ["train.steps=400", "checkpoint.every=3"]

    process = launch(tiny_run_file, hostfile, *overrides)
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while latest_checkpoint(checkpoints) is None and process.poll() is None:
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()[0]
    kill_all(process)
    last = latest_checkpoint(checkpoints)
    assert last is not None and read_state(last)["step"] < 400

    steps = read_state(last)["step"] + 3
    overrides = [f"train.steps={steps}", "checkpoint.every=3"]
    process = launch(tiny_run_file, hostfile, *overrides)
    output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 0, output
    assert f"resuming from {last}" in output
    steps_logged = [m["step"] for m in read_metrics(tiny_run.run_folder) if "loss" in m]
    assert steps_logged == list(range(steps))
