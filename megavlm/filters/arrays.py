"""Arrays that workers leave for each other, in files that are whole or not there at all."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megavlm.files.folder import Folder

Rows = NDArray[np.void]
"""With named fields."""


def save_arrays(folder: Folder, name: str, **arrays: NDArray[np.generic]) -> None:
    """Write arrays by their names."""
    content = io.BytesIO()
    np.savez(content, **arrays)  # pyright: ignore[reportArgumentType]  (its last is no array)
    folder.write_atomically(name, content.getvalue())


def load_arrays(folder: Folder, name: str) -> dict[str, Any]:
    """The arrays that were saved, by name."""
    with np.load(io.BytesIO(read_whole(folder, name)), allow_pickle=False) as arrays:
        return dict(arrays)


def read_whole(folder: Folder, name: str) -> bytes:
    """A file of any size."""
    size = folder.size(name)
    with folder.open(name, "rb", [(0, size)]) as file:
        return file.read(size)


def write_parts(
    folder: Folder, name: str, rows: Rows, part_of: NDArray[np.integer], parts: int
) -> None:
    """Write rows ordered by their part, so that each part is one range of bytes.

    The file begins with parts + 1 integers (little-endian, 64 bits): where each part begins, in
    bytes, and where the last one ends. Of equal parts the rows keep their order.
    """
    starts = np.cumsum([0, *np.bincount(part_of, minlength=parts)]) * rows.itemsize
    head = (8 * (parts + 1) + starts).astype("<i8")
    content = np.empty(head[-1], np.uint8)
    content[: head.nbytes] = head.view(np.uint8)
    order = np.argsort(part_of, kind="stable")
    np.take(rows, order, out=content[head.nbytes :].view(rows.dtype), mode="clip")
    folder.write_atomically(name, content.data)


def read_part(folder: Folder, names: Sequence[str], part: int, row: np.dtype[np.void]) -> Rows:
    """The rows of one part of several files, one file after the other."""
    heads = folder.read_ranges(names, [(8 * part, 8 * part + 16)] * len(names))
    ranges = [(int(start), int(stop)) for start, stop in (np.frombuffer(h, "<i8") for h in heads)]
    there = [n for n, (start, stop) in enumerate(ranges) if start < stop]
    if not there:
        return np.empty(0, row)
    contents = folder.read_ranges([names[n] for n in there], [ranges[n] for n in there])
    return np.frombuffer(b"".join(contents), row)
