"""What the stages of a run learn from, and which parts of the model they need."""

import math
from collections.abc import Iterable, Mapping
from typing import Literal

from pydantic.dataclasses import dataclass

from megavlm.config.sizes import STRICT
from megavlm.errors import ConfigError

ObjectiveName = Literal["mim", "contrastive", "captioning", "instruction"]
Part = Literal["encoder", "projector", "decoder", "cross_attention", "text_tower", "heads"]

PRETRAINING: tuple[ObjectiveName, ...] = ("mim", "contrastive")
"""Objectives that train the image encoder, with heads and a text tower that serve nothing else."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MimSettings:
    """Masked image modelling: hidden patches are predicted, in pixels (SimMIM, Xie et al. 2022)."""

    masked_fraction: float = 0.6
    """Share of a picture that is hidden."""
    block_patches: int = 2
    """Side of the square blocks of patches that are hidden together; 32 pixels serve well."""

    def __post_init__(self) -> None:
        if not 0 < self.masked_fraction < 1:
            raise ConfigError(
                f"mim.masked_fraction={self.masked_fraction} must lie between 0 and 1"
            )
        if self.block_patches < 1:
            raise ConfigError(f"mim.block_patches={self.block_patches} must be at least 1")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ContrastiveSettings:
    """Each picture is told from all other texts of the step, and each text from all pictures."""

    loss: Literal["infonce", "sigmoid"] = "infonce"
    """infonce: softmax over the step, as in CLIP. sigmoid: every pair by itself, as in SigLIP."""


def check_objectives(objectives: Mapping[ObjectiveName, float]) -> None:
    """Raise ConfigError unless these can be learned together in one step."""
    if not objectives:
        raise ConfigError(
            "objectives is empty; name captioning, instruction, or mim and contrastive"
        )
    for name, weight in objectives.items():
        if not 0 < weight < math.inf:
            raise ConfigError(f"objectives.{name}={weight} must be a weight above 0")
    if len(objectives) > 1 and not set(objectives) <= set(PRETRAINING):
        raise ConfigError(
            f"objectives {', '.join(objectives)} cannot share a step: only mim and contrastive "
            "can; give each its own stage, or mix captions and chats as sources in data.train"
        )


def is_pretraining(objectives: Iterable[ObjectiveName]) -> bool:
    """Whether these train the encoder with heads of its own, and no language model."""
    return set(objectives) <= set(PRETRAINING)


def parts_of(objectives: Iterable[ObjectiveName]) -> tuple[Part, ...]:
    """The parts of the model that a stage with these objectives has."""
    if not is_pretraining(objectives):
        return ("encoder", "projector", "decoder", "cross_attention")
    return (
        ("encoder", "text_tower", "heads") if "contrastive" in objectives else ("encoder", "heads")
    )
