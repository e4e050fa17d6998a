import io
import json
import os
import tarfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from megavlm.data.index import (
    ShardSize,
    index_tar,
    read_index,
    samples_of,
    write_index,
    write_manifest,
)
from megavlm.data.samples import Sample, Text, Turn, text
from megavlm.data.shards import ShardFolder, write_shard, write_shards
from megavlm.errors import BadSampleError, DataError, StorageError
from megavlm.files.folder import Folder


def picture(colour: str, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, kind)
    return buffer.getvalue()


def sample(number: int) -> Sample:
    kinds = ("PNG", "JPEG", "WEBP")
    pictures = () if number % 4 == 3 else (picture("red", kinds[number % 4]),)
    numbers = tuple(range(len(pictures)))
    caption = text("Caption:", f"絵 {number}", task="caption", kind="ja", pictures=numbers)
    return Sample(key=f"sample-{number}", pictures=pictures, texts=(caption,))


@pytest.fixture
def folder(tmp_path):
    write_shards(tmp_path, (sample(n) for n in range(15)), 5)
    return tmp_path


def test_samples_come_back_in_order(folder):
    shards = ShardFolder(folder)
    assert [shards.read(n) for n in range(len(shards))] == [sample(n) for n in range(15)]
    assert shards.locate(7) == "000001.tar:sample-7"


def test_equal_samples_give_equal_bytes(folder, tmp_path):
    write_shard(tmp_path / "again.tar", (sample(n) for n in range(5)))
    assert (tmp_path / "again.tar").read_bytes() == (folder / "000000.tar").read_bytes()


def test_the_tar_is_an_ordinary_webdataset(folder):
    with tarfile.open(folder / "000000.tar") as tar:
        names = tar.getnames()
    assert names[:2] == ["sample-0.png", "sample-0.json"]
    assert "sample-3.png" not in names  # text-only


def test_missing_things_are_named(tmp_path, folder):
    with pytest.raises(DataError, match="none does not exist"):
        ShardFolder(tmp_path / "none")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=r"holds no \.tar shard"):
        ShardFolder(empty)
    (folder / "000001.index.npy").unlink()
    with pytest.raises(DataError, match=r"has no index 000001\.index\.npy"):
        ShardFolder(folder).check_sizes()
    with pytest.raises(StorageError, match=r"cannot read .*000001\.index\.npy: No such file"):
        ShardFolder(folder).read(5)
    (folder / "shards.json").unlink()
    with pytest.raises(DataError, match=r"has no shards\.json; run `megavlm data index"):
        ShardFolder(folder)


def test_a_truncated_shard(folder):
    path = folder / "000002.tar"
    path.write_bytes(path.read_bytes()[:3000])
    shards = ShardFolder(folder)
    with pytest.raises(DataError, match=r"000002\.tar has 3000 bytes, but shards\.json says \d+"):
        shards.check_sizes()
    with pytest.raises(BadSampleError, match=r"sample 000002\.tar, number 4 is cut off"):
        shards.read(14)
    path.unlink()
    with pytest.raises(DataError, match=r"000002\.tar is missing"):
        shards.check_sizes()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda members: members[:-2], "does not number 5 samples"),
        (lambda members: members[members["sample"] != 2], "does not number 5 samples"),
        (lambda members: members["offset"], "no list of members"),
        (lambda members: _with(members, "size", 2**63), "reaches beyond"),
        (lambda members: _with(members, "offset", 2**64 - 1), "reaches beyond"),
        (lambda members: np.array([None]), "no list of members"),
    ],
)
def test_a_broken_index(folder, change, says):
    path = folder / "000000.index.npy"
    np.save(path, change(np.load(path)))
    with pytest.raises(DataError, match=f"is broken: .*({says})"):
        ShardFolder(folder).read(0)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"no array", "cut"])
def test_an_index_that_is_no_whole_array(folder, content):
    path = folder / "000000.index.npy"
    path.write_bytes(path.read_bytes()[:-1] if content == "cut" else content)
    with pytest.raises(DataError, match=r"000000\.index\.npy is broken: "):
        ShardFolder(folder).read(0)


def test_no_file_stays_open(folder):
    """A process may have few, and a mixture has indices of many shards at once."""
    shards = ShardFolder(folder)
    before = _free_descriptor()
    assert [shards.read(number) for number in range(15)]
    assert _free_descriptor() == before


def _free_descriptor():
    """The lowest number that no open file has."""
    with open(os.devnull) as file:
        return file.fileno()


def test_indices_of_two_groups_stay_open(folder, monkeypatch):
    monkeypatch.setattr("megavlm.data.shards.OPEN_INDICES", 1)
    read = Counter()

    def counted(folder, shard, expected):
        read[shard] += 1
        return read_index(folder, shard, expected)

    monkeypatch.setattr("megavlm.data.shards.read_index", counted)
    for group_shards, times in ((1, 2), (2, 1)):
        shards, _ = ShardFolder(folder, group_shards), read.clear()
        for _ in range(2):
            shards.sizes_of(np.arange(15))
        assert set(read.values()) == {times}


def _with(members, name, value):
    members[name][0] = value
    return members


@pytest.mark.parametrize(
    "manifest", ["{", "[]", '{"shards": {"a.tar": [1]}}', '{"shards": {"a.tar": [-1, 2]}}']
)
def test_a_broken_manifest(folder, manifest):
    (folder / "shards.json").write_text(manifest)
    with pytest.raises(DataError, match=r"shards\.json is broken"):
        ShardFolder(folder)


@pytest.mark.parametrize(
    "record",
    [
        *("{", "[]", '{"texts": []}', '{"texts": [{"prompt": "x"}]}', '{"texts": 3}'),
        '{"texts": [{"prompt": "", "answer": "\\ud800", "task": "caption"}]}',
        "[" * 100_000,
    ],
)
def test_a_bad_record_is_a_bad_sample(tmp_path, record):
    _write_tar(tmp_path, {"one.json": record.encode()})
    with pytest.raises(BadSampleError, match="one"):
        ShardFolder(tmp_path).read(0)
    with pytest.raises(BadSampleError, match="one"):
        ShardFolder(tmp_path).read_texts(0)


def test_a_huge_sample_is_refused_unread(folder):
    path = folder / "000000.index.npy"
    np.save(path, _with(np.load(path), "size", 2**30))
    manifest = json.loads((folder / "shards.json").read_text())
    manifest["shards"]["000000.tar"][1] = 2**31
    (folder / "shards.json").write_text(json.dumps(manifest))
    shards = ShardFolder(folder)
    [content] = shards.fetch([0])
    assert len(content) == 512, "the header alone"
    for read in (shards.read, shards.read_texts):
        with pytest.raises(BadSampleError, match="the limit is"):
            read(0)


def test_chats_over_several_pictures_come_back(tmp_path):
    turns = (
        Turn(prompt="Which are alike?", answer="both", pictures=(0, 1)),
        Turn(prompt="And this?", answer="not", pictures=(2,)),
        Turn(prompt="Why?", answer="its colour"),
    )
    pictures = tuple(picture(colour) for colour in ("red", "green", "blue"))
    several = Sample(key="s", pictures=pictures, texts=(Text(turns=turns, task="chat"),))
    one = sample(0)
    write_shards(tmp_path, [several, one], 2)
    shards = ShardFolder(tmp_path)
    assert [shards.read(n) for n in range(2)] == [several, one]
    assert shards.sizes_of(np.arange(2)).pictures_n.tolist() == [3, 1]
    with tarfile.open(tmp_path / "000000.tar") as tar:
        assert tar.getnames() == ["s.0.png", "s.1.png", "s.2.png", "s.json", *_names(one)]


def test_pictures_are_ordered_by_number(tmp_path):
    pictures = tuple(picture("red", kind) for kind in ("PNG", "JPEG", "WEBP") * 4)
    members = {f"s.{number}.jpg": pictures[number] for number in (*range(6, 12), *range(6))}
    _write_tar(
        tmp_path, members | {"s.json": b'{"texts": [{"prompt": "", "answer": "a", "task": "t"}]}'}
    )
    assert ShardFolder(tmp_path).read(0).pictures == pictures


def test_samples_of_img2dataset(tmp_path):
    """Its JSON tells where the picture came from; the caption lies beside it."""
    record = b'{"url": "http://a/b.jpg", "caption": "a cat", "width": 8}'
    members = {"00001.jpg": picture("red", "JPEG"), "00001.json": record, "00001.txt": b"a cat"}
    members |= {"00002.jpg": picture("blue", "JPEG"), "00002.txt": b"\xff\xfe"}
    members |= {"00003.cls": b"3", "00003.jpg": picture("green", "JPEG")}
    _write_tar(tmp_path, members)
    shards = ShardFolder(tmp_path)
    [turn] = shards.read(0).texts[0].turns
    assert (turn.prompt, turn.answer, turn.pictures) == ("", "a cat", (0,))
    with pytest.raises(BadSampleError, match=r"0\.tar:00002: its JSON or caption is broken"):
        shards.read(1)
    with pytest.raises(BadSampleError, match=r"neither a \.json member nor a \.txt"):
        shards.read(2)


@pytest.mark.parametrize(
    "names", [("s.json", "s.0.json"), ("s.0.json", "s.1.json"), ("s.txt", "s.0.txt")]
)
def test_a_second_record_or_caption_makes_a_bad_sample(tmp_path, names):
    _write_tar(tmp_path, dict.fromkeys(names, b"{}"))
    for read in (ShardFolder(tmp_path).read, ShardFolder(tmp_path).read_texts):
        with pytest.raises(BadSampleError, match="it may have one of each"):
            read(0)


def _names(one):
    return [f"{one.key}.png", f"{one.key}.json"]


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("s.0.png", "s.2.png"), "numbered from 0 on"),
        (("s.png", "s.jpg"), "numbered from 0 on"),
        (("s.png", "s.0.png"), "numbered from 0 on"),
        (tuple(f"s.{n}.png" for n in range(65)), "has 65 pictures; the limit is 64"),
    ],
)
def test_pictures_that_are_not_numbered_right_are_a_bad_sample(tmp_path, names, says):
    _write_tar(tmp_path, {name: picture("red") for name in names} | {"s.json": b"{}"})
    with pytest.raises(BadSampleError, match=says):
        ShardFolder(tmp_path).read(0)


@pytest.mark.parametrize(
    "turns",
    [
        '[{"prompt": "p", "answer": "a", "pictures": [1]}]',
        '[{"prompt": "p", "answer": "a", "pictures": [0, 0]}]',
        '[{"prompt": "p", "answer": "a", "pictures": ["0"]}]',
        '[{"prompt": "p", "answer": "a", "pictures": true}]',
        '[{"prompt": "p"}]',
        "[]",
        '{"prompt": "p"}',
    ],
)
def test_broken_turns_are_a_bad_sample(tmp_path, turns):
    record = f'{{"texts": [{{"turns": {turns}, "task": "chat"}}]}}'
    _write_tar(tmp_path, {"s.png": picture("red"), "s.json": record.encode()})
    with pytest.raises(BadSampleError, match=r"sample 0\.tar:s: its JSON must hold a list `texts`"):
        ShardFolder(tmp_path).read(0)


def _write_tar(folder, members):
    with tarfile.open(folder / "0.tar", "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with (folder / "0.tar").open("rb") as file:
        members = index_tar(file)
    write_index(Folder(folder), "0.tar", members)
    size = ShardSize(samples_of(members), (folder / "0.tar").stat().st_size)
    write_manifest(Folder(folder), {"0.tar": size})
