"""AdamW's parameter groups, and the learning rate as a function of the step."""

import math
from typing import Any

import torch

from megavlm.config.run import OptimizerSettings
from megavlm.model.vlm import VisionLanguageModel


def adamw(
    model: VisionLanguageModel,
    settings: OptimizerSettings,
    implementation: type[torch.optim.Optimizer] = torch.optim.AdamW,
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019); the learning rate is set before every step."""
    make: Any = implementation
    return make(
        parameter_groups(model, settings.weight_decay),
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
    )


def decays(name: str, axes: int) -> bool:
    """Matrices decay; norms, biases, gates and position embeddings do not."""
    return axes >= 2 and not name.endswith("positions")


def parameter_groups(model: VisionLanguageModel, weight_decay: float) -> list[dict[str, Any]]:
    """Trained parameters, those that decay and those that do not."""
    # ZeRO-3 flattens parameters; the ledger knows their shapes.
    ledger = model.ledger()
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decayed if decays(name, len(ledger[name].shape)) else kept).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def learning_rate_at(step: int, steps: int, settings: OptimizerSettings) -> float:
    """Learning rate of step 0 <= step < steps: linear warm-up, then cosine decay to the minimum.

    The peak is reached at the end of the warm-up, the minimum at the last step.
    """
    warmup_steps = math.ceil(steps * settings.warmup_fraction)
    if step < warmup_steps:
        return settings.learning_rate * (step + 1) / warmup_steps
    progress = (step + 1 - warmup_steps) / max(1, steps - warmup_steps)
    span = settings.learning_rate - settings.minimum_learning_rate
    return settings.minimum_learning_rate + span * (1 + math.cos(math.pi * progress)) / 2
