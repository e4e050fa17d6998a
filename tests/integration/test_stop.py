"""What launchers make of a signal: ranks save the step they are in before they end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megavlm.checkpoint.listing import latest_checkpoint
from megavlm.checkpoint.storage import read_state
from megavlm.files.folder import Folder
from megavlm.train.metrics import read_metrics

TIMEOUT_SECONDS = 200
OVERRIDES = ["train.steps=400", "checkpoint.every=1000", "data.workers=1", "evaluation.samples=1"]
BIN = Path(sys.executable).parent


def torchrun(run_file, _):
    words = ["torchrun", "--standalone", "--nproc-per-node=2", "--shutdown-timeout=60"]
    words.append("--signals-to-handle=SIGTERM,SIGUSR1")
    return [*words, "-m", "megavlm", "train", run_file]


def deepspeed(run_file, tmp_path):
    (tmp_path / "hostfile").write_text("localhost slots=2\n")
    return [sys.executable, "-m", "megavlm", "train", run_file, "--hostfile", tmp_path / "hostfile"]


def launcher(process):
    """The process that starts ranks, and ends them: with `deepspeed` a child of the command."""
    children = [process, *process.children()]
    return next(p for p in reversed(children) if "deepspeed.launcher.launch" in p.cmdline())


def told_by_torchrun(process, number):
    process.send_signal(number)


def told_by_deepspeed(process, number):
    launcher(psutil.Process(process.pid)).send_signal(number)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "tell", "number"),
    [
        (torchrun, told_by_torchrun, signal.SIGTERM),
        (torchrun, told_by_torchrun, signal.SIGUSR1),
        (deepspeed, told_by_deepspeed, signal.SIGTERM),
    ],
)
def test_a_launcher_that_is_told_to_end(tiny_run, tiny_run_file, tmp_path, command, tell, number):
    words = [*map(str, command(tiny_run_file, tmp_path)), *OVERRIDES]
    process = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"},
    )
    try:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not any("loss" in line for line in read_metrics(tiny_run.run_folder)):
            assert time.monotonic() < deadline and process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        tell(process, number)
        output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    checkpoint = latest_checkpoint(Folder(tiny_run.run_folder / "checkpoints"))
    assert checkpoint is not None, output
    step = read_state(checkpoint)["step"]
    assert "stopped by a signal (on " in output, output
    assert f"step {step} is saved" in output
    steps = [line["step"] for line in read_metrics(tiny_run.run_folder) if "gradient_norm" in line]
    assert steps == list(range(step))
    assert process.returncode == 1, "both launchers say so of any signal"
