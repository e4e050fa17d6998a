"""Which rank keeps whose copy, and how bytes get there."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

BLOCK_BYTES = 16 << 20
"""That travel at once, to each neighbour."""

TakesBlock = Callable[[Tensor], object]


def neighbours(hosts: Sequence[str]) -> list[int | None]:
    """For each rank, its counterpart on the next host; None where there is one host.

    hosts: of each rank. They are taken in the order of their first ranks, the first one comes after
    the last, and where the next one has fewer ranks, they serve several each.
    """
    ranks_of: dict[str, list[int]] = defaultdict(list)
    for rank, host in enumerate(hosts):
        ranks_of[host].append(rank)
    if len(ranks_of) == 1:
        return [None] * len(hosts)
    names = list(ranks_of)
    following = dict(zip(names, [*names[1:], names[0]], strict=True))
    return [
        ranks_of[following[host]][ranks_of[host].index(rank) % len(ranks_of[following[host]])]
        for rank, host in enumerate(hosts)
    ]


class Outgoing(NamedTuple):
    """Bytes for the neighbour."""

    rank: int
    size: int
    read_into: TakesBlock
    """Fills a block with what comes next."""


class Incoming(NamedTuple):
    """Bytes of a rank whose neighbour this one is."""

    rank: int
    size: int
    write: TakesBlock
    """Takes the next block."""


def pass_on(
    out: Outgoing,
    incoming: Sequence[Incoming],
    group: dist.ProcessGroup,
    on_progress: Callable[[], None],
) -> None:
    """Send to the neighbour, and take from those whose neighbour this rank is, block by block.

    Where reading or writing fails, zeros go out and what comes is dropped, so that no other rank
    waits in vain; the first error is raised when all bytes have passed.
    """
    failed: list[Exception] = []

    def attempt(call: TakesBlock, block: Tensor) -> None:
        if not failed:
            try:
                call(block)
            except Exception as error:
                failed.append(error)

    for start in range(0, max(out.size, *(one.size for one in incoming), 0), BLOCK_BYTES):
        on_progress()
        requests: list[Any] = []
        if start < out.size:
            block = torch.zeros(min(BLOCK_BYTES, out.size - start), dtype=torch.uint8)
            attempt(out.read_into, block)
            requests.append(dist.isend(block, out.rank, group))
        arriving: list[tuple[Incoming, Tensor]] = []
        for one in incoming:
            if start < one.size:
                block = torch.empty(min(BLOCK_BYTES, one.size - start), dtype=torch.uint8)
                requests.append(dist.irecv(block, one.rank, group))
                arriving.append((one, block))
        for request in requests:
            request.wait()
        for one, block in arriving:
            attempt(one.write, block)
    for error in failed:
        raise error
