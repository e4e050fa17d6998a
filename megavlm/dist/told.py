"""Errors that all ranks raise, and that one of them tells."""

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar, cast

import torch.distributed as dist

from megavlm.dist import groups
from megavlm.errors import MegavlmError
from megavlm.terminal import tell_error

Value = TypeVar("Value")

ASKED_SECONDS = 1.0
"""Rank 0, whose process has the ranks' store, stays so long for others to ask it."""


def agreed(step: Callable[[], Value], group: dist.ProcessGroup | None = None) -> Value:
    """What it returns; a MegavlmError of one rank is raised on all (of a group). Collective."""
    value, error = None, None
    try:
        value = step()
    except MegavlmError as failed:
        error = failed
    for found in filter(None, groups.from_all_ranks(error, group)):
        raise found
    return cast(Value, value)


@contextmanager
def told_once() -> Iterator[None]:
    """Have errors of the body told by the rank that comes first; within the world's group.

    At once, as a launcher ends the others when the first rank has ended. What differs is told by
    each.
    """
    try:
        yield
    except MegavlmError as error:
        if _comes_first(str(error)):
            tell_error(error)
        error.is_told = True
        if dist.get_rank() == 0:
            _stay(str(error))
        raise


def _comes_first(text: str) -> bool:
    with suppress(Exception):  # where the store is gone, each speaks for itself
        return _count(text, 1) == 1
    return True


def _stay(text: str) -> None:
    given_up = time.monotonic() + ASKED_SECONDS
    with suppress(Exception):
        while _count(text, 0) < dist.get_world_size() and time.monotonic() < given_up:
            time.sleep(0.02)


def _count(text: str, more: int) -> int:
    """Of ranks that have this to tell."""
    store = cast(Any, dist).distributed_c10d._get_default_store()
    return store.add(f"told/{hashlib.sha256(text.encode()).hexdigest()}", more)
