import gc
import multiprocessing
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import pytest

from megavlm.errors import CheckpointError, StorageError
from megavlm.files import folder as folders
from megavlm.files.folder import Folder


def test_a_folder_on_the_disk_has_a_path(tmp_path, monkeypatch):
    assert Folder(f"file://{tmp_path}/run").local_path == tmp_path / "run"
    assert Folder(tmp_path).local_path == tmp_path
    monkeypatch.chdir(tmp_path)
    assert Folder("run").local_path == Path.cwd() / "run"
    assert Folder("memory://run").local_path is None


def test_a_file_in_place_of_a_folder_and_a_folder_in_place_of_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    file = Folder(tmp_path / "file")
    for use in (
        file.names,
        file.create,
        file.check_writable,
        (file / "below").create,
        lambda: file.has("a"),
        lambda: file.read("a"),
        lambda: file.open("a", "rb"),
        lambda: file.open("a", "wb"),
        lambda: file.size("a"),
        lambda: file.mapped("a"),
        lambda: (file / "below").read_ranges(["a"], [(0, 1)]),
    ):
        with pytest.raises(StorageError) as caught:
            use()
        assert f"{tmp_path}/file is a file, not a folder; name a folder" in str(caught.value)
    folder = Folder(tmp_path)
    for use in (
        lambda: folder.read("folder"),
        lambda: folder.open("folder", "rb"),
        lambda: folder.open("folder", "wb"),
        lambda: folder.write_atomically("folder", b""),
    ):
        with pytest.raises(StorageError) as caught:
            use()
        assert f"{tmp_path}/folder is a folder, not a file; name a file" in str(caught.value)
    store = Folder("memory://misfits")
    store.write_atomically("a", b"")
    with pytest.raises(StorageError, match="misfits/a is a file, not a folder; name a folder"):
        (store / "a").names()


@pytest.mark.parametrize(
    ("told", "modified"),
    [
        (1_700_000_000, 1.7e9),
        (1.7e9, 1.7e9),
        ("1700000000.0", 1.7e9),
        ("2023-11-14T22:13:20Z", 1.7e9),
        ("2023-11-14T22:13:20.000+00:00", 1.7e9),
        ("Tue, 14 Nov 2023 22:13:20 GMT", 1.7e9),
        (datetime.fromtimestamp(1.7e9, UTC), 1.7e9),
        ("long ago", 0),
        (None, 0),
    ],
)
def test_times_of_files_as_stores_tell_them(told, modified):
    for name in ("mtime", "LastModified"):
        assert folders._entry({"size": 3, name: told}) == (3, modified)


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


@pytest.mark.parametrize("in_bucket", [False, True])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, in_bucket):
    folder = Folder("memory://written") if in_bucket else Folder(tmp_path)
    folder.write_atomically("a", b"old")
    monkeypatch.setattr(folder, "_in_bucket", in_bucket)

    def full(file):
        raise StorageError("no room")

    monkeypatch.setattr(folders, "sync", full)
    if in_bucket:
        monkeypatch.setattr(folder, "open", lambda *_: full(None))
    with pytest.raises(StorageError, match="no room"):
        folder.write_atomically("a", b"new")
    assert folder.names() == ["a"] and folder.read("a") == b"old"


def test_a_disk_that_cannot_be_read_is_told():
    """The kernel answers EIO where a process has no memory."""
    with Folder("/proc/self").open("mem", "rb") as file:
        for read in (lambda: file.read(8), file.read, lambda: file.readinto(bytearray(1 << 20))):
            with pytest.raises(CheckpointError, match="cannot read /proc/self/mem: Input/output"):
                read()


def test_a_copy_may_be_deleted_at_any_moment(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    store = Folder("memory://copies")
    store.write_atomically("a", b"abc")
    one, another = Folder("memory://copies"), Folder("memory://copies")
    assert another.mapped("a").tobytes() == b"abc"

    def deleting(path):
        another.forget("a")
        return mapped(path)

    mapped = folders._mapped
    monkeypatch.setattr(folders, "_mapped", deleting)
    assert one.mapped("a").tobytes() == b"abc"
    assert copies_in(tmp_path) == 0


def test_no_copies_are_left(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    store = Folder("memory://copies")
    store.write_atomically("a", b"abc")
    content = store.mapped("a")
    assert copies_in(tmp_path) == 1
    store.write_atomically("b", b"def")
    with monkeypatch.context() as patch:
        patch.setattr(folders, "MAX_SMALL_BYTES", 1)
        with pytest.raises(CheckpointError, match="b is larger than 1 bytes"):
            store.mapped("b")
    assert copies_in(tmp_path) == 1

    def in_another_process():
        kept.append(Folder("memory://copies"))
        kept[0].mapped("b")
        assert copies_in(tmp_path) == 2

    kept = []
    process = multiprocessing.get_context("fork").Process(target=in_another_process)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert copies_in(tmp_path) == 1
    del store
    gc.collect()
    assert copies_in(tmp_path) == 0
    assert content.tobytes() == b"abc"


def copies_in(temporary: Path) -> int:
    [folder] = temporary.glob("megavlm-*")
    return len([*folder.iterdir()])


def test_large_files_are_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "MAX_SMALL_BYTES", 10)
    (tmp_path / "small").write_bytes(bytes(10))
    (tmp_path / "large").write_bytes(bytes(11))
    assert Folder(tmp_path).read("small") == bytes(10)
    with pytest.raises(CheckpointError, match="large is larger than 10 bytes"):
        Folder(tmp_path).read("large")
