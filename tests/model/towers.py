"""Hugging Face's CLIP, SigLIP and ViT encoders, and our encoder with their weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
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
from megavlm.convert.towers import from_hugging_face
from megavlm.data.image import PIXEL_MEAN, PIXEL_STD
from megavlm.model.vit import VisionTransformer
from tests.batches import TINY
from tests.convert.hugging_face import fill, saved

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


def our_tower(sizes: EncoderSizes, theirs: Any, folder: Path) -> VisionTransformer:
    """Ours, with their weights; both take pixels that are normalised already."""
    encoder = VisionTransformer(
        sizes, dtype=torch.float32, recompute="none", parallel=UNDIVIDED
    ).eval()
    tensors, config = saved(theirs, folder)
    as_they_are = {"image_mean": PIXEL_MEAN, "image_std": PIXEL_STD}
    fill(encoder, from_hugging_face(tensors, config, sizes, as_they_are).tensors, "encoder.")
    return encoder
