"""How long a block takes on a GPU, if nothing is communicated."""

from functools import cache
from math import ceil
from typing import NamedTuple

from megavlm.planner.hardware import Gpu
from megavlm.planner.work import VALUE_BYTES, Block, Matmul

TILE = 128
"""Rows and columns of the result that one multiprocessor computes at a time."""
ATTENTION_BACKWARD = 2.5
"""FLOPs of fused attention's backward pass over its forward pass: it multiplies q and k anew."""
STREAMED_BACKWARD = 2.0
"""Values that elementwise kernels move in the backward pass, over the forward pass."""


class BlockSeconds(NamedTuple):
    """Of one block and micro-batch."""

    forward: float
    attention: float
    """The attention cores' part of the forward pass."""
    backward: float

    def recomputed(self, mode: str) -> float:
        """What gradient checkpointing adds to the backward pass."""
        return {"none": 0.0, "selective": self.attention, "full": self.forward}[mode]


def matmul_seconds(gpu: Gpu, matmul: Matmul) -> float:
    """Limited by arithmetic or by memory; few tiles leave multiprocessors idle."""
    tiles = ceil(matmul.rows / TILE) * ceil(matmul.columns / TILE)
    busy = min(1.0, tiles / gpu.multiprocessors)
    # A tile is computed whole, however much of it the matrices fill.
    rows, columns = (ceil(n / TILE) * TILE if n > TILE else n for n in matmul[::2])
    rows = max(rows, 16.0)
    flops = 2 * rows * matmul.inner * columns
    arithmetic = flops / (gpu.matmul_flops_per_second * gpu.matmul_efficiency * busy)
    values = matmul.rows * matmul.inner + matmul.inner * matmul.columns
    values += matmul.rows * matmul.columns
    moved = VALUE_BYTES * values / (gpu.memory_bytes_per_second * gpu.memory_efficiency)
    return max(arithmetic, moved)


@cache
def block_seconds(gpu: Gpu, block: Block) -> BlockSeconds:
    """Forward, and the backward passes that the block needs.

    What a GPU computes faster than its host launches takes as long as launching it.
    """
    bandwidth = gpu.memory_bytes_per_second * gpu.memory_efficiency
    streamed = VALUE_BYTES * block.streamed_values / bandwidth
    attention_rate = gpu.matmul_flops_per_second * gpu.attention_efficiency
    attention = sum(a.flops for a in block.attentions) / attention_rate
    forward = sum(matmul_seconds(gpu, m) for m in block.matmuls) + attention + streamed
    backward, kernels = 0.0, 0
    if block.passes_gradients:  # gradients of the inputs: result times weight
        backward += sum(matmul_seconds(gpu, Matmul(m[0], m[2], m[1])) for m in block.matmuls)
        kernels += block.kernels
    if block.trained:  # gradients of the weights: inputs times result
        backward += sum(matmul_seconds(gpu, Matmul(m[1], m[0], m[2])) for m in block.matmuls)
        kernels += block.kernels
    if kernels:
        backward += ATTENTION_BACKWARD * attention + STREAMED_BACKWARD * streamed
    return BlockSeconds(
        forward=max(forward, block.kernels * gpu.launch_seconds),
        attention=attention,
        backward=max(backward, kernels * gpu.launch_seconds),
    )
