"""What one rank holds and sends, on tensors without data: its bytes by kind, its collectives."""

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Call(NamedTuple):
    """One call into a process group."""

    operation: str
    ranks: tuple[int, ...]
    """Of the group, by their global numbers."""
    peer: int | None
    """Global number of the rank that is sent to, received from, or broadcast from."""
    tensors: tuple[tuple[str, int], ...]
    """Type and elements of each tensor, in the order of the call."""
    bytes: int
    """Of the largest list of tensors: what is gathered, reduced, or sent."""


class Memory:
    """Bytes of all live storages by kind, and the peak of their sum."""

    def __init__(self) -> None:
        self.live: Counter[str] = Counter()
        self.total = 0
        self.peak = 0
        self.at_peak: dict[str, int] = {}
        self.kind = ""
        """Of what is allocated from now on; empty: by whether autograd runs backward."""
        self._known: dict[int, list[Any]] = {}

    def start_peak(self) -> None:
        """Forget the peak so far."""
        self.peak, self.at_peak = self.total, dict(self.live)

    def see(self, tensor: Tensor) -> None:
        """Count a tensor's storage, unless it is known."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = entry = [self._kind(), 0]
        weakref.finalize(storage, self._freed, key)
        self._grow(entry, storage.nbytes())

    def resized(self, storage: Any) -> None:
        """Count a storage anew."""
        entry = self._known.get(storage._cdata)
        if entry is not None:
            if storage.nbytes() > entry[1] == 0 and entry[0] not in HELD:
                entry[0] = self._kind()
            self._grow(entry, storage.nbytes() - entry[1])

    def call_it(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Tell what storages are that are alive already."""
        for tensor in tensors:
            entry = self._known.get(tensor.untyped_storage()._cdata)
            if entry is not None and entry[0] not in HELD:
                self.live[entry[0]] -= entry[1]
                self.live[kind] += entry[1]
                entry[0] = kind

    def _kind(self) -> str:
        if self.kind:
            return self.kind
        in_backward = torch._C._current_graph_task_id() != -1
        return "backward" if in_backward else "forward"

    def _grow(self, entry: list[Any], size: int) -> None:
        entry[1] += size
        self.live[entry[0]] += size
        self.total += size
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, dict(self.live)

    def _freed(self, key: int) -> None:
        kind, size = self._known.pop(key)
        self.live[kind] -= size
        self.total -= size


HELD = ("parameters", "gradients", "optimizer")


class Recorder:
    """Takes in what the dry run's dispatch mode sees."""

    def __init__(self) -> None:
        self.memory = Memory()
        self.calls: list[Call] = []
        self.operations = 0
        self._ranks: dict[str, tuple[int, ...]] = {}

    def collective(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call of c10d."""
        names = [argument.name for argument in function._schema.arguments]
        named = dict(zip(names, args, strict=False)) | kwargs
        group = dist.ProcessGroup.unbox(named["process_group"])
        ranks = self.ranks(group)
        place = next((named[n] for n in ("dst", "src", "root_rank") if n in named), None)
        lists = [list(_tensors(value)) for value in named.values()]
        self.calls.append(
            Call(
                operation=function._schema.name.removeprefix("c10d::"),
                ranks=ranks,
                peer=None if place is None else ranks[place],
                tensors=tuple((_name(t.dtype), t.numel()) for ts in lists for t in ts),
                bytes=max(sum(t.numel() * t.element_size() for t in ts) for ts in lists),
            )
        )

    def of_objects(self, operation: str, group: Any) -> None:
        """A call that sends pickled objects."""
        ranks = self.ranks(group or dist.group.WORLD)
        self.calls.append(Call(operation, ranks, None, (), 0))

    def ranks(self, group: Any) -> tuple[int, ...]:
        """A group's ranks by their global numbers."""
        name = group.group_name
        if name not in self._ranks:
            self._ranks[name] = tuple(dist.get_process_group_ranks(group))
        return self._ranks[name]


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
