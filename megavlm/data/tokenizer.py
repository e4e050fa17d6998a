"""SentencePiece tokenizer: BPE with byte fallback, and control symbols for images and chat.

Control symbols are never produced from text, so a user's text cannot make an image or a role.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import sentencepiece

from megavlm.errors import BadSampleError, MegavlmError, TokenizerError

UNKNOWN, BEGIN, END, PADDING = 0, 1, 2, 3
CONTROL_SYMBOLS = ("<|image|>", "<|user|>", "<|assistant|>")
BYTE_PIECES = 256
# unknown, begin, end, padding, the control symbols and the bytes, before any learned piece
RESERVED_PIECES = 4 + len(CONTROL_SYMBOLS) + BYTE_PIECES

SPACE = "\u2581"
KNOWN_WORDS = 1 << 16
"""At most so many words are remembered, some 15 MB; then it begins anew."""
LONGEST_WORD = 24
"""Characters; what is longer, as a sentence in Japanese, hardly comes again."""

VOCABULARY = 64_000
SEED_TEXTS = 10**7
"""A tokenizer is trained on at most so many lines."""
CHARACTER_COVERAGE = 0.99995
"""Share of the characters in the training texts that become pieces; the rarest are bytes.

SentencePiece's default of 0.9995 is meant for texts that are all Japanese. Where kanji are a
hundredth of all characters, they are what it leaves out: see docs/data.md.
"""
MAX_LINE_CHARACTERS = 1_024
"""SentencePiece leaves longer lines than 4,192 bytes out; a character has at most 4."""
# It leaves out lines with its mark of the unknown.
UNKNOWN_MARK = "\u2585"
NO_CHARACTER = "a text has a lone surrogate, half of a character; write it anew"


class Piece(NamedTuple):
    """One entry of the vocabulary."""

    text: str
    """With SPACE for a space."""
    kind: str
    """unknown, control, byte or learned."""


class Tokenizer:
    """A trained SentencePiece model; raises TokenizerError when the file is missing or foreign."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            problem = "is a folder" if path.is_dir() else "does not exist"
            raise TokenizerError(
                f"tokenizer {path} {problem}; train it with `megavlm tokenizer train RUN.yaml` or "
                "set data.tokenizer"
            )
        model = path.read_bytes()
        self.fingerprint = hashlib.sha256(model).hexdigest()
        """Identifies the tokenizer in checkpoints."""
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise TokenizerError(f"{path} is not a SentencePiece model: {error}") from error
        pieces = self._pieces
        if (pieces.bos_id(), pieces.eos_id(), pieces.pad_id()) != (BEGIN, END, PADDING):
            raise TokenizerError(
                f"tokenizer {path} must number its begin, end and padding symbols {BEGIN}, {END} "
                f"and {PADDING}; train it with `megavlm tokenizer train`"
            )
        self._words: dict[str, list[int]] = {}
        """Tokens of words: captions have the same few again and again."""
        self._by_words = self._never_crosses_spaces()
        self.image, self.user, self.assistant = (self._symbol(s, path) for s in CONTROL_SYMBOLS)

    @property
    def vocabulary(self) -> int:
        return self._pieces.get_piece_size()

    def pieces(self) -> list[Piece]:
        """The vocabulary, in the order of its numbers."""
        model, numbers = self._pieces, range(self.vocabulary)
        return [Piece(model.id_to_piece(number), self._kind(number)) for number in numbers]

    def encode(self, text: str) -> list[int]:
        """Tokens of a text; raises BadSampleError for one with lone surrogates."""
        if not self._by_words:
            return self._new(text)
        first, *later = text.split(" ")
        tokens = [*(self._words.get(first) or self._new(first))]
        for word in later:
            word = f" {word}"
            tokens += self._words.get(word) or self._new(word)
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of the tokens; control symbols and padding leave no trace."""
        return self._pieces.decode(list(tokens))

    def prompt(self, text: str, *, with_image: bool) -> list[int]:
        """Tokens up to where the answer begins.

        The image symbol comes first, before the begin symbol, so that every token of a text that
        has an image sees it.
        """
        return self.turn(text, images=int(with_image), first=True)

    def turn(self, prompt: str, *, images: int, first: bool) -> list[int]:
        """Tokens of a chat's turn up to where its answer begins."""
        begin = [BEGIN] if first else []
        return [*[self.image] * images, *begin, self.user, *self.encode(prompt), self.assistant]

    def _new(self, word: str) -> list[int]:
        """Tokens of a word that is not known yet, or of a whole text, by SentencePiece."""
        try:
            tokens: list[int] = self._pieces.encode(word)
        except RuntimeError as error:
            raise BadSampleError(NO_CHARACTER) from error
        if len(word) <= LONGEST_WORD:
            if len(self._words) == KNOWN_WORDS:
                self._words.clear()
            self._words[word] = tokens
        return tokens

    def _never_crosses_spaces(self) -> bool:
        """Whether the tokens of a text are those of its words, one after the other.

        So it is when no piece has a space after its first character, and nothing is normalised.
        """
        probe = "  \uff21\u3000b "  # a full-width letter, an ideographic space
        normal: str = self._pieces.normalize(probe)
        return normal == probe.replace(" ", SPACE) and not any(
            SPACE in piece.text[1:] for piece in self.pieces()
        )

    def _kind(self, number: int) -> str:
        model = self._pieces
        if model.is_control(number):
            return "control"
        if model.is_byte(number):
            return "byte"
        return "unknown" if model.is_unknown(number) else "learned"

    def _symbol(self, symbol: str, path: Path) -> int:
        token = self._pieces.piece_to_id(symbol)
        if token == UNKNOWN:
            raise TokenizerError(
                f"tokenizer {path} lacks the control symbol {symbol}; train it with "
                "`megavlm tokenizer train`"
            )
        return token


def train_tokenizer(
    texts: Iterable[str], path: Path, vocabulary: int, seed_texts: int = SEED_TEXTS
) -> None:
    """Train a BPE model on texts and write it to `path`.

    Identity normalisation and no dummy prefix, so that decoding returns the text unchanged. A piece
    has characters of one script, where SentencePiece takes kanji and kana for one, so that Japanese
    words become pieces; and each digit is a piece, so that all numbers are written alike.
    Of more lines than `seed_texts` a sample is taken, always the same.
    Raises TokenizerError when the file exists or cannot be written, and when the texts cannot fill
    the vocabulary.
    """
    if vocabulary <= RESERVED_PIECES:
        raise TokenizerError(
            f"vocabulary={vocabulary} must exceed the {RESERVED_PIECES} reserved pieces"
        )
    if path.exists():
        raise TokenizerError(f"tokenizer {path} exists; delete it or choose another name")
    mistakes: list[MegavlmError] = []
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_lines(_noting(texts, mistakes)),
                model_writer=file,
                model_type="bpe",
                vocab_size=vocabulary,
                character_coverage=CHARACTER_COVERAGE,
                byte_fallback=True,
                split_by_unicode_script=True,
                split_digits=True,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                unk_id=UNKNOWN,
                bos_id=BEGIN,
                eos_id=END,
                pad_id=PADDING,
                control_symbols=list(CONTROL_SYMBOLS),
                input_sentence_size=seed_texts,
                shuffle_input_sentence=True,
                minloglevel=1,
            )
        partial.rename(path)
    except RuntimeError as error:
        if mistakes:
            raise mistakes[0] from None
        raise TokenizerError(
            f"cannot train a vocabulary of {vocabulary} on these texts: {error}"
        ) from error
    except OSError as error:
        raise TokenizerError(
            f"cannot write tokenizer {path}: {error.strerror}; choose another name"
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _noting(texts: Iterable[str], mistakes: list[MegavlmError]) -> Iterator[str]:
    """Texts, and what stops them, which SentencePiece would tell as an error of its own."""
    try:
        yield from texts
    except MegavlmError as error:
        mistakes.append(error)
        raise


def _lines(texts: Iterable[str]) -> Iterator[bytes]:
    """SentencePiece reads lines; a text with line breaks, or a long one, is several."""
    for text in texts:
        for line in text.replace(UNKNOWN_MARK, " ").splitlines():
            for start in range(0, len(line), MAX_LINE_CHARACTERS):
                part = line[start : start + MAX_LINE_CHARACTERS]
                yield part.encode(errors="replace")  # lone surrogates are no characters
