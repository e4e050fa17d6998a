"""A prediction of how long a step takes on a cluster, and of what it is made of.

It knows blocks of work and how they are divided, not what model they are of.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megavlm.planner.compute import BlockSeconds, block_seconds
from megavlm.planner.hardware import Cluster
from megavlm.planner.network import Group, all_reduce_seconds, ring_seconds
from megavlm.planner.pipeline import run_pipeline
from megavlm.planner.span import Span
from megavlm.planner.streams import CONTENTION, ShardedBlock, run_micro_batch
from megavlm.planner.work import Block

ADAM_BYTES = 32
"""Read and written for each parameter by AdamW: gradient, master weight, two moments, weight."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimiser step, predicted; seconds on the rank that takes longest."""

    seconds: float
    compute_seconds: float
    """Forward and backward."""
    recompute_seconds: float
    communication_seconds: float
    """What communication adds: the wait for it, and what it slows down."""
    bubble_seconds: float
    optimizer_seconds: float
    """With the copies of gradients and new weights between a GPU and its host."""
    spans: tuple[Span, ...]
    """Of the first micro-batch of sharded ranks; of all of a pipeline's."""


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How weights are divided, by ZeRO-3 or `fully_shard`."""

    first: Group
    """Ranks that a block's weights are gathered from in the first forward pass of a step."""
    later: Group
    """And in every other pass."""
    reduce: Group
    """Ranks that gradients are reduced over after every micro-batch."""
    replicas: Group
    """Ranks that hold the same part, and reduce its gradient once a step."""
    reduced_bytes: float
    """Of each gradient, as it travels."""
    gathered_bytes: float
    """Of each weight, as it travels among the ranks of `first`."""
    states_in_host: bool = False
    """Whether the optimiser's states lie in the memory of the host, which then updates them."""
    weights_in_host: bool = False
    """Whether a rank's share of the weights does, from which it is copied to be gathered."""
    ahead: int = 1
    """Blocks whose weights are gathered ahead of their use."""
    overlapped_reduction: bool = True
    """Whether ranks compute while gradients are reduced; they always do while they gather."""


@dataclass(frozen=True, kw_only=True)
class Division:
    """How matrices and layers are divided, by Megatron-core."""

    tensor: Group
    pipeline: int
    copies: Group
    """Ranks that hold the same part of the model."""
    send_seconds: float
    """From one pipeline rank to the next."""
    reduced_bytes: int
    overlapped_tensor: bool = False
    """Whether tensor-parallel messages hide behind the matrix products."""
    overlapped_copies: bool = True
    """Whether gradients and new weights travel while the passes go on."""


def sharded_step(
    cluster: Cluster,
    blocks: Sequence[Block],
    sharding: Sharding,
    *,
    micro_batches: int,
    recompute: str,
) -> Step:
    """A step in which every rank computes all blocks, and gathers their weights as they come."""
    seconds = [block_seconds(cluster.gpu, block) for block in blocks]

    def timed(forward: Group) -> list[Span]:
        return run_micro_batch(
            [
                ShardedBlock(
                    name=block.name,
                    compute=s,
                    gather_forward=_gather(cluster, forward, sharding, block),
                    gather_backward=_gather(cluster, sharding.later, sharding, block),
                    reduce=block.trained
                    * ring_seconds(
                        cluster, sharding.reduce, sharding.reduced_bytes * block.parameters
                    ),
                )
                for block, s in zip(blocks, seconds, strict=True)
            ],
            recompute,
            sharding.ahead,
            overlapped_reduction=sharding.overlapped_reduction,
        )

    spans = timed(sharding.first)
    passes = _end(spans) + (micro_batches - 1) * _end(timed(sharding.later))
    own = sum(block.parameters for block in blocks if block.trained) / sharding.reduce.ranks
    passes += all_reduce_seconds(cluster, sharding.replicas, sharding.reduced_bytes * own)
    compute = micro_batches * sum(s.forward + s.backward for s in seconds)
    again = micro_batches * _recomputed(seconds, recompute)
    optimizer = _optimizer_seconds(cluster, own, in_host=sharding.states_in_host)
    optimizer += _offload_seconds(cluster, sharding, own, blocks[0].value_bytes, micro_batches)
    return Step(
        seconds=passes + optimizer,
        compute_seconds=compute,
        recompute_seconds=again,
        communication_seconds=passes - compute - again,
        bubble_seconds=0.0,
        optimizer_seconds=optimizer,
        spans=tuple(spans),
    )


def divided_step(
    cluster: Cluster,
    chunks: Sequence[Sequence[Block]],
    division: Division,
    *,
    micro_batches: int,
    recompute: str,
) -> Step:
    """A step of a pipeline, of which each rank has the same number of chunks, in turn."""
    ranks = division.pipeline
    seconds = [[block_seconds(cluster.gpu, block) for block in chunk] for chunk in chunks]
    both = [
        _chunk_seconds(cluster, chunk, of_blocks, division, recompute)
        for chunk, of_blocks in zip(chunks, seconds, strict=True)
    ]
    spans = run_pipeline(
        [forward for forward, _ in both],
        [backward for _, backward in both],
        division.send_seconds,
        ranks=ranks,
        micro_batches=micro_batches,
    )
    on = [range(rank, len(chunks), ranks) for rank in range(ranks)]
    busy = [micro_batches * sum(sum(both[c]) for c in own) for own in on]
    slowest = busy.index(max(busy))
    on_slowest = [s for c in on[slowest] for s in seconds[c]]
    compute = micro_batches * sum(s.forward + s.backward for s in on_slowest)
    again = micro_batches * _recomputed(on_slowest, recompute)
    held = [[block for c in own for block in chunks[c]] for own in on]
    trained = max(sum(block.parameters for block in own if block.trained) for own in held)
    reduce = ring_seconds(cluster, division.copies, division.reduced_bytes * trained)
    gather = ring_seconds(cluster, division.copies, chunks[0][0].value_bytes * trained)
    waits = reduce + gather
    if division.overlapped_copies:
        # Weights travel in the forward pass, gradients in the last backward pass; behind the first
        # pipeline rank megatron-core reduces all gradients at the end.
        hidden = sum(both[c][1] for c in on[0]) if ranks == 1 else 0.0
        waits = max(0.0, reduce - hidden)
        waits += max(0.0, gather - sum(both[c][0] for c in on[0]))
        waits += CONTENTION * (reduce + gather - waits)
    optimizer = _optimizer_seconds(cluster, trained / division.copies.ranks, in_host=False)
    return Step(
        seconds=_end(spans) + waits + optimizer,
        compute_seconds=compute,
        recompute_seconds=again,
        communication_seconds=busy[slowest] - compute - again + waits,
        bubble_seconds=_end(spans) - busy[slowest],
        optimizer_seconds=optimizer,
        spans=tuple(spans),
    )


def _chunk_seconds(
    cluster: Cluster,
    blocks: Sequence[Block],
    seconds: Sequence[BlockSeconds],
    division: Division,
    recompute: str,
) -> tuple[float, float]:
    """Forward and backward of a chunk on one micro-batch, tensor-parallel messages included."""
    forward_seconds = backward_seconds = 0.0
    for block, s in zip(blocks, seconds, strict=True):
        gathers, again = (
            sum(ring_seconds(cluster, division.tensor, block.value_bytes * n) for n in values)
            for values in (block.gathered, block.regathered)
        )
        if division.overlapped_tensor:
            gathers, again = CONTENTION * gathers, CONTENTION * again
        forward_seconds += s.forward + gathers
        if s.backward:
            backward_seconds += s.backward + s.recomputed(recompute) + gathers + again
            backward_seconds += gathers if recompute == "full" and block.is_layer else 0.0
    return forward_seconds, backward_seconds


def _gather(cluster: Cluster, group: Group, sharding: Sharding, block: Block) -> float:
    value_bytes = sharding.gathered_bytes if group == sharding.first else block.value_bytes
    seconds = ring_seconds(cluster, group, value_bytes * block.parameters)
    if sharding.weights_in_host:
        own = block.value_bytes * block.parameters / group.ranks
        seconds += own / cluster.gpu.host_link_bytes_per_second
    return seconds


def _recomputed(seconds: Sequence[BlockSeconds], mode: str) -> float:
    return sum(s.recomputed(mode) for s in seconds if s.backward)


def _optimizer_seconds(cluster: Cluster, parameters: float, *, in_host: bool) -> float:
    gpu = cluster.gpu
    bandwidth = gpu.memory_bytes_per_second * gpu.memory_efficiency
    if in_host:
        bandwidth = gpu.host_memory_bytes_per_second
    return ADAM_BYTES * parameters / bandwidth


def _offload_seconds(
    cluster: Cluster,
    sharding: Sharding,
    parameters: float,
    value_bytes: int,
    micro_batches: int,
) -> float:
    """To copy the gradients and new weights of so many parameters between a GPU and its host.

    DeepSpeed adds up gradients in fp32 on the GPU and keeps them in the host: there and back in
    every micro-batch, and there once more for the optimiser (`partition_grads` in its stage3.py).
    """
    moved = (8 * micro_batches + 4) * sharding.states_in_host
    if sharding.states_in_host != sharding.weights_in_host:
        moved += value_bytes
    return moved * parameters / cluster.gpu.host_link_bytes_per_second


def _end(spans: Sequence[Span]) -> float:
    return max(span.end for span in spans)
