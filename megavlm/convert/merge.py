"""Means of several checkpoints of one model."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from megavlm.checkpoint.lazy import LazyTensor, Tensors, read_by
from megavlm.checkpoint.state import comparable
from megavlm.config.sizes import DecoderSizes, EncoderSizes, TextTowerSizes
from megavlm.convert.files import about
from megavlm.convert.names import Sizes
from megavlm.convert.sources import Model, Source, kinds_of
from megavlm.errors import CheckpointError
from megavlm.files.folder import Folder


def merged(models: Sequence[Model], sources: Sequence[Source], ema_decay: float | None) -> Model:
    """Their mean; with a decay, an exponential average from the oldest, first, to the newest.

    Raises CheckpointError unless they are checkpoints of one model that hold the same tensors.
    """
    _check_mergeable(models, sources, ema_decay)
    decay = 1.0 if ema_decay is None else ema_decay
    shares = [decay ** (len(models) - 1 - i) for i in range(len(models))]
    shares = [share / sum(shares) for share in shares]
    dropped = [name for one in models for name in (*one.dropped, *kinds_of(one.moments))]
    return replace(
        models[-1],
        weights=_mixed([one.weights for one in models], shares),
        moments={},
        dropped=tuple(dict.fromkeys(dropped)),
    )


def _check_mergeable(
    models: Sequence[Model], sources: Sequence[Source], ema_decay: float | None
) -> None:
    """Raise CheckpointError unless a mean of the models says something."""
    for source, model in zip(sources[1:], models[1:], strict=True):
        with about(source.folder):
            one, other = _comparable(models[0].sizes), _comparable(model.sizes)
        for name in sorted(one.keys() | other.keys()):
            if one.get(name) != other.get(name):
                raise CheckpointError(
                    f"{source} has {name}={other.get(name)}, {sources[0]} {one.get(name)}; only "
                    "checkpoints of one model can be merged"
                )
    _require_alike(
        [(source.folder, model.weights) for source, model in zip(sources, models, strict=True)]
    )
    if ema_decay is None:
        return
    for (before, earlier), (after, later) in pairwise(zip(sources, models, strict=True)):
        step, next_step = earlier.state["step"], later.state["step"]
        # Hugging Face's say no step.
        if next_step < step or next_step == step > 0:
            raise CheckpointError(
                f"{after} of step {next_step} comes after {before} of step {step}; for "
                f"--ema-decay={ema_decay} name the oldest first"
            )


def _comparable(sizes: Sizes) -> dict[str, Any]:
    """By setting."""
    values: dict[str, Any] = {}
    kinds = {"encoder": EncoderSizes, "decoder": DecoderSizes, "text_tower": TextTowerSizes}
    for part, plain in sizes.items():
        if plain is None:  # a text tower that the model has not
            continue
        of_part = kinds[part](**plain)
        values |= {f"model.{part}.{name}": value for name, value in comparable(of_part).items()}
    return values


def _require_alike(models: Sequence[tuple[Folder, Tensors]]) -> None:
    """Raise CheckpointError unless models have the same tensors, in the same shapes and types."""
    (first, wanted), *others = models
    for folder, tensors in others:
        for name in sorted(wanted.keys() | tensors.keys()):
            if name not in wanted or name not in tensors:
                has, lacks = (first, folder) if name in wanted else (folder, first)
                raise CheckpointError(
                    f"{has} has {name} and {lacks} has not; merge checkpoints that hold the same"
                )
            one, other = (f"{list(t.shape)} {t.dtype}" for t in (wanted[name], tensors[name]))
            if one != other:
                raise CheckpointError(
                    f"{name} is {one} in {first}, but {other} in {folder}; merge checkpoints of "
                    "one model, and convert one with --dtype first if only types differ"
                )


def _mixed(sources: Sequence[Tensors], shares: Sequence[float]) -> dict[str, LazyTensor]:
    """The mean of the same tensors of several models, by their shares; sums are in fp64."""

    def read(name: str) -> Tensor:
        total = torch.zeros(sources[0][name].shape, dtype=torch.float64)
        for source, share in zip(sources, shares, strict=True):
            total.add_(source[name].read(), alpha=share)
        return total.to(sources[0][name].dtype)

    return read_by(read, sources[0])
