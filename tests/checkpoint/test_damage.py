"""A run whose newest checkpoints are damaged goes on from the one before them, or not at all."""

from functools import partial

import pytest
import torch

from megavlm.checkpoint.damage import leave_damaged
from megavlm.checkpoint.listing import whole_checkpoints
from megavlm.checkpoint.save import CheckpointSaver
from megavlm.checkpoint.shards import Shards
from megavlm.config.run import CheckpointSettings
from megavlm.errors import CheckpointError
from megavlm.files.folder import Folder
from tests.ranks import run_on_ranks

SETTINGS = CheckpointSettings(every=1, keep_last=4, asynchronous=False)


def save_three(root, rank):
    with CheckpointSaver(root, SETTINGS) as saver:
        for step in (1, 2, 3):
            box = torch.full((2, 3), float(step))
            saver.save(step, {"weights/a": Shards((4, 3), {(2 * rank, 0): box})}, {"stage": "x"})


def steps(root):
    return [int(str(folder)[-8:]) for folder in whole_checkpoints(root)]


def damage(root, step, number):
    path = root.local_path / f"step-{step:08d}" / f"tensors-0000{number}-of-00002.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] if step == 3 else content[:-1] + bytes([content[-1] ^ 1]))


def on_rank(root, rank):
    save_three(root, rank)
    assert leave_damaged(root) == [] and steps(root) == [3, 2, 1]
    if rank == 0:
        damage(root, 3, 1)
        damage(root, 2, 2)
    told = leave_damaged(root)
    assert steps(root) == [1]
    if rank == 1:
        damage(root, 1, 1)
    with pytest.raises(CheckpointError, match=r"is as it was written: .*step-0000000"):
        leave_damaged(root)
    assert steps(root) == [1]
    return told


def test_the_newest_that_is_whole(tmp_path):
    first, second = run_on_ranks(2, partial(on_rank, Folder(tmp_path)))
    assert first == second and len(first) == 2
    assert "step-00000003/tensors-00001-of-00002.safetensors has" in first[0]
    assert "step-00000002/tensors-00002-of-00002.safetensors is corrupt" in first[1]
    assert all("delete" not in line for line in first), "it is done"
