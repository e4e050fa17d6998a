"""Lines of text to lines of tokens, as `megavlm tokenizer encode` writes them."""

import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import cache, partial
from itertools import islice
from pathlib import Path

from megavlm.data.tokenizer import Tokenizer

LINES_AT_ONCE = 4_000
AHEAD = 3
"""So many parts for each worker are in memory."""


def encode_lines(
    model: Path, lines: Iterable[str], *, workers: int = 1, pieces: bool = False
) -> Iterator[str]:
    """Each line's tokens with spaces between, some thousand lines at once, in order.

    workers: processes; 1 works in this one. pieces: writes pieces for numbers. Raises
    TokenizerError.
    """
    Tokenizer(model)  # a mistake is told before anything starts
    encode = partial(_encoded, model, pieces)
    parts = _parts(iter(lines))
    if workers == 1:
        yield from map(encode, parts)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        waiting: deque[Future[str]] = deque()
        for part in parts:
            waiting.append(pool.submit(encode, part))
            if len(waiting) >= AHEAD * workers:
                yield waiting.popleft().result()
        for future in waiting:
            yield future.result()


def _parts(lines: Iterator[str]) -> Iterator[list[str]]:
    while part := [*islice(lines, LINES_AT_ONCE)]:
        yield part


def _encoded(model: Path, pieces: bool, lines: list[str]) -> str:
    tokenizer, words = _open(model, pieces)
    encoded = map(tokenizer.encode, lines)
    return "".join(f"{' '.join([words[token] for token in tokens])}\n" for tokens in encoded)


@cache
def _open(model: Path, pieces: bool) -> tuple[Tokenizer, list[str]]:
    """The tokenizer, and what is written for each of its tokens."""
    tokenizer = Tokenizer(model)
    numbers = map(str, range(tokenizer.vocabulary))
    return tokenizer, [p.text for p in tokenizer.pieces()] if pieces else [*numbers]
