"""Tensors that are read when they are needed, so that a model never has to fit into memory."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor


@dataclass(frozen=True)
class LazyTensor:
    """A tensor's shape and type, and a way to read it; nothing is kept after a read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    """The whole tensor on the CPU."""


Tensors = Mapping[str, LazyTensor]
"""A model, or its optimiser's states, by name. Conversions are functions from one to another."""


def in_memory(tensors: Mapping[str, Tensor]) -> dict[str, LazyTensor]:
    """Tensors that are there already."""
    return {name: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors.items()}


def read_by(read: Callable[[str], Tensor], tensors: Tensors) -> dict[str, LazyTensor]:
    """Tensors of the same names, shapes and types, which another function reads by name."""
    return {name: LazyTensor(t.shape, t.dtype, partial(read, name)) for name, t in tensors.items()}
