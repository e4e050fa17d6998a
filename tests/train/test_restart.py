"""What starts a run again heeds signals and silent hosts; tests/integration starts real ranks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megavlm.config.plan import Plan
from megavlm.train import restart
from megavlm.train.restart import Restarts
from tests.runs import plan_of

RANK = """
import signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
print(flush=True)
time.sleep(60)
"""


@pytest.fixture
def plan(tiny_run) -> Plan:
    return plan_of(tiny_run)


@pytest.fixture(autouse=True)
def handlers():
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def restarts_of(plan, tmp_path, hosts="localhost"):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("".join(f"{host} slots=2\n" for host in hosts.split()))
    return Restarts(plan, hostfile, Path("run of mine.yaml"), ["train.steps=3"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_between_two_starts_is_heeded(plan, tmp_path, monkeypatch, number):
    starts = []

    def hosts_left(self):
        os.kill(os.getpid(), number)
        return self._slots_by_host

    def popen(words, **_):
        starts.append(words)
        return real("false")

    real = subprocess.Popen
    monkeypatch.setattr(restart.subprocess, "Popen", popen)
    monkeypatch.setattr(Restarts, "_hosts_left", hosts_left)
    assert restarts_of(plan, tmp_path).run(3) == 1
    assert len(starts) == 1


def test_ranks_that_ssh_has_started_are_told(plan, tmp_path, capfd):
    restarts = restarts_of(plan, tmp_path)
    words = ["-m", "megavlm", "--local_rank=0", "train", "run of mine.yaml", "train.steps=3"]
    environment = {**os.environ, "RANK": "0"}
    with (
        subprocess.Popen(["sleep", "60"]) as launcher,
        subprocess.Popen(
            [sys.executable, "-c", RANK, *words], env=environment, stdout=subprocess.PIPE
        ) as rank,
    ):
        assert rank.stdout is not None and rank.stdout.readline()  # it listens
        restarts._launcher = launcher
        restarts._stop(signal.SIGUSR1, None)
        assert rank.wait(20) == 75 and launcher.poll() is None
        restarts._stop(signal.SIGUSR1, None)
        assert launcher.wait(20) == -signal.SIGTERM
    assert "SIGUSR1: no rank is on this machine" in capfd.readouterr().err


def test_a_host_that_hangs_is_silent(plan, tmp_path, monkeypatch):
    """It takes the connection, and then waits for a disk."""
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text('#!/bin/sh\ncase "$*" in *hung*) exec sleep 60 ;; *gone*) exit 255 ;; esac\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ssh.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(restart, "ANSWER_SECONDS", 1)
    started = time.monotonic()
    assert restarts_of(plan, tmp_path, "a hung gone")._silent_hosts() == ["hung", "gone"]
    assert time.monotonic() - started < 30
