"""Who writes and reads what, for torch Distributed Checkpoint.

Its default planners send an object for every box to one rank and back. For 30.5 billion parameters
on 128 ranks those are 370,000, and take that rank's interpreter a minute of each save, in which
all others wait for its kernels. Here only names, origins and sizes travel, which takes it three
seconds, and a rank that loads needs nobody.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from itertools import chain, product
from operator import add
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megavlm.checkpoint.shards import Origin, State
from megavlm.errors import CheckpointError

Size = tuple[int, ...]
Box = tuple[Origin, Size]
Holding = dict[str, tuple[Size, torch.dtype, dict[Origin, Size]]]
"""Of each tensor: its whole shape, its type, and the boxes that a rank holds with their sizes."""


class ShardsSavePlanner(SavePlanner):
    """Every box is written once, by the rank that has least to write among those that hold it."""

    total_bytes = 0
    """Of all tensors, on the rank that has planned them."""

    def set_up_planner(
        self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        self._state: State = state_dict

    def create_local_plan(self) -> SavePlan:
        holding: Holding = {}
        for name, shards in self._state.items():
            sizes = {origin: tuple(box.shape) for origin, box in shards.boxes.items()}
            for dtype in {box.dtype for box in shards.boxes.values()}:  # none, or one
                holding[name] = (shards.shape, dtype, sizes)
        return SavePlan([], planner_data=holding)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        holdings: list[Holding] = [plan.planner_data for plan in all_plans]
        tensors = {
            name: TensorStorageMetadata(TensorProperties(dtype), torch.Size(shape), chunks=[])
            for holding in holdings
            for name, (shape, dtype, _) in holding.items()
        }
        self.total_bytes = sum(
            tensor.size.numel() * tensor.properties.dtype.itemsize for tensor in tensors.values()
        )
        others = _written_by_others(holdings)
        plans = [
            replace(plan, planner_data=other) for plan, other in zip(all_plans, others, strict=True)
        ]
        return plans, Metadata(tensors)  # pyright: ignore[reportArgumentType]

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        by_others: set[tuple[str, Origin]] = new_plan.planner_data
        items = [
            item
            for name, shards in self._state.items()
            for item in shards.__create_write_items__(name, shards)
            if (name, tuple(item.index.offset or ())) not in by_others
        ]
        return replace(new_plan, items=items)

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._state[write_item.index.fqn].__get_tensor_shard__(write_item.index)


def _written_by_others(holdings: Sequence[Holding]) -> list[set[tuple[str, Origin]]]:
    """For each rank, the boxes that another one writes.

    Raises CheckpointError unless the boxes of each tensor make it up.
    """
    tensors: dict[str, tuple[Size, torch.dtype]] = {}
    holders: dict[str, dict[Box, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, holding in enumerate(holdings):
        for name, (shape, dtype, sizes) in holding.items():
            if tensors.setdefault(name, (shape, dtype)) != (shape, dtype):
                raise CheckpointError(f"the ranks hold {name} in several shapes or types")
            for box in sizes.items():
                holders[name][box].append(rank)
    load = [0] * len(holdings)
    by_others: list[set[tuple[str, Origin]]] = [set() for _ in holdings]
    for name, boxes in holders.items():
        check_boxes("the ranks hold", name, tensors[name][0], boxes)
        for (origin, size), ranks in boxes.items():
            writer = min(ranks, key=load.__getitem__)
            load[writer] += math.prod(size)
            for rank in ranks:
                if rank != writer:
                    by_others[rank].add((name, origin))
    return by_others


def check_boxes(who_has: str, name: str, shape: Size, boxes: Collection[Box]) -> None:
    """Raise CheckpointError unless every element of a tensor lies in exactly one of the boxes.

    Points that are corners of an odd number of boxes tell where that number is odd: where they
    are the whole tensor's own corners, each element lies in some box. It lies in one alone if the
    boxes have no more elements than the tensor. So no box has to be compared with another.
    """
    held = sum(math.prod(size) for _, size in boxes)
    if held != math.prod(shape):
        raise CheckpointError(f"{who_has} {held} elements of {name}, which has {math.prod(shape)}")
    if _odd_corners(boxes) != _odd_corners([((0,) * len(shape), shape)]):
        raise CheckpointError(f"{who_has} boxes of {name} that overlap, or lie outside it")


def _odd_corners(boxes: Iterable[Box]) -> set[tuple[int, ...]]:
    corners = (product(*zip(first, map(add, first, size), strict=True)) for first, size in boxes)
    counts = Counter(chain.from_iterable(corners))
    return {corner for corner, count in counts.items() if count % 2}


class ShardsLoadPlanner(LoadPlanner):
    """Every rank reads what it holds, from wherever the checkpoint has it."""

    def set_up_planner(
        self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        assert metadata is not None
        self._state: State = state_dict
        self._saved = metadata.state_dict_metadata

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan([])

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        items: list[ReadItem] = []
        for name, shards in self._state.items():
            saved = self._saved[name]
            assert isinstance(saved, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(name, saved, shards.__create_chunk_list__())
        return LoadPlan(items)

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise CheckpointError(f"{read_item.dest_index.fqn} is no tensor")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        box = self._state[read_item.dest_index.fqn].__get_tensor_shard__(read_item.dest_index)
        for axis, (offset, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            box = box.narrow(axis, offset, length)
        return box

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass
