import io
import os
import pickle
import resource
import signal
import zipfile
from argparse import Namespace
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn, serialization

from megavlm.convert.megatron import _STAND_INS
from megavlm.convert.torch_files import Attributes, Inert, load_structure, plain_name, reserve
from megavlm.errors import CheckpointError


class OpensAFile:
    """Creates a file when its pickle is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


class Harmless:
    pass


@contextmanager
def files_of_at_most(count: int):
    """Writing more bytes fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.pt"


def test_tensors_are_read_as_they_were_saved(path):
    base = torch.randn(6, 4)
    saved = {
        "scalar": torch.tensor(3.5),
        "bf16": torch.randn(3, 5).bfloat16(),
        "view": base[2:4],
        "same storage": base,
        "empty": torch.empty(0, 3),
        "parameter": nn.Parameter(torch.randn(7)),
        "nested": [{"mask": torch.tensor([True, False])}, 3, "text", torch.Size([2])],
    }
    torch.save(saved, path)
    loaded = load_structure(path)
    assert loaded.keys() == saved.keys()
    for key in saved.keys() - {"nested"}:
        assert (loaded[key].shape, loaded[key].dtype) == (saved[key].shape, saved[key].dtype)
        assert torch.equal(loaded[key].read(), saved[key]), key
    assert loaded["nested"][0]["mask"].read().tolist() == [True, False]
    assert loaded["nested"][1:] == [3, "text", torch.Size([2])]


def test_part_of_a_tensor(path):
    torch.save(torch.arange(10), path)
    out = torch.zeros(3, dtype=torch.int64)
    load_structure(path).read_into(out, 4)
    assert out.tolist() == [4, 5, 6]


def test_a_reserved_file_is_one_of_torch(path):
    values = {"matrix": torch.randn(4, 3), "scalar": torch.tensor(2.0).bfloat16()}
    blank = {key: torch.empty_like(value, device="meta") for key, value in values.items()}
    stored = reserve(path, {"model": blank, "iteration": 3})
    for key, value in values.items():
        stored["model"][key].write(value)
    for mmap in (False, True):
        loaded = torch.load(path, weights_only=True, mmap=mmap)
        assert loaded["iteration"] == 3
        assert all(torch.equal(loaded["model"][key], value) for key, value in values.items())


def test_places_beyond_4_gib(path):
    sizes = [5 * 2**30, 7, 2**30, 9]  # the file is sparse
    blank = {str(i): torch.empty(n, dtype=torch.uint8, device="meta") for i, n in enumerate(sizes)}
    for stored in reserve(path, blank).values():
        last = torch.tensor([3], dtype=torch.uint8)
        with path.open("r+b") as file:
            file.seek(stored.offset_bytes + stored.shape[0] - 1)
            file.write(bytes([3]))
        stored.read_into(out := torch.zeros_like(last), stored.shape[0] - 1)
        assert torch.equal(out, last)
    mapped = torch.load(path, weights_only=True, mmap=True)
    assert [int(tensor[-1]) for tensor in mapped.values()] == [3] * len(sizes)
    path.unlink()


def test_code_is_named_and_never_run(path, tmp_path):
    torch.save({"weights": torch.ones(2), "extra": OpensAFile(tmp_path / "run")}, path)
    with pytest.raises(CheckpointError, match=r"could run code: it needs io\.open;"):
        load_structure(path)
    assert not (tmp_path / "run").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "run").exists()  # it would have


def replace_pickle(path, content: bytes) -> None:
    """Write a file of torch.save whose pickle is made by hand."""
    torch.save(0, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, record in records.items():
            archive.writestr(name, content if name.endswith("data.pkl") else record)


@pytest.mark.parametrize(
    "template",
    [
        b"cposix\nsystem\n(X%c\x00\x00\x00%stR.",
        b"cbuiltins\nexec\n(X%c\x00\x00\x00%stR.",
        b"(S'posix'\nS'system'\n\x93X%c\x00\x00\x00%s\x85R.",
        b"(iposix\nsystem\n.%c%s",
    ],
    ids=["system", "exec", "name from the stack", "instance"],
)
def test_hand_made_pickles_do_not_run(path, tmp_path, template):
    command = f"touch {tmp_path / 'run'}".encode()
    replace_pickle(path, template % (len(command), command))
    with pytest.raises(CheckpointError):
        load_structure(path)
    assert not (tmp_path / "run").exists()


def test_a_bare_pickle_is_refused(path, tmp_path):
    path.write_bytes(pickle.dumps(OpensAFile(tmp_path / "run")))
    with pytest.raises(CheckpointError, match="no file of"):
        load_structure(path)
    torch.save(OpensAFile(tmp_path / "run"), path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="no file of"):
        load_structure(path)
    assert not (tmp_path / "run").exists()


def test_what_others_have_registered_is_refused(path):
    torch.save(Harmless(), path)
    with serialization.safe_globals([Harmless]):
        torch.load(path)
        with pytest.raises(CheckpointError, match="Harmless"):
            load_structure(path)
        assert Harmless in serialization.get_safe_globals()


def test_stand_ins_are_called_instead(path):
    torch.save([Counter(a=1), Harmless()], path)
    name = f"{__name__}.Harmless"
    before = set(serialization.get_safe_globals())
    counter, harmless = load_structure(path, [(dict, name)])
    assert counter == {"a": 1} and harmless == {}
    assert set(serialization.get_safe_globals()) == before


def test_stand_ins_keep_nothing_or_attributes(path):
    torch.save([Namespace(ranks=2, more=torch.ones(3)), io.BytesIO(b"1")], path)
    names = [(Attributes, "argparse.Namespace"), (Inert, "_io.BytesIO")]
    args, file = load_structure(path, names)
    assert type(args) is dict
    assert args["ranks"] == 2 and args["more"].read().tolist() == [1, 1, 1]
    assert type(file) is Inert and not vars(file)


def test_a_stand_in_for_getattr_gives_nothing(path, tmp_path):
    content = b"cbuiltins\ngetattr\n(cargparse\nNamespace\nX\x06\x00\x00\x00updatetR"
    replace_pickle(path, content + b".")
    assert type(load_structure(path, _STAND_INS)) is Inert
    replace_pickle(path, content + b")R.")
    with pytest.raises(CheckpointError, match="could run code"):
        load_structure(path, _STAND_INS)


@pytest.mark.parametrize("name", ["iter_0000100", "a.b_c", "résumé", "x" * 255])
def test_plain_names(name):
    assert plain_name(name, Path("file")) == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../a", "/a", "a/b", "a\\b", "a\0", "a\nb", "\ud800", "é" * 128, 3, None],
)
def test_names_that_are_not_plain(name):
    with pytest.raises(CheckpointError, match="file gives the name"):
        plain_name(name, Path("file"))


def test_a_full_disk(path):
    blank = {"a": torch.empty(10_000, device="meta")}
    message = r"cannot write .*file\.pt: File too large; free space or permit writing there, and "
    with files_of_at_most(500), pytest.raises(CheckpointError, match=message):
        reserve(path, blank)
    stored = reserve(path, blank)["a"]
    with files_of_at_most(5_000), pytest.raises(CheckpointError, match=message):
        stored.write(torch.ones(10_000))
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match=r"cannot write .*directory; free"):
        reserve(path, blank)


def test_unreadable_files(path, monkeypatch):
    torch.save({"a": torch.ones(3)}, path)
    stored = load_structure(path)["a"]
    path.unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*file\.pt: No such file"):
        stored.read()
    path.symlink_to("/proc/self/mem")  # its first page is not readable
    with pytest.raises(CheckpointError, match=r"cannot read .*file\.pt: Input/output error"):
        load_structure(path)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")  # root may do anything

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(CheckpointError, match=r"cannot read .*file\.pt: Permission denied"):
        load_structure(path)


def test_missing_and_damaged_files(path):
    with pytest.raises(CheckpointError, match="is missing"):
        load_structure(path)
    torch.save({"a": torch.randn(1000)}, path)
    stored = load_structure(path)["a"]
    whole = path.read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="damaged"):
            load_structure(path)
    os.truncate(path, 1000)
    with pytest.raises(CheckpointError, match="ends too early"):
        stored.read()
    replace_pickle(path, b"no pickle")
    with pytest.raises(CheckpointError):
        load_structure(path)


def test_a_tensor_that_is_not_contiguous_is_refused(path):
    torch.save(torch.randn(2, 3).T, path)
    with pytest.raises(CheckpointError, match="not contiguous"):
        load_structure(path)
