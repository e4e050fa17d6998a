"""SentencePiece tokenizer: BPE with byte fallback, and control symbols for images and chat.

Control symbols are never produced from text, so a user's text cannot make an image or a role.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from megavlm.errors import TokenizerError

UNKNOWN, BEGIN, END, PADDING = 0, 1, 2, 3
CONTROL_SYMBOLS = ("<|image|>", "<|user|>", "<|assistant|>")
BYTE_PIECES = 256
# unknown, begin, end, padding, the control symbols and the bytes, before any learned piece
RESERVED_PIECES = 4 + len(CONTROL_SYMBOLS) + BYTE_PIECES


class Tokenizer:
    """A trained SentencePiece model; raises TokenizerError when the file is missing or foreign."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise TokenizerError(
                f"tokenizer {path} does not exist; train it with "
                "`megavlm tokenizer RUN.yaml` or set data.tokenizer"
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
                f"and {PADDING}; train it with `megavlm tokenizer`"
            )
        self.image, self.user, self.assistant = (self._symbol(s, path) for s in CONTROL_SYMBOLS)

    @property
    def vocabulary(self) -> int:
        return self._pieces.get_piece_size()

    def encode(self, text: str) -> list[int]:
        return self._pieces.encode(text)

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

    def _symbol(self, symbol: str, path: Path) -> int:
        token = self._pieces.piece_to_id(symbol)
        if token == UNKNOWN:
            raise TokenizerError(
                f"tokenizer {path} lacks the control symbol {symbol}; train it with "
                "`megavlm tokenizer`"
            )
        return token


def train_tokenizer(
    texts: Iterable[str], path: Path, vocabulary: int, seed_texts: int = 10**7
) -> None:
    """Train a BPE model on texts and write it to `path`.

    Identity normalisation and no dummy prefix, so that decoding returns the text unchanged.
    At most `seed_texts` texts are sampled. Raises TokenizerError when the texts cannot fill the
    vocabulary.
    """
    if vocabulary <= RESERVED_PIECES:
        raise TokenizerError(
            f"vocabulary={vocabulary} must exceed the {RESERVED_PIECES} reserved pieces"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_lines(texts),
                model_writer=file,
                model_type="bpe",
                vocab_size=vocabulary,
                character_coverage=0.9995,
                byte_fallback=True,
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
    except RuntimeError as error:
        partial.unlink()
        raise TokenizerError(
            f"cannot train a vocabulary of {vocabulary} on these texts: {error}"
        ) from error
    partial.rename(path)


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """SentencePiece reads lines; a text with line breaks is several."""
    for text in texts:
        yield from text.splitlines()
