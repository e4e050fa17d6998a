"""Checkpoints of the model, not of the engine: whole named tensors in safetensors files.

A checkpoint is a folder `step-00000200` with one file a rank, and `state.json`, which names every
tensor's file and every file's SHA-256. It gets its name only when it is complete.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megavlm.errors import CheckpointError

FORMAT = 1
STATE_FILE = "state.json"


def save_checkpoint(
    root: Path, step: int, tensors: Iterable[tuple[str, Tensor]], state: dict[str, Any], keep: int
) -> Path:
    """Write the checkpoint of a step; collective. Keeps the newest `keep` checkpoints of `root`.

    Every rank iterates over the same tensors and writes its turn of them. `state` is plain data.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    folder = root / f"step-{step:08d}"
    partial = folder.with_suffix(".partial")
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    mine = {key: t.contiguous() for i, (key, t) in enumerate(tensors) if i % ranks == rank}
    name = f"tensors-{rank:05d}-of-{ranks:05d}.safetensors"
    save_file(mine, partial / name)
    _sync(partial / name)
    written: list[Any] = [None] * ranks
    dist.all_gather_object(written, (name, _sha256(partial / name), list(mine)))
    if rank == 0:
        files = {name: {"sha256": digest, "tensors": keys} for name, digest, keys in written}
        content = {"format": FORMAT, "step": step, **state, "files": files}
        (partial / STATE_FILE).write_text(json.dumps(content, indent=1))
        _sync(partial / STATE_FILE)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(partial, folder)
        for old in _checkpoints(root)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return folder


def latest_checkpoint(root: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    return max(_checkpoints(root), default=None)


def read_state(folder: Path) -> dict[str, Any]:
    """The plain data of a checkpoint; raises CheckpointError when it is missing or broken."""
    path = folder / STATE_FILE
    try:
        state = json.loads(path.read_text())
        version = state["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error}") from error
    if version != FORMAT:
        raise CheckpointError(
            f"checkpoint {folder} has format {version}; this version reads {FORMAT}"
        )
    return state


def tensor_reader(folder: Path) -> Callable[[str], Tensor]:
    """A function from a tensor's key to the whole tensor on the CPU; files are checked first.

    Raises CheckpointError for a file that is missing or not as it was written, and, later, for a
    key that the checkpoint does not hold.
    """
    files: dict[str, dict[str, Any]] = read_state(folder)["files"]
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(
                f"checkpoint file {path} is missing; delete {folder} to go on from an earlier one"
            )
        if _sha256(path) != entry["sha256"]:
            raise CheckpointError(
                f"checkpoint file {path} is corrupt (its SHA-256 does not match); delete {folder} "
                "to go on from an earlier one"
            )
    file_of = {key: folder / name for name, entry in files.items() for key in entry["tensors"]}

    def read(key: str) -> Tensor:
        if key not in file_of:
            raise CheckpointError(
                f"checkpoint {folder} holds no tensor {key}; it is of another model"
            )
        try:
            with safe_open(file_of[key], framework="pt") as file:
                return file.get_tensor(key)
        except SafetensorError as error:
            raise CheckpointError(f"checkpoint file {file_of[key]} is corrupt: {error}") from error

    return read


def _checkpoints(root: Path) -> list[Path]:
    return sorted(path.parent for path in root.glob(f"step-*[0-9]/{STATE_FILE}"))


def _sync(path: Path) -> None:
    """Have the file on disk before the folder gets its name."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
