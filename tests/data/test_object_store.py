"""Training from shards in an S3 object store.

s3fs runs a thread, so only forked processes use it.
"""

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megavlm.data.collate import texts_alone
from megavlm.data.loader import MicroBatches, Share, load
from megavlm.data.sources import Place, training_sources
from megavlm.data.tokenizer import Tokenizer
from tests.object_store import object_store
from tests.ranks import run_on_ranks

BUCKET = "bucket"


@pytest.fixture(scope="module")
def store(tmp_path_factory, coloured_squares):
    """Has the shards of coloured squares."""
    with object_store(tmp_path_factory.mktemp("store")) as store:
        store.client.create_bucket(Bucket=BUCKET)
        for path in (coloured_squares / "train").iterdir():
            store.client.put_object(Bucket=BUCKET, Key=f"train/{path.name}", Body=path.read_bytes())
        yield store


def in_store(run):
    return replace(run, data=replace(run.data, train=f"s3://{BUCKET}/train", shuffle_shards=1))


def batches_of(run, workers):
    def loaded(_):
        sources, tokenizer = training_sources(run), Tokenizer(run.data.tokenizer)
        data = MicroBatches(sources, tokenizer, run, Share(0, 1), texts_alone, training=True)
        batches = load(data, range(8), workers)
        return [(batch.tokens_bt, batch.pixels) for batch in batches]

    return run_on_ranks(1, loaded, groups=False)[0]


def test_batches_from_a_store_are_those_from_a_disk(tiny_run, store, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    local = batches_of(replace(tiny_run, data=replace(tiny_run.data, shuffle_shards=1)), 0)
    store.new_requests()
    remote = batches_of(in_store(tiny_run), 3)
    assert len(local) == len(remote) == 8
    for before, after in zip(local, remote, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    paths = [r["path"] for r in store.new_requests() if r["method"] == "GET"]
    indices = [path for path in paths if path.endswith(".index.npy")]
    # Workers that begin at the same moment may each read the first one.
    assert len(set(indices)) == 4
    assert len(indices) <= 4 + 2
    [copies] = tmp_path.glob("megavlm-*")
    assert copies.stat().st_mode & 0o777 == 0o700
    assert len([*copies.iterdir()]) <= 4


def test_copies_of_closed_indices_are_deleted(tiny_run, store, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("megavlm.data.shards.OPEN_INDICES", 2)

    def left(_):
        sources = training_sources(in_store(tiny_run))
        sources.sizes_of([Place(0, number) for number in range(len(sources))])
        return len([*tmp_path.glob("megavlm-*/*")])

    assert run_on_ranks(1, left, groups=False) == [2]
    assert not [*tmp_path.glob("megavlm-*/*")]


def test_a_folder_of_copies_that_others_can_write_is_refused(
    tiny_run, store, tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / f"megavlm-{os.getuid()}").mkdir(mode=0o755)
    with pytest.raises(AssertionError, match="is not this user's alone; delete it, or set TMPDIR"):
        batches_of(in_store(tiny_run), 0)
    assert Path(tempfile.gettempdir()) == tmp_path
