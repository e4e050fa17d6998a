"""What a server takes on, each a setting of `megavlm serve`."""

from dataclasses import dataclass, field

MIB = 2**20


def _limit(default: int, meaning: str) -> int:
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True, kw_only=True)
class ServeLimits:
    """Whole numbers of at least 1."""

    rows: int = _limit(16, "answers that are written at the same time; others wait")
    queue: int = _limit(64, "requests that may wait; more are refused with 429")
    tokens: int = _limit(2_048, "of a chat, its answer included")
    answer_tokens: int = _limit(512, "of an answer whose request does not say max_tokens")
    pictures: int = _limit(4, "of a chat")
    picture_mib: int = _limit(10, "of one encoded picture")
    picture_megapixels: int = _limit(16, "of one picture; 64 is the most that is ever decoded")
    body_mib: int = _limit(32, "of a request's body")
    bodies_mib: int = _limit(256, "of all bodies that are being read at the same time")
    connections: int = _limit(512, "at the same time; more are refused with 503")
    receive_seconds: int = _limit(30, "in which a request has to arrive, its body included")
    send_seconds: int = _limit(30, "after which a client that takes no more bytes is cut off")
    request_seconds: int = _limit(120, "in which an answer ends")
    drain_seconds: int = _limit(30, "that running answers have left after SIGTERM or SIGINT")
