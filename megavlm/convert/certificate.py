"""What a conversion read and wrote, tensor by tensor, so that it can be checked later."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megavlm.checkpoint.folder import Folder
from megavlm.checkpoint.lazy import LazyTensor, Tensors
from megavlm.checkpoint.tensor_file import NAMES, as_bytes, tensor_bytes
from megavlm.convert.files import read_json
from megavlm.errors import CheckpointError

CERTIFICATE_FILE = "certificate.json"


@dataclass(frozen=True)
class Record:
    """The tensors of one side that have been read or written."""

    tensors: Tensors
    hashes: dict[str, str]
    """SHA-256 of their bytes, row by row, by their names."""

    @classmethod
    def of(cls, tensors: Tensors, on_read: Callable[[int], None] = lambda _: None) -> "Record":
        """Tensors that are hashed when they are read first."""
        hashes: dict[str, str] = {}

        def read(name: str, tensor: LazyTensor) -> Tensor:
            value = tensor.read()
            if name not in hashes:
                hashes[name] = hashlib.sha256(as_bytes(value)).hexdigest()
                on_read(tensor_bytes(tensor.shape, tensor.dtype))
            return value

        lazy = {
            name: LazyTensor(t.shape, t.dtype, lambda name=name, t=t: read(name, t))
            for name, t in tensors.items()
        }
        return cls(lazy, hashes)

    def summary(self) -> dict[str, Any]:
        """As the certificate has it: counts, and every tensor."""
        used = {name: self.tensors[name] for name in sorted(self.hashes)}
        return {
            "tensors": len(used),
            "bytes": sum(tensor_bytes(t.shape, t.dtype) for t in used.values()),
            "each": {
                name: {
                    "dtype": NAMES[t.dtype],
                    "shape": list(t.shape),
                    "sha256": self.hashes[name],
                }
                for name, t in used.items()
            },
        }


def hashes_of_files(folder: Folder) -> dict[str, str | None]:
    """SHA-256 of a folder's JSON and text files; None for others, whose tensors are listed."""
    return {
        name: hashlib.sha256(folder.read(name)).hexdigest()
        if name.endswith((".json", ".txt"))
        else None
        for name in folder.names()
        if name != CERTIFICATE_FILE
    }


def check_target(target: dict[str, Any], tensors: Tensors, folder: Folder) -> None:
    """Raise CheckpointError unless a converted folder's files, and their tensors, are its own."""
    there, certified = hashes_of_files(folder), target["files"]
    for kind, names, known in (("tensor", tensors, target["each"]), ("file", there, certified)):
        for name in sorted(set(names) - set(known)):
            raise CheckpointError(
                f"{folder} holds the {kind} {name}, which its certificate does not list; remove it"
            )
    for name, digest in certified.items():
        if name not in there:
            raise CheckpointError(f"{folder} lacks {name}, which its certificate lists")
        if there[name] != digest:
            raise CheckpointError(
                f"{folder}: {name} has sha256 {there[name]}, its certificate says {digest}"
            )


def check_against(
    side: dict[str, Any], tensors: Tensors, where: str, on_read: Callable[[int], None]
) -> int:
    """Read all tensors of a side of a certificate again; returns how many there are.

    Raises CheckpointError that names the first tensor which is missing or differs.
    """
    each: dict[str, dict[str, Any]] = side["each"]
    for name, fields in each.items():
        if name not in tensors:
            raise CheckpointError(f"{where} lacks {name}, which its certificate lists")
        tensor = tensors[name]
        seen = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape)}
        seen["sha256"] = hashlib.sha256(as_bytes(tensor.read())).hexdigest()
        for field, value in fields.items():
            if seen[field] != value:
                raise CheckpointError(
                    f"{where}: {name} has {field} {seen[field]}, its certificate says {value}"
                )
        on_read(tensor_bytes(tensor.shape, tensor.dtype))
    return len(each)


def read_certificate(folder: Folder) -> dict[str, Any]:
    """Of a converted folder; raises CheckpointError when there is none."""
    if not folder.has(CERTIFICATE_FILE):
        raise CheckpointError(
            f"{folder} has no {CERTIFICATE_FILE}; only `megavlm convert` writes one"
        )
    return read_json(folder, CERTIFICATE_FILE)
