"""What both sides of a conversion compute on the same fixed inputs, Hugging Face's by its own code.

transformers is imported where it is used: conversions work without it.
"""

import os
from importlib.util import find_spec
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from megavlm.checkpoint.lazy import Tensors
from megavlm.checkpoint.tensor_file import tensor_bytes
from megavlm.config.engines import UNDIVIDED
from megavlm.config.sizes import DecoderSizes, EncoderSizes, ModelSizes
from megavlm.convert import towers
from megavlm.convert.files import preprocessor
from megavlm.convert.names import SMALLEST_ENCODER, Sizes
from megavlm.dist import groups
from megavlm.files.folder import Folder
from megavlm.model.vit import VisionTransformer, normalise
from megavlm.model.vlm import VisionLanguageModel

SEED = 1
ROWS, TOKENS = 2, 12


def compared(kind: str, folder: Folder, ours: Tensors, sizes: Sizes) -> dict[str, Any]:
    """The worst difference between a Hugging Face folder and our weights, or why there is none.

    kind: mllama, llama or tower. ours: by the ledger's names.
    """
    if reason := _cannot_run(folder, ours):
        return {"compared": False, "reason": reason}
    compare, what = {
        "mllama": (_mllama, "logits, with and without pictures"),
        "llama": (_llama, "logits without pictures"),
        "tower": (_tower, "states of all tokens after the last norm"),
    }[kind]
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    # Its threads would be new to torch, and now and then two of them fail to set its own at once.
    os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")
    generator = torch.Generator().manual_seed(SEED)
    with groups.process_groups(seed=SEED), torch.no_grad():
        pairs = compare(folder, ours, sizes, generator)
    return {
        "compared": True,
        "what": f"{what}, fp32, {ROWS} rows of random inputs (seed {SEED})",
        "worst_difference": float(torch.stack([(a - b).abs().max() for a, b in pairs]).max()),
        "standard_deviation": float(pairs[0][1].std()),
    }


def _cannot_run(folder: Folder, ours: Tensors) -> str:
    if folder.local_path is None:
        return "transformers reads local folders only"
    if find_spec("transformers") is None:
        return "transformers is not installed"
    needed = 3 * sum(tensor_bytes(t.shape, torch.float32) for t in ours.values())
    available = psutil.virtual_memory().available
    if needed > available:
        return f"both models in fp32 need {needed >> 30} GiB, {available >> 30} GiB are free"
    return ""


Pairs = list[tuple[Tensor, Tensor]]


def _mllama(folder: Folder, ours: Tensors, sizes: Sizes, generator: torch.Generator) -> Pairs:
    from transformers import MllamaForConditionalGeneration

    theirs: Any = MllamaForConditionalGeneration.from_pretrained(
        str(folder.local_path), dtype=torch.float32
    )
    encoder, decoder = EncoderSizes(**sizes["encoder"]), DecoderSizes(**sizes["decoder"])
    mine = VisionLanguageModel(ModelSizes(encoder=encoder, decoder=decoder), dtype=torch.float32)
    _fill(mine, ours)
    tokens = _tokens(decoder.vocabulary, generator)
    pixels = _pixels(encoder.image_pixels, generator)
    seeing = theirs(
        input_ids=tokens,
        pixel_values=normalise(pixels)[:, None, None],
        aspect_ratio_ids=torch.ones(ROWS, 1, dtype=torch.long),
        aspect_ratio_mask=torch.ones(ROWS, 1, 1, dtype=torch.long),
        cross_attention_mask=torch.ones(ROWS, TOKENS, 1, 1),
    ).logits
    low = (torch.arange(ROWS) * encoder.tokens)[:, None].expand(ROWS, TOKENS)
    ranges = torch.stack([low, low + encoder.tokens]).int()
    states = mine.encode_images(pixels)
    return [
        (mine.logits(tokens, ranges, states), seeing),
        (mine.logits(tokens, torch.zeros_like(ranges), states), theirs(input_ids=tokens).logits),
    ]


def _llama(folder: Folder, ours: Tensors, sizes: Sizes, generator: torch.Generator) -> Pairs:
    from transformers import AutoModelForCausalLM

    theirs: Any = AutoModelForCausalLM.from_pretrained(str(folder.local_path), dtype=torch.float32)
    decoder = DecoderSizes(**sizes["decoder"])
    sizes_of_all = ModelSizes(encoder=SMALLEST_ENCODER, decoder=decoder)  # it sees nothing
    mine = VisionLanguageModel(sizes_of_all, dtype=torch.float32)
    # The encoder and the projector of a whole model have no place in this one.
    _fill(mine, {name: t for name, t in ours.items() if name.startswith("language.")})
    vocabulary = min(decoder.vocabulary, theirs.config.vocab_size)
    tokens = _tokens(vocabulary, generator)
    ranges = torch.zeros(2, ROWS, TOKENS, dtype=torch.int32)
    logits = mine.logits(
        tokens, ranges, mine.encode_images(_pixels(SMALLEST_ENCODER.image_pixels, generator))
    )
    return [(logits[..., :vocabulary], theirs(input_ids=tokens).logits[..., :vocabulary])]


def _tower(folder: Folder, ours: Tensors, sizes: Sizes, generator: torch.Generator) -> Pairs:
    from transformers import AutoModel

    whole: Any = AutoModel.from_pretrained(str(folder.local_path), dtype=torch.float32).eval()
    theirs = getattr(whole, "vision_model", whole)
    encoder = EncoderSizes(**sizes["encoder"])
    mine = VisionTransformer(
        encoder, dtype=torch.float32, recompute="none", parallel=UNDIVIDED
    ).eval()
    _fill(mine, {name.removeprefix("encoder."): tensor for name, tensor in ours.items()})
    config: dict[str, Any] = whole.config.to_dict()
    their_side = config.get("vision_config", config).get("image_size", encoder.image_pixels)
    pixels = _pixels(their_side, generator)
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in towers.pixel_statistics(config, preprocessor(folder))
    )
    states = theirs(pixel_values=(pixels / 255 - mean) / std).last_hidden_state
    if config["model_type"].startswith("clip"):  # it norms the class token only
        states = theirs.post_layernorm(states)
    side = encoder.image_pixels  # what patches leave over is unseen
    return [(mine(pixels[..., :side, :side]).transpose(0, 1), states)]


def _fill(model: nn.Module, tensors: Tensors) -> None:
    """Parts without weights are zero: the gates of new layers, too, which are then closed."""
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[name].read()) if name in tensors else parameter.zero_()


def _tokens(vocabulary: int, generator: torch.Generator) -> Tensor:
    return torch.randint(vocabulary, (ROWS, TOKENS), generator=generator)


def _pixels(side: int, generator: torch.Generator) -> Tensor:
    return torch.randint(256, (ROWS, 3, side, side), generator=generator, dtype=torch.uint8)
