"""Reading parts of a file in an object store, with few requests and few bytes too many.

A request takes tens of milliseconds whatever it brings, and each rank reads thousands of boxes.
What the file systems offer are one request a read, or reading ahead by a fixed amount.
"""

import io
from bisect import bisect_right
from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import Any

Range = tuple[int, int]
"""First byte, and the one after the last."""

SMALL_BYTES = 1 << 20
"""What is less costs as much as the request does: ranges so near to each other share one."""
PIECE_BYTES = 8 << 20
"""Of one request: longer ranges are cut up, as one connection brings some 100 MB/s at most."""
PIECES_AT_ONCE = 16


class RangeReader(io.RawIOBase):
    """A file that is read by requests, where `ranges` say and from first to last.

    Other reads work, with a request each. It holds at most PIECES_AT_ONCE in memory.
    """

    def __init__(
        self, fetch: Callable[[list[Range]], list[bytes]], ranges: Iterable[Range]
    ) -> None:
        self._fetch = fetch
        self._position = 0
        self._plan(ranges)

    def _plan(self, ranges: Iterable[Range]) -> None:
        self._pieces = pieces_of(ranges)
        self._held: dict[int, bytes] = {}

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        assert whence == io.SEEK_SET  # the size is not known
        self._position = offset
        return offset

    def readinto(self, target: Any, /) -> int:
        number = bisect_right(self._pieces, self._position, key=itemgetter(0)) - 1
        if number < 0 or self._position >= self._pieces[number][1]:
            self._plan([(self._position, self._position + max(len(target), SMALL_BYTES))])
            number = 0
        if number not in self._held:
            self._held.clear()  # before others come
            contents = self._fetch(self._pieces[number : number + PIECES_AT_ONCE])
            self._held = dict(enumerate(contents, start=number))
        first = self._position - self._pieces[number][0]
        part = self._held[number][first : first + len(target)]
        target[: len(part)] = part
        self._position += len(part)
        return len(part)


def pieces_of(ranges: Iterable[Range]) -> list[Range]:
    """What to request, ascending, so that all ranges are covered."""
    spans: list[Range] = []
    for first, stop in sorted(ranges):
        if spans and first <= spans[-1][1] + SMALL_BYTES:
            spans[-1] = (spans[-1][0], max(stop, spans[-1][1]))
        else:
            spans.append((first, stop))
    return [
        (start, min(start + PIECE_BYTES, stop))
        for first, stop in spans
        for start in range(first, stop, PIECE_BYTES)
    ]
