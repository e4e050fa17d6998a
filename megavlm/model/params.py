"""The ledger of parameters: every name, its whole shape, how it splits over tensor-parallel ranks.

Names are those of `VisionLanguageModel` on one rank; they are the same on every engine and in
checkpoints. Conversion, resharding and planning read this list instead of building a model.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megavlm.config.objectives import ObjectiveName, Part, is_pretraining
from megavlm.config.run import RunSettings
from megavlm.config.sizes import DecoderSizes, EncoderSizes, ModelSizes, TextTowerSizes

ENCODER = "image encoder"
PROJECTOR = "projector"
EMBEDDINGS = "embeddings and head"
SELF_LAYERS = "self-attention layers"
CROSS_LAYERS = "cross-attention layers"
TEXT_TOWER = "text tower"
HEADS = "pre-training heads"
PARTS = (ENCODER, PROJECTOR, EMBEDDINGS, SELF_LAYERS, CROSS_LAYERS, TEXT_TOWER, HEADS)

PART_OF: dict[str, Part] = {
    ENCODER: "encoder",
    PROJECTOR: "projector",
    EMBEDDINGS: "decoder",
    SELF_LAYERS: "decoder",
    CROSS_LAYERS: "cross_attention",
    TEXT_TOWER: "text_tower",
    HEADS: "heads",
}
"""What the settings call each of PARTS."""


class Parameter(NamedTuple):
    """One parameter of the model."""

    name: str
    shape: tuple[int, ...]
    tensor_axis: int | None = None
    """The axis that tensor parallelism splits; None: each rank holds it whole."""
    tensor_blocks: int = 1
    """Blocks along that axis which are split one by one."""
    initial_mean: float = 0.0
    initial_std: float = 0.0
    part: str = ""
    """One of PARTS."""

    @property
    def setting(self) -> Part:
        """What the settings call its part of the model."""
        return PART_OF[self.part]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def shard(self, whole: Tensor, ranks: int, rank: int) -> Tensor:
        """What a tensor-parallel rank holds of the whole tensor."""
        if self.tensor_axis is None or ranks == 1:
            return whole
        blocks = whole.chunk(self.tensor_blocks, self.tensor_axis)
        shards = [block.chunk(ranks, self.tensor_axis)[rank] for block in blocks]
        return torch.cat(shards, self.tensor_axis)

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        """The whole tensor, from what the tensor-parallel ranks hold in their order."""
        if self.tensor_axis is None or len(shards) == 1:
            return shards[0]
        blocks_by_rank = [shard.chunk(self.tensor_blocks, self.tensor_axis) for shard in shards]
        blocks = [block for by_rank in zip(*blocks_by_rank, strict=True) for block in by_rank]
        return torch.cat(blocks, self.tensor_axis)


def parameters_of(run: RunSettings) -> list[Parameter]:
    """All parameters of the model that a stage trains."""
    if is_pretraining(run.objectives):
        return pretraining_parameters(run.model, run.objectives)
    return parameters(run.model)


def trained_parameters(run: RunSettings) -> list[Parameter]:
    """Those that a stage trains."""
    return [entry for entry in parameters_of(run) if entry.setting in run.trained_parts]


def carried_parts(before: RunSettings, run: RunSettings) -> tuple[Part, ...]:
    """Parts whose moments go on from the stage right before: it has trained them whole.

    AdamW counts its steps by part, so a part with a new parameter starts afresh.
    """
    trained = {entry.name for entry in trained_parameters(before)}
    new = {entry.setting for entry in parameters_of(run) if entry.name not in trained}
    return tuple(part for part in run.trained_parts if part not in new)


def all_parameters(sizes: ModelSizes) -> list[Parameter]:
    """All parameters that any stage has."""
    objectives: list[ObjectiveName] = (
        ["mim"] if sizes.text_tower is None else ["mim", "contrastive"]
    )
    pretraining = pretraining_parameters(sizes, objectives)
    return [*parameters(sizes), *pretraining[len(encoder_parameters(sizes.encoder)) :]]


def pretraining_parameters(
    sizes: ModelSizes, objectives: Collection[ObjectiveName]
) -> list[Parameter]:
    """The encoder, and what its pre-training needs beside it."""
    entries = encoder_parameters(sizes.encoder)
    if "mim" in objectives:
        entries += _of_part(HEADS, _mim_head(sizes.encoder))
    if "contrastive" in objectives:
        assert sizes.text_tower is not None, "the settings are checked for it"
        vocabulary = sizes.decoder.vocabulary
        entries += _of_part(TEXT_TOWER, _text_tower(sizes.text_tower, vocabulary))
        entries += _of_part(HEADS, _contrastive_head(sizes.encoder, sizes.text_tower))
    return entries


def parameters(sizes: ModelSizes) -> list[Parameter]:
    """All parameters of a vision-language model of these sizes."""
    encoder, decoder = sizes.encoder, sizes.decoder
    # Image states come out of a norm; the projector keeps their unit variance.
    projector_std = encoder.width**-0.5
    projector = [
        _normal("projector.weight", (decoder.width, encoder.width), projector_std),
        Parameter("projector.bias", (decoder.width,)),
    ]
    return [
        *encoder_parameters(encoder),
        *_of_part(PROJECTOR, projector),
        *decoder_parameters(decoder),
    ]


def encoder_parameters(sizes: EncoderSizes) -> list[Parameter]:
    """All parameters of an image encoder of these sizes."""
    return _of_part(ENCODER, _encoder(sizes))


def decoder_parameters(sizes: DecoderSizes) -> list[Parameter]:
    """All parameters of a decoder of these sizes."""
    matrix, std = (sizes.vocabulary, sizes.width), _small_std(sizes.width)
    embeddings = [
        _normal("language.embedding.word_embeddings.weight", matrix, std, 0),
        _normal("language.output_layer.weight", matrix, std, 0),
    ]
    self_layers = [
        *_decoder_layers(sizes, cross=False),
        _scale("language.decoder.final_layernorm.weight", sizes.width),
    ]
    return [
        *_of_part(EMBEDDINGS, embeddings),
        *_of_part(SELF_LAYERS, self_layers),
        *_of_part(CROSS_LAYERS, _decoder_layers(sizes, cross=True)),
    ]


def count_by_part(entries: Iterable[Parameter]) -> dict[str, int]:
    """Number of parameters of each part that there is, in the order of PARTS."""
    counts: dict[str, int] = dict.fromkeys(PARTS, 0)
    for parameter in entries:
        counts[parameter.part] += parameter.numel
    return {part: count for part, count in counts.items() if count}


def _of_part(part: str, entries: Iterable[Parameter]) -> list[Parameter]:
    return [entry._replace(part=part) for entry in entries]


def _small_std(width: int) -> float:
    """Initial standard deviation ("SmallInit", Nguyen and Salazar 2019)."""
    return math.sqrt(2 / (5 * width))


def _normal(
    name: str, shape: tuple[int, ...], std: float, axis: int | None = None, blocks: int = 1
) -> Parameter:
    return Parameter(name, shape, axis, blocks, initial_std=std)


def _scale(name: str, width: int) -> Parameter:
    return Parameter(name, (width,), initial_mean=1.0)


def _layer_norm(name: str, width: int) -> Iterator[Parameter]:
    yield _scale(f"{name}.weight", width)
    yield Parameter(f"{name}.bias", (width,))


def _encoder(sizes: EncoderSizes) -> Iterator[Parameter]:
    width, mlp_width, patch = sizes.width, sizes.mlp_width, sizes.patch_pixels
    std = _small_std(width)
    # Projections back onto the residual stream are smaller, by depth (GPT-2, Radford et al. 2019).
    out_std = std / math.sqrt(2 * sizes.layers)
    if sizes.class_token:
        yield _normal("encoder.class_token", (width,), width**-0.5)
    yield _normal("encoder.positions", (sizes.tokens, width), width**-0.5)
    # As torch's convolutions: a variance of 1 / (3 x inputs).
    yield _normal("encoder.patch.weight", (width, 3, patch, patch), (9 * patch**2) ** -0.5)
    if sizes.pre_norm:
        yield from _layer_norm("encoder.norm_pre", width)
    for i in range(sizes.layers):
        layer = f"encoder.block.layers.{i}"
        yield from _layer_norm(f"{layer}.input_layernorm", width)
        yield _normal(f"{layer}.self_attention.linear_qkv.weight", (3 * width, width), std, 0)
        yield _normal(f"{layer}.self_attention.linear_proj.weight", (width, width), out_std, 1)
        if sizes.attention_bias:
            yield Parameter(f"{layer}.self_attention.linear_qkv.bias", (3 * width,), 0)
            yield Parameter(f"{layer}.self_attention.linear_proj.bias", (width,))
        yield from _layer_norm(f"{layer}.pre_mlp_layernorm", width)
        yield _normal(f"{layer}.mlp.linear_fc1.weight", (mlp_width, width), std, 0)
        yield Parameter(f"{layer}.mlp.linear_fc1.bias", (mlp_width,), 0)
        yield _normal(f"{layer}.mlp.linear_fc2.weight", (width, mlp_width), out_std, 1)
        yield Parameter(f"{layer}.mlp.linear_fc2.bias", (width,))
    yield from _layer_norm("encoder.block.final_layernorm", width)


def _mim_head(sizes: EncoderSizes) -> Iterator[Parameter]:
    pixels = 3 * sizes.patch_pixels**2
    yield _normal("mim_head.mask_token.weight", (sizes.width,), _small_std(sizes.width))
    yield _normal("mim_head.predict.weight", (pixels, sizes.width), _small_std(sizes.width))
    yield Parameter("mim_head.predict.bias", (pixels,))


def _text_tower(sizes: TextTowerSizes, vocabulary: int) -> Iterator[Parameter]:
    width, mlp_width = sizes.width, sizes.mlp_width
    std = _small_std(width)
    out_std = std / math.sqrt(2 * sizes.layers)
    yield _normal("text_tower.gpt.embedding.word_embeddings.weight", (vocabulary, width), std, 0)
    for i in range(sizes.layers):
        layer = f"text_tower.gpt.decoder.layers.{i}"
        attention = f"{layer}.self_attention"
        yield from _self(layer, attention, width, width)
        yield from _out_and_mlp(layer, attention, width, mlp_width, out_std)
    yield _scale("text_tower.norm.weight", width)


def _contrastive_head(encoder: EncoderSizes, tower: TextTowerSizes) -> Iterator[Parameter]:
    features = tower.feature_width
    for name, width in (("image", encoder.width), ("text", tower.width)):
        yield _normal(f"contrastive_head.{name}.weight", (features, width), width**-0.5)
    # As in SigLIP (Zhai et al. 2023, section 3.2); InfoNCE has no use for the bias.
    yield Parameter("contrastive_head.log_scale", (1,), initial_mean=math.log(10))
    yield Parameter("contrastive_head.bias", (1,), initial_mean=-10.0)


def _decoder_layers(sizes: DecoderSizes, *, cross: bool) -> Iterator[Parameter]:
    """The cross-attention layers, or the others."""
    width, mlp_width = sizes.width, sizes.mlp_width
    std = _small_std(width)
    out_std = std / math.sqrt(2 * sizes.layers)
    for i in range(sizes.layers):
        if (i in sizes.cross_layers) != cross:
            continue
        layer = f"language.decoder.layers.{i}"
        attention = f"{layer}.{'cross_attention' if cross else 'self_attention'}"
        kv_width = sizes.kv_heads * sizes.head_width
        if cross:
            yield from _cross(layer, attention, sizes)
        else:
            yield from _self(layer, attention, width, kv_width)
        yield from _out_and_mlp(layer, attention, width, mlp_width, out_std)


def _out_and_mlp(
    layer: str, attention: str, width: int, mlp_width: int, out_std: float
) -> Iterator[Parameter]:
    yield _normal(f"{attention}.linear_proj.weight", (width, width), out_std, 1)
    # The gate and the up projection of SwiGLU lie one after the other; each is split.
    fc1 = (2 * mlp_width, width)
    yield _normal(f"{layer}.mlp.linear_fc1.weight", fc1, _small_std(width), 0, 2)
    yield _normal(f"{layer}.mlp.linear_fc2.weight", (width, mlp_width), out_std, 1)


def _self(layer: str, attention: str, width: int, kv_width: int) -> Iterator[Parameter]:
    yield _scale(f"{layer}.input_layernorm.weight", width)
    qkv = (width + 2 * kv_width, width)
    yield _normal(f"{attention}.linear_qkv.weight", qkv, _small_std(width), 0)
    yield _scale(f"{layer}.pre_mlp_layernorm.weight", width)


def _cross(layer: str, attention: str, sizes: DecoderSizes) -> Iterator[Parameter]:
    width, kv_width = sizes.width, sizes.kv_heads * sizes.head_width
    std = _small_std(width)
    yield Parameter(f"{layer}.attention_gate", (1,), initial_mean=sizes.initial_gate)
    yield Parameter(f"{layer}.mlp_gate", (1,), initial_mean=sizes.initial_gate)
    yield _scale(f"{layer}.input_norm.weight", width)
    yield _normal(f"{attention}.linear_q.weight", (width, width), std, 0)
    yield _normal(f"{attention}.linear_kv.weight", (2 * kv_width, width), std, 0)
    yield _scale(f"{attention}.q_layernorm.weight", sizes.head_width)
    yield _scale(f"{attention}.k_layernorm.weight", sizes.head_width)
    yield _scale(f"{layer}.mlp_norm.weight", width)
