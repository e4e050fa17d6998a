"""The build's own record of the CUDA kernels: no spilled registers, and the instructions meant."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megavlm.ops import library

ROOT = Path(__file__).parents[2]
OBJECTS = sorted((ROOT / "build/operators").glob("cuda_*.o"))
CUOBJDUMP = shutil.which("cuobjdump") or next(
    map(str, Path(sys.prefix).glob("lib/python*/site-packages/nvidia/cu13/bin/cuobjdump")), None
)

HAS_CUDA_KERNELS = library.built() == "for CPUs and GPUs"
pytestmark = pytest.mark.skipif(not HAS_CUDA_KERNELS, reason="built without CUDA kernels (no nvcc)")


def test_the_products_are_those_that_the_generator_writes(tmp_path):
    for name in ("make_wgmma.py", "wgmma.cuh"):
        shutil.copy(ROOT / "csrc/cuda" / name, tmp_path)
    subprocess.run([sys.executable, str(tmp_path / "make_wgmma.py")], check=True)
    assert (tmp_path / "wgmma.cuh").read_text() == (ROOT / "csrc/cuda/wgmma.cuh").read_text()


def test_every_kernel_file_was_built():
    sources = (ROOT / "csrc/cuda").glob("*.cu")
    assert {path.stem for path in OBJECTS} == {f"cuda_{source.stem}" for source in sources}


@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: path.stem)
def test_no_register_is_spilled(path):
    log = path.with_suffix(".log").read_text()
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert spills or path.stem == "cuda_cross_attention"  # which has no kernels, only chooses
    assert all(stores == loads == "0" for stores, loads in spills), log
    assert "serialized" not in log and "warning" not in log, log


@pytest.mark.skipif(CUOBJDUMP is None, reason="no cuobjdump (pip install nvidia-cuda-cuobjdump)")
@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: path.stem)
def test_the_tensor_cores_and_the_copy_engine_are_used(path):
    wanted = {"_sm90": {"HGMMA", "UTMALDG"}, "_sm80": {"HMMA", "LDGSTS"}, "decode": {"HMMA"}}
    for part, instructions in wanted.items():
        if part in path.stem:
            search = f"{Path(str(CUOBJDUMP)).parent}:{os.environ['PATH']}"  # it calls nvdisasm
            sass = subprocess.run(
                [str(CUOBJDUMP), "--dump-sass", str(path)],
                env=os.environ | {"PATH": search},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            assert {name for name in instructions if name in sass} == instructions
