"""The ledger of parameters: every name, its whole shape, and how it splits over tensor ranks.

Names are those of `VisionLanguageModel` on one rank; they are the same on every engine and in
checkpoints. Conversion, resharding and planning read this list instead of building a model.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from megavlm.config.sizes import DecoderSizes, EncoderSizes, ModelSizes


class Parameter(NamedTuple):
    """One parameter of the model."""

    name: str
    shape: tuple[int, ...]
    tensor_axis: int | None = None
    """The axis that tensor parallelism splits; None: each rank holds it whole."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def parameters(sizes: ModelSizes) -> list[Parameter]:
    """All parameters of a model of these sizes."""
    width, vocabulary = sizes.decoder.width, sizes.decoder.vocabulary
    return [
        *_encoder(sizes.encoder),
        Parameter("projector.weight", (width, sizes.encoder.width)),
        Parameter("projector.bias", (width,)),
        Parameter("language.embedding.word_embeddings.weight", (vocabulary, width), 0),
        *_decoder_layers(sizes.decoder),
        Parameter("language.decoder.final_layernorm.weight", (width,)),
        Parameter("language.output_layer.weight", (vocabulary, width), 0),
    ]


def count_by_part(sizes: ModelSizes) -> dict[str, int]:
    """Number of parameters of each part of the model."""
    counts: dict[str, int] = dict.fromkeys(
        (
            "image encoder",
            "projector",
            "embeddings and head",
            "self-attention layers",
            "cross-attention layers",
        ),
        0,
    )
    cross_prefixes = tuple(f"language.decoder.layers.{i}." for i in sizes.decoder.cross_layers)
    for parameter in parameters(sizes):
        counts[_part_of(parameter.name, cross_prefixes)] += parameter.numel
    return counts


def _part_of(name: str, cross_prefixes: tuple[str, ...]) -> str:
    if name.startswith("encoder."):
        return "image encoder"
    if name.startswith("projector."):
        return "projector"
    if name.startswith(cross_prefixes):
        return "cross-attention layers"
    if name.startswith("language.decoder."):
        return "self-attention layers"
    return "embeddings and head"


def _encoder(sizes: EncoderSizes) -> Iterator[Parameter]:
    width = sizes.width
    yield Parameter("encoder.class_token", (width,))
    yield Parameter("encoder.positions", (sizes.tokens, width))
    yield Parameter("encoder.patch.weight", (width, 3, sizes.patch_pixels, sizes.patch_pixels))
    yield from _layer_norm("encoder.norm_pre", width)
    for i in range(sizes.layers):
        layer = f"encoder.block.layers.{i}"
        yield from _layer_norm(f"{layer}.input_layernorm", width)
        yield Parameter(f"{layer}.self_attention.linear_qkv.weight", (3 * width, width), 0)
        yield Parameter(f"{layer}.self_attention.linear_proj.weight", (width, width), 1)
        yield from _layer_norm(f"{layer}.pre_mlp_layernorm", width)
        yield Parameter(f"{layer}.mlp.linear_fc1.weight", (sizes.mlp_width, width), 0)
        yield Parameter(f"{layer}.mlp.linear_fc1.bias", (sizes.mlp_width,), 0)
        yield Parameter(f"{layer}.mlp.linear_fc2.weight", (width, sizes.mlp_width), 1)
        yield Parameter(f"{layer}.mlp.linear_fc2.bias", (width,))
    yield from _layer_norm("encoder.block.final_layernorm", width)


def _layer_norm(name: str, width: int) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", (width,))
    yield Parameter(f"{name}.bias", (width,))


def _decoder_layers(sizes: DecoderSizes) -> Iterator[Parameter]:
    for i in range(sizes.layers):
        layer = f"language.decoder.layers.{i}"
        yield from _cross(layer, sizes) if i in sizes.cross_layers else _self(layer, sizes)
        # The gate and the up projection of SwiGLU lie one after the other; each is split.
        yield Parameter(f"{layer}.mlp.linear_fc1.weight", (2 * sizes.mlp_width, sizes.width), 0)
        yield Parameter(f"{layer}.mlp.linear_fc2.weight", (sizes.width, sizes.mlp_width), 1)


def _self(layer: str, sizes: DecoderSizes) -> Iterator[Parameter]:
    width, kv_width = sizes.width, sizes.kv_heads * sizes.head_width
    attention = f"{layer}.self_attention"
    yield Parameter(f"{layer}.input_layernorm.weight", (width,))
    yield Parameter(f"{attention}.linear_qkv.weight", (width + 2 * kv_width, width), 0)
    yield Parameter(f"{attention}.linear_proj.weight", (width, width), 1)
    yield Parameter(f"{layer}.pre_mlp_layernorm.weight", (width,))


def _cross(layer: str, sizes: DecoderSizes) -> Iterator[Parameter]:
    width, kv_width = sizes.width, sizes.kv_heads * sizes.head_width
    attention = f"{layer}.cross_attention"
    yield Parameter(f"{layer}.attention_gate", (1,))
    yield Parameter(f"{layer}.mlp_gate", (1,))
    yield Parameter(f"{layer}.input_norm.weight", (width,))
    yield Parameter(f"{attention}.linear_q.weight", (width, width), 0)
    yield Parameter(f"{attention}.linear_kv.weight", (2 * kv_width, width), 0)
    yield Parameter(f"{attention}.q_norm.weight", (sizes.head_width,))
    yield Parameter(f"{attention}.k_norm.weight", (sizes.head_width,))
    yield Parameter(f"{attention}.linear_proj.weight", (width, width), 1)
    yield Parameter(f"{layer}.mlp_norm.weight", (width,))
