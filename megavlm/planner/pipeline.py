"""When each pipeline rank computes what: megatron-core's 1F1B schedules, plain and interleaved.

Narayanan et al. 2021, section 2.2. Times come from dependencies alone: every rank runs its passes
in the schedule's order, each as soon as what it needs has arrived.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from megavlm.planner.span import Span


class Pass(NamedTuple):
    """One chunk on one micro-batch, forward or backward."""

    kind: str
    chunk: int
    """In the model's order, over all ranks."""
    micro_batch: int


@lru_cache(maxsize=64)  # the search compares runs with the same schedule, one after another
def passes_of(rank: int, ranks: int, virtual: int, micro_batches: int) -> tuple[Pass, ...]:
    """What a pipeline rank runs in a step, in order."""
    total = micro_batches * virtual
    if virtual == 1:
        warmup = min(ranks - rank - 1, total)
    elif micro_batches == ranks:
        warmup = total
    else:
        warmup = min(2 * (ranks - rank - 1) + (virtual - 1) * ranks, total)

    def nth(kind: str, number: int) -> Pass:
        group, within = divmod(number, ranks * virtual)
        local = within // ranks if virtual > 1 else 0
        micro_batch = group * ranks + within % ranks if virtual > 1 else number
        if kind == "backward":
            local = virtual - 1 - local
        return Pass(kind, local * ranks + rank, micro_batch)

    passes = [nth("forward", n) for n in range(warmup)]
    for number in range(total - warmup):
        passes += [nth("forward", warmup + number), nth("backward", number)]
    passes += [nth("backward", n) for n in range(total - warmup, total)]
    return tuple(passes)


def run_pipeline(
    forward_seconds: Sequence[float],
    backward_seconds: Sequence[float],
    send_seconds: float,
    *,
    ranks: int,
    micro_batches: int,
) -> list[Span]:
    """A step's passes on every rank, from 0 on; the seconds are of each chunk."""
    chunks = len(forward_seconds)
    virtual = chunks // ranks
    waiting = [[*reversed(passes_of(r, ranks, virtual, micro_batches))] for r in range(ranks)]
    free = [0.0] * ranks
    done: dict[Pass, float] = {}
    spans: list[Span] = []
    while any(waiting):
        moved = False
        for rank in range(ranks):
            while (
                waiting[rank]
                and (ready := _ready(waiting[rank][-1], done, chunks, send_seconds)) is not None
            ):
                task = waiting[rank].pop()
                seconds = forward_seconds if task.kind == "forward" else backward_seconds
                start = max(free[rank], ready)
                free[rank] = done[task] = start + seconds[task.chunk]
                name = f"chunk {task.chunk}, micro-batch {task.micro_batch}"
                spans.append(Span(f"rank {rank}", name, task.kind, start, free[rank]))
                moved = True
        assert moved, "a schedule cannot wait for itself"
    return spans


def _ready(task: Pass, done: dict[Pass, float], chunks: int, send_seconds: float) -> float | None:
    """When what a pass needs is there; None while that is not known."""
    kind, chunk, micro_batch = task
    if kind == "forward":
        if chunk == 0:
            return 0.0
        needed, sent = Pass(kind, chunk - 1, micro_batch), send_seconds
    elif chunk == chunks - 1:
        needed, sent = Pass("forward", chunk, micro_batch), 0.0
    else:
        needed, sent = Pass(kind, chunk + 1, micro_batch), send_seconds
    return done[needed] + sent if needed in done else None


def most_in_flight(
    rank: int, ranks: int, virtual: int, micro_batches: int, bytes_of_chunk: Mapping[int, float]
) -> dict[int, int]:
    """Of each chunk of a rank, how many micro-batches it keeps when all of them take most."""
    kept: dict[int, int] = {}
    most: dict[int, int] = {}
    most_bytes = -1.0
    for task in passes_of(rank, ranks, virtual, micro_batches):
        kept[task.chunk] = kept.get(task.chunk, 0) + (1 if task.kind == "forward" else -1)
        taken = sum(count * bytes_of_chunk[chunk] for chunk, count in kept.items())
        if taken > most_bytes:
            most, most_bytes = dict(kept), taken
    return most
