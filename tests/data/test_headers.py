import tarfile

import pytest

from megavlm.__main__ import main
from megavlm.data.shards import ShardFolder
from megavlm.errors import BadSampleError
from megavlm.filters.judge import unsafe_names
from tests.data.test_index_folder import index


def header(name, kind, size, content=b""):
    """A tar header of any size, also one that cannot be, and content in whole blocks."""
    info = tarfile.TarInfo(name)
    info.type = kind
    info.size = max(0, size)
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    if size < 0:
        block[124:136] = (256**12 + size).to_bytes(12, "big")
        block[148:156] = b"        "
        block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block) + content + bytes(-len(content) % 512)


def sample(key):
    record = b'{"texts": [{"prompt": "", "answer": "a", "task": "caption"}]}'
    return header(f"{key}.json", tarfile.REGTYPE, len(record), record)


def shards_of(folder, *parts):
    (folder / "0.tar").write_bytes(b"".join(parts) + bytes(1024))
    assert index(folder) == 0
    return ShardFolder(folder)


BROKEN = b"22 GNU.sparse.map=x\n22 GNU.sparse.major=1\n"


@pytest.mark.parametrize(
    "end",
    [
        header("x", tarfile.XHDTYPE, len(BROKEN), BROKEN),
        header("x", tarfile.GNUTYPE_LONGNAME, -512),
        header("x", tarfile.REGTYPE, -512),
        header("x", tarfile.GNUTYPE_LONGNAME, 3, b"abc") * 3,
    ],
    ids=["broken PAX", "a name of -512 bytes", "-512 bytes", "names"],
)
def test_what_others_wrote_before_a_sample_does_no_harm(tmp_path, end):
    ignored = header("b.bin", tarfile.REGTYPE, len(end), end)
    shards = shards_of(tmp_path, sample("a"), ignored, sample("b"), sample("c"))
    assert shards.read(0).key == "a"
    assert shards.read(2).key == "c"
    try:  # its name may be what somebody says who wrote headers for it
        assert shards.read(1).texts[0].answer == "a"
    except BadSampleError:
        pytest.fail("a sample went for what is not its own")
    assert unsafe_names(shards.fetch([1])[0]) == []


def test_a_sample_is_not_blamed_for_the_name_before_it(tmp_path):
    ignored = header("../evil.bin", tarfile.REGTYPE, 3, b"abc")
    shards = shards_of(tmp_path, sample("a"), ignored, sample("b"))
    assert [unsafe_names(content) for content in shards.fetch([0, 1])] == [[], []]


@pytest.mark.parametrize(
    "broken",
    [
        header("b.json", tarfile.REGTYPE, -512),
        header("x", tarfile.XHDTYPE, len(BROKEN), BROKEN) + sample("b"),
    ],
    ids=["a size below zero", "broken PAX"],
)
def test_a_tar_whose_headers_cannot_be_is_named(tmp_path, capsys, broken):
    (tmp_path / "0.tar").write_bytes(sample("a") + broken + sample("c") + bytes(1024))
    assert main(["data", "index", str(tmp_path)]) == 2
    assert "0.tar" in capsys.readouterr().err


def test_a_negative_size_ends_the_search_for_names():
    content = sample("a") + header("../b", tarfile.REGTYPE, -512) + sample("c")
    assert unsafe_names(content) == []
