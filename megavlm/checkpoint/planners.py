"""Who writes and reads what, for torch Distributed Checkpoint.

Its default planners send an object for every box to one rank and back. For 30.5 billion parameters
on 128 ranks those are 370,000, and take that rank's interpreter a minute of each save, in which
all others wait for its kernels. Here only names, origins and numbers of elements travel, and a
rank that loads needs nobody.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
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

Holding = dict[str, tuple[tuple[int, ...], torch.dtype, dict[Origin, int]]]
"""Of each tensor: its whole shape, its type, and the boxes that a rank holds with their sizes."""


class ShardsSavePlanner(SavePlanner):
    """Every box is written once, by the rank that has least to write among those that hold it."""

    def set_up_planner(
        self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        self._state: State = state_dict

    def create_local_plan(self) -> SavePlan:
        holding: Holding = {}
        for name, shards in self._state.items():
            for box in shards.boxes.values():
                sizes = {origin: box.numel() for origin, box in shards.boxes.items()}
                holding[name] = (shards.shape, box.dtype, sizes)
        return SavePlan([], planner_data=holding)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        holdings: list[Holding] = [plan.planner_data for plan in all_plans]
        tensors = {
            name: TensorStorageMetadata(TensorProperties(dtype), torch.Size(shape), chunks=[])
            for holding in holdings
            for name, (shape, dtype, _) in holding.items()
        }
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

    Raises CheckpointError unless the boxes of each tensor add up to it.
    """
    holders: dict[tuple[str, Origin], list[int]] = defaultdict(list)
    for rank, holding in enumerate(holdings):
        for name, (_, _, sizes) in holding.items():
            for origin in sizes:
                holders[name, origin].append(rank)
    elements: dict[str, int] = defaultdict(int)
    load = [0] * len(holdings)
    by_others: list[set[tuple[str, Origin]]] = [set() for _ in holdings]
    for (name, origin), ranks in holders.items():
        size = holdings[ranks[0]][name][2][origin]
        elements[name] += size
        writer = min(ranks, key=load.__getitem__)
        load[writer] += size
        for rank in ranks:
            if rank != writer:
                by_others[rank].add((name, origin))
    shapes = {name: shape for holding in holdings for name, (shape, _, _) in holding.items()}
    for name, shape in shapes.items():
        if elements[name] != math.prod(shape):
            raise CheckpointError(
                f"the ranks hold {elements[name]} elements of {name}, which has {math.prod(shape)}"
            )
    return by_others


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
