import pytest

from megavlm.__main__ import main
from megavlm.data.tokenizer import Tokenizer
from megavlm.data.tokenizer_report import figures_by_script, script_of


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("a red square", "Latin"),
        ("日本の国旗", "Japanese"),
        ("スキー", "Japanese"),
        ("ﾃｽﾄ", "Japanese"),
        ("国旗", "Han"),
        ("ＡＢＣ", "Latin"),  # noqa: RUF001
        ("красный квадрат", "Cyrillic"),
        ("12 🏁", "no letters"),
        ("", "no letters"),
    ],
)
def test_script_of_most_letters(text, script):
    assert script_of(text) == script


def test_figures_count_tokens_bytes_and_changed_texts(coloured_squares):
    tokenizer = Tokenizer(coloured_squares / "tokenizer.model")
    spaced, broken = "a\u2581red", "half \ud83c"
    texts = ["a red square", "旗", spaced, broken]
    figures = figures_by_script(tokenizer, texts)
    assert [*figures] == ["Latin", "Han", "all"]
    assert figures["Han"].bytes == 3  # it is no piece
    assert figures["Han"].tokens == figures["Han"].bytes + figures["Han"].unknown
    latin = figures["Latin"]
    assert (latin.texts, latin.changed, latin.unknown, latin.bytes) == (3, 2, 1, 0)
    assert figures["all"].tokens == latin.tokens + 3
    assert figures["all"].characters == sum(map(len, texts))


def test_the_command(coloured_squares, tmp_path, capsys):
    model, file = coloured_squares / "tokenizer.model", tmp_path / "texts.txt"
    file.write_text("a [red] square\n日本の国旗\n")
    train = coloured_squares / "train"
    assert main(["tokenizer", "inspect", str(model), "--texts", str(file), str(train)]) == 0
    out = capsys.readouterr().out
    for shown in ("512 pieces", "<|image|>", "<0x00> ... <0xFF>", "Japanese", "tokens a character"):
        assert shown in out
