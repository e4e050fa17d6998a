"""What a rank holds of a tensor, as boxes of the whole.

Engines hold ranges of flattened tensors: ZeRO-3 and megatron-core's optimiser cut wherever the
number of ranks says, also within a row, and tensor parallelism has taken a part first. A range of
rows is one box; the parts of rows at its ends are one box each.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from megavlm.model.params import Parameter

Origin = tuple[int, ...]


@dataclass(frozen=True)
class Shards:
    """This rank's boxes of one tensor; torch Distributed Checkpoint saves and loads them.

    It asks for the methods with underscores (`torch.distributed._checkpointable`).
    """

    shape: tuple[int, ...]
    """Of the whole tensor."""
    boxes: dict[Origin, Tensor]
    """By where their first element lies in the whole. They share the engine's memory."""

    def size(self) -> torch.Size:
        return torch.Size(self.shape)

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, origin),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=_chunk(origin, box),
                    properties=TensorProperties(dtype=box.dtype),
                    size=self.size(),
                ),
            )
            for origin, box in self.boxes.items()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_chunk(origin, box) for origin, box in self.boxes.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.boxes[tuple(index.offset)]


MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's states of a parameter."""
State = Mapping[str, Shards]
"""What a rank holds, by `weights/NAME`, `exp_avg/NAME` and `exp_avg_sq/NAME`."""


def _chunk(origin: Origin, box: Tensor) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(origin), sizes=box.shape)


def shards_of_range(
    entry: Parameter, flat: Tensor, first: int, tensor_ranks: int = 1, tensor_rank: int = 0
) -> Shards:
    """The boxes of a range of a tensor-parallel rank's part of a parameter, flattened.

    flat: its elements from `first` on; what goes beyond the part's end is padding.
    """
    shape = list(entry.shape)
    axis = entry.tensor_axis if tensor_ranks > 1 else None
    if axis is not None:
        shape[axis] //= tensor_ranks
    stop = min(first + flat.numel(), math.prod(shape))
    boxes: dict[Origin, Tensor] = {}
    for origin, size in boxes_of_range(shape, first, max(first, stop)):
        offset = sum(o * math.prod(shape[i + 1 :]) for i, o in enumerate(origin)) - first
        box = flat[offset : offset + math.prod(size)].view(size)
        if axis is None:
            boxes[origin] = box
            continue
        block = shape[axis] // entry.tensor_blocks
        for number, low, high in _by_block(origin[axis], size[axis], block):
            whole = list(origin)
            whole[axis] = low + block * (number * (tensor_ranks - 1) + tensor_rank)
            boxes[tuple(whole)] = box.narrow(axis, low - origin[axis], high - low)
    return Shards(entry.shape, boxes)


def _by_block(start: int, size: int, block: int) -> Iterator[tuple[int, int, int]]:
    """Cut a range where blocks end: the number of each block, and the range's part in it."""
    for number in range(start // block, (start + size - 1) // block + 1):
        yield number, max(start, number * block), min(start + size, (number + 1) * block)


def boxes_of_range(
    shape: Sequence[int], first: int, stop: int
) -> Iterator[tuple[Origin, tuple[int, ...]]]:
    """Origins and sizes of the boxes that elements first to stop of a row-major tensor make up."""
    if first == stop:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    begin, end = -(-first // row), stop // row
    if begin > end:  # within one row
        start = first // row
        yield from _in_row(shape, start, first - start * row, stop - start * row)
        return
    if first % row:
        yield from _in_row(shape, begin - 1, first % row, row)
    if begin < end:
        yield (begin, *[0] * (len(shape) - 1)), (end - begin, *shape[1:])
    if stop % row:
        yield from _in_row(shape, end, 0, stop % row)


def _in_row(
    shape: Sequence[int], row: int, first: int, stop: int
) -> Iterator[tuple[Origin, tuple[int, ...]]]:
    for origin, size in boxes_of_range(shape[1:], first, stop):
        yield (row, *origin), (1, *size)


def whole(tensor: Tensor) -> Shards:
    """A tensor that a rank holds whole."""
    return Shards(tuple(tensor.shape), {(0,) * tensor.ndim: tensor})
