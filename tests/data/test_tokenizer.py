import random

import pytest

from megavlm.data.tokenizer import (
    BEGIN,
    CONTROL_SYMBOLS,
    RESERVED_PIECES,
    UNKNOWN,
    Tokenizer,
    train_tokenizer,
)
from megavlm.errors import TokenizerError

TEXTS = [
    "a grinning face with big eyes",
    "女性: ランニング 薄い肌色",
    "日本の国旗",
    "Is this a flag? yes",
]


def corpus():
    generator = random.Random(0)
    words = [w for text in TEXTS for w in text.split()]
    return [" ".join(generator.choices(words, k=6)) for _ in range(400)] + TEXTS


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(corpus(), path, vocabulary=400)
    return Tokenizer(path)


@pytest.mark.parametrize(
    "text",
    [*TEXTS, "", "  two  spaces ", "ＦＵＬＬ width", "🏃🏿‍♀️ never seen: ∑ñ", "ﬁ ligature"],  # noqa: RUF001
)
def test_text_round_trips(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert UNKNOWN not in tokens


def test_vocabulary(tokenizer):
    assert tokenizer.vocabulary == 400


def test_text_cannot_make_control_symbols(tokenizer):
    controls = {tokenizer.image, tokenizer.user, tokenizer.assistant}
    for symbol in (*CONTROL_SYMBOLS, "<s>", "</s>"):
        tokens = tokenizer.encode(f"look {symbol} here")
        assert not controls & set(tokens)
        assert BEGIN not in tokens
        assert tokenizer.decode(tokens) == f"look {symbol} here"


def test_the_image_symbol_comes_first(tokenizer):
    with_image = tokenizer.prompt("Is this a flag?", with_image=True)
    assert with_image[:3] == [tokenizer.image, BEGIN, tokenizer.user]
    assert with_image[-1] == tokenizer.assistant
    assert with_image[1:] == tokenizer.prompt("Is this a flag?", with_image=False)
    assert tokenizer.decode(with_image) == "Is this a flag?"


def test_mistakes(tmp_path):
    with pytest.raises(TokenizerError, match="does not exist"):
        Tokenizer(tmp_path / "none.model")
    (tmp_path / "broken.model").write_bytes(b"not a model")
    with pytest.raises(TokenizerError, match="is not a SentencePiece model"):
        Tokenizer(tmp_path / "broken.model")
    with pytest.raises(TokenizerError, match=f"must exceed the {RESERVED_PIECES} reserved"):
        train_tokenizer(TEXTS, tmp_path / "x.model", vocabulary=100)
    with pytest.raises(TokenizerError, match="cannot train a vocabulary of 64000"):
        train_tokenizer(TEXTS, tmp_path / "x.model", vocabulary=64_000)
    assert not list(tmp_path.glob("x.*"))
