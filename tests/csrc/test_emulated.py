"""The C++ and CUDA kernels against plain fp64 loops; CUDA under tests/csrc/emulator."""

import os
import subprocess

import pytest

from tests.csrc import build

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="no C++ compiler (g++, or CXX)")

PARTS = [("cpu", None), ("cuda", "80"), ("cuda", "90")]
PART_IDS = ["cpu", "sm80", "sm90"]


def run(kind: str, *arguments: str, capability: str | None = None, sanitize: bool = False) -> str:
    program = build.build(kind, sanitize)
    environment = os.environ | ({"EMULATED_CAPABILITY": capability} if capability else {})
    done = subprocess.run([program, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_emulator():
    run("selftest")


@pytest.mark.parametrize(("kind", "capability"), PARTS, ids=PART_IDS)
@pytest.mark.parametrize("operation", ["forward", "backward", "norm"])
def test_random_problems(kind: str, capability: str | None, operation: str):
    run(kind, "--operation", operation, "--cases", "12", capability=capability)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("sanitize", [False, True], ids=["plain", "sanitized"])
@pytest.mark.parametrize(("kind", "capability"), PARTS, ids=PART_IDS)
def test_many_random_problems(kind: str, capability: str | None, sanitize: bool):
    cases = "30" if sanitize else "300"
    run(kind, "--cases", cases, "--seed", "1000", capability=capability, sanitize=sanitize)
