"""Counts the memory of real tensors as the dry run counts that of tensors without data."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._C._distributed_c10d import Work
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from megavlm.dryrun.record import Recorder


class _Seeing(TorchDispatchMode):
    """Counts real tensors as the dry run counts those without data."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._memory = recorder.memory

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            # A DTensor has no memory but that of its part.
            if type(leaf) in (torch.Tensor, nn.Parameter) and leaf.device.type != "meta":
                self._memory.see(leaf)
        return out


@contextmanager
def seen() -> Iterator[Recorder]:
    """What the body allocates; not gloo's own copies, which NCCL does not make."""
    recorder, resize = Recorder(), torch.UntypedStorage.resize_

    def resize_(storage: Any, size: int) -> Any:
        out = resize(storage, size)
        recorder.memory.resized(storage)
        return out

    wait = Work.wait

    def wait_(work: Any, *args: Any) -> Any:
        with _disable_current_modes():
            return wait(work, *args)

    with (
        patch.object(torch.UntypedStorage, "resize_", resize_),
        patch.object(Work, "wait", wait_),
        _Seeing(recorder),
    ):
        yield recorder
