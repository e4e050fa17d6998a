"""Linear layers of generation: torch's own, on the weights of tensor-parallel ones."""

from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, distributed, nn


def linear(parallel: Any) -> nn.Linear:
    """This rank's part of a linear layer: whole, or cut along its outputs.

    Of one that is cut along its inputs, `reduced` adds the parts up; it must have no bias.
    """
    out_width, width = parallel.weight.shape
    layer = nn.Linear(width, out_width, bias=parallel.bias is not None, device="meta")
    layer.weight, layer.bias = parallel.weight, parallel.bias
    return layer


class RowLinear(nn.Module):
    """A linear layer that is cut along its inputs."""

    def __init__(self, parallel: Any) -> None:
        super().__init__()
        out_width, width = parallel.weight.shape
        self.part = nn.Linear(width, out_width, bias=False, device="meta")
        self.part.weight = parallel.weight
        self.bias = parallel.bias

    def forward(self, x: Tensor) -> Tensor:
        out = self.part(x)
        if parallel_state.get_tensor_model_parallel_world_size() > 1:
            distributed.all_reduce(out, group=parallel_state.get_tensor_model_parallel_group())
        return out if self.bias is None else out + self.bias


def gathered(part: Tensor) -> Tensor:
    """The whole last axis, of tensor-parallel ranks' parts."""
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    if ranks == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(ranks)]
    distributed.all_gather(parts, part, group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(parts, -1)
