"""Builds check.cpp with the CPU kernels, or with the CUDA kernels under the emulator.

python -m tests.csrc.build cpu|cuda|selftest [--sanitize] prints the program's path. `selftest` is
for the emulator itself. --sanitize: GCC's address and undefined-behaviour sanitizers, which find
accesses out of bounds, instead of the emulator's search for races.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setup import CSRC, ROOT, cpu_sources

HERE = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
FLAGS = ["-std=c++20", "-O2", "-g", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
# GCC's hooks for memory accesses, without its library: emulator/races.cpp has its own. Addresses
# in its messages are the program's.
RACES = ["-fsanitize=thread", "-fno-pie"]
EMULATED = ["-DCHECK_CUDA", f"-I{HERE / 'emulator'}", f"-I{CSRC / 'cuda'}"]
INCLUDE = re.compile(r'^\s*#\s*include\s+["<](.+?)[">]', re.MULTILINE)


def sources_of(path: Path, seen: set[Path], directories: list[Path]) -> set[Path]:
    """The file and all of ours that it includes."""
    if path not in seen:
        seen.add(path)
        for name in INCLUDE.findall(path.read_text()):
            candidates = [directory / name for directory in [path.parent, *directories]]
            found = next((file.resolve() for file in candidates if file.is_file()), None)
            if found:
                sources_of(found, seen, directories)
    return seen


def compile_object(source: Path, flags: list[str]) -> Path:
    directories = [Path(flag[2:]) for flag in flags if flag.startswith("-I")]
    digest = hashlib.sha256(" ".join([str(COMPILER), *flags]).encode())
    for file in sorted(sources_of(source, set(), directories)):
        digest.update(file.read_bytes())
    target = BUILD / f"{source.stem}-{digest.hexdigest()[:16]}.o"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}")
        command = [str(COMPILER), *flags, "-c", "-x", "c++", str(source), "-o", str(partial)]
        subprocess.run(command, check=True)
        partial.rename(target)
    return target


def build(kind: str, sanitize: bool = False) -> Path:
    """Returns the program: `cpu` and `cuda` check kernels, `selftest` the emulator."""
    flags = FLAGS + (SANITIZE if sanitize else ["-fno-pie"])
    kernel_flags = EMULATED + ([] if sanitize else RACES)
    emulator = [(file, [*EMULATED, "-O3"]) for file in sorted((HERE / "emulator").glob("*.cpp"))]
    if kind == "cpu":
        parts = [(HERE / "check.cpp", []), *cpu_sources().values()]
    elif kind == "cuda":
        kernels = sorted((CSRC / "cuda").glob("*.cu"))
        parts = [(HERE / "check.cpp", EMULATED), *emulator]
        parts += [(kernel, [*kernel_flags, "-w"]) for kernel in kernels]
    else:
        parts = [(HERE / "emulator_selftest.cu", kernel_flags), *emulator]
    BUILD.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
        objects = list(pool.map(lambda part: compile_object(part[0], flags + part[1]), parts))
    program = BUILD / f"check_{kind}{'_sanitized' if sanitize else ''}"
    digest = hashlib.sha256("\n".join(map(str, objects)).encode()).hexdigest()
    stamp = program.with_suffix(".objects")
    if not program.exists() or not stamp.exists() or stamp.read_text() != digest:
        partial = program.with_suffix(f".{os.getpid()}")
        link = SANITIZE if sanitize else ["-no-pie"]
        subprocess.run(
            [str(COMPILER), *link, *map(str, objects), "-pthread", "-o", str(partial)], check=True
        )
        partial.rename(program)
        stamp.write_text(digest)
    return program


if __name__ == "__main__":
    print(build(sys.argv[1], "--sanitize" in sys.argv))
