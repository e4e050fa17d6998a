import json

import pytest
import torch

from megavlm.checkpoint.store import latest_checkpoint, read_state, save_checkpoint, tensor_reader
from megavlm.errors import CheckpointError
from tests.ranks import run_on_ranks

TENSORS = [(f"weights/{n}", torch.full((3, n + 1), float(n))) for n in range(7)]


def save(root, step, ranks=2, keep=2):
    def on_rank(_):
        save_checkpoint(root, step, TENSORS, {"note": "plain data"}, keep)

    run_on_ranks(ranks, on_rank)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_tensors_come_back_whatever_the_ranks(tmp_path, ranks):
    save(tmp_path, 5, ranks)
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint == tmp_path / "step-00000005"
    read = tensor_reader(checkpoint)
    for key, tensor in TENSORS:
        assert torch.equal(read(key), tensor)
    state = read_state(checkpoint)
    assert (state["step"], state["note"]) == (5, "plain data")
    assert len(list(checkpoint.glob("*.safetensors"))) == ranks
    with pytest.raises(CheckpointError, match="holds no tensor weights/none; it is of another"):
        read("weights/none")


def test_only_the_newest_are_kept(tmp_path):
    for step in (2, 4, 10):
        save(tmp_path, step, ranks=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000004", "step-00000010"]


def test_an_unfinished_checkpoint_is_not_seen(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    save(tmp_path, 2, ranks=1)
    (tmp_path / "step-00000002").rename(tmp_path / "step-00000004.partial")
    assert latest_checkpoint(tmp_path) is None
    save(tmp_path, 4, ranks=1)  # the leftover is swept away
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000004"]


def test_damage_is_told(tmp_path):
    save(tmp_path, 2)
    checkpoint = tmp_path / "step-00000002"
    file = next(checkpoint.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{file.name} is corrupt"):
        tensor_reader(checkpoint)
    file.unlink()
    with pytest.raises(CheckpointError, match=f"{file.name} is missing"):
        tensor_reader(checkpoint)
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps({**state, "format": 99}))
    with pytest.raises(CheckpointError, match="has format 99; this version reads 1"):
        read_state(checkpoint)
    (checkpoint / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot read checkpoint"):
        read_state(checkpoint)
