"""What a rank holds during a step: weights, gradients, optimiser, activations, and what is passing.

Bytes that a layer keeps for its backward pass are counted tensor by tensor, from megatron-core's
layers as `model/` puts them together. Predicted; `megavlm dryrun` counts them exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

from megavlm.config.engines import UNDIVIDED, MegatronSettings
from megavlm.config.run import RunSettings, data_parallel_ranks, samples_per_micro_batch
from megavlm.model.params import parameters_of
from megavlm.planner.activations import BlockBytes, block_bytes
from megavlm.planner.cut import with_cut
from megavlm.planner.hardware import BF16_BYTES, GIB, Cluster
from megavlm.planner.pipeline import most_in_flight
from megavlm.planner.predict import cut_blocks
from megavlm.planner.work import (
    Block,
    Tokens,
    model_blocks,
    passed_on_bytes,
    tokens_of,
    value_bytes,
)
from megavlm.planner.zero3 import with_bucket_sizes

RUNTIME_BYTES = int(2.0 * GIB)
"""CUDA's context, and NCCL's and cuBLAS's buffers (0.5 to 2 and 1 to 2 GiB are common)."""
FRAGMENTATION = 0.05
"""Of what changes during a step: what the allocator cannot use."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank when it holds most."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Kept for the backward pass, and what the layer at work has beside it."""
    gathered: float
    """Weights that ZeRO-3 or FSDP2 has gathered, and their gradients before they are reduced."""
    buffers: float
    """For messages."""

    @property
    def runtime(self) -> float:
        """Of CUDA, NCCL and the allocator."""
        return RUNTIME_BYTES + FRAGMENTATION * (self.activations + self.gathered)

    @property
    def tensors(self) -> float:
        """Of all tensors together."""
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def total(self) -> float:
        """Of the GPU."""
        return self.tensors + self.runtime


def memory_of(run: RunSettings, cluster: Cluster, tokens_per_text: float) -> list[Memory]:
    """Of each pipeline rank; of any rank under ZeRO-3 and FSDP2, where all are alike."""
    copies = data_parallel_ranks(run, cluster.ranks)
    tokens = tokens_of(run, samples_per_micro_batch(run.train, copies), tokens_per_text)
    match run.engine:
        case "megatron":
            return _megatron(run, tokens, copies)
        case "zero3":
            return [_zero3(run, tokens, cluster.ranks)]
        case "fsdp2":
            return [_fsdp2(run, tokens, cluster.ranks)]


def host_bytes(run: RunSettings, cluster: Cluster) -> float:
    """Of one host's memory: what all of its ranks offload. Loaders' and the system's are not in it.

    Gradients twice, in fp32: as they add up, and as the optimiser takes them.
    """
    zero3 = run.zero3
    if run.engine != "zero3":
        return 0.0
    entries = parameters_of(run)
    held = sum(entry.numel for entry in entries)
    trained = sum(entry.numel for entry in entries if entry.setting in run.trained_parts)
    states = (12 + 8) * trained if zero3.offload_optimizer == "cpu" else 0.0
    weights = 0.0
    if zero3.offload_parameters == "cpu":
        again = cluster.ranks / zero3.secondary_partition if zero3.secondary_partition > 1 else 0.0
        weights = value_bytes(run) * held * (1 + again)
    return (weights + states) / cluster.hosts


class _Chunk(NamedTuple):
    """Blocks that run one after another, and what each of them takes."""

    blocks: Sequence[Block]
    takes: Sequence[BlockBytes]
    mode: str

    def kept(self) -> list[float]:
        """Of each block, between its forward and its backward pass."""
        return [
            takes.kept_in(self.mode) if block.keeps else 0.0
            for block, takes in zip(self.blocks, self.takes, strict=True)
        ]

    def most(self, gathered: Sequence[float] | None = None) -> float:
        """At most, over one micro-batch, forward and backward.

        gathered: of each block, bytes of weights and gradients that are there while it runs.
        """
        most = before = 0.0
        beside = gathered or [0.0] * len(self.blocks)
        for block, takes, kept, own in zip(
            self.blocks, self.takes, self.kept(), beside, strict=True
        ):
            at_work = max(takes.forward, takes.backward) if block.keeps else takes.forward
            most = max(most, before + at_work + own)
            before += kept
        return most


def _chunk(
    run: RunSettings,
    blocks: Sequence[Block],
    tokens: Tokens,
    parallel: MegatronSettings,
    *,
    weight_gradients: bool = True,
) -> _Chunk:
    takes = {
        block.name: block_bytes(run, block, tokens, parallel, weight_gradients)
        for block in set(blocks)
    }
    return _Chunk(blocks, [takes[block.name] for block in blocks], run.train.recompute)


def _megatron(run: RunSettings, tokens: Tokens, copies: int) -> list[Memory]:
    parallel = with_cut(run)
    cut = cut_blocks(run, model_blocks(run, tokens, parallel), parallel)
    chunks = [_chunk(run, blocks, tokens, parallel) for blocks in cut]
    ranks, size = parallel.pipeline_parallel, value_bytes(run)
    texts, images = passed_on_bytes(run, tokens, parallel)
    sent = texts + images if ranks > 1 else 0.0
    found: list[Memory] = []
    for rank in range(ranks):
        own = {chunk: chunks[chunk] for chunk in range(rank, len(chunks), ranks)}
        # Beside what blocks keep: what was received, and with interleaving what is sent.
        sizes = {
            number: sum(chunk.kept()) + sent * ((number > 0) + (len(own) > 1))
            for number, chunk in own.items()
        }
        in_flight = most_in_flight(
            rank, ranks, parallel.virtual_pipeline, run.train.micro_batches, sizes
        )
        at_rest = sum(count * sizes[number] for number, count in in_flight.items())
        at_work = max(chunk.most() - sum(chunk.kept()) for chunk in own.values())
        blocks = [block for chunk in own.values() for block in chunk.blocks]
        held = sum(block.parameters for block in blocks)
        trained = sum(block.parameters for block in blocks if block.trained)
        ends = (rank == 0) + (rank == ranks - 1)
        regathered = size * max(max(block.gathered, default=0.0) for block in blocks)
        # Where gradients are clipped, one tensor's are copied; no activations are left then.
        clipped = 4 * min(trained / copies, max(block.largest_matrix for block in blocks))
        found.append(
            Memory(
                weights=size * held,
                gradients=4 * trained,
                optimizer=(12 if size == BF16_BYTES else 8) * trained / copies,
                activations=max(at_rest + at_work, clipped),
                gathered=0.0,
                # Gradients of what was received and sent, and of the image states as they add up;
                # and what sequence parallelism gathers into, again and again.
                buffers=(2 - ends) * sent
                + 2 * images
                + (regathered if parallel.sequence_parallel else 0.0),
            )
        )
    return found


def _zero3(run: RunSettings, tokens: Tokens, ranks: int) -> Memory:
    blocks = model_blocks(run, tokens, UNDIVIDED)
    zero3 = with_bucket_sizes(run).zero3
    bucket, ahead, live = zero3.reduce_bucket, zero3.prefetch_bucket, zero3.max_live_parameters
    assert bucket is not None and ahead is not None and live is not None
    held = sum(block.parameters for block in blocks)
    trained = sum(block.parameters for block in blocks if block.trained)
    secondary = held / zero3.secondary_partition if zero3.secondary_partition > 1 else 0.0
    in_host = zero3.offload_parameters != "none"
    states_in_host = zero3.offload_optimizer != "none"
    size = value_bytes(run)
    chunk = _chunk(run, blocks, tokens, UNDIVIDED, weight_gradients=False)
    # The first gradient that finds the bucket full sets off its reduction, which takes as much once
    # more. The last trained block finds it empty, and has the gradient of a matrix, when that is
    # made, beside what it holds then.
    last = max(n for n, block in enumerate(blocks) if block.trained)
    with_gradient = block_bytes(run, blocks[last], tokens, UNDIVIDED, weight_gradients=True)
    passing: list[float] = [size * bucket * block.trained for block in blocks]
    passing[last] = with_gradient.backward - chunk.takes[last].backward
    activations, most = chunk.most(), chunk.most(passing)
    # It gathers ahead while fewer are alive, a bucket at a time.
    gathered = size * min(live + ahead, held)
    # The optimiser goes over one part of the model after another, with a copy of its gradients; all
    # that was gathered, and one bucket, are free by then.
    parts = {
        part: sum(block.parameters for block in blocks if block.part == part)
        for part in run.trained_parts
    }
    stepping = 0.0 if states_in_host else 4 * max(parts.values()) / ranks
    return Memory(
        weights=size * (0.0 if in_host else held / ranks + secondary),
        gradients=0.0 if states_in_host else 4 * trained / ranks,
        optimizer=0.0 if states_in_host else 12 * trained / ranks,
        activations=max(activations, stepping - gathered - size * bucket),
        gathered=gathered,
        buffers=size * bucket + most - activations,
    )


def _fsdp2(run: RunSettings, tokens: Tokens, ranks: int) -> Memory:
    blocks = model_blocks(run, tokens, UNDIVIDED)
    shards = run.fsdp2.shard_ranks or ranks
    held = sum(block.parameters for block in blocks)
    trained = [block.parameters * block.trained for block in blocks]
    size, ahead = value_bytes(run), run.fsdp2.prefetch_layers
    one = run.train.micro_batches == 1
    beside: list[float] = []
    for n, block in enumerate(blocks):
        weights = block.parameters + sum(b.parameters for b in blocks[max(0, n - ahead) : n])
        # The gradients of the unit behind are being reduced, in fp32.
        reduced = 4 * sum(trained[n + 1 : n + 2])
        # The shards that gradients are summed in come into being in the first micro-batch.
        summed = 4 * sum(trained[n + 1 :] if one else trained) / shards
        beside.append(size * (weights + trained[n]) + reduced + summed)
    chunk = _chunk(run, blocks, tokens, UNDIVIDED, weight_gradients=False)
    activations, most = chunk.most(), chunk.most(beside)
    gradients = min(4 * sum(trained) / shards, most - activations)
    return Memory(
        weights=4 * held / shards,
        gradients=gradients,
        optimizer=8 * sum(trained) / shards,
        activations=activations,
        gathered=most - activations - gradients,
        buffers=0.0,
    )
