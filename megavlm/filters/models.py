"""Classifiers and image-text scores by Hugging Face checkpoints that lie on this machine.

Only safetensors are read, and no code from a checkpoint's folder is run.
"""

import json
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from megavlm.config.filters import FilterSettings
from megavlm.errors import ConfigError
from megavlm.filters.towers import is_ours

_LOCAL = {"local_files_only": True, "trust_remote_code": False}
_SAFE = {**_LOCAL, "use_safetensors": True}


@torch.no_grad()
def agreement(
    checkpoint: Path, device: str, images: Sequence[Image.Image], captions: Sequence[str]
) -> list[float]:
    """Cosine of the embeddings of each picture and its caption, by a CLIP or SigLIP."""
    if not captions:
        return []
    model, tokenizer, image_processor = _dual_encoder(checkpoint, device)
    # A fixed length: a score does not depend on what else is in the batch. SigLIP wants it so.
    tokens = tokenizer(
        list(captions),
        padding="max_length",
        truncation=True,
        max_length=model.config.text_config.max_position_embeddings,
        return_tensors="pt",
    )
    pixels = image_processor(list(images), return_tensors="pt")
    outputs = model(**tokens.to(device), **pixels.to(device))
    unit = torch.nn.functional.normalize
    cosines = unit(outputs.image_embeds.float()) * unit(outputs.text_embeds.float())
    return cosines.sum(-1).tolist()


@torch.no_grad()
def probabilities(
    checkpoint: Path,
    device: str,
    of: str,
    label: str,
    inputs: Sequence[Image.Image] | Sequence[str],
) -> list[float]:
    """What a classifier gives a label for each picture or text (`of`: pictures, texts)."""
    if not inputs:
        return []
    results = _classifier(checkpoint, device, of)(list(inputs), batch_size=len(inputs))
    return [next(r["score"] for r in result if r["label"] == label) for result in results]


@cache
def _dual_encoder(checkpoint: Path, device: str) -> tuple[Any, Any, Any]:
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(checkpoint, **_SAFE).eval().to(device)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, **_LOCAL)
    # The same on every machine, whether or not it has torchvision.
    image_processor = AutoImageProcessor.from_pretrained(checkpoint, backend="pil", **_LOCAL)
    return model, tokenizer, image_processor


@cache
def _classifier(checkpoint: Path, device: str, of: str) -> Any:
    from transformers import (
        AutoImageProcessor,
        AutoModelForImageClassification,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        pipeline,
    )

    if of == "pictures":
        return pipeline(
            "image-classification",
            model=AutoModelForImageClassification.from_pretrained(checkpoint, **_SAFE),
            image_processor=AutoImageProcessor.from_pretrained(checkpoint, backend="pil", **_LOCAL),
            device=device,
            top_k=None,
        )
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, **_SAFE)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, **_LOCAL)
    tokenizer.model_max_length = min(tokenizer.model_max_length, _most_tokens(model))
    return pipeline(
        "text-classification",
        model=model,
        tokenizer=tokenizer,
        device=device,
        top_k=None,
        truncation=True,
    )


def _most_tokens(model: Any) -> int:
    """That a model can read at once; tokenizers need not say it."""
    most = getattr(model.config, "max_position_embeddings", None) or -1
    if most < 1:  # XLNet's way to say that there is no limit
        return sys.maxsize
    # RoBERTa counts its positions from that of the padding on.
    embeddings = getattr(model.base_model, "embeddings", None)
    padding = getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None)
    return most if padding is None else most - padding - 1


def check_checkpoints(rules: FilterSettings) -> None:
    """Raise ConfigError for a folder without a checkpoint, and for a label that it lacks."""
    folders = [classifier.checkpoint for classifier in rules.classifiers]
    if rules.agreement and not is_ours(rules.agreement.checkpoint):  # else `resolved` checks it
        folders.append(rules.agreement.checkpoint)
    for folder in folders:
        if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
            raise ConfigError(
                f"checkpoint {folder} needs a config.json and weights in safetensors; download it "
                "from the Hugging Face Hub into a folder, or convert it; agreement takes a run of "
                "megavlm with checkpoints, or a step's folder, too"
            )
    for classifier in rules.classifiers:
        config = json.loads((classifier.checkpoint / "config.json").read_text())
        labels = list(config.get("id2label", {}).values())
        if classifier.label not in labels:
            raise ConfigError(
                f"classifiers: {classifier.checkpoint} has no label {classifier.label!r}; its "
                f"labels are {labels}"
            )
