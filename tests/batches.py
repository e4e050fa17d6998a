"""Random micro-batches for the smallest model."""

from dataclasses import replace

import numpy as np
import torch

from megavlm.config.presets import PRESETS
from megavlm.config.sizes import EncoderSizes, ModelSizes
from megavlm.data.packing import Batch, PackedText, pack
from megavlm.data.tokenizer import BEGIN, END

TINY = PRESETS["vlm-tiny"]
# All that the presets leave alone; as many layers, the first of them a cross-attention layer.
OTHER_FORM = ModelSizes(
    encoder=replace(
        TINY.encoder,
        image_pixels=40,  # 25 patches, 7 registers
        heads=4,
        attention_bias=True,
        class_token=False,
        pre_norm=False,
        activation="quick_gelu",
        norm_epsilon=1e-6,
        visible_registers=False,
    ),
    decoder=replace(
        TINY.decoder,
        self_layers=3,
        cross_every=None,
        cross_at=(0, 3, 4),
        heads=8,
        kv_heads=4,
        rope_scaling=8.0,
        norm_epsilon=1e-6,
    ),
)
ROW_TOKENS = 16


def random_batch(
    seed: int, *, samples: int, images: bool = True, encoder: EncoderSizes = TINY.encoder
) -> Batch:
    """`samples` samples with two texts each; without images, text-only."""
    generator = np.random.default_rng(seed)
    side = encoder.image_pixels
    pixels = torch.zeros((samples, 3, side, side), dtype=torch.uint8)
    if images:
        pixels = torch.from_numpy(generator.integers(0, 256, pixels.shape, dtype=np.uint8))
    texts = []
    for sample in range(samples):
        for _ in range(2):
            words = generator.integers(10, TINY.decoder.vocabulary, generator.integers(3, 9))
            tokens = [BEGIN, *words.tolist(), END]
            texts.append(PackedText(tokens, 2, sample if images else None))
    return pack(texts, pixels, row_tokens=ROW_TOKENS, image_tokens=encoder.tokens)
