"""Records which collectives a rank issues, on which group, with which shapes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


class Collective(NamedTuple):
    """One call into a process group."""

    operation: str
    ranks: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Collective] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function._schema.name
        if name.startswith("c10d::"):
            groups = [a for a in args if isinstance(a, torch.ScriptObject)]
            group = next(dist.ProcessGroup.unbox(g) for g in groups if _is_group(g))
            tensors = [t for a in args for t in (a if isinstance(a, list) else [a])]
            shapes = tuple(tuple(t.shape) for t in tensors if isinstance(t, torch.Tensor))
            ranks = tuple(dist.get_process_group_ranks(group))
            self.calls.append(Collective(name.removeprefix("c10d::"), ranks, shapes))
        return function(*args, **(kwargs or {}))


def _is_group(value: torch.ScriptObject) -> bool:
    return value._type().qualified_name().endswith("ProcessGroup")


@contextmanager
def recorded() -> Iterator[list[Collective]]:
    """Fill the list with the collectives of this rank, in order, while the body runs."""
    with _Recorder() as recorder:
        yield recorder.calls
