"""Small checkpoints that ranks have written, and what they hold."""

import torch

from megavlm.checkpoint.load import load_checkpoint
from megavlm.checkpoint.shards import shards_of_range
from megavlm.config.run import CheckpointSettings
from megavlm.files.folder import Folder
from megavlm.model.params import Parameter
from tests.ranks import run_on_ranks
from tests.states import save_checkpoint

SHAPES = {f"weights/{n}": (3 + n, 5) for n in range(5)} | {"weights/scale": (), "exp_avg/0": (3, 5)}
SYNCHRONOUS = CheckpointSettings(every=1, asynchronous=False)


def values(name, step=0):
    generator = torch.Generator().manual_seed(1000 * step + len(name) + sum(map(ord, name)))
    return torch.randn(SHAPES[name], generator=generator)


def held(rank, ranks, step=0, dtype=torch.float32, fill=None):
    """Each tensor's flattened elements, shared out evenly, as ZeRO-3 does."""
    state = {}
    for name, shape in SHAPES.items():
        flat = values(name, step).flatten().to(dtype)
        size = -(-flat.numel() // ranks)
        part = flat[rank * size : (rank + 1) * size].clone()
        if fill is not None:
            part.fill_(fill)
        state[name] = shards_of_range(Parameter(name, shape), part, rank * size)
    return state


def save(root, step, ranks=2, settings=SYNCHRONOUS):
    def on_rank(rank):
        state = {"note": "plain data"}
        save_checkpoint(Folder(root), step, held(rank, ranks, step), state, settings)

    run_on_ranks(ranks, on_rank)


def assert_loads(place, step, ranks, dtype=torch.float32):
    def on_rank(rank):
        state = held(rank, ranks, dtype=dtype, fill=7)
        load_checkpoint(Folder(str(place)), state)
        expected = held(rank, ranks, step, dtype)
        for name, shards in state.items():
            for origin, box in shards.boxes.items():
                assert torch.equal(box, expected[name].boxes[origin]), (name, origin)

    run_on_ranks(ranks, on_rank)
