"""Copies in the memory of hosts, and going on from them."""

import os
import resource
import shutil
import signal
from contextlib import suppress
from dataclasses import replace

import pytest
import torch.distributed as dist

from megavlm.checkpoint.copies import Copies, is_whole, union
from megavlm.checkpoint.listing import claim, latest_checkpoint
from megavlm.checkpoint.recovery import candidates, recover, shares
from megavlm.checkpoint.save import CheckpointSaver
from megavlm.checkpoint.storage import file_name, folder_name, read_state
from megavlm.config.run import CheckpointSettings
from megavlm.errors import CheckpointError, ConfigError, DataError, DivergenceError, StoppedError
from megavlm.files.folder import Folder
from tests.checkpoint.written import assert_loads, held
from tests.ranks import run_on_ranks

SETTINGS = CheckpointSettings(every=100, memory_every=1)


def piece(step, number, count, **fields):
    file = {file_name(number, count): {"bytes": 10, "sha256": "0" * 64}}
    tensors = {f"weights/{number}": {"dtype": "F32", "shape": [3]}}
    plain = {"step": step, "file_count": count, "on_disk": 0, "format": 4, "note": "plain"}
    return {**plain, "files": file, "tensors": tensors, **fields}


def test_pieces_make_up_a_whole():
    two = union([piece(5, 1, 2), piece(5, 2, 2), piece(5, 1, 2)])
    assert two is not None and is_whole(two)
    assert list(two["tensors"]) == ["weights/1", "weights/2"] and two["note"] == "plain"
    half = union([piece(5, 1, 2)])
    assert half is not None and not is_whole(half)
    other = {file_name(2, 2): {"bytes": 11, "sha256": "0" * 64}}
    assert union([]) is None
    for contradiction in ({"note": "other"}, {"tensors": {"weights/1": {}}}):
        assert union([piece(5, 1, 2), piece(5, 2, 2, **contradiction)]) is None
    assert union([piece(5, 2, 2), piece(5, 2, 2, files=other)]) is None
    strange = union([piece(5, 1, 2), piece(5, 2, 3, file_count=2)])
    assert strange is not None and not is_whole(strange), "two files, of which one is of three"


def test_the_newest_whole_copy_comes_first():
    one = {"a": {"x": piece(5, 1, 2), "y": piece(6, 1, 2), "z": piece(7, 1, 2)}}
    two = {"b": {"x": piece(5, 2, 2), "y": piece(6, 2, 2), "z": piece(7, 1, 2)}}
    found = candidates({**one, **two}, on_disk=4)
    assert [c.name for c in found] == ["y", "x"], "of z the second file is missing"
    assert found[0].holders == {file_name(1, 2): {"a"}, file_name(2, 2): {"b"}}
    assert [c.name for c in candidates({**one, **two}, on_disk=5)] == ["y"]
    assert candidates(one, on_disk=4) == candidates({}, on_disk=0) == []


def test_who_deletes_a_checkpoint_goes_back():
    held_by = {"a": {"x": piece(12, 1, 1, on_disk=10)}}
    assert [len(candidates(held_by, on_disk)) for on_disk in (8, 10, 11, 12)] == [0, 1, 1, 0]


def test_ranks_share_the_files_of_their_host():
    sizes = {"1": 5, "2": 4, "3": 3, "4": 3}
    holders = {"1": {"a"}, "2": {"a", "b"}, "3": {"a"}, "4": {"b"}}
    assert shares(sizes, holders, ["a", "a", "b"]) == {"1": 0, "2": 1, "3": 1, "4": 2}
    assert shares(sizes, holders, ["a", "a"]) is None


def test_a_host_needs_room_for_its_own_and_its_neighbours(tmp_path):
    def on_rank(rank):
        copies = open_copies(tmp_path, rank, "aab"[rank])
        free = shutil.disk_usage(tmp_path).free
        copies.check_room(free // 3)  # of three ranks all lie on either host, twice
        with pytest.raises(CheckpointError, match=r"host-[ab] has .* GB free, and 2 copies of"):
            copies.check_room(free * 2 // 3)

    run_on_ranks(3, on_rank)


def open_copies(tmp_path, rank, host=None, settings=SETTINGS):
    """Of a rank that is a host of its own, unless one is named."""
    root, host = Folder(tmp_path / "root"), f"host-{rank if host is None else host}"
    claim(root, tmp_path)
    memory = tmp_path / host
    memory.mkdir(exist_ok=True)
    return Copies(root, replace(settings, memory_folder=memory), host)


def save_copies(tmp_path, steps, hosts="01", on_disk=()):
    """On ranks of these hosts; the run is then killed."""

    def on_rank(rank):
        copies, root = open_copies(tmp_path, rank, hosts[rank]), Folder(tmp_path / "root")
        saver = CheckpointSaver(root, SETTINGS, copies=copies)
        for step in steps:
            tensors, state = held(rank, len(hosts), step), {"note": f"step {step}"}
            saver.save(step, tensors, state, to_disk=step in on_disk, to_memory=True)
            for shards in tensors.values():
                for box in shards.boxes.values():
                    box.fill_(float("nan"))
            saver.wait()

    run_on_ranks(len(hosts), on_rank)


def recovered(tmp_path, hosts="01", most_bytes=resource.RLIM_INFINITY):
    def on_rank(rank):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, resource.RLIM_INFINITY))
        found = recover(Folder(tmp_path / "root"), open_copies(tmp_path, rank, hosts[rank]))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        return found

    [found, *others] = {one and tuple(one) for one in run_on_ranks(len(hosts), on_rank)}
    assert not others
    return found


def copies_on(tmp_path, host):
    return sorted((tmp_path / f"host-{host}").glob("megavlm-*/*/*/step-*"))


def test_a_lost_host_is_replaced_by_its_neighbour(tmp_path):
    save_copies(tmp_path, [1, 2, 3], on_disk=[1])
    both = [[path.name[:13] for path in copies_on(tmp_path, host)] for host in (0, 1)]
    assert both == [["step-00000002", "step-00000003"]] * 2
    shutil.rmtree(tmp_path / "host-0")
    assert recovered(tmp_path) == (3, 1)
    state = read_state(Folder(tmp_path / "root" / folder_name(3)))
    assert (state["step"], state["note"], len(state["files"])) == (3, "step 3", 2)
    assert not {"file_count", "on_disk"} & state.keys()
    assert_loads(Folder(tmp_path / "root" / folder_name(3)), 3, 3)
    assert copies_on(tmp_path, 1) == [] and recovered(tmp_path) is None


def spoil(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damaged_on", "step"), [([0, 1], 1), pytest.param([1], 2, marks=pytest.mark.slow)]
)
def test_damaged_files_come_from_elsewhere_or_an_older_copy(tmp_path, capfd, damaged_on, step):
    save_copies(tmp_path, [1, 2], hosts="001")
    for host in damaged_on:
        spoil(copies_on(tmp_path, host)[-1] / file_name(3, 3))
    (copies_on(tmp_path, 0)[-1] / "tensors-00001-of-00003.json").write_text("{")  # nor is this one
    assert recovered(tmp_path) == (step, 0)  # on two ranks
    assert_loads(Folder(tmp_path / "root" / folder_name(step)), step, 2)
    assert latest_checkpoint(Folder(tmp_path / "root")) == Folder(
        tmp_path / "root" / folder_name(step)
    )
    assert os.listdir(tmp_path / "root").count(folder_name(2)) == (step == 2)
    told = capfd.readouterr().err
    assert told.count("is damaged, and not used") == len(damaged_on), told


def test_a_copy_that_fails_is_told_once_and_training_goes_on(tmp_path, capfd):
    """Of a neighbour, or of a rank's own; a checkpoint on the disk follows all the same."""
    events = []

    def on_rank(rank):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        copies, root = open_copies(tmp_path, rank), Folder(tmp_path / "root")
        tell = lambda event, **fields: events.append((event, fields["step"]))  # noqa: E731
        saver = CheckpointSaver(root, SETTINGS, tell=tell, copies=copies)
        seen, open_file = [], Folder.open
        for step in range(1, 6):
            full = 500 if step in (2, 3) and rank == 1 else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (full, resource.RLIM_INFINITY))
            if step == 4 and rank == 0:  # what comes from rank 1
                Folder.open = lambda folder, name, mode, *_: open_file(
                    folder, name, mode if "00002-of" not in name else "x"
                )
            saver.save(step, held(rank, 2, step), {}, to_disk=step == 5, to_memory=True)
            saver.wait()
            Folder.open = open_file
            seen.append([path.name[:13] for path in copies_on(tmp_path, rank)])
            dist.barrier()
        return events, seen

    for events, seen in run_on_ranks(2, on_rank):
        made = [(step, event) for event, step in events if event.startswith("memory_copy_")]
        failed = [step for step, event in made if event == "memory_copy_failed"]
        assert failed == [2, 3, 4]
        assert seen == [["step-00000001"]] * 4 + [[]], "the last one is on the disk"
    told = capfd.readouterr().err
    assert told.count("warning: no copy of step 2 in memory: cannot write") == 1
    assert told.count("warning: ") == 1 and "(docker run --shm-size)" in told
    assert_loads(Folder(tmp_path / "root" / folder_name(5)), 5, 2)


def test_a_run_that_is_saved_deletes_its_copies(tmp_path):
    def on_rank(rank):
        copies, left = open_copies(tmp_path, rank), []
        ends = None, StoppedError("a signal"), DivergenceError("copies differ"), DataError("mine")
        for error in ends:
            with suppress(StoppedError, DivergenceError, DataError):
                with CheckpointSaver(Folder(tmp_path / "root"), SETTINGS, copies=copies) as saver:
                    saver.save(1, held(rank, 2, 1), {}, to_disk=False, to_memory=True)
                    if error is not None:
                        raise error
            left.append(len(copies_on(tmp_path, rank)))
        return left

    assert run_on_ranks(2, on_rank) == [[0, 0, 0, 1]] * 2


def test_copies_that_are_not_whole_are_told(tmp_path, capfd):
    save_copies(tmp_path, [1], hosts="012")
    assert recovered(tmp_path, hosts="0") is None  # which has its own and that of the last one
    told = "copies in memory, the newest of step 1, are not used: they are not whole"
    assert told in capfd.readouterr().err


def test_a_checkpoint_that_is_deleted_does_not_come_back(tmp_path):
    save_copies(tmp_path, [1, 2, 3], on_disk=[1, 3])
    assert copies_on(tmp_path, 0) == copies_on(tmp_path, 1) == []
    shutil.rmtree(tmp_path / "root" / folder_name(3))
    assert recovered(tmp_path) is None
    assert latest_checkpoint(Folder(tmp_path / "root")) == Folder(
        tmp_path / "root" / folder_name(1)
    )


def test_copies_of_a_deleted_run_are_deleted(tmp_path):
    save_copies(tmp_path, [1])
    shutil.rmtree(tmp_path / "root")
    assert recovered(tmp_path) is None
    assert copies_on(tmp_path, 0) == copies_on(tmp_path, 1) == []
    assert latest_checkpoint(Folder(tmp_path / "root")) is None


def test_copies_stay_where_the_disk_cannot_be_written(tmp_path, capfd):
    save_copies(tmp_path, [1])
    assert recovered(tmp_path, most_bytes=500) is None
    assert "copies in memory stay unused" in capfd.readouterr().err
    assert os.listdir(tmp_path / "root") == ["run.json"]
    assert recovered(tmp_path) == (1, 0)


def test_the_folder_is_the_users_alone(tmp_path):
    def on_rank(rank):
        open_copies(tmp_path, rank)
        own = tmp_path / "host-0" / f"megavlm-{os.geteuid()}"
        assert own.stat().st_mode & 0o777 == 0o700
        own.chmod(0o755)
        with pytest.raises(CheckpointError, match="is no folder that this user alone can enter"):
            open_copies(tmp_path, rank)
        own.rename(tmp_path / "elsewhere")
        own.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(CheckpointError, match="is no folder that this user alone can enter"):
            open_copies(tmp_path, rank)
        with pytest.raises(CheckpointError, match="nowhere cannot be used on host-0: No such file"):
            settings = replace(SETTINGS, memory_folder=tmp_path / "nowhere")
            Copies(Folder(tmp_path / "root"), settings, "host-0")

    run_on_ranks(1, on_rank)


def test_copies_come_more_often_than_checkpoints():
    with pytest.raises(ConfigError, match=r"memory_every=5 must be below checkpoint.every=5"):
        CheckpointSettings(every=5, memory_every=5)
