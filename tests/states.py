"""Whole tensors of an engine's state, gathered for comparison."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megavlm.checkpoint.save import CheckpointSaver
from megavlm.checkpoint.shards import State
from megavlm.checkpoint.storage import folder_name
from megavlm.config.run import CheckpointSettings
from megavlm.engine.base import Engine
from megavlm.files.folder import Folder


def whole_tensors(engine: Engine) -> dict[str, Tensor]:
    """All tensors of an engine, whole, on every rank; collective."""
    return gathered(engine.state())


def gathered(held: State) -> dict[str, Tensor]:
    """Whole tensors, on every rank; collective. What no rank holds of them is NaN."""
    mine = {
        name: (shards.shape, {origin: box.clone() for origin, box in shards.boxes.items()})
        for name, shards in held.items()
    }
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, mine)
    tensors: dict[str, Tensor] = {}
    for state in states:
        for name, (shape, boxes) in state.items():
            whole = tensors.setdefault(name, torch.full(shape, float("nan")))
            for origin, box in boxes.items():
                whole[tuple(slice(o, o + s) for o, s in zip(origin, box.shape, strict=True))] = box
    return tensors


def fill_from(read: Callable[[str], Tensor]) -> Callable[[State], None]:
    """What `Engine.load_state` takes, from whole tensors by name."""

    def fill(state: State) -> None:
        for name, shards in state.items():
            whole = read(name)
            for origin, box in shards.boxes.items():
                places = zip(origin, box.shape, strict=True)
                box.copy_(whole[tuple(slice(o, o + s) for o, s in places)])

    return fill


def save_checkpoint(
    root: Folder, step: int, shards: State, state: dict[str, Any], settings: CheckpointSettings
) -> Folder:
    """Write one checkpoint and return its folder; collective."""
    with CheckpointSaver(root, settings) as saver:
        saver.save(step, shards, state)
    return root / folder_name(step)
