"""Hugging Face's CLIP, SigLIP and ViT encoders, and our encoder with their weights."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from megavlm.config.engines import UNDIVIDED
from megavlm.config.sizes import EncoderSizes
from megavlm.model.vit import VisionTransformer
from tests.batches import TINY

PLAIN = replace(TINY.encoder, attention_bias=True, visible_registers=False)


class Tower(NamedTuple):
    """One of theirs, and the sizes of ours that equal it; images of any size."""

    config: type
    model: type
    sizes: EncoderSizes
    activation: str
    """Their name for it."""


TOWERS = {
    "CLIP": Tower(
        CLIPVisionConfig, CLIPVisionModel, replace(PLAIN, activation="quick_gelu"), "quick_gelu"
    ),
    "OpenCLIP": Tower(CLIPVisionConfig, CLIPVisionModel, PLAIN, "gelu"),
    "SigLIP": Tower(
        SiglipVisionConfig,
        SiglipVisionModel,
        replace(
            PLAIN, class_token=False, pre_norm=False, activation="gelu_tanh", norm_epsilon=1e-6
        ),
        "gelu_pytorch_tanh",
    ),
    "ViT": Tower(ViTConfig, ViTModel, replace(PLAIN, pre_norm=False, norm_epsilon=1e-12), "gelu"),
}

# The beginnings of ViT's names, as CLIP and SigLIP call the same.
_VIT_NAMES = {
    "embeddings.cls_token": "embeddings.class_embedding",
    "embeddings.position_embeddings": "embeddings.position_embedding.weight",
    "embeddings.patch_embeddings.projection.": "embeddings.patch_embedding.",
    "layernorm.": "post_layernorm.",
    "layers.": "encoder.layers.",
}
# Of a layer: ours, CLIP's and SigLIP's, ViT's.
_LAYER_NAMES = {
    "input_layernorm": ("layer_norm1", "layernorm_before"),
    "self_attention.linear_proj": ("self_attn.out_proj", "attention.o_proj"),
    "pre_mlp_layernorm": ("layer_norm2", "layernorm_after"),
    "mlp.linear_fc1": ("mlp.fc1", "mlp.fc1"),
    "mlp.linear_fc2": ("mlp.fc2", "mlp.fc2"),
}


def their_tower(tower: Tower, image_pixels: int) -> Any:
    """Theirs, of our sizes."""
    sizes = tower.sizes
    is_vit = tower.model is ViTModel
    config = tower.config(
        image_size=image_pixels,
        patch_size=sizes.patch_pixels,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        intermediate_size=sizes.mlp_width,
        hidden_act=tower.activation,
        layer_norm_eps=sizes.norm_epsilon,
    )
    return tower.model(config, **({"add_pooling_layer": False} if is_vit else {})).eval()


def our_tower(sizes: EncoderSizes, theirs: nn.Module) -> VisionTransformer:
    """Ours, with their weights."""
    encoder = VisionTransformer(
        sizes, dtype=torch.float32, recompute="none", parallel=UNDIVIDED
    ).eval()
    weights = _ours(sizes, {_as_clip(name): t for name, t in theirs.state_dict().items()})
    parameters = dict(encoder.named_parameters())
    assert parameters.keys() == weights.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    return encoder


def _as_clip(name: str) -> str:
    for vit, clip in _VIT_NAMES.items():
        if name.startswith(vit):
            return clip + name.removeprefix(vit)
    return name


def _ours(sizes: EncoderSizes, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    positions = theirs["embeddings.position_embedding.weight"].reshape(-1, sizes.width).clone()
    if "embeddings.patch_embedding.bias" in theirs:
        positions[int(sizes.class_token) :] += theirs["embeddings.patch_embedding.bias"]
    ours = {"patch.weight": theirs["embeddings.patch_embedding.weight"], "positions": positions}
    if sizes.class_token:
        ours["class_token"] = theirs["embeddings.class_embedding"].flatten()
    for kind in ("weight", "bias"):
        if sizes.pre_norm:
            ours[f"norm_pre.{kind}"] = theirs[f"pre_layrnorm.{kind}"]
        ours[f"block.final_layernorm.{kind}"] = theirs[f"post_layernorm.{kind}"]
        for i in range(sizes.layers):
            a, b = f"block.layers.{i}.", f"encoder.layers.{i}."
            for name, others in _LAYER_NAMES.items():
                [tensor] = {f"{b}{n}.{kind}" for n in others} & theirs.keys()
                ours[f"{a}{name}.{kind}"] = theirs[tensor]
            [attention] = {
                n for n in ("self_attn", "attention") if f"{b}{n}.q_proj.{kind}" in theirs
            }
            ours[f"{a}self_attention.linear_qkv.{kind}"] = torch.cat(
                # Of every head its query, key and value rows.
                [
                    theirs[f"{b}{attention}.{part}_proj.{kind}"].chunk(sizes.heads)[head]
                    for head in range(sizes.heads)
                    for part in "qkv"
                ]
            )
    return ours
