"""Texts to train a tokenizer on, or to look at: lines of plain files, and all of shards."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from megavlm.data.shards import ShardFolder
from megavlm.errors import BadSampleError, DataError


def read_texts(places: Iterable[str | Path], samples: int) -> Iterator[str]:
    """The lines of text files, and the prompts and answers of folders of shards.

    samples: of a folder with more, so many are read, evenly spaced. Bad ones are named on standard
    error and left out. Raises DataError for a place that cannot be read.
    """
    for place in places:
        if Path(place).is_file():
            yield from _lines_of(Path(place))
        elif "://" not in str(place) and not Path(place).exists():
            raise DataError(f"texts {place} do not exist; name a text file or a folder of shards")
        else:
            yield from _texts_of(ShardFolder(place), samples)


def evenly_spaced(count: int, most: int) -> list[int]:
    """At most so many of the numbers below a count."""
    chosen = min(count, most)
    return [number * count // chosen for number in range(chosen)]


def decoded_lines(lines: Iterable[bytes], place: str) -> Iterator[str]:
    """Lines of a file of UTF-8 without their ends; raises DataError for one that is not."""
    for number, line in enumerate(lines, start=1):
        try:
            yield line.removesuffix(b"\n").removesuffix(b"\r").decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{place}, line {number}, is not UTF-8 ({error.reason} at byte {error.start}); "
                "convert it, with iconv, say"
            ) from error


def _lines_of(path: Path) -> Iterator[str]:
    try:
        with path.open("rb") as file:
            yield from decoded_lines(file, str(path))
    except OSError as error:
        raise DataError(f"cannot read texts {path}: {error.strerror}") from error


def _texts_of(folder: ShardFolder, samples: int) -> Iterator[str]:
    for number in evenly_spaced(len(folder), samples):
        try:
            for text in folder.read_texts(number):
                for turn in text.turns:
                    yield turn.prompt
                    yield turn.answer
        except BadSampleError as error:
            print(f"skipped {error}", file=sys.stderr, flush=True)
