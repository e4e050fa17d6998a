"""How full packed rows are, and how fast texts are packed.

    python tools/bench_packing.py --captions captions.txt --tokenizer tokenizer.model

Takes the token counts of real captions, one to a line, draws texts from them, and packs as many at
once as a micro-batch has: into rows of a fixed length, and into rows only as long as needed
(`data.row_bucket_tokens`). Beside it, texts put into rows in the order in which they come ("next
fit"), as a loader does that looks at one text at a time; timings in turns, medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megavlm.data.packing import lay_out, python_text_places, text_places
from megavlm.data.tokenizer import END, Tokenizer

Lengths = NDArray[np.int64]

BUCKET_TOKENS = 64
ROUNDS = 5
TEXTS_AT_ONCE = (16, 64, 256, 1024, 4096, 16384)


def lengths_of(captions: Path, tokenizer: Tokenizer, prompt: str) -> Lengths:
    """Tokens that each caption takes in a row, with its prompt."""
    before = len(tokenizer.turn(prompt, images=1, first=True))
    lines = [line for line in captions.read_text().splitlines() if line]
    tokens = [before + len(tokenizer.encode(line)) + len([END]) - 1 for line in lines]
    return np.array(tokens, np.int64)


def next_fit(lengths: Lengths, row_tokens: int) -> int:
    """Rows that texts need in the order in which they come."""
    rows, used = 1, 0
    for length in lengths.tolist():
        if used + length > row_tokens:
            rows, used = rows + 1, 0
        used += length
    return rows


def efficiency(lengths: Lengths, at_once: int, row_tokens: int, bucket_tokens: int | None) -> float:
    """Share of places that are no padding, over all that is packed at once in turn."""
    places = 0
    for first in range(0, len(lengths), at_once):
        part = lengths[first : first + at_once].tolist()
        (rows, length), _ = lay_out(part, row_tokens, bucket_tokens=bucket_tokens, shared=True)
        places += rows * length
    return float(lengths.sum()) / places


def seconds_of(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--captions", type=Path, required=True, help="one to a line")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--prompt", default="Caption:")
    parser.add_argument("--row-tokens", type=int, default=2048)
    parser.add_argument("--texts", type=int, default=2**18, help="that are drawn")
    options = parser.parse_args()
    row_tokens = options.row_tokens
    real = lengths_of(options.captions, Tokenizer(options.tokenizer), options.prompt)
    lengths = np.random.default_rng(0).choice(np.minimum(real, row_tokens), options.texts)
    print(
        f"{len(real):,} captions: {real.mean():.1f} tokens on average with the prompt, at most "
        f"{real.max()}; {options.texts:,} texts drawn, rows of {row_tokens}\n"
    )
    print(
        "| texts at once | rows full | rows full, as long as needed | next fit | texts/s | "
        "of Python's |\n|---|---|---|---|---|---|"
    )
    for at_once in TEXTS_AT_ONCE:
        parts = [lengths[a : a + at_once] for a in range(0, len(lengths), at_once)]
        contenders: dict[str, Callable[[], object]] = {
            "C++": lambda parts=parts: [text_places(part, row_tokens) for part in parts],
            "Python": lambda parts=parts: python_text_places(parts[0], row_tokens),
        }
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(ROUNDS):
            for name, function in contenders.items():
                times[name].append(seconds_of(function))
        rate = len(lengths) / statistics.median(times["C++"])
        of_python = rate * statistics.median(times["Python"]) / at_once
        in_order = lengths.sum() / (row_tokens * sum(next_fit(part, row_tokens) for part in parts))
        print(
            f"| {at_once:,} | {efficiency(lengths, at_once, row_tokens, None):.1%} | "
            f"{efficiency(lengths, at_once, row_tokens, BUCKET_TOKENS):.1%} | {in_order:.1%} | "
            f"{rate / 1e6:.2f} M | {of_python:.0f} x |"
        )


if __name__ == "__main__":
    main()
