"""What all ranks do together, and whose errors all of them raise."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megavlm.errors import CheckpointError, MegavlmError

Value = TypeVar("Value")


def on_all_ranks(step: Callable[[], Value], group: dist.ProcessGroup | None = None) -> Value:
    """What it returns; an error of one rank is raised on all, as a CheckpointError. Collective."""
    value, error = None, None
    try:
        value = step()
    except CheckpointError as failed:
        error = failed
    except Exception as failed:
        error = CheckpointError(str(failed) if isinstance(failed, MegavlmError) else repr(failed))
    errors: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(errors, error, group=group)
    for told in filter(None, errors):
        raise told
    return cast(Value, value)


@contextmanager
def failures_told() -> Iterator[None]:
    """Raise the first rank's error; torch wraps those of all ranks."""
    try:
        yield
    except CheckpointException as failed:
        rank, (error, trace) = min(failed.failures.items())
        if isinstance(error, MegavlmError):
            raise error from failed
        raise CheckpointError(f"rank {rank}: {error!r}\n{''.join(trace.format())}") from failed
