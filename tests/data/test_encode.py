import io
import sys

import pytest

from megavlm.__main__ import main
from megavlm.data import encode
from megavlm.data.encode import encode_lines
from megavlm.data.tokenizer import Tokenizer

LINES = ["a red square", "", "日本の国旗 🏁", *(f"number {n}" for n in range(40))]


@pytest.fixture
def model(coloured_squares):
    return coloured_squares / "tokenizer.model"


def test_a_line_of_numbers_for_each_line(model, monkeypatch):
    monkeypatch.setattr(encode, "LINES_AT_ONCE", 7)
    lines = "".join(encode_lines(model, LINES)).split("\n")
    assert lines.pop() == ""
    tokenizer = Tokenizer(model)
    assert [[*map(int, line.split())] for line in lines] == [tokenizer.encode(t) for t in LINES]
    pieces = "".join(encode_lines(model, ["a red square"], pieces=True))
    assert pieces.replace(" ", "").replace("▁", " ") == "a red square\n"


@pytest.mark.slow
def test_workers_give_the_same_in_the_same_order(model):
    lines = LINES * 1_000
    assert "".join(encode_lines(model, lines, workers=3)) == "".join(encode_lines(model, lines))


def test_the_command(model, tmp_path, capfdbinary, monkeypatch):
    file = tmp_path / "lines.txt"
    file.write_text("a red square\nred\n")
    assert main(["tokenizer", "encode", str(model), str(file)]) == 0
    of_file = capfdbinary.readouterr().out
    assert of_file.decode() == "".join(encode_lines(model, ["a red square", "red"]))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(file.read_bytes())))
    assert main(["tokenizer", "encode", str(model)]) == 0
    assert capfdbinary.readouterr().out == of_file


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["encode", "MODEL", "none.txt"], "cannot read none.txt: No such file"),
        (["encode", "none.model", "/dev/null"], "tokenizer none.model does not exist"),
        (["encode", "MODEL", "/dev/null", "more"], "more is one word too many"),
        (["inspect", "/dev/null"], "tokenizer /dev/null does not exist"),
        (["inspect", "MODEL", "--texts", "none.txt"], "texts none.txt do not exist"),
        (["train", "--texts", "none.txt"], "name a run file, or with --texts what to train on"),
        (["train", "RUN", "--vocabulary", "9"], "--vocabulary is model.decoder.vocabulary of"),
        (["train", "--texts", "none.txt", "--out", "x"], "texts none.txt do not exist"),
    ],
)
def test_mistakes(capsys, model, tiny_run_file, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    names = {"MODEL": str(model), "RUN": str(tiny_run_file)}
    assert main(["tokenizer", *(names.get(word, word) for word in words)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("megavlm: error: ") and says in told
    assert told.count("\n") == 1
    assert [path.name for path in tmp_path.glob("x*")] == []


def test_training_on_a_file_of_lines(tmp_path):
    file, out = tmp_path / "lines.txt", tmp_path / "new.model"
    file.write_text("the quick brown fox\n" * 50)
    arguments = ["--texts", str(file), "--out", str(out), "--vocabulary", "290"]
    assert main(["tokenizer", "train", *arguments]) == 0
    assert Tokenizer(out).vocabulary == 290
