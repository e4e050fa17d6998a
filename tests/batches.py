"""Random micro-batches for the smallest model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from megavlm.config.data import DataSettings
from megavlm.config.presets import PRESETS
from megavlm.config.sizes import EncoderSizes, ModelSizes
from megavlm.data.packing import Batch, PackedText, PairBatch, Span, pack, pack_pairs
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
ROWS = DataSettings(train="none", heldout="none", tokenizer=Path("none"), row_tokens=ROW_TOKENS)


def label_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy of every label of a batch, (b, t), in nats."""
    return model(
        batch.tokens_bt,
        batch.labels_bt,
        batch.text_numbers_bt,
        batch.image_ranges_2bt,
        batch.pixels,
    )


def loss_sum(model: nn.Module, batch: Batch) -> Tensor:
    """Summed cross entropy of a batch's learned tokens, in nats."""
    return (label_losses(model, batch) * batch.learned_bt).sum()


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
            seen = [(0, Span(sample, sample + 1))] if images else []
            texts.append(PackedText(tokens, [Span(2, len(tokens))], seen))
    return pack(texts, pixels, ROWS, image_tokens=encoder.tokens)


def random_pairs(seed: int, slots: int = 3, encoder: EncoderSizes = TINY.encoder) -> PairBatch:
    """Pictures with a text each; now and then a slot has no text, or nothing."""
    generator = np.random.default_rng(seed)
    side = encoder.image_pixels
    shape = (slots, 3, side, side)
    pixels = torch.from_numpy(generator.integers(0, 256, shape, dtype=np.uint8))
    patches = (side // encoder.patch_pixels) ** 2
    order = generator.random((slots, patches)).argsort(1)
    masked = torch.from_numpy(order < patches // 2)
    has_image = torch.ones(slots, dtype=torch.bool)
    texts = [
        (slot, [BEGIN, *generator.integers(10, 500, generator.integers(2, 9)).tolist(), END])
        for slot in range(slots)
    ]
    if seed % 4 == 1:
        texts.pop(1)
    if seed % 4 == 2:
        texts.pop()
        has_image[-1] = False
        pixels[-1] = 0
    batch = pack_pairs(texts, pixels, has_image, masked, ROWS)
    return replace(batch, samples=int(has_image.sum()))
