"""What a tokenizer holds, and what it makes of texts, as `megavlm tokenizer inspect` shows them."""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from megavlm.data.tokenizer import UNKNOWN, Piece, Tokenizer
from megavlm.errors import BadSampleError
from megavlm.terminal import printable

LONGEST = 12
EXAMPLES = 6
FEW_PIECES = 10
"""Scripts with fewer are counted together."""
ALL = "all"
NO_LETTERS = "no letters"
# Of names of characters in Unicode, where their first word is not their script.
SCRIPTS = {"Cjk": "Han", "Ideographic": "Han", "Katakana-hiragana": "Katakana"}
WIDTHS = ("Fullwidth", "Halfwidth")


@dataclass
class TextFigures:
    """What became of texts of one script."""

    texts: int = 0
    characters: int = 0
    tokens: int = 0
    bytes: int = 0
    """Tokens that stand for one byte of a character that is no piece."""
    unknown: int = 0
    """Tokens without a meaning; none with byte fallback."""
    changed: int = 0
    """Texts that decoding does not give back."""

    def add(self, other: "TextFigures") -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def figures_by_script(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, TextFigures]:
    """Figures of texts by the script that most of their letters have, largest first, then of all.

    Kanji and kana are one script, Japanese, in a text that has kana.
    """
    is_byte = [piece.kind == "byte" for piece in tokenizer.pieces()]
    by_script: defaultdict[str, TextFigures] = defaultdict(TextFigures)
    for text in filter(None, texts):  # captions without a prompt have an empty one
        try:
            tokens = tokenizer.encode(text)
        except BadSampleError:  # no text to begin with
            tokens = [UNKNOWN]
        figures = TextFigures(
            texts=1,
            characters=len(text),
            tokens=len(tokens),
            bytes=sum(is_byte[token] for token in tokens),
            unknown=tokens.count(UNKNOWN),
            changed=tokenizer.decode(tokens) != text,
        )
        by_script[script_of(text)].add(figures)
    total = TextFigures()
    for figures in by_script.values():
        total.add(figures)
    return dict(sorted(by_script.items(), key=lambda item: -item[1].texts)) | {ALL: total}


def script_of(text: str) -> str:
    """The script of most of its letters."""
    counts = Counter(script for script in map(_script_of_character, text) if script)
    if not counts:
        return NO_LETTERS
    if counts.keys() & {"Hiragana", "Katakana"}:
        counts["Japanese"] = sum(counts.pop(s, 0) for s in ("Hiragana", "Katakana", "Han"))
    return counts.most_common(1)[0][0]


@lru_cache(None)
def _script_of_character(character: str) -> str:
    """The first word of a letter's name, which is its script; "" for what is no letter."""
    if not unicodedata.category(character).startswith("L"):
        return ""
    words = unicodedata.name(character, "").capitalize().split()
    word = words[0] if words else ""
    return words[1].capitalize() if word in WIDTHS else SCRIPTS.get(word, word)


def print_tokenizer(path: Path, texts: Iterable[str] | None) -> None:
    """Print tables of the vocabulary and, if there are texts, of what becomes of them."""
    tokenizer = Tokenizer(path)
    pieces = tokenizer.pieces()
    # Also where nobody looks on, lines are whole.
    console = Console(width=None if Console().is_terminal else 100)
    console.print(
        _text(f"{path}: {tokenizer.vocabulary:,} pieces, SHA-256 {tokenizer.fingerprint}")
    )
    learned = sorted((p.text for p in pieces if p.kind == "learned"), key=lambda t: (-len(t), t))
    console.print(_kinds(pieces, learned), _scripts(learned))
    if texts is not None:
        console.print(_figures(figures_by_script(tokenizer, texts)))


def _kinds(pieces: Sequence[Piece], learned: Sequence[str]) -> Table:
    single = [text for text in learned if len(text) == 1]
    longer = learned[: len(learned) - len(single)]
    control = [piece.text for piece in pieces if piece.kind in ("control", "unknown")]
    of_bytes = [piece.text for piece in pieces if piece.kind == "byte"]
    table = Table("kind", *_right("pieces"), "which", box=SIMPLE_HEAD)
    for kind, members, shown in (
        ("control", control, control),
        ("bytes", of_bytes, [of_bytes[0], "...", of_bytes[-1]] if of_bytes else []),
        ("characters", single, []),
        ("longer", longer, [f"longest: {' '.join(longer[:LONGEST])}"]),
    ):
        table.add_row(kind, f"{len(members):,}", _text(" ".join(shown)))
    return table


def _scripts(learned: Sequence[str]) -> Table:
    by_script: defaultdict[str, list[str]] = defaultdict(list)
    for text in learned:
        by_script[script_of(text)].append(text)
    for script in [s for s, texts in by_script.items() if len(texts) < FEW_PIECES]:
        by_script["others"] += by_script.pop(script)
    table = Table("script", *_right("pieces", "share"), "longest", box=SIMPLE_HEAD)
    for script, texts in sorted(by_script.items(), key=lambda item: -len(item[1])):
        share = f"{len(texts) / len(learned):.1%}"
        table.add_row(script, f"{len(texts):,}", share, _text(" ".join(texts[:EXAMPLES])))
    return table


def _figures(by_script: dict[str, TextFigures]) -> Table:
    columns = ("texts", "tokens a text", "tokens a character", "bytes", "unknown", "changed")
    table = Table("texts in", *_right(*columns), box=SIMPLE_HEAD)
    for script, f in by_script.items():
        table.add_row(
            script,
            f"{f.texts:,}",
            f"{f.tokens / max(1, f.texts):.2f}",
            f"{f.tokens / max(1, f.characters):.3f}",
            f"{f.bytes / max(1, f.tokens):.2%}",
            f"{f.unknown:,}",
            f"{f.changed:,}",
        )
    return table


def _text(pieces: str) -> Text:
    """Pieces as they are, but for what would steer a terminal."""
    return Text(printable(pieces))


def _right(*names: str) -> Iterator[Column]:
    for name in names:
        yield Column(name, justify="right")
