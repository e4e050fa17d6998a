"""Checkpoints in an S3 object store, and behind other URLs.

s3fs runs a thread, so only the ranks use it, and never the test process that they are forked from.
"""

import json
import os
import signal
from dataclasses import replace
from unittest.mock import patch
from uuid import uuid4

import pytest
import s3fs
import torch

from megavlm.checkpoint import storage
from megavlm.checkpoint.listing import latest_checkpoint
from megavlm.checkpoint.load import load_checkpoint
from megavlm.checkpoint.save import CheckpointSaver
from megavlm.checkpoint.shards import whole
from megavlm.checkpoint.storage import folder_name, read_state
from megavlm.config.run import CheckpointSettings
from megavlm.errors import CheckpointError
from megavlm.files import folder as folders
from megavlm.files.folder import Folder
from megavlm.train.loop import train
from tests.checkpoint.written import SYNCHRONOUS, assert_loads, held, save
from tests.object_store import count, object_store
from tests.ranks import run_on_ranks
from tests.runs import plan_of
from tests.states import save_checkpoint

BUCKET = "bucket"
PART_BYTES = 5 << 20


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with object_store(tmp_path_factory.mktemp("store")) as store:
        store.client.create_bucket(Bucket=BUCKET)
        yield store


@pytest.fixture
def run_name(store):
    """Of a run that has nothing yet."""
    store.new_requests()
    return uuid4().hex


@pytest.fixture
def root(run_name):
    return f"s3://{BUCKET}/{run_name}"


def in_a_process(function, *arguments):
    """What it returns there."""
    return run_on_ranks(1, lambda _: function(*arguments), groups=False)[0]


def latest(root):
    def place():
        found = latest_checkpoint(Folder(root))
        return found and str(found)

    return in_a_process(place)


def forbid(store, *actions):
    """For everyone; nothing is forbidden any more without actions."""
    store.client.delete_bucket_policy(Bucket=BUCKET)
    if actions:
        rule = {"Effect": "Deny", "Principal": "*", "Action": actions, "Resource": "arn:aws:s3:::*"}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [rule]})
        store.client.put_bucket_policy(Bucket=BUCKET, Policy=policy)


@pytest.mark.parametrize("asynchronous", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_tensors_come_back_whatever_the_ranks(store, root, asynchronous):
    save(root, 2, 2, CheckpointSettings(every=1, asynchronous=asynchronous))
    place = f"{root}/step-00000002"
    assert latest(root) == place
    for ranks in (1, 3):
        assert_loads(place, 2, ranks)


def test_few_requests_are_made(store, root):
    save(root, 2)
    store.new_requests()
    save(root, 4)
    # Listed are the new folder, what lies above it as the new one is empty, and that to delete.
    assert count(store.new_requests()) == {"LIST": 3, "PUT": 3, "HEAD": 2}
    latest(root)
    assert count(store.new_requests()) == {"LIST": 1, "HEAD": 1}
    assert_loads(f"{root}/step-00000004", 4, 1)
    # state.json, and of each file the header, the whole to check it, and the tensors.
    assert count(store.new_requests()) == {"LIST": 1, "GET": 7}


def test_the_newest_and_the_chosen_are_kept(store, run_name, root):
    def on_rank(rank):
        settings = CheckpointSettings(every=1, keep_last=1, keep_every=4)
        saver = CheckpointSaver(Folder(root), settings)
        for step in (2, 4, 10, 13):
            saver.save(step, held(rank, 2, step), {})
        saver.wait()

    run_on_ranks(2, on_rank)
    kept = {key.split("/")[1] for key in store.keys(BUCKET) if key.startswith(run_name)}
    assert kept == {"step-00000004", "step-00000013"}
    assert latest(root) == f"{root}/step-00000013"


def test_half_a_checkpoint_is_not_seen_and_swept_away(store, run_name, root):
    save(root, 2)

    def killed(rank):
        with patch.object(storage, "write_state", lambda *_: os.kill(os.getpid(), signal.SIGKILL)):
            save_checkpoint(Folder(root), 3, held(rank, 2, 7), {}, SYNCHRONOUS)

    with pytest.raises(AssertionError, match="ended with status"):
        run_on_ranks(2, killed)
    assert [k for k in store.keys(BUCKET) if k.startswith(f"{run_name}/step-00000003/tensors")]
    assert latest(root) == f"{root}/step-00000002"
    save(root, 3, ranks=1)
    assert_loads(f"{root}/step-00000003", 3, 2)
    assert len([k for k in store.keys(BUCKET) if k.startswith(f"{run_name}/step-00000003")]) == 2


@pytest.mark.parametrize("ends", ["well", "with an error", "by a kill"])
def test_a_file_in_parts_appears_whole_or_not_at_all(store, run_name, root, ends):
    tensor = torch.arange(4_500_000)  # 36 MB, seven parts

    def stop(parts):
        if len(parts) == 2 and ends == "by a kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if len(parts) == 2 and ends == "with an error":
            raise OSError("the store is full")

    def on_rank(_):
        upload = s3fs.core.S3File._upload_chunk

        def upload_until(file, final=False):
            stop(file.parts or ())
            return upload(file, final)

        with (
            patch.object(s3fs.S3FileSystem, "default_block_size", PART_BYTES),
            patch.object(folders, "WRITE_BYTES", PART_BYTES),
            patch.object(s3fs.core.S3File, "_upload_chunk", upload_until),
        ):
            state = {"weights/a": whole(tensor)}
            save_checkpoint(Folder(root), 1, state, {}, SYNCHRONOUS)
        read = {"weights/a": whole(torch.zeros_like(tensor))}
        load_checkpoint(Folder(root) / folder_name(1), read)
        assert torch.equal(read["weights/a"].boxes[(0,)], tensor)

    def uploads():
        found = store.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
        return [upload for upload in found if upload["Key"].startswith(run_name)]

    if ends == "well":
        run_on_ranks(1, on_rank)
        parts = [r for r in store.new_requests() if "partNumber" in r["query"]]
        assert len(parts) == 7 and not uploads()
        return
    with pytest.raises(AssertionError, match=r"store is full|ended with status"):
        run_on_ranks(1, on_rank)
    assert not [key for key in store.keys(BUCKET) if key.startswith(run_name)]
    # What a kill leaves takes room until the store's rules for its lifecycle delete it.
    assert len(uploads()) == (ends == "by a kill")


def fails_to_load(place, match, ranks=1):
    def on_rank(rank):
        with pytest.raises(CheckpointError, match=match):
            load_checkpoint(Folder(place), held(rank, ranks))

    run_on_ranks(ranks, on_rank)


def test_damage_is_told_on_all_ranks(store, run_name, root):
    save(root, 2)
    place = f"{root}/step-00000002"
    name = "tensors-00002-of-00002.safetensors"
    where = {"Bucket": BUCKET, "Key": f"{run_name}/step-00000002/{name}"}
    good = store.client.get_object(**where)["Body"].read()
    store.client.put_object(**where, Body=good[:-9] + bytes([good[-9] ^ 1]) + good[-8:])
    fails_to_load(place, f"{name} is corrupt", ranks=2)
    store.client.put_object(**where, Body=good[:-1])
    fails_to_load(place, f"{name} has {len(good) - 1} bytes instead of {len(good)}")
    store.client.delete_object(**where)
    fails_to_load(place, f"{name} is missing")


def told(function, *arguments):
    """The message of its CheckpointError."""

    def message():
        with (
            patch.object(s3fs.S3FileSystem, "retries", 1),  # it takes two seconds to give up
            pytest.raises(CheckpointError) as failed,
        ):
            function(*arguments)
        return str(failed.value)

    return in_a_process(message)


def test_a_bucket_or_a_key_that_is_not_there_is_told(store, root):
    assert latest("s3://nowhere/run") is None
    assert told(lambda: Folder("s3://nowhere/run").check_writable()) == (
        "cannot write to s3://nowhere/run: The specified bucket does not exist; permit writing "
        "there or choose another checkpoint.folder"
    )
    assert [b["Name"] for b in store.client.list_buckets()["Buckets"]] == [BUCKET]
    assert told(lambda: read_state(Folder(root))) == (
        f"cannot read {root}/state.json: The specified key does not exist; check that place, and "
        "that you may read there"
    )


def test_a_store_that_cannot_be_reached_is_told(root, monkeypatch):
    unreachable = "http://127.0.0.1:1"
    monkeypatch.setenv("AWS_ENDPOINT_URL", unreachable)
    says = told(lambda: latest_checkpoint(Folder(root)))
    assert says.startswith(f"cannot list {root}: Could not connect to the endpoint URL")
    assert says.endswith("; check that place, and that you may read there")
    says = told(lambda: Folder(root).has("state.json"))
    assert says.startswith(f"cannot find {root}/state.json: Could not connect")


def test_missing_credentials_are_told(root, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    says = told(lambda: Folder(root).check_writable())
    assert says.startswith(f"cannot write to {root}: Unable to locate credentials")


def test_what_is_forbidden_is_told_and_nothing_is_lost(store, root, capfd):
    save(root, 2)
    place = f"{root}/step-00000002"

    def fails_to_save(match):
        def on_rank(rank):
            for asynchronous in (False, True):
                settings = CheckpointSettings(every=1, keep_last=1, asynchronous=asynchronous)
                saver = CheckpointSaver(Folder(root), settings)
                with pytest.raises(CheckpointError, match=match):
                    saver.save(3 + asynchronous, held(rank, 2), {})
                    saver.wait()

        run_on_ranks(2, on_rank)

    try:
        forbid(store, "s3:PutObject")
        assert told(lambda: Folder(root).check_writable()) == (
            f"cannot write to {root}: Forbidden; permit writing there or choose another "
            "checkpoint.folder"
        )
        fails_to_save(r"cannot write .*-of-00002.safetensors: Forbidden; earlier checkpoints are")
        forbid(store, "s3:DeleteObject")
        assert told(lambda: Folder(root).check_writable()).startswith(f"cannot write to {root}: ")
        forbid(store, "s3:GetObject")
        fails_to_load(place, f"cannot read {place}/state.json: Forbidden; check that place, and")
        # Nothing may be deleted because a store does not say whether it is whole.
        forbid(store, "s3:HeadObject")
        settings = CheckpointSettings(every=1, keep_last=1)
        run_on_ranks(2, lambda rank: save_checkpoint(Folder(root), 5, held(rank, 2), {}, settings))
        assert "warning: cannot find " in capfd.readouterr().err
    finally:
        forbid(store)
    assert_loads(place, 2, 1)


def test_a_url_without_its_package_is_told():
    with pytest.raises(CheckpointError, match="cannot use folder nosuch://run: "):
        Folder("nosuch://run")


def test_file_urls_are_paths(tmp_path):
    root = f"file://{tmp_path}/run"
    save(root, 2)
    assert latest(root) == f"{root}/step-00000002"
    assert_loads(tmp_path / "run" / "step-00000002", 2, 3)


def test_stores_with_folders_work():
    """As those behind sftp, hdfs and smb; memory is one process's own."""
    root = "memory://run"

    def on_rank(rank):
        Folder(root).check_writable()
        for step in (2, 4, 6):
            save_checkpoint(Folder(root), step, held(rank, 1, step), {}, SYNCHRONOUS)
        assert Folder(root).names() == ["step-00000004", "step-00000006"]
        found = latest_checkpoint(Folder(root))
        assert found.names() == ["state.json", "tensors-00001-of-00001.safetensors"]
        state = held(rank, 1, fill=7)
        load_checkpoint(found, state)
        expected = held(rank, 1, 6)
        for name, shards in state.items():
            for origin, box in shards.boxes.items():
                assert torch.equal(box, expected[name].boxes[origin])

    run_on_ranks(1, on_rank)


@pytest.mark.slow
def test_a_resumed_run_is_bit_identical(store, run_name, root, tiny_run):
    checkpoint = replace(tiny_run.checkpoint, every=1, folder=root)
    run = replace(
        tiny_run,
        engine="fsdp2",
        train=replace(tiny_run.train, steps=3),
        data=replace(tiny_run.data, workers=1),  # forked while s3fs runs
        checkpoint=checkpoint,
    )

    def last():
        """Of the last step: the bytes of its files, by name."""
        keys = [k for k in store.keys(BUCKET) if k.startswith(f"{run_name}/step-00000003/")]
        assert len(keys) == 3
        return {k: store.client.get_object(Bucket=BUCKET, Key=k)["Body"].read() for k in keys}

    run_on_ranks(2, lambda _: train(plan_of(run)), groups=False)
    unbroken = last()
    store.client.delete_object(Bucket=BUCKET, Key=f"{run_name}/step-00000003/state.json")
    run_on_ranks(2, lambda _: train(plan_of(run)), groups=False)
    assert last() == unbroken
    assert not (run.run_folder / "checkpoints").exists()
