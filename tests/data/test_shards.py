import io
import json
import tarfile

import pytest
from PIL import Image

from megavlm.data.samples import Sample, Text
from megavlm.data.shards import ShardFolder, index_shard, write_shard
from megavlm.errors import BadSampleError, DataError


def picture(colour: str, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, kind)
    return buffer.getvalue()


def sample(number: int) -> Sample:
    kinds = ("PNG", "JPEG", "WEBP")
    text = Text(prompt="Caption:", answer=f"絵 {number}", task="caption", kind="ja")
    content = None if number % 4 == 3 else picture("red", kinds[number % 4])
    return Sample(key=f"sample-{number}", picture=content, texts=(text,))


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
