"""Tiny Hugging Face checkpoints: a CLIP that knows colours, and classifiers of a fixed opinion."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CONFIG_MAPPING,
    AutoModelForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

COLOURS = ("red", "green", "blue", "white", "black", "yellow")
SIDE = 16
TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
}


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<unk>", "<start>", "<end>", "a", "square", "picture", "of", *COLOURS]
    vocabulary = {word: n for n, word in enumerate(words)}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 2), ("<end>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", unk_token="<unk>", eos_token="<end>"
    )


def coloured(colour: str, side: int = 40) -> Image.Image:
    return Image.new("RGB", (side, side), colour)


def save_clip(folder: Path, steps: int = 60) -> None:
    """Trained until captions of the right colour agree with a square of it, and no others do."""
    torch.manual_seed(0)
    vision = {**TINY, "image_size": SIDE, "patch_size": 8}
    text = {**TINY, "vocab_size": 64, "max_position_embeddings": 12, "eos_token_id": 3}
    text |= {"bos_token_id": 2, "pad_token_id": 0}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    sides = {"height": SIDE, "width": SIDE}
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=sides)
    tokens = tokenizer()
    inputs = {
        **tokens([f"a {c} square" for c in COLOURS], padding="max_length", max_length=12,
                 return_tensors="pt"),
        **image_processor([coloured(c) for c in COLOURS], return_tensors="pt"),
    }  # fmt: skip
    inputs.pop("token_type_ids", None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**inputs, return_loss=True).loss.backward()
        optimizer.step()
    for part in (model, tokens, image_processor):
        part.save_pretrained(folder)


def save_classifiers(
    folder: Path,
    probabilities: Sequence[float],
    family: Literal["Bert", "Roberta"] = "Bert",
    tokenizer_limit: int | None = 16,
) -> None:
    """`folder/pictures` and `folder/texts`, which give `safe` and `unsafe` these probabilities.

    family: of the model that reads texts; tokenizer_limit: tokens that its tokenizer says it reads.
    """
    torch.manual_seed(0)
    labels = {"id2label": {0: "safe", 1: "unsafe"}, "label2id": {"safe": 0, "unsafe": 1}}
    of_pictures = ViTForImageClassification(
        ViTConfig(**TINY, image_size=SIDE, patch_size=8, **labels)
    )
    config = CONFIG_MAPPING[family.lower()](
        **TINY, vocab_size=64, max_position_embeddings=16, pad_token_id=0, **labels
    )
    of_texts = AutoModelForSequenceClassification.from_config(config)
    processor = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})
    words = tokenizer()
    if tokenizer_limit:
        words.model_max_length = tokenizer_limit
    for name, model, inputs in (
        ("pictures", of_pictures, processor),
        ("texts", of_texts, words),
    ):
        with torch.no_grad():
            head = getattr(model.classifier, "out_proj", model.classifier)  # RoBERTa's has layers
            head.weight.zero_()
            head.bias.copy_(torch.tensor(probabilities).log())
        model.save_pretrained(folder / name)
        inputs.save_pretrained(folder / name)
