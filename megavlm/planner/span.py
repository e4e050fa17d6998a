"""Something that takes time."""

from typing import NamedTuple


class Span(NamedTuple):
    """From start to end, in seconds, on a stream or a rank."""

    lane: str
    name: str
    kind: str
    start: float
    end: float
