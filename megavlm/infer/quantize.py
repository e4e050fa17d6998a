"""Weights of fewer bits: int8 and int4 weight-only quantisation of the decoder, by torchao.

What is quantised are the linear layers of the decoder: attention, cross-attention, feed-forward.
Embedding, head, norms, encoder and projector stay: they are a small part of a large model, and the
head's errors would go straight into the choice of tokens.
"""

import importlib.util
import logging
from typing import TYPE_CHECKING, Any, Literal, get_args

from megavlm.config.sizes import ModelSizes
from megavlm.errors import ConfigError

if TYPE_CHECKING:
    from megavlm.model.vlm import VisionLanguageModel

Quantization = Literal["int8", "int4"]
"""int8: a scale for each output. int4: a scale and a zero for each GROUP of an output's weights."""
KINDS: tuple[Quantization, ...] = get_args(Quantization)
GROUP = 32
"""Weights that share an int4 scale; docs/quantization.md has what larger ones cost."""
OUTPUTS = 16
"""Whose weights torch packs together in int4; their number must be a multiple."""
LAYERS = "language.decoder.layers."


def check_quantization(kind: str, sizes: ModelSizes, ranks: int = 1) -> None:
    """Raise ConfigError for what cannot be quantised here. ranks: that share each layer."""
    if kind not in KINDS:
        raise ConfigError(f"quantization={kind} is unknown; it is {' or '.join(KINDS)}")
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(
            f"quantization={kind} needs torchao; run `pip install 'megavlm[quantization]'`"
        )
    if kind == "int4":
        _check_int4(sizes, ranks)


def _check_int4(sizes: ModelSizes, ranks: int) -> None:
    import torch

    from megavlm.model.params import parameters

    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        name = torch.cuda.get_device_name()
        raise ConfigError(f"int4 kernels need compute capability 8.0, beyond {name}; use int8")
    for entry in parameters(sizes):
        if not is_quantized(entry.name, len(entry.shape)):
            continue
        shape = [*entry.shape]
        if entry.tensor_axis is not None:
            shape[entry.tensor_axis] //= ranks
        outputs, inputs = shape
        if outputs % OUTPUTS or inputs % GROUP:
            shared = ranks > 1
            where = f" on each of {ranks} ranks" if shared else ""
            raise ConfigError(
                f"int4 takes {OUTPUTS} outputs and groups of {GROUP} inputs, which must divide a "
                f"layer's width; {entry.name} has {outputs:,} and {inputs:,}{where}; use int8"
                f"{' or fewer ranks' if shared else ''}"
            )


def is_quantized(name: str, axes: int) -> bool:
    """Whether a parameter of the model, of so many axes, is quantised."""
    return name.startswith(LAYERS) and axes == 2


def quantize(model: "VisionLanguageModel", kind: Quantization) -> None:
    """Quantise a model, or this tensor-parallel rank's part of one, in place, for generation.

    One layer after the other, so that memory never exceeds the model's by more than a layer. It is
    then for `Engine`: megatron-core's layers cannot compute with such weights. int4 wants a bf16
    model, as its kernels compute in it: there is none for fp32 on a GPU, and on a CPU it takes
    tens of times as long.
    """
    from megavlm.infer.linear import linear

    quantize_, config = _torchao(kind, next(model.parameters()).is_cuda)
    # Names, as a list of the weights would keep them all alive.
    names = [name for name, p in model.named_parameters() if is_quantized(name, p.ndim)]
    for name in names:
        layer: Any = model.get_submodule(name.removesuffix(".weight"))
        quantized = linear(layer)
        quantize_(quantized, config)
        layer.weight = quantized.weight


def _torchao(kind: Quantization, is_cuda: bool) -> tuple[Any, Any]:
    """What quantises a layer, and its settings for this device."""
    logging.disable(logging.WARNING)  # it names kernels for other machines, which cannot load
    try:
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
        from torchao.quantization import (
            Int4WeightOnlyConfig,
            Int8WeightOnlyConfig,
            quantize_,
        )
    finally:
        logging.disable(logging.NOTSET)
    # Else it sets what torch.compile does in the whole process.
    common: dict[str, Any] = {"set_inductor_config": False}
    if kind == "int8":
        return quantize_, Int8WeightOnlyConfig(**common)
    if is_cuda:  # the layout that needs no further package
        tiles: Any = "tile_packed_to_4d"
        return quantize_, Int4WeightOnlyConfig(
            group_size=GROUP, int4_packing_format=tiles, **common
        )
    return quantize_, PrototypeInt4WeightOnlyConfig(group_size=GROUP, **common)
