import json

import pytest
import torch
from torch.distributed.checkpoint.state_dict_loader import load

from megavlm.checkpoint.load import load_checkpoint, load_present
from megavlm.checkpoint.shards import whole
from megavlm.checkpoint.storage import CheckpointReader, folder_name
from megavlm.errors import CheckpointError
from megavlm.files.folder import Folder
from tests.checkpoint.written import SHAPES, assert_loads, held, save, values
from tests.ranks import run_on_ranks


def test_another_type_is_converted(tmp_path):
    save(tmp_path, 1)
    assert_loads(Folder(tmp_path / "step-00000001"), 1, 2, torch.bfloat16)


def test_any_program_on_torch_distributed_checkpoint_reads_it(tmp_path):
    save(tmp_path, 5, ranks=3)
    reader = CheckpointReader(Folder(tmp_path / "step-00000005"))
    tensors = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    load(tensors, storage_reader=reader, no_dist=True)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, values(name, 5))


def fails_to_load(folder, match, state=None):
    def on_rank(rank):
        with pytest.raises(CheckpointError, match=match):
            load_checkpoint(folder, held(rank, 2) if state is None else state)

    run_on_ranks(2, on_rank)


def test_damage_is_told_on_all_ranks(tmp_path):
    save(tmp_path, 2)
    folder = tmp_path / "step-00000002"
    checkpoint = Folder(folder)
    file = sorted(folder.glob("*.safetensors"))[1]
    good = file.read_bytes()
    for place in (0, 9, len(good) // 2, len(good) - 1):
        file.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        fails_to_load(checkpoint, rf"{file.name} is (corrupt|no safetensors file)")
    file.write_bytes(good[:-1])
    fails_to_load(checkpoint, f"{file.name} has {len(good) - 1} bytes instead of {len(good)}")
    file.unlink()
    fails_to_load(checkpoint, f"{file.name} is missing")
    file.write_bytes(good)
    assert_loads(checkpoint, 2, 2)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "format": 99}))
    fails_to_load(checkpoint, "has format 99; this version reads 4")
    (folder / "state.json").write_text("{")
    fails_to_load(checkpoint, "cannot read checkpoint")


def test_another_model_is_told(tmp_path):
    save(tmp_path, 2)
    checkpoint = Folder(tmp_path / "step-00000002")
    fails_to_load(checkpoint, "no tensor weights/9", {"weights/9": whole(torch.zeros(1))})
    fails_to_load(checkpoint, r"shape \[3, 5\]", {"weights/0": whole(torch.zeros(3, 6))})


def test_missing_moments_are_told_whatever_else_is_missing(tmp_path):
    save(tmp_path, 2)
    lacked = {f"{kind}/1": whole(torch.zeros(4, 5)) for kind in ("ema", "exp_avg", "weights")}
    told = r"holds no states of the optimiser \(exp_avg/1, say\)"
    fails_to_load(Folder(tmp_path / "step-00000002"), told, lacked)


def test_what_a_checkpoint_has_can_be_loaded_alone(tmp_path):
    save(tmp_path, 2)

    def on_rank(rank):
        state = held(rank, 2, fill=7) | {"weights/new": whole(torch.full((2,), 7.0))}
        load_present(Folder(tmp_path / "step-00000002"), state)
        expected = held(rank, 2, 2)
        for name, shards in state.items():
            for origin, box in shards.boxes.items():
                kept = name == "weights/new"
                assert torch.equal(
                    box, torch.full_like(box, 7) if kept else expected[name].boxes[origin]
                )

    run_on_ranks(2, on_rank)


def test_ranks_that_see_different_checkpoints_are_told(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)

    def on_rank(rank):
        with pytest.raises(CheckpointError, match="ranks see different checkpoints"):
            load_checkpoint(Folder(tmp_path) / folder_name(1 + rank), held(rank, 2))

    run_on_ranks(2, on_rank)


def test_an_error_of_one_rank_is_told_on_all(tmp_path):
    save(tmp_path, 1)

    def on_rank(rank):
        if rank == 1:  # its disk
            CheckpointReader._header = lambda *_: (_ for _ in ()).throw(OSError(5, "bad disk"))
        with pytest.raises(CheckpointError, match="bad disk"):
            load_checkpoint(Folder(tmp_path) / folder_name(1), held(rank, 2))

    run_on_ranks(2, on_rank)
