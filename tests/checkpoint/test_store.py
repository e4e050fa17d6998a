import json
import resource
import signal
import time
from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_loader import load

from megavlm.checkpoint.listing import claim, latest_checkpoint
from megavlm.checkpoint.shards import Shards, shards_of_range, whole
from megavlm.checkpoint.storage import CheckpointReader, folder_name, read_state
from megavlm.checkpoint.store import CheckpointSaver, lazy_tensors, load_checkpoint, load_present
from megavlm.config.run import CheckpointSettings
from megavlm.errors import CheckpointError, DivergenceError
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


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("ranks", [2, *(pytest.param(r, marks=pytest.mark.slow) for r in (1, 3))])
def test_tensors_come_back_whatever_the_ranks(tmp_path, ranks, asynchronous):
    save(tmp_path, 5, ranks, CheckpointSettings(every=1, asynchronous=asynchronous))
    checkpoint = latest_checkpoint(Folder(tmp_path))
    assert str(checkpoint) == str(tmp_path / "step-00000005")
    for readers in (1, 2, 4):
        assert_loads(checkpoint, 5, readers)
    state = read_state(checkpoint)
    assert (state["step"], state["note"]) == (5, "plain data")
    assert len(list((tmp_path / "step-00000005").glob("*.safetensors"))) == ranks
    for name, lazy in lazy_tensors(CheckpointReader(checkpoint)).items():
        assert (lazy.shape, lazy.dtype) == (SHAPES[name], torch.float32)
        assert torch.equal(lazy.read(), values(name, 5))


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


def test_ranks_may_hold_the_same_and_one_of_them_writes(tmp_path):
    def on_rank(rank):
        own = {f"weights/{rank}": whole(torch.full((2,), float(rank)))}
        both = {"weights/both": whole(torch.ones(1000))}
        return str(save_checkpoint(Folder(tmp_path), 1, own | both, {}, SYNCHRONOUS))

    [folder, _] = run_on_ranks(2, on_rank)
    sizes = [entry["bytes"] for entry in read_state(Folder(folder))["files"].values()]
    assert 4000 < sum(sizes) < 5000
    lazy = lazy_tensors(CheckpointReader(Folder(folder)))
    assert [float(lazy[f"weights/{rank}"].read()[0]) for rank in range(2)] == [0, 1]


def test_a_part_that_nobody_holds_is_refused(tmp_path):
    def on_rank(rank):
        state = {"weights/a": Shards((4,), {(rank,): torch.zeros(1)})}
        with pytest.raises(CheckpointError, match="hold 2 elements of weights/a, which has 4"):
            save_checkpoint(Folder(tmp_path), 1, state, {}, SYNCHRONOUS)

    run_on_ranks(2, on_rank)
    assert latest_checkpoint(Folder(tmp_path)) is None


def test_the_newest_and_the_chosen_are_kept(tmp_path):
    for step in (2, 4, 10, 13):
        save(tmp_path, step, ranks=1, settings=CheckpointSettings(every=1, keep_every=4))
    kept = ["step-00000004", "step-00000010", "step-00000013"]
    assert sorted(p.name for p in tmp_path.iterdir()) == kept


def test_what_a_crash_leaves_is_not_seen_and_swept_away(tmp_path):
    assert latest_checkpoint(Folder(tmp_path)) is None
    save(tmp_path, 2, ranks=1)
    for step in (1, 4):
        (tmp_path / f"step-{step:08d}").mkdir()
        (tmp_path / f"step-{step:08d}" / "tensors-00001-of-00002.safetensors").write_text("half")
    assert str(latest_checkpoint(Folder(tmp_path))) == str(tmp_path / "step-00000002")
    save(tmp_path, 4, ranks=1)
    assert_loads(latest_checkpoint(Folder(tmp_path)), 4, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000004"]
    assert len(list((tmp_path / "step-00000004").iterdir())) == 2


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path):
    """What is saved is what there was when `save` was called."""

    def on_rank(rank):
        saver = CheckpointSaver(Folder(tmp_path), CheckpointSettings(every=1))
        for step in range(1, 6):
            state = held(rank, 2, step)
            saver.save(step, state, {})
            for shards in state.values():
                for box in shards.boxes.values():
                    box.fill_(float("nan"))
            saver.check()
        saver.wait()

    run_on_ranks(2, on_rank)
    for step in (4, 5):
        assert_loads(Folder(tmp_path / f"step-{step:08d}"), step, 2)


def test_a_whole_checkpoint_is_never_overwritten(tmp_path):
    save(tmp_path, 2)

    def on_rank(rank):
        with pytest.raises(CheckpointError, match="already holds a checkpoint"):
            save_checkpoint(Folder(tmp_path), 2, held(rank, 2, 3), {}, SYNCHRONOUS)

    run_on_ranks(2, on_rank)
    assert_loads(Folder(tmp_path / "step-00000002"), 2, 2)


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


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_disk_that_cannot_be_written_is_told_and_nothing_is_lost(tmp_path, asynchronous):
    save(tmp_path, 2)

    def on_rank(rank):
        settings = CheckpointSettings(every=1, asynchronous=asynchronous)
        saver = CheckpointSaver(Folder(tmp_path), settings)
        if rank == 1:  # its writes fail in the middle, as those to a full disk do
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))
        told = r"cannot write .*00002-of-00002.*: File too large; earlier checkpoints are untouched"
        with pytest.raises(CheckpointError, match=told):
            saver.save(3, held(rank, 2), {})
            saver.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)

    run_on_ranks(2, on_rank)
    assert_loads(latest_checkpoint(Folder(tmp_path)), 2, 2)


def test_the_first_error_is_the_one_to_tell(tmp_path):
    def on_rank(_):
        with pytest.raises(ValueError, match="the first"):
            with CheckpointSaver(Folder(tmp_path), CheckpointSettings(every=1)) as saver:
                saver._running = Future()
                saver._running.set_exception(RuntimeError("connection closed by peer"))
                raise ValueError("the first")

    run_on_ranks(1, on_rank)


def test_a_save_is_finished_when_training_ends_with_an_error(tmp_path):
    def on_rank(rank):
        with pytest.raises(DivergenceError):
            with CheckpointSaver(Folder(tmp_path), CheckpointSettings(every=1)) as saver:
                saver.save(1, held(rank, 2, 1), {})
                raise DivergenceError("all ranks raise it")

    run_on_ranks(2, on_rank)
    assert_loads(latest_checkpoint(Folder(tmp_path)), 1, 2)


def test_no_save_is_waited_for_where_a_rank_may_be_gone(tmp_path):
    def on_rank(_):
        with pytest.raises(RuntimeError, match="closed by peer"):
            with CheckpointSaver(Folder(tmp_path), CheckpointSettings(every=1)) as saver:
                saver._write = lambda *_: time.sleep(3600)  # as it waits for one that is gone
                saver.save(1, held(0, 1, 1), {})
                raise RuntimeError("closed by peer")

    run_on_ranks(1, on_rank)


def test_a_failed_save_is_told_on_all_ranks_at_the_same_step(tmp_path):
    def on_rank(rank):
        saver = CheckpointSaver(Folder(tmp_path / "missing"), CheckpointSettings(every=1))
        if rank == 1:
            saver._root = Folder("/dev/null/nowhere")
        saver.save(1, held(rank, 2), {})
        for step in range(1000):
            try:
                saver.check()
            except CheckpointError as error:
                return step, str(error)
            time.sleep(0.01 * rank)  # one rank looks when the other does not
        return None

    first, second = run_on_ranks(2, on_rank)
    assert first[0] == second[0] and "cannot write" in first[1]
    assert first[1].startswith(second[1]), "the first one knows the space needed, too"


def test_a_run_can_go_on_without_a_checkpoint(tmp_path, capfd):
    """Its disk is full for two of them, and then no more."""
    settings = CheckpointSettings(every=1, keep_last=1, on_failure="continue")

    def on_rank(rank):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        saver = CheckpointSaver(Folder(tmp_path), settings)
        seen = []
        for step in range(1, 5):
            full = 500 if step in (2, 3) and rank == 1 else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (full, resource.RLIM_INFINITY))
            saver.save(step, held(rank, 2, fill=step), {})
            while saver._running is not None:
                saver.check()
            seen.append(sorted(path.name for path in tmp_path.iterdir()))
            dist.barrier()
            if step == 3:
                with pytest.raises(CheckpointError, match="cannot write"):
                    saver.wait()
        saver.wait()
        return seen

    first = [folder_name(1)]
    assert run_on_ranks(2, on_rank)[0] == [first, first, first, [folder_name(4)]]
    told = [
        line
        for line in capfd.readouterr().err.splitlines()
        if line.startswith("megavlm: warning: ")
    ]
    gigabytes = sum(box.nbytes for s in held(0, 1).values() for box in s.boxes.values()) / 1e9
    for line, step, failures in zip(told, (2, 3), (1, 2), strict=True):
        assert f"no checkpoint of step {step}, the {failures}. failure in a row; training" in line
        assert (
            f"GB are free in {tmp_path})" in line and f"a checkpoint takes {gigabytes:.3g} " in line
        )
    state = held(0, 1)
    run_on_ranks(1, lambda _: load_checkpoint(Folder(tmp_path) / folder_name(4), state))


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


def test_a_folder_of_checkpoints_belongs_to_one_run_and_is_shared(tmp_path):
    root = tmp_path / "checkpoints"

    def on_rank(rank):
        claim(Folder(root), tmp_path / "one")
        claim(Folder(root), tmp_path / "one")  # it goes on
        with pytest.raises(CheckpointError, match=f"belongs to the run in {tmp_path}/one"):
            claim(Folder(root), tmp_path / "other")
        own = Folder(tmp_path / f"host-{rank}")
        own.create()
        with pytest.raises(CheckpointError, match="host-1 is not shared by all hosts"):
            claim(own, tmp_path / "one")

    run_on_ranks(2, on_rank)
    save(root, 1)
    assert latest_checkpoint(Folder(root)) == Folder(root) / folder_name(1)


def test_what_cannot_be_deleted_is_told_and_stays(tmp_path, capfd):
    for name in ("step-7", "step-²", "step-old", "notes"):
        (tmp_path / name).mkdir(parents=True)

    def on_rank(_):
        delete = Folder.delete
        Folder.delete = lambda f: (_ for _ in ()).throw(CheckpointError("cannot delete it"))
        with CheckpointSaver(Folder(tmp_path), replace(SYNCHRONOUS, keep_last=1)) as saver:
            saver.save(1, held(0, 1), {})
            saver.save(2, held(0, 1), {})
        Folder.delete = delete

    run_on_ranks(1, on_rank)
    assert "warning: cannot delete it" in capfd.readouterr().err
    assert_loads(latest_checkpoint(Folder(tmp_path)), 0, 1)
    assert (tmp_path / "step-7").exists()
