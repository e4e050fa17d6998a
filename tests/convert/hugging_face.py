"""Files of Hugging Face's models, and our model with converted weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megavlm.checkpoint.lazy import LazyTensor, Tensors, in_memory
from megavlm.config.sizes import ModelSizes
from megavlm.model.vit import VisionTransformer
from megavlm.model.vlm import VisionLanguageModel


def saved(model: Any, folder: Path) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
    """What transformers writes of a model: its tensors, and config.json."""
    model.save_pretrained(folder)
    return filed(folder), json.loads((folder / "config.json").read_text())


def filed(folder: Path) -> dict[str, LazyTensor]:
    return in_memory(load_file(folder / "model.safetensors"))


def write(tensors: Tensors, config: Mapping[str, Any], folder: Path) -> None:
    """A folder that `from_pretrained` opens."""
    folder.mkdir()
    read = {name: tensor.read().clone() for name, tensor in tensors.items()}
    save_file(read, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def opened(kind: Any, folder: Path) -> Any:
    """The model in a folder; all of its weights, and no others, come from there."""
    model, loading = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    return model.eval()


def assert_same(some: Tensors, others: Tensors) -> None:
    """Names, shapes, types and bits."""
    assert some.keys() == others.keys()
    for name, tensor in some.items():
        one, other = tensor.read(), others[name].read()
        assert (tensor.shape, tensor.dtype) == (tuple(one.shape), one.dtype), name
        assert (tensor.shape, tensor.dtype) == (others[name].shape, others[name].dtype), name
        as_bytes = (t.contiguous().view(torch.uint8) for t in (one, other))
        assert torch.equal(*as_bytes), name


def our_model(tensors: Tensors, sizes: ModelSizes) -> VisionLanguageModel:
    """Our model with these weights; parts without weights are zero."""
    model = VisionLanguageModel(sizes, dtype=torch.float32).eval()
    fill(model, tensors)
    return model


@torch.no_grad()
def fill(
    model: VisionLanguageModel | VisionTransformer, tensors: Tensors, prefix: str = ""
) -> None:
    parameters = {prefix + name: p for name, p in model.named_parameters()}
    assert {name for name in tensors if not name.startswith("beside.")} <= parameters.keys()
    for name, parameter in parameters.items():
        parameter.zero_()
        if name in tensors:
            whole = tensors[name].read()
            assert whole.shape == parameter.shape, name
            parameter.copy_(whole)


@torch.no_grad()
def our_logits(
    model: VisionLanguageModel, tokens_bt: Tensor, image_states: Tensor | None
) -> Tensor:
    """Logits (b, t, vocabulary) fp32. Row i sees the i-th part of the image states, or nothing."""
    rows, length = tokens_bt.shape
    ranges = torch.zeros(2, rows, length, dtype=torch.int32)
    if image_states is None:
        side = model.sizes.encoder.image_pixels
        image_states = model.encode_images(torch.zeros(1, 3, side, side))
    else:
        image_tokens = len(image_states) // rows
        ranges[0] = (torch.arange(rows) * image_tokens)[:, None]
        ranges[1] = ranges[0] + image_tokens
    return model.logits(tokens_bt, ranges, image_states)
