from pathlib import Path

import pytest

from megavlm.errors import CheckpointError
from megavlm.files import folder as folders
from megavlm.files.folder import Folder


def test_a_folder_on_the_disk_has_a_path(tmp_path, monkeypatch):
    assert Folder(f"file://{tmp_path}/run").local_path == tmp_path / "run"
    assert Folder(tmp_path).local_path == tmp_path
    monkeypatch.chdir(tmp_path)
    assert Folder("run").local_path == Path.cwd() / "run"
    assert Folder("memory://run").local_path is None


@pytest.mark.parametrize("name", ["../outside", "a/b", "/etc/passwd", "..", ".", ""])
def test_only_what_is_in_a_folder_is_opened(tmp_path, name):
    folder = Folder(tmp_path)
    for use in (
        folder.read,
        folder.size,
        folder.has,
        folder.delete_file,
        lambda name: folder.open(name, "rb"),
        lambda name: folder.open(name, "wb"),
        lambda name: folder.write_atomically(name, b""),
    ):
        with pytest.raises(CheckpointError, match="is no name of a file in "):
            use(name)


def test_a_disk_that_cannot_be_read_is_told():
    """The kernel answers EIO where a process has no memory."""
    with Folder("/proc/self").open("mem", "rb") as file:
        for read in (lambda: file.read(8), file.read, lambda: file.readinto(bytearray(1 << 20))):
            with pytest.raises(CheckpointError, match="cannot read /proc/self/mem: Input/output"):
                read()


def test_large_files_are_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "MAX_SMALL_BYTES", 10)
    (tmp_path / "small").write_bytes(bytes(10))
    (tmp_path / "large").write_bytes(bytes(11))
    assert Folder(tmp_path).read("small") == bytes(10)
    with pytest.raises(CheckpointError, match="large is larger than 10 bytes"):
        Folder(tmp_path).read("large")
