import resource
import signal
import time
from concurrent.futures import Future

import pytest
import torch
import torch.distributed as dist

from megavlm.checkpoint.listing import latest_checkpoint
from megavlm.checkpoint.load import lazy_tensors, load_checkpoint
from megavlm.checkpoint.save import CheckpointSaver
from megavlm.checkpoint.shards import Shards, whole
from megavlm.checkpoint.storage import CheckpointReader, folder_name, read_state
from megavlm.config.run import CheckpointSettings
from megavlm.errors import CheckpointError, DivergenceError
from megavlm.files.folder import Folder
from tests.checkpoint.written import SHAPES, SYNCHRONOUS, assert_loads, held, save, values
from tests.ranks import run_on_ranks
from tests.states import save_checkpoint


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
