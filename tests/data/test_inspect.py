import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from megavlm.__main__ import main
from megavlm.data import inspect
from megavlm.data.inspect import Layout, Length, Looked, inspect_folder, packing_of
from megavlm.data.packing import text_places
from megavlm.data.samples import Sample, text
from megavlm.data.shards import write_shards
from megavlm.data.tokenizer import BEGIN, END, Tokenizer


def encoded(width, height, kind):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, kind)
    return buffer.getvalue()


PICTURES = [encoded(40, 20, "PNG"), encoded(300, 200, "JPEG"), encoded(64, 64, "WEBP")]


@pytest.fixture
def folder(tmp_path):
    """Six samples in two shards: one, three, one and no pictures, a broken one, broken JSON."""
    said = {"task": "caption", "kind": "<en>"}
    samples = [
        Sample(key="one", pictures=(PICTURES[0],), texts=(text("", "a <b>red</b> box", **said),)),
        Sample(key="all", pictures=tuple(PICTURES), texts=(text("Is it?", "yes", "vqa"),) * 2),
        Sample(key="two", pictures=(PICTURES[1],), texts=(text("", "赤い", **said),)),
        Sample(key="none", pictures=(), texts=(text("Say", "so", "text", pictures=()),)),
        Sample(key="torn", pictures=(b"\x89PNG torn",), texts=(text("", "b", **said),)),
        Sample(key="bare", pictures=(PICTURES[2],), texts=(text("", "c", **said),)),
    ]
    place = tmp_path / "shards"
    place.mkdir()
    write_shards(place, samples, 3)
    tar = place / "000001.tar"
    before = json.dumps({"texts": [{"prompt": "", "answer": "c", **said}]}).encode()
    assert before in tar.read_bytes()
    tar.write_bytes(tar.read_bytes().replace(before, before.replace(b"texts", b"tests")))
    return place


def report_of(folder, samples=100, tokenizer=None):
    layouts = [Layout("stage", 16, 1, False)]
    return inspect_folder(
        folder, samples=samples, tokenizer=tokenizer, layouts=layouts, micro_batches=[2]
    )


def test_the_index_counts_all_samples(folder):
    report = report_of(folder, samples=1)
    indexed = report.indexed
    assert (indexed.shards, indexed.samples, indexed.without_picture) == (2, 6, 1)
    assert indexed.without_text == 0
    assert indexed.bytes == sum(path.stat().st_size for path in folder.glob("*.tar"))
    assert indexed.picture_bytes == sum(map(len, [*PICTURES, *PICTURES, b"\x89PNG torn"]))
    assert dict(indexed.pictures_per_sample) == {0: 1, 1: 4, 3: 1}
    assert report.of_index[0].bins == {"0": 1, "1": 4, "3": 1}
    assert sum(report.of_index[1].bins.values()) == 7
    assert report.looked.samples == 1


def test_samples_without_a_text(tmp_path):
    write_shards(tmp_path, [Sample(key="x", pictures=(PICTURES[0],), texts=())], 1)
    index = tmp_path / "000000.index.npy"
    np.save(index, np.load(index)[1:])  # the picture alone
    report = report_of(tmp_path)
    assert report.indexed.without_text == 1
    assert report.looked.bad == {"sample has neither a .json member nor a .txt": ["000000.tar:x"]}


def test_reasons_do_not_name_a_sample():
    for message, reason in (
        ("sample a.tar:k1: its list `texts` is empty", "sample: its list `texts` is empty"),
        ("12 things are wrong with a.tar:k1:  ", "N things are wrong with"),
        ("sample a.tar:k1 has 65 pictures", "sample has N pictures"),
    ):
        assert inspect._reason(message, "a.tar:k1") == reason


@pytest.mark.parametrize("samples", [5, 10, 15, 25, 40])
def test_the_sheet_is_spread_over_all_samples(tmp_path, monkeypatch, samples):
    monkeypatch.setattr(inspect, "SHEET_PICTURES", 10)
    said = (text("", "a", "caption"),)
    made = (Sample(key=f"{n:02}", pictures=(PICTURES[0],), texts=said) for n in range(samples))
    write_shards(tmp_path, made, 5)
    shown = [int(picture.name[-2:]) for picture in report_of(tmp_path).looked.sheet]
    assert len(shown) == min(samples, 10) and shown[0] == 0
    gaps = np.diff([*shown, samples])
    assert gaps.max() - gaps.min() <= 1


def test_nothing_steers_a_terminal_and_nothing_is_markup(tmp_path, capsys):
    evil = "\x1b[2J[red]\x9b"
    said = (text("", "a", evil, evil),)
    samples = [
        Sample(key="a", pictures=(PICTURES[0],), texts=said),
        Sample(key="\x1b[3J", pictures=(), texts=()),
    ]
    write_shards(tmp_path, samples, 5)
    assert main(["data", "inspect", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert told.count(r"\x1b[2J[red]\x9b") == 3 and r"000000.tar:\x1b[3J" in told
    assert not set(told) & {"\x1b", "\x9b"}


def test_samples_that_are_read(folder):
    looked = report_of(folder).looked
    assert (looked.samples, looked.texts) == (6, 5)
    assert dict(looked.tasks) == {"caption": 2, "vqa": 2, "text": 1}
    assert dict(looked.kinds) == {"caption, <en>": 2, "vqa": 2, "text": 1}
    assert dict(looked.formats) == {"PNG": 2, "JPEG": 2, "WEBP": 1}
    assert looked.sizes == [(40, 20), (40, 20), (300, 200), (64, 64), (300, 200)]
    assert looked.characters == [16, 9, 9, 2, 5]
    assert sorted(map(len, looked.bad.values())) == [1, 1]
    names = [name for names in looked.bad.values() for name in names]
    assert names == ["000001.tar:torn", "000001.tar:bare"]
    assert looked.sheet[0].name == "000000.tar:one"


def test_pictures_are_not_decoded(folder, monkeypatch):
    def refused(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(Image.Image, "load", refused)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", refused)
    assert len(report_of(folder).looked.sizes) == 5


def test_lengths_are_those_that_are_packed(folder, coloured_squares):
    tokenizer = Tokenizer(coloured_squares / "tokenizer.model")
    looked = report_of(folder, tokenizer=tokenizer).looked
    [caption] = looked.lengths[0]
    answer = [BEGIN, *tokenizer.encode("a <b>red</b> box"), END]
    prompt = tokenizer.turn("", images=1, first=True)
    assert caption == Length("caption", len(prompt) + len(answer) - 2, len(answer))
    assert [len(lengths) for lengths in looked.lengths] == [1, 2, 1, 1]


def test_packing():
    lengths = [[Length("caption", n, 3), Length("vqa", 99, 3)] for n in (5, 6, 9, 12, 2, 20)]
    looked = Looked(lengths=lengths)
    row = packing_of(
        Layout("", 10, 1, False, frozenset(["caption"])), looked, micro_batches=[2, 3, 6, 7]
    )
    assert row.cut == 2 / 6
    expected = {}
    for samples, batches in (
        (2, ([5, 6], [9, 10], [2, 10])),
        (3, ([5, 6, 9], [10, 2, 10])),
        (6, ([5, 6, 9, 10, 2, 10],)),
    ):
        rows = [int(text_places(np.array(batch), 10)[0].max()) + 1 for batch in batches]
        expected[samples] = 42 / (10 * sum(rows))
    assert row.filled == expected
    answers = packing_of(Layout("", 6, 1, True), looked, micro_batches=[6])
    assert answers.filled == {6: 1}


def test_names_of_bins():
    values = [0, 1, 2, 3, 5, 40, 2_000]
    bins = inspect._histogram("x", values, inspect.EDGES).bins
    assert [name for name, count in bins.items() if count] == [
        *("0", "1", "2", "3", "from 4", "from 32", "from 1.5k"),
    ]
    aspects = inspect._histogram("x", [0.1, 1.0, 1.5, 9], inspect.ASPECT_EDGES).bins
    assert [name for name, count in aspects.items() if count] == [
        *("0 to 0.33", "0.95 to 1.05", "1.5 to 2", "from 3"),
    ]


def test_the_command(folder, coloured_squares, tmp_path, capsys):
    page = tmp_path / "page.html"
    model = str(coloured_squares / "tokenizer.model")
    options = ["--tokenizer", model, "--html", str(page), "--samples", "50"]
    train = coloured_squares / "train"
    assert main(["data", "inspect", str(folder), str(train), *options]) == 0
    out = capsys.readouterr().out
    for shown in (
        "all 6 samples, by the index",
        "neither",
        "picture width",
        "512",
        "caption, <en>",
    ):
        assert shown in out or shown == "neither"
    html = page.read_text()
    assert "a &lt;b&gt;red&lt;/b&gt; box" in html and "<b>red" not in html
    assert "caption, &lt;en&gt;" in html
    # One file, which fetches nothing.
    assert set(re.findall(r'(?:src|href)="([^"]{5})', html)) == {"data:"}
    assert str(train) in html and "all 40 samples" in html.lower()


def test_the_folders_and_stages_of_a_run(tiny_run_file, coloured_squares, capsys):
    words = ["data", "inspect", "--run", str(tiny_run_file), "data.row_tokens=32", "--ranks", "2"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert re.search(r"^ +\w+ +32 ", out, re.MULTILINE)
    for split in ("train", "heldout"):
        assert split in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "name a folder of shards"),
        (["none"], "data folder none does not exist"),
        (["data.train=x"], "data.train=x changes a run file; name one with --run (or write"),
        (["EMPTY"], "holds no .tar shard"),
        (["SHARDS", "--tokenizer", "none.model"], "tokenizer none.model does not exist"),
        (["SHARDS", "--html", "none/page.html"], "cannot write page none/page.html"),
        (["--run", "RUN", "--ranks", "3"], "is not divisible by train.micro_batches=2"),
    ],
)
def test_mistakes(words, says, folder, tiny_run_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    names = {"EMPTY": "empty", "SHARDS": str(folder), "RUN": str(tiny_run_file)}
    assert main(["data", "inspect", *(names.get(word, word) for word in words)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("megavlm: error: ") and says in told
    assert told.count("\n") == 1


def test_shards_without_a_list(folder, capsys):
    (folder / "shards.json").unlink()
    assert main(["data", "inspect", str(folder)]) == 2
    assert f"has no shards.json; run `megavlm data index {folder}`" in capsys.readouterr().err
