"""Errors that all ranks raise alike, and that one of them tells."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

import torch.distributed as dist

from megavlm.errors import MegavlmError
from megavlm.terminal import tell_error


@contextmanager
def told_once() -> Iterator[None]:
    """Have errors of the body told by the rank that comes first; within the world's group.

    At once, as a launcher ends the others when the first rank has ended. What differs is told by
    each.
    """
    try:
        yield
    except MegavlmError as error:
        said_before = False
        with suppress(Exception):  # where the ranks' store is gone, each speaks for itself
            store = cast(Any, dist).distributed_c10d._get_default_store()
            digest = hashlib.sha256(str(error).encode()).hexdigest()
            said_before = store.add(f"told/{digest}", 1) > 1
        if not said_before:
            tell_error(error)
        error.is_told = True
        raise
