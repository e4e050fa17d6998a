"""Arrays that workers leave for each other, in files that are whole or not there at all."""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megavlm.files.folder import Folder


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
