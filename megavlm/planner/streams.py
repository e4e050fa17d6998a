"""A step under ZeRO-3 or FSDP2: two streams, one that computes and one that communicates."""

from collections.abc import Sequence
from dataclasses import dataclass

from megavlm.planner.compute import BlockSeconds
from megavlm.planner.span import Span

CONTENTION = 0.35
"""By how much computation slows down while a collective takes multiprocessors and bandwidth."""


@dataclass(frozen=True, kw_only=True)
class ShardedBlock:
    """Seconds of a block in one micro-batch."""

    name: str
    compute: BlockSeconds
    gather_forward: float
    gather_backward: float
    reduce: float


def run_micro_batch(
    blocks: Sequence[ShardedBlock], recompute: str, ahead: int, *, overlapped_reduction: bool = True
) -> list[Span]:
    """Forward and backward of one micro-batch, from 0 on.

    A block's weights are gathered while one of the `ahead` blocks before it computes; its gradients
    are reduced as soon as they are there, on the same stream. Without `overlapped_reduction` the
    computation goes on once they are reduced.
    """
    spans: list[Span] = []
    compute_free = network_free = 0.0
    starts: list[float] = []

    def communicate(name: str, kind: str, earliest: float, seconds: float) -> float:
        nonlocal compute_free, network_free
        if seconds == 0:
            return earliest
        start = max(earliest, network_free)
        network_free = start + seconds
        if kind == "reduce" and not overlapped_reduction:
            compute_free = network_free
        spans.append(Span("network", name, kind, start, network_free))
        return network_free

    def compute(name: str, kind: str, earliest: float, seconds: float) -> float:
        nonlocal compute_free
        start = max(earliest, compute_free)
        seconds_beside = max(0.0, min(network_free, start + seconds) - start)
        compute_free = start + seconds + CONTENTION * seconds_beside
        starts.append(start)
        spans.append(Span("compute", name, kind, start, compute_free))
        return compute_free

    passes = [(b, "forward", b.gather_forward, b.compute.forward, 0.0) for b in blocks]
    for b in reversed(blocks):
        seconds = b.compute.backward + (
            b.compute.recomputed(recompute) if b.compute.backward else 0
        )
        gather = b.gather_backward if seconds else 0.0
        passes.append((b, "backward", gather, seconds, b.reduce if seconds else 0.0))
    gathered: list[float] = []
    for number, (block, kind, _, seconds, reduce) in enumerate(passes):
        # Issue the gathers that may be under way while this block computes.
        while len(gathered) < min(number + 1 + ahead, len(passes)):
            later = passes[len(gathered)]
            behind = len(gathered) - ahead
            earliest = starts[behind] if 0 <= behind < len(starts) else compute_free * (behind >= 0)
            gathered.append(communicate(later[0].name, "gather", earliest, later[2]))
        done = compute(block.name, kind, gathered[number], seconds)
        communicate(block.name, "reduce", done, reduce)
    return spans
