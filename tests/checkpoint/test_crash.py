"""Savers that are killed at random moments: the newest whole checkpoint always loads."""

import os
import random
import signal
import time

import pytest
import torch

from megavlm.checkpoint.listing import latest_checkpoint
from megavlm.checkpoint.load import load_checkpoint
from megavlm.checkpoint.save import CheckpointSaver
from megavlm.checkpoint.shards import shards_of_range
from megavlm.checkpoint.storage import read_state
from megavlm.config.run import CheckpointSettings
from megavlm.files.folder import Folder
from megavlm.model.params import Parameter
from tests.ranks import alone, run_on_ranks

ENTRIES = [Parameter(f"weights/{n}", (40, 50 + n)) for n in range(40)]


def held(rank, step):
    """Half of each tensor, filled with the step."""
    return {
        entry.name: shards_of_range(
            entry, torch.full((entry.numel // 2,), float(step)), rank * entry.numel // 2
        )
        for entry in ENTRIES
    }


def save_for_ever(root, asynchronous):
    """Two ranks that do nothing but save, from the newest checkpoint on."""

    def on_rank(rank):
        saver = CheckpointSaver(root, CheckpointSettings(every=1, asynchronous=asynchronous))
        latest = latest_checkpoint(root)
        step = read_state(latest)["step"] if latest else 0
        while True:
            step += 1
            saver.save(step, held(rank, step), {})

    run_on_ranks(2, on_rank)


def kill_at_a_random_moment(root, asynchronous, delay_seconds):
    """After the first save has begun, as a power cut would: all ranks at once."""
    before = set(root.names())
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        try:
            save_for_ever(root, asynchronous)
        finally:
            os._exit(1)
    deadline = time.monotonic() + 60
    while set(root.names()) == before and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(delay_seconds)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.timeout(600)
def test_the_newest_whole_checkpoint_always_loads(tmp_path, kills):
    root = Folder(tmp_path)
    chance = random.Random(kills)
    steps, unfinished = [0], 0
    for number in range(kills):
        kill_at_a_random_moment(root, number % 2 == 0, chance.uniform(0, 0.2))
        latest = latest_checkpoint(root)
        if latest is None:
            continue
        unfinished += root.names()[-1] != latest.place.rpartition("/")[2]
        step = read_state(latest)["step"]
        assert step >= steps[-1]
        steps.append(step)
        with alone():
            state = {e.name: shards_of_range(e, torch.full((e.numel,), -1.0), 0) for e in ENTRIES}
            load_checkpoint(latest, state)
        for shards in state.values():
            for box in shards.boxes.values():
                assert (box == step).all()
    assert steps[-1] > 2  # saves were finished
    assert unfinished or kills < 50  # and others were cut short
