"""Installs the package; builds the extensions in csrc/ where their compilers are found.

- `megavlm._C`: the operators. C++ always; CUDA kernels too where nvcc is (MEGAVLM_CUDA=auto), must
  be (1) or is left out (0). CUDA_HOME names another toolkit.
- `megavlm._data`: index builders of the data pipeline.

MAX_JOBS: compilers at once (default: the cores). Without a C++ compiler the package installs all
the same and runs on plain torch and Python.
"""

import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import Extension, find_packages, setup
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"
OBJECTS = ROOT / "build/operators"  # kept between builds: only what changed is compiled again

OLDEST_TORCH = "0x020b000000000000"  # 2.11: the binary runs with it and every later one
COMPILER = shlex.split(os.environ.get("CXX", "g++"))
CXX = [*COMPILER, "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall"]
# Contraction and errno change no rule of IEEE arithmetic that the kernels rely on: infinities stay.
CPU_KERNELS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
INSTRUCTION_SETS = {
    "baseline": [],
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "avx512bf16": ["-march=x86-64-v4", "-mavx512bf16", "-mprefer-vector-width=512"],
}
NVCC = ["-std=c++17", "-O3", "--use_fast_math", "-lineinfo", "--expt-relaxed-constexpr"]
NVCC += ["-Xcompiler=-fPIC", "-Xptxas=-v", f"-I{CSRC / 'cuda'}"]


def architectures(source: Path) -> list[str]:
    """The GPUs a file is compiled for, by its name."""
    if "_sm90" in source.stem:
        codes = [("90a", "sm_90a")]  # wgmma and TMA are Hopper's alone
    elif "_sm80" in source.stem:
        codes = [("80", "sm_80"), ("80", "compute_80")]  # later GPUs translate the second
    else:
        codes = [("80", "sm_80"), ("90", "sm_90"), ("90", "compute_90")]
    return [f"-gencode=arch=compute_{virtual},code={code}" for virtual, code in codes]


def cuda_home() -> Path | None:
    """The CUDA toolkit to build with, if any."""
    wanted = os.environ.get("MEGAVLM_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"MEGAVLM_CUDA={wanted!r}: must be auto, 0 or 1")
    if wanted == "0":
        return None
    chosen, on_path = os.environ.get("CUDA_HOME"), shutil.which("nvcc")
    homes = [Path(on_path).resolve().parents[1]] if on_path else []
    homes += [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
    for home in [Path(chosen)] if chosen else homes:
        if (home / "bin/nvcc").exists() and runtime_folder(home):
            return home
    if wanted == "1" or chosen:
        where = f"in CUDA_HOME={chosen}" if chosen else "on PATH or below /usr/local; set CUDA_HOME"
        sys.exit(f"MEGAVLM_CUDA={wanted}, but no CUDA toolkit with bin/nvcc {where}")
    return None


def runtime_folder(cuda: Path) -> Path | None:
    """Where the CUDA runtime for static linking lies."""
    for folder in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib"):
        if (cuda / folder / "libcudart_static.a").exists():
            return cuda / folder
    return None


def torch_folder() -> Path:
    """Of the installed torch, found without importing it, which takes seconds."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        sys.exit(
            "torch is not installed in this build environment: install torch first, then megavlm "
            "with pip install --no-build-isolation"
        )
    return Path(torch.origin).parent


def cpu_sources() -> dict[str, tuple[Path, list[str]]]:
    """Object name -> source and flags of the CPU's kernels."""
    kernels = CSRC / "cpu/instruction_set.cpp"  # compiled once for each
    plain = sorted(set((CSRC / "cpu").glob("*.cpp")) - {kernels})
    sources = {f"cpu_{source.stem}": (source, ["-O2"]) for source in plain}
    intel = platform.machine() in ("x86_64", "AMD64")
    for name, flags in INSTRUCTION_SETS.items() if intel else [("baseline", [])]:
        sources[f"isa_{name}"] = (kernels, [*CPU_KERNELS, *flags, f"-DMEGAVLM_ISA={name}"])
    return sources


def compile_commands(cuda: Path | None) -> dict[str, list[str]]:
    """Object name -> the command that compiles it, without `-o`; the source comes last."""
    library = [
        *CXX,
        "-O2",
        f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}",
        "-DTORCH_STABLE_ONLY",
        "-DPy_LIMITED_API=0x030b0000",
        f"-isystem{torch_folder() / 'include'}",
        f"-I{sysconfig.get_path('include')}",
        *(["-DMEGAVLM_WITH_CUDA"] if cuda else []),
    ]
    commands = {"library": [*library, str(CSRC / "library.cpp")]}
    for name, (source, flags) in cpu_sources().items():
        commands[name] = [*CXX, *flags, str(source)]
    if cuda:
        for source in sorted((CSRC / "cuda").glob("*.cu")):
            nvcc = [str(cuda / "bin/nvcc"), *NVCC, *architectures(source), "-c"]
            commands[f"cuda_{source.stem}"] = [*nvcc, str(source)]
    return commands


class Build(build_ext):
    """Compiles `megavlm._C` file by file, and only what changed; the rest as setuptools does."""

    def build_extension(self, ext: Extension) -> None:
        if ext.name != "megavlm._C":
            super().build_extension(ext)
            return
        target = Path(self.get_ext_fullpath(ext.name))
        cuda = cuda_home()
        try:
            build_operators(target, cuda)
        except CompileError as error:
            if cuda is None or os.environ.get("MEGAVLM_CUDA") == "1":
                raise
            print(f"{error}\n\nmegavlm: the CUDA kernels cannot be built; going on without them")
            build_operators(target, None)


def build_operators(target: Path, cuda: Path | None) -> None:
    """Compile and link `megavlm._C`."""
    OBJECTS.mkdir(parents=True, exist_ok=True)
    commands = compile_commands(cuda)
    jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
    with ThreadPoolExecutor(jobs) as pool:
        compiled = list(
            pool.map(lambda name: compile_one(OBJECTS / name, commands[name]), commands)
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    # No run path to torch: Python has loaded it before the operators.
    libraries = [f"-L{torch_folder() / 'lib'}", "-ltorch_cpu", *cuda_libraries(cuda)]
    run([*COMPILER, "-shared", "-o", str(target), *map(str, compiled), *libraries])
    print(f"megavlm._C: built with {'CPU and CUDA' if cuda else 'CPU'} kernels")


def compile_one(stem: Path, command: list[str]) -> Path:
    """Compile unless the same command made this object from the same sources; keeps a .log."""
    output, log, key_file = (stem.with_suffix(suffix) for suffix in (".o", ".log", ".key"))
    source = Path(command[-1])
    headers = sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cuh"))
    key = hashlib.sha256(repr(command).encode() + compiler_version(command[0]).encode())
    for path in (source, *headers, torch_folder() / "version.py"):
        key.update(path.read_bytes())
    if output.exists() and key_file.exists() and key_file.read_text() == key.hexdigest():
        return output
    compiler = command if "-c" in command else [*command[:-1], "-c", command[-1]]
    log.write_text(run([*compiler, "-o", str(output)]))
    key_file.write_text(key.hexdigest())
    return output


@cache
def compiler_version(program: str) -> str:
    """What it says of itself."""
    return run([program, "--version"])


def run(command: list[str]) -> str:
    """What the command printed; raises CompileError, which an optional extension survives."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise CompileError(f"cannot run {command[0]}: {error}") from error
    if done.returncode != 0:
        raise CompileError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def cuda_libraries(cuda: Path | None) -> list[str]:
    """The CUDA runtime, linked statically, so that the binary also loads without a driver."""
    if cuda is None:
        return []
    return [f"-L{runtime_folder(cuda)}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]


CUDA_REQUIRED = os.environ.get("MEGAVLM_CUDA") == "1"
OPERATORS = Extension("megavlm._C", [], py_limited_api=True, optional=not CUDA_REQUIRED)
DATA = Pybind11Extension("megavlm._data", ["csrc/data/packing.cpp"], cxx_std=17, optional=True)

if __name__ == "__main__":  # not where tests/csrc/build.py reads the flags
    setup(
        packages=find_packages(include=["megavlm", "megavlm.*"]),
        package_data={
            f"megavlm.{part}": ["*.j2", "*.html"] for part in ("data", "eval", "filters", "serve")
        },
        ext_modules=[OPERATORS, DATA],
        cmdclass={"build_ext": Build},
    )
