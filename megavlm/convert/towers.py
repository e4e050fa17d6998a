"""Hugging Face image encoders as our encoder: CLIP, SigLIP and ViT."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from megavlm.checkpoint.lazy import LazyTensor, Tensors
from megavlm.config.sizes import EncoderSizes
from megavlm.convert.names import (
    BESIDE,
    Absent,
    Converted,
    Joined,
    Rule,
    Shape,
    copied,
    require_values,
    to_ours,
    within,
)
from megavlm.data.image import PIXEL_MEAN, PIXEL_STD
from megavlm.errors import ConfigError
from megavlm.model.params import encoder_parameters

# Our names of activations, and Hugging Face's.
Activation = Literal["gelu", "quick_gelu", "gelu_tanh"]
ACTIVATIONS: dict[Activation, str] = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
}

Modules = list[tuple[str, list[str]]]
"""Modules with weight and bias: ours, and theirs that it joins."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """How the encoders of one kind are named and built."""

    prefix: str
    """What the names begin with in a checkpoint of more than the encoder."""
    patch: str
    """The convolution over patches."""
    patch_bias: bool
    plain: dict[str, str]
    """Tensors that are no weight or bias of a module below: ours, and theirs."""
    around: Modules
    """Modules before and after the layers."""
    layers: str
    layer: Modules
    left_out: tuple[str, ...]
    """How the names of what our encoder lacks begin."""
    form: dict[str, Any]
    """What sets the encoder apart from Mllama's, in EncoderSizes."""
    defaults: dict[str, Any]
    """What transformers assumes where a config.json is silent."""
    pixel_mean: Sequence[float]
    pixel_std: Sequence[float]
    """Of red, green and blue between 0 and 1: how its pixels are normalised unless told."""


CLIP_LAYER: Modules = [
    ("input_layernorm", ["layer_norm1"]),
    ("self_attention.linear_qkv", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    ("self_attention.linear_proj", ["self_attn.out_proj"]),
    ("pre_mlp_layernorm", ["layer_norm2"]),
    ("mlp.linear_fc1", ["mlp.fc1"]),
    ("mlp.linear_fc2", ["mlp.fc2"]),
]
VIT_LAYER: Modules = [
    ("input_layernorm", ["layernorm_before"]),
    (
        "self_attention.linear_qkv",
        [f"attention.attention.{kind}" for kind in ("query", "key", "value")],
    ),
    ("self_attention.linear_proj", ["attention.output.dense"]),
    ("pre_mlp_layernorm", ["layernorm_after"]),
    ("mlp.linear_fc1", ["intermediate.dense"]),
    ("mlp.linear_fc2", ["output.dense"]),
]
BASE_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3_072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
}

CLIP = Family(
    prefix="vision_model.",
    patch="embeddings.patch_embedding",
    patch_bias=False,
    plain={
        "encoder.class_token": "embeddings.class_embedding",
        "encoder.positions": "embeddings.position_embedding.weight",
    },
    around=[
        ("encoder.norm_pre", ["pre_layrnorm"]),
        ("encoder.block.final_layernorm", ["post_layernorm"]),
    ],
    layers="encoder.layers",
    layer=CLIP_LAYER,
    left_out=("embeddings.position_ids",),
    form={"attention_bias": True, "visible_registers": False},
    defaults={
        **BASE_DEFAULTS,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    pixel_mean=PIXEL_MEAN,
    pixel_std=PIXEL_STD,
)
SIGLIP = Family(
    prefix="vision_model.",
    patch="embeddings.patch_embedding",
    patch_bias=True,
    plain={"encoder.positions": "embeddings.position_embedding.weight"},
    around=[("encoder.block.final_layernorm", ["post_layernorm"])],
    layers="encoder.layers",
    layer=CLIP_LAYER,
    left_out=("embeddings.position_ids", "head."),
    form={
        "attention_bias": True,
        "visible_registers": False,
        "class_token": False,
        "pre_norm": False,
    },
    defaults={
        **BASE_DEFAULTS,
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
    pixel_mean=(0.5, 0.5, 0.5),
    pixel_std=(0.5, 0.5, 0.5),
)
VIT = Family(
    prefix="vit.",
    patch="embeddings.patch_embeddings.projection",
    patch_bias=True,
    plain={
        "encoder.class_token": "embeddings.cls_token",
        "encoder.positions": "embeddings.position_embeddings",
    },
    around=[("encoder.block.final_layernorm", ["layernorm"])],
    layers="encoder.layer",
    layer=VIT_LAYER,
    left_out=("embeddings.mask_token", "pooler."),
    form={"attention_bias": True, "visible_registers": False, "pre_norm": False},
    defaults={
        **BASE_DEFAULTS,
        "patch_size": 16,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
    },
    pixel_mean=(0.5, 0.5, 0.5),
    pixel_std=(0.5, 0.5, 0.5),
)
FAMILIES = {
    "clip": CLIP,
    "clip_vision_model": CLIP,
    "siglip": SIGLIP,
    "siglip_vision_model": SIGLIP,
    "vit": VIT,
}


def encoder_sizes_of(config: Mapping[str, Any]) -> EncoderSizes:
    """Sizes of our encoder that is this image encoder.

    config: the contents of config.json, of the encoder alone or of a model with a text half.
    Patches that do not divide image_size leave its rest unseen, as there.
    Raises ConfigError when our encoder cannot express it.
    """
    family = _family(config)
    vision: dict[str, Any] = family.defaults | config.get("vision_config", config)
    require_values(
        vision, {"num_channels": 3, "qkv_bias": True}, "choose a model of colour pictures"
    )
    image, patch = _side(vision, "image_size"), _side(vision, "patch_size")
    return EncoderSizes(
        image_pixels=image // patch * patch,
        patch_pixels=patch,
        width=vision["hidden_size"],
        layers=vision["num_hidden_layers"],
        heads=vision["num_attention_heads"],
        mlp_width=vision["intermediate_size"],
        activation=our_activation(vision["hidden_act"]),
        norm_epsilon=vision["layer_norm_eps"],
        **family.form,
    )


def from_hugging_face(
    theirs: Tensors,
    config: Mapping[str, Any],
    sizes: EncoderSizes,
    preprocessor: Mapping[str, Any],
) -> Converted:
    """An image encoder as ours; our output is its last states after its last norm, of all tokens.

    theirs: under the names that its files have. sizes: of `encoder_sizes_of` this config.
    preprocessor: as in `pixel_statistics`.

    Bits change in two tensors alone: our encoder has no bias at its patches and always normalises
    pixels as CLIP does, so a bias is added to the positions of the patches, and another
    normalisation goes into the patches' weights and into that bias. Sums are in fp32, rounded once.
    Raises CheckpointError when the tensors are not those of the config.
    """
    family = _family(config)
    prefix = family.prefix if any(name.startswith(family.prefix) for name in theirs) else ""
    left_out = tuple(prefix + name for name in family.left_out)
    dropped = tuple(
        name for name in theirs if not name.startswith(prefix) or name.startswith(left_out)
    )
    encoder = {
        name.removeprefix(prefix): _without_leading_ones(tensor)
        for name, tensor in theirs.items()
        if name not in dropped
    }
    ours = to_ours(encoder, _table(family, sizes), _shapes(sizes))
    _fold(
        ours,
        ours.pop(BESIDE + family.patch + ".bias", None),
        *pixel_statistics(config, preprocessor),
        first_patch=int(sizes.class_token),
    )
    return Converted(ours, dropped)


def pixel_statistics(
    config: Mapping[str, Any], preprocessor: Mapping[str, Any]
) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation that the encoder's pixels are normalised by, for each colour.

    preprocessor: the contents of preprocessor_config.json, or nothing, for what its family has.
    """
    family = _family(config)
    mean = preprocessor.get("image_mean", family.pixel_mean)
    std = preprocessor.get("image_std", family.pixel_std)
    if not (len(mean) == len(std) == 3 and min(std) > 0):
        raise ConfigError(
            f"image_mean={mean} and image_std={std} must be three numbers each, of std above 0; "
            "mend preprocessor_config.json"
        )
    return mean, std


def our_activation(theirs: str) -> Activation:
    """Our name of an activation of Hugging Face's."""
    for ours, name in ACTIVATIONS.items():
        if name == theirs:
            return ours
    raise ConfigError(
        f"hidden_act={theirs} must be one of {', '.join(ACTIVATIONS.values())}; choose a model "
        "with one of them"
    )


def _family(config: Mapping[str, Any]) -> Family:
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ConfigError(
            f"model_type={kind}: image encoders are converted from {', '.join(FAMILIES)}; choose a "
            "model of these"
        )
    return FAMILIES[kind]


def _side(vision: Mapping[str, Any], name: str) -> int:
    side = vision[name]
    sides = {side} if isinstance(side, int) else set(side)
    if len(sides) > 1:
        raise ConfigError(f"{name}={side} must be square; choose a model of square pictures")
    return sides.pop()


def _table(family: Family, sizes: EncoderSizes) -> list[Rule]:
    rules: list[Rule] = [copied("encoder.patch.weight", f"{family.patch}.weight")]
    if family.patch_bias:
        rules.append(Absent(f"{family.patch}.bias", (sizes.width,), kept=True))
    rules += [copied(ours, theirs) for ours, theirs in family.plain.items()]
    rules += _modules(family.around, sizes)
    for i in range(sizes.layers):
        ours, theirs = f"encoder.block.layers.{i}.", f"{family.layers}.{i}."
        rules += within(ours, theirs, _modules(family.layer, sizes))
    return rules


def _modules(modules: Modules, sizes: EncoderSizes) -> list[Rule]:
    return [
        Joined(
            f"{ours}.{kind}",
            {f"{name}.{kind}": 1 for name in theirs},
            groups=sizes.heads if len(theirs) > 1 else 1,
        )
        for ours, theirs in modules
        for kind in ("weight", "bias")
    ]


def _shapes(sizes: EncoderSizes) -> dict[str, Shape]:
    return {parameter.name: parameter.shape for parameter in encoder_parameters(sizes)}


def _without_leading_ones(tensor: LazyTensor) -> LazyTensor:
    """ViT's class token and positions have axes for a batch: (1, 1, w) and (1, t, w)."""
    if len(tensor.shape) != 3:
        return tensor
    shape = tensor.shape[1:] if tensor.shape[1] > 1 else tensor.shape[2:]
    return LazyTensor(shape, tensor.dtype, lambda: tensor.read().reshape(shape))


def _fold(
    ours: dict[str, LazyTensor],
    bias: LazyTensor | None,
    mean: Sequence[float],
    std: Sequence[float],
    first_patch: int,
) -> None:
    """Put the patches' bias and their normalisation of pixels into patches' weight and positions.

    x theirs = (x ours * our std + our mean - their mean) / their std, for each colour.
    """
    weight, positions = ours["encoder.patch.weight"], ours["encoder.positions"]
    as_ours = tuple(mean) == PIXEL_MEAN and tuple(std) == PIXEL_STD
    their_mean, their_std, our_mean, our_std = map(torch.tensor, (mean, std, PIXEL_MEAN, PIXEL_STD))
    scale_c11 = (our_std / their_std)[:, None, None]
    shift_c11 = ((our_mean - their_mean) / their_std)[:, None, None]

    def read_weight() -> Tensor:
        return (weight.read().float() * scale_c11).to(weight.dtype)

    def read_positions() -> Tensor:
        moved = positions.read().to(torch.float32, copy=True)
        if bias is not None:
            moved[first_patch:] += bias.read().float()
        if not as_ours:
            moved[first_patch:] += (weight.read().float() * shift_c11).sum((1, 2, 3))
        return moved.to(positions.dtype)

    if not as_ours:
        ours["encoder.patch.weight"] = replace(weight, read=read_weight)
    if not as_ours or bias is not None:
        ours["encoder.positions"] = replace(positions, read=read_positions)
