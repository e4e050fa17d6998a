"""Initial weights: a pure function of the seed and each parameter's name.

So they are the same on every engine and number of ranks, and each rank makes only what it holds.
Only CPUs and GPUs draw different numbers.
"""

import hashlib
from typing import Any, cast

import torch
from torch import Tensor, nn

from megavlm.model.params import Parameter


def initial_values(parameter: Parameter, seed: int, device: torch.device) -> Tensor:
    """The whole parameter at the start of training, fp32."""
    if parameter.initial_std == 0:
        return torch.full(parameter.shape, parameter.initial_mean, device=device)
    digest = hashlib.blake2b(f"{seed}:{parameter.name}".encode(), digest_size=8).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
    values = torch.empty(parameter.shape, device=device)
    return values.normal_(parameter.initial_mean, parameter.initial_std, generator=generator)


@torch.no_grad()
def materialise(model: Any, seed: int, device: torch.device) -> None:
    """Give a model that was built on the meta device its initial weights, on a device."""
    ledger = model.ledger()
    for prefix, module in model.named_modules():
        for key, old in list(module.named_parameters(recurse=False)):
            name = f"{prefix}.{key}" if prefix else key
            values = model.shard(ledger[name], initial_values(ledger[name], seed, device))
            new = nn.Parameter(values.to(old.dtype), requires_grad=old.requires_grad)
            # Tensor- and sequence-parallel marks; a fake tensor keeps its own.
            cast(Any, new.__dict__).update({**vars(old), **vars(new)})
            setattr(module, key, new)
