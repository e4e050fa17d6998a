"""`megavlm data index` on folders as they are met with."""

import io
import json
import os
import tarfile

import pytest

from megavlm.__main__ import main
from megavlm.data.shards import ShardFolder, write_shards
from megavlm.errors import BadSampleError
from megavlm.filters.judge import unsafe_names
from tests.conftest import coloured_sample

RECORD = b'{"texts": [{"prompt": "p", "answer": "a", "task": "caption"}]}'


def tar_of(*names, content=RECORD, format=tarfile.USTAR_FORMAT):
    """A tar of members that hold a record, whatever they are called."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def index(folder, workers=1):
    return main(["data", "index", str(folder), "--workers", str(workers)])


@pytest.fixture
def indexed(tmp_path):
    """The squares' shards, which were there before."""
    write_shards(tmp_path, (coloured_sample(n) for n in range(15)), 5)
    return tmp_path


def test_shards_that_are_there_are_indexed(indexed, capsys):
    before = [ShardFolder(indexed).read(n) for n in range(15)]
    for path in (*indexed.glob("*.index.npy"), indexed / "shards.json"):
        path.unlink()
    assert index(indexed, workers=2) == 0
    told = "15 samples in 3 shards, 3 of them new; 3 samples without a picture"
    assert told in capsys.readouterr().out
    assert [ShardFolder(indexed).read(n) for n in range(15)] == before
    ShardFolder(indexed).check_sizes()


def test_what_was_added_replaced_or_broken_is_indexed_anew(indexed, capsys):
    path = indexed / "000000.tar"
    path.write_bytes(tar_of("a.json", "b.json").ljust(path.stat().st_size, b"\0"))
    os.utime(indexed / "000000.index.npy", (1, 1))  # longer ago than it is
    (indexed / "000001.index.npy").write_bytes(b"no array")
    (indexed / "000003.tar").write_bytes(tar_of("c.json"))
    (indexed / "000002.tar").unlink()
    assert index(indexed) == 0
    assert "8 samples in 3 shards, 2 of them new" in capsys.readouterr().out
    shards = ShardFolder(indexed)
    assert [shards.read(n).key for n in (0, 1, 7)] == ["a", "b", "c"]
    assert index(indexed) == 0
    assert "0 of them new" in capsys.readouterr().out


def test_a_tar_that_was_replaced_is_not_misread(indexed):
    (indexed / "000000.tar").write_bytes(
        tar_of(*(f"{n}.json" for n in range(15))).ljust(
            (indexed / "000000.tar").stat().st_size, b"\0"
        )
    )
    for read in (ShardFolder(indexed).read, ShardFolder(indexed).read_texts):
        with pytest.raises(BadSampleError, match=r"is not where its index says; delete 0000"):
            read(0)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (tar_of("a.json", "b.json")[:2048], "its end is missing; copy it again"),
        (tar_of("a.json", "b.json")[:1500], "its end is missing; copy it again"),
        (tar_of("a.json", "b.json")[:700], "no whole tar"),
        (b"\x1f\x8b no tar" * 200, "no whole tar, or a compressed one"),
        (tar_of("a.jpg", "b.jpg", "a.json", "b.json"), "write it with `tar --sort=name`"),
    ],
)
def test_shards_that_cannot_be_used_are_all_named(indexed, content, says, capsys):
    (indexed / "000001.tar").write_bytes(content)
    (indexed / "000003.tar").write_bytes(content)
    assert index(indexed) == 2
    *named, error = capsys.readouterr().err.splitlines()
    assert [line for line in named if says in line] == named
    assert [line.partition(": ")[0].rpartition("/")[2] for line in named] == [
        "000001.tar",
        "000003.tar",
    ]
    assert "2 of 4 shards" in error


def test_what_no_sample_uses_and_what_has_no_text_is_counted(tmp_path, capsys):
    names = ("a.json", "a.txt", "b.png", "c.json", "c.1.json", "d.cls", "e.v2.json", "f.0.jpg")
    names += ("f.0.png", "f.1.png", "f.json")
    (tmp_path / "0.tar").write_bytes(tar_of(*names))
    assert index(tmp_path) == 0
    assert capsys.readouterr().out.strip().splitlines() == [
        "ignored 1 member .cls, which no sample uses",
        "ignored 1 member .json, which no sample uses (a key must have no dots)",
        "1 sample without text: training will skip them",
        "2 members twice in a sample: training will skip such samples",
        f"{tmp_path}: 4 samples in 1 shard, 1 of them new; 2 samples without a picture",
    ]


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "holds no .tar shard"),
        ({"0.tar.gz": b""}, r"holds no .tar shard; unpack 0.tar.gz, and the like, first"),
        ({"0.tar": tar_of()}, "has a sample; all are empty"),
        (
            {"0.tar": tar_of("a.b.jpg")},
            "has a sample; ignored 1 member .jpg, which no sample uses (a",
        ),
    ],
)
def test_folders_without_samples(tmp_path, files, says, capsys):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert index(tmp_path) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "shards.json").exists()


def test_places_that_are_no_folders(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert index(tmp_path / "file") == 2
    assert "is a file" in capsys.readouterr().err
    assert index(tmp_path / "none") == 2
    assert "is not there" in capsys.readouterr().err


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
def test_long_names_are_read_whole(tmp_path, format):
    keys = [letter * 150 for letter in "ab"] + ["c", "女性", "d" * 900]
    names = [f"folder/{key}.json" for key in keys]
    names[2:2] = ["x" * 120 + ".cls"]  # of no sample, with a long name of its own
    (tmp_path / "0.tar").write_bytes(tar_of(*names, format=format))
    assert index(tmp_path) == 0
    shards = ShardFolder(tmp_path)
    for number, key in enumerate(keys):
        assert shards.read(number).key == key
        assert shards.locate(number) == f"0.tar:{key}"
        assert [text.answer for text in shards.read_texts(number)] == ["a"]
    # What a sample is read from begins with its own headers, and names none before it.
    assert [unsafe_names(content) for content in shards.fetch(range(len(keys)))] == [[]] * len(keys)
    (tmp_path / "0.tar").write_bytes(tar_of("a.json", f"{'../' * 50}b.json", format=format))
    assert index(tmp_path) == 0
    contents = ShardFolder(tmp_path).fetch([0, 1])
    assert [bool(unsafe_names(content)) for content in contents] == [False, True]


def test_what_members_are_called_cannot_steer_a_terminal(tmp_path, capsys):
    (tmp_path / "0.tar").write_bytes(tar_of("\x1b[2J.json", "b.\x1b[31m", content=b"no JSON"))
    assert index(tmp_path) == 0
    with pytest.raises(BadSampleError) as caught:
        ShardFolder(tmp_path).read(0)
    assert r"0.tar:\x1b[2J: its JSON" in str(caught.value)
    told = capsys.readouterr().out
    assert r".\x1b[31m" in told and "\x1b" not in told


def test_names_are_never_paths(tmp_path):
    """Members that would lie outside of the folder are samples like others."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/0.tar").write_bytes(tar_of("../../evil.json", "/etc/passwd.json"))
    assert index(tmp_path / "data") == 0
    shards = ShardFolder(tmp_path / "data")
    assert [shards.read(n).key for n in range(2)] == ["evil", "passwd"]
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "0.index.npy",
        "0.tar",
        "shards.json",
    ]
    assert json.loads((tmp_path / "data/shards.json").read_text())["shards"]["0.tar"][0] == 2
