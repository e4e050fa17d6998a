"""The C++ and CUDA kernels against plain fp64 loops; CUDA under tests/csrc/emulator."""

import os
import subprocess

import pytest

from tests.csrc import build

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="no C++ compiler (g++, or CXX)")

TARGETS = {"cpu": {}, "sm80": {"EMULATED_CAPABILITY": "80"}, "sm90": {"EMULATED_CAPABILITY": "90"}}


def run(program: str, *arguments: str, sanitize: bool = False, **environment: str):
    command = [build.build(program, sanitize), *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def run_checks(target: str, *arguments: str, sanitize: bool = False, **environment: str):
    program = "cpu" if target == "cpu" else "cuda"
    run(program, *arguments, sanitize=sanitize, **TARGETS[target], **environment)


def test_emulator():
    run("selftest")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("operation", ["forward", "backward", "norm"])
def test_random_problems(operation: str, target: str):
    run_checks(target, "--operation", operation, "--cases", "4")


def test_few_queries():
    """On a large GPU, so that the image tokens are split."""
    sizes = ["--text", "1", "--image", "1500"]
    run_checks(
        "sm90", "--operation", "forward", "--cases", "5", *sizes, EMULATED_MULTIPROCESSORS="132"
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("sanitize", [False, True], ids=["plain", "sanitized"])
@pytest.mark.parametrize("target", TARGETS)
def test_many_random_problems(target: str, sanitize: bool):
    run_checks(target, "--cases", "20" if sanitize else "200", "--seed", "1000", sanitize=sanitize)
