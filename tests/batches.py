"""Random micro-batches for the smallest model."""

import numpy as np
import torch

from megavlm.config.presets import PRESETS
from megavlm.data.packing import Batch, PackedText, pack
from megavlm.data.tokenizer import BEGIN, END

TINY = PRESETS["vlm-tiny"]
ROW_TOKENS = 16


def random_batch(seed: int, *, samples: int, images: bool = True) -> Batch:
    """`samples` samples with two texts each; without images, text-only."""
    generator = np.random.default_rng(seed)
    side = TINY.encoder.image_pixels
    pixels = torch.zeros((samples, 3, side, side), dtype=torch.uint8)
    if images:
        pixels = torch.from_numpy(generator.integers(0, 256, pixels.shape, dtype=np.uint8))
    texts = []
    for sample in range(samples):
        for _ in range(2):
            words = generator.integers(10, TINY.decoder.vocabulary, generator.integers(3, 9))
            tokens = [BEGIN, *words.tolist(), END]
            texts.append(PackedText(tokens, 2, sample if images else None))
    return pack(texts, pixels, row_tokens=ROW_TOKENS, image_tokens=TINY.encoder.tokens)
