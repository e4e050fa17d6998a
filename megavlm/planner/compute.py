"""How long a block takes on a GPU, if nothing is communicated."""

from functools import cache
from math import ceil
from typing import NamedTuple

from megavlm.planner.hardware import Gpu
from megavlm.planner.work import Block, Matmul

TILE = 128
"""Rows and columns of the result that one multiprocessor computes at a time."""
ATTENTION_BACKWARD = 2.5
"""FLOPs of fused attention's backward pass over its forward pass: it multiplies q and k anew."""
STREAMED_BACKWARD = 2.0
"""Values that elementwise kernels move in the backward pass, over the forward pass."""


class BlockSeconds(NamedTuple):
    """Of one block and micro-batch."""

    forward: float
    backward: float
    recomputed_core: float
    """The attention core's part of the forward pass, where `selective` recomputes it."""
    recomputed_in_full: float
    """The forward pass once more, of a layer."""

    def recomputed(self, mode: str) -> float:
        """What gradient checkpointing adds to the backward pass."""
        return {
            "none": 0.0,
            "selective": self.recomputed_core,
            "full": self.recomputed_in_full,
        }[mode]


def matmul_seconds(gpu: Gpu, matmul: Matmul, value_bytes: int) -> float:
    """Limited by arithmetic or by memory; few tiles leave multiprocessors idle."""
    tiles = ceil(matmul.rows / TILE) * ceil(matmul.columns / TILE)
    busy = min(1.0, tiles / gpu.multiprocessors)
    # A tile is computed whole, however much of it the matrices fill.
    rows, columns = (ceil(n / TILE) * TILE if n > TILE else n for n in matmul[::2])
    rows = max(rows, 16.0)
    flops = 2 * rows * matmul.inner * columns
    arithmetic = flops / (gpu.peak_flops_per_second(value_bytes) * gpu.matmul_efficiency * busy)
    values = matmul.rows * matmul.inner + matmul.inner * matmul.columns
    values += matmul.rows * matmul.columns
    moved = value_bytes * values / (gpu.memory_bytes_per_second * gpu.memory_efficiency)
    return max(arithmetic, moved)


@cache
def block_seconds(gpu: Gpu, block: Block) -> BlockSeconds:
    """Forward, and the backward passes that the block needs.

    What a GPU computes faster than its host launches takes as long as launching it.
    """
    bandwidth = gpu.memory_bytes_per_second * gpu.memory_efficiency
    size = block.value_bytes
    streamed = size * block.streamed_values / bandwidth
    attention_rate = gpu.peak_flops_per_second(size) * gpu.attention_efficiency
    attention = sum(a.flops for a in block.attentions) / attention_rate
    forward = sum(matmul_seconds(gpu, m, size) for m in block.matmuls) + attention + streamed
    forward = max(forward, block.kernels * gpu.launch_seconds)
    backward, kernels = 0.0, 0
    if block.passes_gradients:  # gradients of the inputs: result times weight
        backward += sum(matmul_seconds(gpu, Matmul(m[0], m[2], m[1]), size) for m in block.matmuls)
        kernels += block.kernels
    if block.trained:  # gradients of the weights: inputs times result
        backward += sum(matmul_seconds(gpu, Matmul(m[1], m[0], m[2]), size) for m in block.matmuls)
        kernels += block.kernels
    if kernels:
        backward += ATTENTION_BACKWARD * attention + STREAMED_BACKWARD * streamed
    return BlockSeconds(
        forward=forward,
        backward=max(backward, kernels * gpu.launch_seconds),
        recomputed_core=attention if block.has_core_checkpoint else 0.0,
        recomputed_in_full=forward if block.is_layer else 0.0,
    )
