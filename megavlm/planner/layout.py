"""What each pipeline rank of the Megatron engine holds, and what it costs: arithmetic, no model."""

import re
from dataclasses import dataclass
from itertools import accumulate, pairwise

from megavlm.config.run import RunSettings
from megavlm.model.params import (
    CROSS_LAYERS,
    EMBEDDINGS,
    ENCODER,
    SELF_LAYERS,
    Parameter,
    parameters,
)
from megavlm.planner.cut import costs_per_image, with_cut
from megavlm.planner.work import value_bytes

GRADIENT_BYTES = 4  # gradients are summed in fp32
_LAYER = re.compile(r"^language\.decoder\.layers\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Consecutive layers on one pipeline rank."""

    number: int
    """Its place in the model's order."""
    pipeline_rank: int
    layers: range
    """Decoder layers, self- and cross-attention."""
    cross_layers: int
    """How many of them attend to images."""
    costs: tuple[tuple[str, float], ...]
    """What it computes, in order: the part, and its share of the FLOPs of the whole model."""
    parameters: int
    """On each tensor-parallel rank."""
    trained: int
    """Parameters among them that are not frozen."""

    @property
    def cost(self) -> float:
        """Share of the FLOPs of the whole model."""
        return sum(cost for _, cost in self.costs)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A model cut into chunks."""

    tensor: int
    pipeline: int
    virtual: int
    micro_batches: int
    weight_bytes: int
    """Of one parameter."""
    chunks: tuple[Chunk, ...]

    def on(self, pipeline_rank: int) -> list[Chunk]:
        """The chunks of a pipeline rank."""
        return [chunk for chunk in self.chunks if chunk.pipeline_rank == pipeline_rank]

    def cost(self, pipeline_rank: int) -> float:
        """A pipeline rank's share of the FLOPs of the whole model."""
        return sum(chunk.cost for chunk in self.on(pipeline_rank))

    @property
    def costliest_over_mean(self) -> float:
        """How much the costliest pipeline rank computes, over the mean of all."""
        return self.pipeline * max(self.cost(rank) for rank in range(self.pipeline))

    @property
    def bubble(self) -> float:
        """Time that a rank waits for others, over the time that it computes.

        (p - 1) / (m v), for p equal pipeline ranks of v equal chunks and m micro-batches
        (Narayanan et al. 2021, section 2.2).
        """
        return (self.pipeline - 1) / (self.micro_batches * self.virtual)

    def state_bytes(self, pipeline_rank: int, copies: int) -> float:
        """Weights, gradients and optimiser states on each rank; without activations.

        The moments, and bf16's master weights, are sharded over the copies of the model.
        """
        count = sum(chunk.parameters for chunk in self.on(pipeline_rank))
        trained = sum(chunk.trained for chunk in self.on(pipeline_rank))
        optimizer_bytes = (2 if self.weight_bytes == 4 else 3) * 4
        return count * self.weight_bytes + trained * (GRADIENT_BYTES + optimizer_bytes / copies)


def layout_of(run: RunSettings) -> Layout:
    """How the run's model is cut; one chunk unless the engine is Megatron's."""
    parallel = with_cut(run)
    decoder = run.model.decoder
    before, layer_costs, after = costs_per_image(run)
    whole = before + sum(layer_costs) + after
    ends = list(accumulate(parallel.chunk_layers or (decoder.layers,), initial=0))
    counts = _parameters_by_chunk(run, ends, parallel.tensor_parallel)
    chunks: list[Chunk] = []
    for number, (start, end) in enumerate(pairwise(ends)):
        is_cross = [i in decoder.cross_layers for i in range(start, end)]
        costs = [
            (CROSS_LAYERS if cross else SELF_LAYERS, layer_costs[i] / whole)
            for i, cross in zip(range(start, end), is_cross, strict=True)
        ]
        if start == 0:
            costs.insert(0, (ENCODER, before / whole))
        if end == decoder.layers:
            costs.append((EMBEDDINGS, after / whole))
        count, trained = counts[number]
        chunks.append(
            Chunk(
                number=number,
                pipeline_rank=number % parallel.pipeline_parallel,
                layers=range(start, end),
                cross_layers=sum(is_cross),
                costs=tuple(costs),
                parameters=count,
                trained=trained,
            )
        )
    return Layout(
        tensor=parallel.tensor_parallel,
        pipeline=parallel.pipeline_parallel,
        virtual=parallel.virtual_pipeline,
        micro_batches=run.train.micro_batches,
        weight_bytes=value_bytes(run),
        chunks=tuple(chunks),
    )


def _parameters_by_chunk(run: RunSettings, ends: list[int], tensor: int) -> list[tuple[int, int]]:
    """Parameters of every chunk on each tensor-parallel rank, and how many of them are trained."""
    chunk_of_layer = [n for n, (start, end) in enumerate(pairwise(ends)) for _ in range(start, end)]
    counts = [[0, 0] for _ in range(len(ends) - 1)]
    for entry in parameters(run.model):
        numel = entry.numel if entry.tensor_axis is None else entry.numel // tensor
        count = counts[_chunk_of(entry, chunk_of_layer)]
        count[0] += numel
        count[1] += 0 if entry.setting in run.train.frozen else numel
    return [(count, trained) for count, trained in counts]


def _chunk_of(entry: Parameter, chunk_of_layer: list[int]) -> int:
    if layer := _LAYER.match(entry.name):
        return chunk_of_layer[int(layer[1])]
    after_layers = ("language.output_layer.", "language.decoder.final_layernorm.")
    return chunk_of_layer[-1] if entry.name.startswith(after_layers) else 0
