import io
import json
import tarfile

import pytest
from PIL import Image

from megavlm.data.samples import Sample, Text, Turn, text
from megavlm.data.shards import ShardFolder, index_shard, write_shard
from megavlm.errors import BadSampleError, DataError


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
    for shard in range(3):
        members = (sample(n) for n in range(shard * 5, shard * 5 + 5))
        assert write_shard(tmp_path / f"{shard:06d}.tar", members) == 5
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
    (folder / "000001.index.json").unlink()
    with pytest.raises(DataError, match=r"has no index 000001\.index\.json"):
        ShardFolder(folder)


def test_a_truncated_shard_is_found_at_once(folder):
    path = folder / "000002.tar"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"000002\.tar is truncated: 3000 bytes"):
        ShardFolder(folder)


def test_a_broken_index(folder):
    (folder / "000000.index.json").write_text('[{"key": 1}]')
    with pytest.raises(DataError, match="is broken"):
        ShardFolder(folder)


@pytest.mark.parametrize(
    "record", ["{", "[]", '{"texts": []}', '{"texts": [{"prompt": "x"}]}', '{"texts": 3}']
)
def test_a_bad_record_is_a_bad_sample(tmp_path, record):
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("one.json")
        info.size = len(record)
        tar.addfile(info, io.BytesIO(record.encode()))
    (tmp_path / "0.index.json").write_text(json.dumps(index_shard(path)))
    with pytest.raises(BadSampleError, match="one"):
        ShardFolder(tmp_path).read(0)


def test_a_huge_member_is_refused_unread(folder):
    index = folder / "000000.index.json"
    entries = json.loads(index.read_text())
    entries[0]["members"]["png"] = [0, 2**30]
    index.write_text(json.dumps(entries))
    path = folder / "000000.tar"
    with path.open("r+b") as file:
        file.truncate(2**30)  # sparse
    with pytest.raises(BadSampleError, match="the limit is"):
        ShardFolder(folder).read(0)


def test_chats_over_several_pictures_come_back(tmp_path):
    turns = (
        Turn(prompt="Which are alike?", answer="both", pictures=(0, 1)),
        Turn(prompt="And this?", answer="not", pictures=(2,)),
        Turn(prompt="Why?", answer="its colour"),
    )
    pictures = tuple(picture(colour) for colour in ("red", "green", "blue"))
    several = Sample(key="s", pictures=pictures, texts=(Text(turns=turns, task="chat"),))
    one = sample(0)
    write_shard(tmp_path / "0.tar", [several, one])
    shards = ShardFolder(tmp_path)
    assert [shards.read(n) for n in range(2)] == [several, one]
    assert [shards.pictures_of(n) for n in range(2)] == [3, 1]
    with tarfile.open(tmp_path / "0.tar") as tar:
        assert tar.getnames() == ["s.0.png", "s.1.png", "s.2.png", "s.json", *_names(one)]


def test_pictures_are_ordered_by_number(tmp_path):
    pictures = tuple(picture("red", kind) for kind in ("PNG", "JPEG", "WEBP") * 4)
    numbers = tuple(range(len(pictures)))
    several = Sample(key="s", pictures=pictures, texts=(text("p", "a", "t", pictures=numbers),))
    write_shard(tmp_path / "0.tar", [several])
    index = tmp_path / "0.index.json"
    [entry] = json.loads(index.read_text())
    index.write_text(json.dumps([entry | {"members": dict(sorted(entry["members"].items()))}]))
    assert ShardFolder(tmp_path).read(0) == several


def test_members_of_a_foreign_index_are_a_bad_sample(folder):
    index = folder / "000000.index.json"
    entries = json.loads(index.read_text())
    extent = entries[0]["members"].pop("png")
    entries[0]["members"] |= {"left.png": extent, "right.png": extent}
    index.write_text(json.dumps(entries))
    with pytest.raises(BadSampleError, match=r"has the members \['left\.png', 'right\.png'\]"):
        ShardFolder(folder).read(0)


def _names(one):
    return [f"{one.key}.png", f"{one.key}.json"]


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("s.0.png", "s.2.png"), "numbered from 0 on"),
        (("s.png", "s.jpg"), "numbered from 0 on"),
        (("s.png", "s.0.png"), "numbered from 0 on"),
        (("s.0.gif", "s.1.png"), "numbered from 0 on"),
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
    with pytest.raises(BadSampleError, match="sample s: its JSON must hold a list `texts`"):
        ShardFolder(tmp_path).read(0)


def _write_tar(folder, members):
    with tarfile.open(folder / "0.tar", "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (folder / "0.index.json").write_text(json.dumps(index_shard(folder / "0.tar")))
