"""Random weights for comparing models."""

import torch
from torch import nn


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 7) -> None:
    """Weights far larger than at initialisation, so that every part matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            parameter.copy_(1.5 * noise / parameter[0].numel() ** 0.5)
        elif name.endswith("weight"):  # a norm's
            parameter.copy_(1 + 0.2 * noise)
        else:
            parameter.copy_(0.5 * noise + 0.3)
