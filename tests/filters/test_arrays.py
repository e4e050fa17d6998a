import numpy as np
import pytest

from megavlm.files.folder import Folder
from megavlm.filters.arrays import load_arrays, read_part, save_arrays, write_parts

ROW = np.dtype([("number", "<i8"), ("hash", "u1", 3)])


@pytest.mark.parametrize("place", ["{}", "memory://{}"])
def test_parts_of_several_files(tmp_path, place):
    """Rows of a part keep their order; a part that has none in a file, or in any, is empty."""
    folder = Folder(place.format(tmp_path))
    parts = {"a": [2, 0, 2, 2], "b": [1, 1], "c": []}
    first = 0
    for name, part_of in parts.items():
        rows = np.zeros(len(part_of), ROW)
        rows["number"] = np.arange(first, first + len(rows))
        rows["hash"] = rows["number"][:, None] + 100
        write_parts(folder, name, rows, np.array(part_of, np.int64), 4)
        first += len(rows)
    for part, numbers in enumerate([[1], [4, 5], [0, 2, 3], []]):
        rows = read_part(folder, [*parts], part, ROW)
        assert rows["number"].tolist() == numbers
        assert rows["hash"].tolist() == [[n + 100] * 3 for n in numbers]


def test_arrays_are_kept(tmp_path):
    save_arrays(Folder(tmp_path), "x.npz", a=np.arange(3), b=np.ones((1, 2), np.uint8))
    arrays = load_arrays(Folder(tmp_path), "x.npz")
    assert arrays["a"].tolist() == [0, 1, 2] and arrays["b"].tolist() == [[1, 1]]
