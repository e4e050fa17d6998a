"""AdamW's parameter groups."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megavlm.config.objectives import Part
from megavlm.config.run import RunSettings
from megavlm.model.params import ENCODER, Parameter

_ENCODER_LAYER = re.compile(r"encoder\.block\.layers\.(\d+)\.")


class Group(NamedTuple):
    """What the parameters of one group of the optimiser have in common."""

    part: Part
    """Parts differ in the steps that the optimiser has taken of them, too."""
    scale: float
    """Factor on the learning rate."""
    decays: bool
    """Whether weight decay applies."""


def group_of(entry: Parameter, run: RunSettings) -> Group:
    """The group of one parameter.

    Matrices decay; norms, biases, gates, position embeddings and mask tokens do not.
    """
    decays = len(entry.shape) >= 2 and not entry.name.endswith("positions")
    scale = run.optimizer.scales.get(entry.setting, 1.0)
    if entry.part == ENCODER:
        layers = run.model.encoder.layers
        layer = _ENCODER_LAYER.match(entry.name)
        if layer:
            scale *= run.optimizer.encoder_layer_decay ** (layers - int(layer[1]))
        elif not entry.name.startswith("encoder.block.final_layernorm."):
            scale *= run.optimizer.encoder_layer_decay ** (layers + 1)
    return Group(entry.setting, scale, decays)


def adamw(
    named_parameters: Iterable[tuple[str, Tensor]],
    ledger: Mapping[str, Parameter],
    run: RunSettings,
    implementation: type[torch.optim.Optimizer] = torch.optim.AdamW,
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) of all that is trained; see `set_learning_rate`."""
    settings = run.optimizer
    parameters_by_group: dict[Group, list[Tensor]] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            group = group_of(ledger[name], run)
            parameters_by_group.setdefault(group, []).append(parameter)
    make: Any = implementation
    # Fused: one pass, and no temporaries, which for the largest tensor take more than activations.
    how = {"fused": True} if implementation is torch.optim.AdamW else {}
    return make(
        [
            {
                "params": parameters,
                "weight_decay": settings.weight_decay if group.decays else 0.0,
                "part": group.part,
                "scale": group.scale,
            }
            for group, parameters in parameters_by_group.items()
        ],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        **how,
    )


def set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    """Set the learning rate of the next step, which each group scales."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["scale"]
