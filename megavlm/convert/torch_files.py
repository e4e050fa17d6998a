"""Files of `torch.save`, read without running what they hold and without loading them whole.

Such a file is a zip archive of one pickle and the tensors' bytes. The pickle is read by torch's
restricted unpickler, which gives every tensor's place; its bytes are read when they are needed.
"""

import os
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, serialization
from torch._subclasses.fake_tensor import FakeTensorMode

from megavlm.errors import CheckpointError
from megavlm.files.folder import READ_REMEDY, is_plain, sync_path

StandIns = Sequence[tuple[Callable[..., Any], str]]
"""What is called in place of a class or function that a pickle names."""
WRITE_REMEDY = "free space or permit writing there, and run again"
MAX_NAME_BYTES = 255  # of ext4, XFS, Lustre and NFS


class Inert:
    """Stands in for an object that nobody reads."""

    def __init__(self, *_: object) -> None:
        """Takes any arguments, and keeps none."""

    def __setstate__(self, _: object) -> None:
        """Takes any state, and keeps none."""


class Attributes(dict[str, Any]):
    """Stands in for an object of which the attributes are read, which become a dict."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes the attributes."""
        self.update(state)


@dataclass(frozen=True)
class StoredTensor:
    """A contiguous tensor in a file."""

    path: Path
    offset_bytes: int
    shape: torch.Size
    dtype: torch.dtype

    def read(self) -> Tensor:
        """The whole tensor."""
        whole = torch.empty(self.shape, dtype=self.dtype)
        self.read_into(whole.view(-1), 0)
        return whole

    def read_into(self, out: Tensor, first: int) -> None:
        """Fill the flat tensor `out` with the elements from `first` on.

        Raises CheckpointError when the file has changed and ends too early, or cannot be read.
        """
        bytes_out: Any = out.view(torch.uint8).numpy()
        # Not mapped: pages of a mapping count as this process's memory.
        with reading(self.path), self.path.open("rb") as file:
            file.seek(self.offset_bytes + first * self.dtype.itemsize)
            if file.readinto(bytes_out) != len(bytes_out):
                raise _damaged(self.path, "it ends too early")

    def write(self, tensor: Tensor) -> None:
        """Overwrite the whole tensor in the file; raises CheckpointError when the disk is full."""
        assert (tensor.shape, tensor.dtype) == (self.shape, self.dtype)
        bytes_in: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        with writing(self.path), self.path.open("r+b") as file:
            file.seek(self.offset_bytes)
            file.write(bytes_in)


def load_structure(path: Path, stand_ins: StandIns = ()) -> Any:
    """What a file holds, with a StoredTensor for every tensor; tuples become lists.

    Raises CheckpointError for a file that is missing, unreadable or damaged, and for one that names
    classes or functions other than torch's own for plain data and those in `stand_ins`; nothing of
    it runs.
    """
    with reading(path), _only_these_globals(stand_ins):
        if not path.is_file():
            raise CheckpointError(f"checkpoint file {path} is missing; copy the checkpoint again")
        with path.open("rb") as file:
            file.read(1)  # is_zipfile would keep the disk's error to itself
        if not zipfile.is_zipfile(path):
            raise _damaged(path, "it has no archive's end")
        try:
            return _stored(torch.load(path, map_location="meta", weights_only=True), path)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"checkpoint file {path} is not loaded because it could run code: it needs "
                f"{_refused_globals(path)}; if you trust who made it, save it again with tensors, "
                "numbers, strings and containers of them only"
            ) from error
        except (CheckpointError, OSError):
            raise
        except Exception as error:  # a damaged pickle may raise anything
            raise _damaged(path, str(error).partition("\n")[0]) from error


def reserve(path: Path, content: dict[str, Any]) -> Any:
    """Write what `torch.save` would, but of meta tensors only their places, to be filled in.

    Returns the structure with a StoredTensor for every tensor. The archive's checksums of tensors
    are wrong; torch does not look at them. Raises CheckpointError when the file cannot be written.
    """
    with FakeTensorMode():
        on_cpu = _on_cpu(content)
    # A file that torch opens itself would fail without saying why.
    with writing(path), path.open("wb") as file:
        with serialization.skip_data(materialize_fake_tensors=True):
            torch.save(on_cpu, file)
    return load_structure(path)


def sync(paths: Iterable[Path]) -> None:
    """Have files, and the names in folders, on their disk."""
    for path in paths:
        with writing(path):
            sync_path(path)


def newest_tag(folder: Path, pointer: str) -> str:
    """What the file `pointer` of a run's folder names as its newest checkpoint."""
    path = folder / pointer
    with reading(path):
        if not path.is_file():
            raise CheckpointError(
                f"{folder} has no file '{pointer}', which names its newest checkpoint; pass the "
                "folder that the run saved to"
            )
        return plain_name(path.read_text(errors="replace").strip(), path)


def step_folder_of(folder: Path, tag: str) -> Path:
    """The folder of one checkpoint in a run's folder; raises CheckpointError unless it exists."""
    step_folder = folder / plain_name(tag, folder)
    with reading(step_folder):
        if not step_folder.is_dir():
            there = sorted(path.name for path in folder.glob("*") if path.is_dir())
            raise CheckpointError(f"{folder} has no checkpoint '{tag}'; it has {there}")
    return step_folder


def plain_name(name: object, where: Path) -> str:
    """A name that a checkpoint's file gives, if it is one of something in a folder itself.

    Raises CheckpointError for what would lead out of the folder, or is no name at all.
    """
    if (
        not isinstance(name, str)
        or not is_plain(name)
        or "\\" in name
        or not name.isprintable()  # nor can half characters be encoded
        or len(name.encode()) > MAX_NAME_BYTES
    ):
        raise CheckpointError(
            f"{where} gives the name {name!r:.100}, which is none that a file or folder in it can "
            "have; copy the checkpoint again from where it was saved"
        )
    return name


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what a disk says into a CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror or error}; {READ_REMEDY}"
        ) from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what a disk says, or torch after it, into a CheckpointError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        said = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise CheckpointError(f"cannot write {path}: {said}; {WRITE_REMEDY}") from error


@contextmanager
def _only_these_globals(stand_ins: StandIns) -> Iterator[None]:
    """Let the unpickler call these beside torch's own, and not what others have registered."""
    registered = serialization.get_safe_globals()
    serialization.clear_safe_globals()
    try:
        serialization.add_safe_globals(list(stand_ins))
        yield
    finally:
        serialization.clear_safe_globals()
        serialization.add_safe_globals(registered)


def _refused_globals(path: Path) -> str:
    try:
        names = serialization.get_unsafe_globals_in_checkpoint(path)
    except pickle.UnpicklingError:  # torch does not even know the opcodes
        names = []
    return ", ".join(sorted(names)) or "more than a pickle of plain data"


def _stored(value: Any, path: Path) -> Any:
    match value:
        case Tensor():
            return _stored_tensor(value, path)
        case torch.Size():
            return value
        case dict():
            return {key: _stored(item, path) for key, item in value.items()}
        case list() | tuple():
            return [_stored(item, path) for item in value]
        case _:
            return value


def _stored_tensor(tensor: Tensor, path: Path) -> StoredTensor:
    if not tensor.is_contiguous():
        raise CheckpointError(
            f"checkpoint file {path} holds a tensor {tuple(tensor.shape)} that is not contiguous; "
            "save it again with contiguous tensors"
        )
    storage: Any = tensor.untyped_storage()
    offset_bytes = storage._checkpoint_offset + tensor.storage_offset() * tensor.itemsize
    if offset_bytes + tensor.numel() * tensor.itemsize > os.path.getsize(path):
        raise _damaged(path, "a tensor reaches past its end")
    return StoredTensor(path, offset_bytes, tensor.shape, tensor.dtype)


def _on_cpu(value: Any) -> Any:
    match value:
        case Tensor():
            return torch.empty(value.shape, dtype=value.dtype)
        case dict():
            return {key: _on_cpu(item) for key, item in value.items()}
        case _:
            return value


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint file {path} is damaged or no file of torch.save ({reason}); copy it again"
    )
