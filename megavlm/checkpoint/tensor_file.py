"""safetensors files, written and read one tensor at a time.

The safetensors package writes from tensors that are all in memory, and reads by mapping local
files. A conversion must do neither, and object stores have no files to map.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from megavlm.checkpoint.lazy import Tensors
from megavlm.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000
"""As the safetensors package has it."""
MAX_AXES = 8
"""More than any model has."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    first_byte: int
    """From the start of the file."""

    @property
    def row_bytes(self) -> int:
        """Of a slice along the first axis."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


def tensor_bytes(shape: Iterable[int], dtype: torch.dtype) -> int:
    """Size of a tensor on disk."""
    return math.prod(shape) * dtype.itemsize


def write_tensors(
    file: IO[bytes], tensors: Tensors, metadata: Mapping[str, str] | None = None
) -> tuple[str, int]:
    """Write a file, reading each tensor shortly before its turn; returns its SHA-256 and its bytes.

    Tensors are read in another thread, one after the other.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor_bytes(tensor.shape, tensor.dtype)
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    # A tensor is read ahead, and hashed while it is written; none of it needs the interpreter.
    with ThreadPoolExecutor(2) as pool:

        def write(content: Any) -> int:
            hashing = pool.submit(digest.update, content)
            file.write(content)
            hashing.result()
            return len(content)

        written = write(len(text).to_bytes(8, "little")) + write(text)
        for name, value in _read_ahead(tensors, pool):
            expected = tensors[name]
            assert (tuple(value.shape), value.dtype) == (expected.shape, expected.dtype), name
            written += write(as_bytes(value))
    return digest.hexdigest(), written


def _read_ahead(tensors: Tensors, pool: ThreadPoolExecutor) -> Iterator[tuple[str, Tensor]]:
    """The tensors in order; while one is used, the next is read."""
    reads = ((name, tensor.read) for name, tensor in tensors.items())
    ahead = ((name, pool.submit(read)) for name, read in reads)
    current = next(ahead, None)
    while current is not None:
        name, reading = current
        value = reading.result()
        current = next(ahead, None)
        yield name, value


def as_bytes(tensor: Tensor) -> memoryview:
    """A tensor's memory, row by row; shares it if it can."""
    flat = tensor.detach().contiguous().reshape(-1)
    # Not `numpy()`: it would forbid for good that the memory of an engine is given back.
    array: Any = np.from_dlpack(flat.view(torch.uint8))
    return memoryview(array if flat.numel() else b"")


def read_header(file: IO[bytes], file_bytes: int, where: str) -> dict[str, Entry]:
    """What a file holds; raises CheckpointError, naming `where`, if it cannot be true."""
    try:
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= min(MAX_HEADER_BYTES, file_bytes - 8):
            raise ValueError(f"a header of {size} bytes in a file of {file_bytes}")
        header = parse_json(file.read(size))
        header.pop("__metadata__", None)
        entries: dict[str, Entry] = {}
        end = 0
        for name, fields in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            shape, (start, stop) = fields["shape"], fields["data_offsets"]
            if not (is_shape(shape) and is_count(start) and is_count(stop)):
                raise ValueError(f"{name} has no shape or no place that can be")
            dtype = DTYPES.get(fields["dtype"])
            if dtype is None:
                raise CheckpointError(
                    f"{name} of {where} has type {fields['dtype']}, which is not supported; "
                    f"convert it to one of {', '.join(DTYPES)}"
                )
            if start != end or stop - start != tensor_bytes(shape, dtype):
                raise ValueError(f"{name} does not lie where its shape says")
            entries[name], end = Entry(dtype, tuple(shape), 8 + size + start), stop
        if 8 + size + end != file_bytes:
            raise ValueError(f"{file_bytes} bytes instead of {8 + size + end}: it is cut short?")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{where} is no safetensors file: {error}") from error
    return entries


def parse_json(content: bytes) -> Any:
    """What JSON says; raises ValueError for an object with a key twice, RecursionError if deep."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key comes twice")
        return found

    return json.loads(content.decode(), object_pairs_hook=once)


def is_count(value: Any) -> bool:
    """Whether plain data is a number of bytes or elements, or a step."""
    return type(value) is int and 0 <= value < 2**63  # True is an int, too


def is_shape(value: Any) -> bool:
    """Whether plain data is the shape of a tensor; torch also wants strides that it can count."""
    return (
        type(value) is list
        and len(value) <= MAX_AXES
        and all(map(is_count, value))
        and math.prod(max(n, 1) for n in value) < 2**63
    )


def read_rows(file: IO[bytes], entry: Entry, first: int, into: Tensor) -> None:
    """Fill `into`, contiguous and of the entry's dtype, with rows of a tensor from `first` on.

    A tensor without axes is its own row.
    """
    if into.numel() == 0:
        return
    file.seek(entry.first_byte + first * entry.row_bytes)
    target = as_bytes(into)
    done = 0
    while done < len(target):
        count = file.readinto(target[done:])  # pyright: ignore[reportAttributeAccessIssue]
        if not count:
            raise CheckpointError(f"{getattr(file, 'name', 'a tensor file')} is cut short")
        done += count


def read_tensor(file: IO[bytes], entry: Entry) -> Tensor:
    """A whole tensor."""
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    read_rows(file, entry, 0, tensor)
    return tensor
