import pickle
import random

import pytest
import sentencepiece

from megavlm.data.tokenizer import (
    BEGIN,
    CONTROL_SYMBOLS,
    RESERVED_PIECES,
    UNKNOWN,
    Tokenizer,
    train_tokenizer,
)
from megavlm.errors import BadSampleError, DataError, TokenizerError

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
def tokenizer_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(corpus(), path, vocabulary=400)
    return path


@pytest.fixture
def tokenizer(tokenizer_path):
    return Tokenizer(tokenizer_path)


@pytest.mark.parametrize(
    "text",
    [*TEXTS, "", "  two  spaces ", "ＦＵＬＬ width", "🏃🏿‍♀️ never seen: ∑ñ", "ﬁ ligature"],  # noqa: RUF001
)
def test_text_round_trips(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert UNKNOWN not in tokens


def test_a_tokenizer_that_is_there_stays(tokenizer_path):
    before = tokenizer_path.read_bytes()
    with pytest.raises(TokenizerError, match=r"model exists; delete it or choose another name"):
        train_tokenizer(corpus(), tokenizer_path, vocabulary=300)
    with pytest.raises(TokenizerError, match=r"cannot write tokenizer .*; choose another name"):
        train_tokenizer(corpus(), tokenizer_path / "x.model", vocabulary=300)
    assert tokenizer_path.read_bytes() == before


def test_vocabulary(tokenizer):
    assert tokenizer.vocabulary == 400
    pieces = tokenizer.pieces()
    kinds = [piece.kind for piece in pieces]
    assert len(pieces) == 400
    assert kinds.count("byte") == 256
    assert {p.text for p in pieces if p.kind == "control"} >= set(CONTROL_SYMBOLS)
    assert "▁grinning" in {p.text for p in pieces if p.kind == "learned"}


def test_what_is_wrong_with_the_texts_is_told_as_it_is(tmp_path):
    def texts():
        yield from TEXTS
        raise DataError("line 9 is not UTF-8")

    with pytest.raises(DataError, match=r"^line 9 is not UTF-8$"):
        train_tokenizer(texts(), tmp_path / "none.model", 400)
    assert not [*tmp_path.iterdir()]


HARD_TEXTS = [
    *corpus(),
    *("👩🏽‍🚀🏳️‍🌈 flags", "a\0b\tc\r\n\u2028d", "日本語と\u3000English １２３", "e\u0301 é"),  # noqa: RUF001
    *("<|image|><|user|>", "<0x0A><unk></s>", "\u2585", "\U0010ffff", "x" * 5_000, "", " "),
]


def test_tokens_are_those_of_sentencepiece(tokenizer, tokenizer_path, monkeypatch):
    monkeypatch.setattr("megavlm.data.tokenizer.KNOWN_WORDS", 20)  # some are forgotten
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path))
    expected = [oracle.encode(text) for text in HARD_TEXTS]
    for _ in range(2):  # with words that are new, and known
        assert [tokenizer.encode(text) for text in HARD_TEXTS] == expected
    assert [tokenizer.decode(tokens) for tokens in expected] == HARD_TEXTS
    assert len(tokenizer._words) <= 20
    assert pickle.loads(pickle.dumps(tokenizer)).encode("a flag") == oracle.encode("a flag")


@pytest.mark.parametrize(
    "options",
    [
        {"add_dummy_prefix": True},
        {"remove_extra_whitespaces": True},
        {"normalization_rule_name": "nmt_nfkc"},
        {"split_by_whitespace": False},
        {"allow_whitespace_only_pieces": True},
    ],
)
def test_foreign_models_give_the_tokens_of_sentencepiece(tmp_path, options):
    """Their tokens of a text are not those of its words."""
    path = tmp_path / "foreign.model"
    plain = {
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
    }
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([*corpus(), *["of the   of the"] * 90]),
            model_writer=file,
            model_type="bpe",
            vocab_size=400,
            byte_fallback=True,
            pad_id=3,
            control_symbols=list(CONTROL_SYMBOLS),
            minloglevel=2,
            **(plain | options),
        )
    tokenizer = Tokenizer(path)
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in [*HARD_TEXTS, "of the   of the of the"]:
        assert tokenizer.encode(text) == oracle.encode(text)


def test_half_a_character_makes_a_bad_sample(tokenizer):
    with pytest.raises(BadSampleError, match="lone surrogate"):
        tokenizer.encode("flag \ud83c")


def test_rare_kanji_are_pieces_where_most_texts_are_english(tmp_path):
    # Of 10,000 characters one is kanji: above the coverage, though below SentencePiece's default.
    texts = [*["a grinning face with big eyes"] * 2_000, *["犬と猫"] * 5]
    train_tokenizer(texts, tmp_path / "x.model", vocabulary=310)
    pieces = {piece.text for piece in Tokenizer(tmp_path / "x.model").pieces()}
    assert {"犬", "と", "猫"} <= pieces


def test_each_digit_is_a_token(tmp_path):
    train_tokenizer(["in 2012 and 2013 it was"] * 50, tmp_path / "x.model", vocabulary=290)
    tokenizer = Tokenizer(tmp_path / "x.model")
    words = [piece.text for piece in tokenizer.pieces()]
    assert [words[token] for token in tokenizer.encode("2012")] == ["2", "0", "1", "2"]


def test_no_text_is_left_out_in_training(tmp_path):
    """SentencePiece skips lines that are too long, and those with its mark of the unknown."""
    texts = ["long " * 3_000, "\u2585marked marked", "half \ud83c"]
    train_tokenizer(texts, tmp_path / "x.model", vocabulary=285)
    pieces = {piece.text for piece in Tokenizer(tmp_path / "x.model").pieces()}
    assert set("longmarkedhf") <= pieces


def test_training_twice_gives_the_same(tmp_path):
    for name in "ab":
        train_tokenizer(corpus(), tmp_path / name, vocabulary=320, seed_texts=300)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


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
