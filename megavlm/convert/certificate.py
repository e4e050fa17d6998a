"""What a conversion read and wrote, tensor by tensor, so that it can be checked later."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megavlm.checkpoint.lazy import Tensors, read_by
from megavlm.checkpoint.tensor_file import NAMES, as_bytes, tensor_bytes
from megavlm.convert.files import read_json
from megavlm.errors import CheckpointError
from megavlm.files.folder import Folder

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

        def read(name: str) -> Tensor:
            value = tensors[name].read()
            if name not in hashes:
                hashes[name] = _sha256(value)
                on_read(value.nbytes)
            return value

        return cls(read_by(read, tensors), hashes)

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


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(as_bytes(tensor)).hexdigest()


def hashes_of_files(folder: Folder) -> dict[str, str | None]:
    """SHA-256 of a folder's JSON, text and Jinja files; None for tensor files, which are listed."""
    return {
        name: hashlib.sha256(folder.read(name)).hexdigest()
        if name.endswith((".json", ".txt", ".jinja"))
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
        seen["sha256"] = _sha256(tensor.read())
        for field, value in fields.items():
            if seen[field] != value:
                raise CheckpointError(
                    f"{where}: {name} has {field} {seen[field]}, its certificate says {value}"
                )
        on_read(tensor_bytes(tensor.shape, tensor.dtype))
    return len(each)


def summary(certificate: dict[str, Any], out: str) -> list[str]:
    """What a conversion to `out` did, in lines."""
    sources, target, left_out = (certificate[key] for key in ("sources", "target", "left_out"))
    lines: list[str] = []
    for source in sources:
        if source["step"]:
            where = " ".join(filter(None, (source["place"], source["tag"])))
            lines.append(f"{where}: read at step {source['step']}")
    bytes_ = target["bytes"]
    size = f"{bytes_ / 1e9:.2f} GB" if bytes_ > 1e7 else f"{bytes_} bytes"
    unchanged = certificate["unchanged"]
    same = f", {unchanged} of them as they were, names and bits" if unchanged else ""
    lines.append(f"{out}: {target['tensors']} tensors, {size}{same}")
    if target["kind"] == "native" and any(source["kind"] != "native" for source in sources):
        for part, sizes in certificate["model"].items():
            told = {k: v for k, v in sizes.items() if v is not None and k != "initial_gate"}
            lines.append(f"for the run file, model.{part}: {json.dumps(told)}")
    if left_out:
        more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        lines.append(f"left out: {', '.join(left_out[:3])}{more}")
    comparison = certificate["comparison"]
    if comparison["compared"]:
        lines.append(
            f"{comparison['what']}: differ by {comparison['worst_difference']:.1e} at most (their "
            f"standard deviation is {comparison['standard_deviation']:.2f})"
        )
    else:
        lines.append(f"not compared: {comparison['reason']}")
    return lines


def read_certificate(folder: Folder) -> dict[str, Any]:
    """Of a converted folder; raises CheckpointError when there is none."""
    if not folder.has(CERTIFICATE_FILE):
        raise CheckpointError(
            f"{folder} has no {CERTIFICATE_FILE}; only `megavlm convert` writes one"
        )
    return read_json(folder, CERTIFICATE_FILE)
