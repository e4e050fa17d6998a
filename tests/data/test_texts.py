import pytest

from megavlm.data.samples import Sample, text
from megavlm.data.shards import write_shards
from megavlm.data.texts import evenly_spaced, read_texts
from megavlm.errors import DataError


def folder_of_texts(folder, count):
    samples = (
        Sample(key=str(n), pictures=(), texts=(text(f"p{n}", f"a{n}", "text", pictures=()),))
        for n in range(count)
    )
    folder.mkdir()
    write_shards(folder, samples, 4)
    return folder


def test_lines_of_files_and_all_texts_of_shards(tmp_path):
    file = tmp_path / "lines.txt"
    file.write_bytes("one\r\n日本\n\n last".encode())
    folder = folder_of_texts(tmp_path / "shards", 2)
    texts = [*read_texts([file, folder], samples=10)]
    assert texts == ["one", "日本", "", " last", "p0", "a0", "p1", "a1"]


def test_of_a_large_folder_evenly_spaced_samples(tmp_path):
    folder = folder_of_texts(tmp_path / "shards", 10)
    assert [*read_texts([folder], samples=3)] == ["p0", "a0", "p3", "a3", "p6", "a6"]
    assert evenly_spaced(10, 10) == evenly_spaced(10, 99) == list(range(10))
    assert evenly_spaced(0, 5) == []


def test_a_bad_sample_is_named_and_left_out(tmp_path, capsys):
    folder = folder_of_texts(tmp_path / "shards", 2)
    tar = folder / "000000.tar"
    tar.write_bytes(tar.read_bytes().replace(b'"p0"', b" p0 "))
    assert [*read_texts([folder], samples=9)] == ["p1", "a1"]
    assert "skipped sample 000000.tar:0" in capsys.readouterr().err


def test_mistakes(tmp_path):
    with pytest.raises(DataError, match="do not exist; name a text file or a folder"):
        [*read_texts([tmp_path / "none"], samples=9)]
    with pytest.raises(DataError, match=r"holds no \.tar shard"):
        [*read_texts([tmp_path], samples=9)]
    (tmp_path / "latin.txt").write_bytes("fine\ncafé".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt, line 2, is not UTF-8"):
        [*read_texts([tmp_path / "latin.txt"], samples=9)]
