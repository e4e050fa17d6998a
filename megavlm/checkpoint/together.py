"""What all ranks do together, and whose errors all of them raise."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megavlm.dist.told import agreed
from megavlm.errors import CheckpointError, MegavlmError

Value = TypeVar("Value")


def on_all_ranks(step: Callable[[], Value], group: dist.ProcessGroup | None = None) -> Value:
    """What it returns; an error of one rank is raised on all, as a CheckpointError. Collective."""

    def as_checkpoint_error() -> Value:
        try:
            return step()
        except CheckpointError:
            raise
        except Exception as failed:
            told = str(failed) if isinstance(failed, MegavlmError) else repr(failed)
            raise CheckpointError(told) from failed

    return agreed(as_checkpoint_error, group)


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
