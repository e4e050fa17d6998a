"""Lets megatron-core and DeepSpeed run on CPU over gloo; does nothing where CUDA is available.

megatron-core 0.16 hard-codes `torch.cuda.current_device()`, `device="cuda"` and the type string
"torch.cuda.FloatTensor". This file is the only place that makes up for it, in `install`:
  1. `torch.cuda` functions that can only raise on a CPU build get CPU meanings;
  2. loaded megatron modules see a stand-in for `torch` whose factories map "cuda" to "cpu" (a
     TorchFunctionMode would not do: autograd switches it off while it recomputes);
  3. the CUDA random state becomes the CPU generator's, in both directions;
  4. `Tensor.cuda()` returns the tensor, and `Tensor.type()` names the CUDA type.
"""

import functools
import importlib
import logging
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

_FACTORIES = ("zeros", "ones", "empty", "tensor", "empty_like")
# These bind `torch` on first use, after `install` would have looked for it.
_LAZY_MODULES = (
    "pipeline_parallel.schedules",
    "optimizer.clip_grads",
    "transformer.utils",
    "models.common.embeddings.rope_utils",
    "dist_checkpointing.exchange_utils",
    "dist_checkpointing.strategies.state_dict_saver",
)


class _TorchOnCpu(types.ModuleType):
    """`torch` with factories that never allocate on a GPU."""

    def __init__(self) -> None:
        super().__init__("torch")
        for name in _FACTORIES:
            setattr(self, name, _on_cpu(name))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def install() -> None:
    """Adapt megatron-core to this process; call it after importing the megatron modules used."""
    if torch.cuda.is_available():
        return
    for name in _LAZY_MODULES:
        importlib.import_module(f"megatron.core.{name}")
    stand_in = _TorchOnCpu()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            setattr(module, "torch", stand_in)
    if torch.Tensor.type is not _cuda_type:
        _replace_cuda_functions()


def use_gloo_for_deepspeed() -> None:
    """Keep DeepSpeed from its own shared-memory collectives on CPUs.

    They compile for half a minute, and spin while they wait, which starves ranks that share cores;
    measured on two ranks, gloo is as fast (48.8 against 46.9 samples/s). With the table of compiled
    operators empty, DeepSpeed does not probe for them with the compiler either.
    """
    if torch.cuda.is_available():
        return
    from deepspeed import ops

    setattr(ops, "__compatible_ops__", {})  # noqa: B010 (the module makes the attribute on demand)


def _replace_cuda_functions() -> None:
    from megatron.core.tensor_parallel import random

    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.synchronize = lambda device=None: None
    cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    cuda.manual_seed = torch.manual_seed
    rng: Any = random
    rng._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: (
        torch.get_rng_state()
    )
    rng._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    logging.getLogger(random.__name__).addFilter(
        lambda record: "CPU RNG state changed within GPU" not in record.getMessage()
    )
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *args, **kwargs: self
    tensor.type = _cuda_type


_tensor_type = torch.Tensor.type


@functools.wraps(_tensor_type)
def _cuda_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    answer = _tensor_type(self, *args, **kwargs)
    is_cpu_name = isinstance(answer, str) and not answer.startswith("torch.cuda")
    return answer.replace("torch.", "torch.cuda.", 1) if is_cpu_name else answer


def _on_cpu(factory: str) -> Callable[..., torch.Tensor]:
    """A factory of torch's, whatever stands under its name when it is called."""

    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return getattr(torch, factory)(*args, **kwargs)

    return make
