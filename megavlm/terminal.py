"""What people read on a terminal: lines, counts, names that others have chosen, and progress."""

import os
import sys
import unicodedata
from collections.abc import Iterable
from typing import TypeVar

from megavlm.redact import without_secrets

Item = TypeVar("Item")

JOINERS = "\u200c\u200d"
"""Of letters in some scripts, and of emoji; they have no shape, and do no harm."""


def tell(text: str) -> None:
    """Print lines on standard error, each at once, so that those of several ranks stay whole."""
    for line in without_secrets(text).splitlines():
        print(f"megavlm: {line}\n", end="", file=sys.stderr, flush=True)


def tell_error(error: Exception) -> None:
    """Tell what ends a command, in one write, and which rank says so.

    error: a MegavlmError, whose own text hides secrets.
    """
    rank = os.environ.get("RANK")
    where = f" (rank {rank})" if rank else ""
    print(f"megavlm: error{where}: {error}\n", end="", file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Tell what a run goes on without."""
    tell(f"warning: {text}")


def counted(count: int, one: str, many: str = "") -> str:
    """A number of things, as in `1 host`, `16 hosts` and, with its plural, `2 copies`."""
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"


def printable(text: str) -> str:
    """A text with escapes for what a terminal would obey or cannot show, line breaks included."""
    if text.isprintable():
        return text
    return "".join(c if _has_shape(c) else c.encode("unicode_escape").decode() for c in text)


def printable_lines(text: str) -> str:
    """The same of each line of a text."""
    return "\n".join(printable(line) for line in text.split("\n"))


def _has_shape(character: str) -> bool:
    return (
        character.isprintable()
        or character in JOINERS
        or unicodedata.category(character) == "Zs"  # spaces
    )


def with_progress(items: Iterable[Item], what: str, total: int) -> Iterable[Item]:
    """Items, while a bar on standard error shows how far they are, if that is a terminal."""
    from rich.console import Console  # not needed by commands that are quick
    from rich.progress import track

    console = Console(stderr=True)
    if not console.is_terminal:
        return items
    return track(items, what, total, console=console, transient=True)
