"""Files of `torch.save`, read without running what they hold and without loading them whole.

Such a file is a zip archive of one pickle and the tensors' bytes. The pickle is read by torch's
restricted unpickler, which gives every tensor's place; its bytes are read when they are needed.
"""

import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, serialization
from torch._subclasses.fake_tensor import FakeTensorMode

from megavlm.errors import CheckpointError

StandIns = Sequence[tuple[Callable[..., Any], str]]
"""What is called in place of a class or function that a pickle names."""


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

        Raises CheckpointError when the file has changed and ends too early.
        """
        bytes_out: Any = out.view(torch.uint8).numpy()
        # Not mapped: pages of a mapping count as this process's memory.
        with self.path.open("rb") as file:
            file.seek(self.offset_bytes + first * self.dtype.itemsize)
            if file.readinto(bytes_out) != len(bytes_out):
                raise _damaged(self.path, "it ends too early")

    def write(self, tensor: Tensor) -> None:
        """Overwrite the whole tensor in the file."""
        assert (tensor.shape, tensor.dtype) == (self.shape, self.dtype)
        bytes_in: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        with self.path.open("r+b") as file:
            file.seek(self.offset_bytes)
            file.write(bytes_in)


def load_structure(path: Path, stand_ins: StandIns = ()) -> Any:
    """What a file holds, with a StoredTensor for every tensor; tuples become lists.

    Raises CheckpointError for a file that is missing or damaged, and for one that names classes or
    functions other than torch's own for plain data and those in `stand_ins`; nothing of it runs.
    """
    if not path.is_file():
        raise CheckpointError(f"checkpoint file {path} is missing; copy the checkpoint again")
    if not zipfile.is_zipfile(path):
        raise _damaged(path, "it has no archive's end")
    with _only_these_globals(stand_ins):
        try:
            return _stored(torch.load(path, map_location="meta", weights_only=True), path)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"checkpoint file {path} is not loaded because it could run code: it needs "
                f"{_refused_globals(path)}; if you trust who made it, save it again with tensors, "
                "numbers, strings and containers of them only"
            ) from error
        except CheckpointError:
            raise
        except Exception as error:  # a damaged pickle may raise anything
            raise _damaged(path, str(error).partition("\n")[0]) from error


def reserve(path: Path, content: dict[str, Any]) -> Any:
    """Write what `torch.save` would, but of meta tensors only their places, to be filled in.

    Returns the structure with a StoredTensor for every tensor. The archive's checksums of tensors
    are wrong; torch does not look at them.
    """
    with FakeTensorMode():
        on_cpu = _on_cpu(content)
    with serialization.skip_data(materialize_fake_tensors=True):
        torch.save(on_cpu, path)
    return load_structure(path)


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
