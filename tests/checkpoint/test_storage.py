import json
import os
import re

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata

from megavlm.checkpoint.lazy import in_memory
from megavlm.checkpoint.shards import whole
from megavlm.checkpoint.storage import CheckpointReader, CheckpointWriter, read_state, write_state
from megavlm.checkpoint.tensor_file import write_tensors
from megavlm.errors import CheckpointError
from megavlm.files.folder import Folder
from tests.checkpoint.written import SYNCHRONOUS
from tests.ranks import run_on_ranks
from tests.states import save_checkpoint

LISTED = {"a": {"dtype": "F32", "shape": [4, 3]}}
STATE = {"step": 1, "files": {}, "tensors": {}}
FILE = {"sha256": "0" * 64, "bytes": 8}


def write(path, *contents, tensors=LISTED):
    """A checkpoint of files that hold these tensors."""
    files = {}
    for number, content in enumerate(contents):
        with (path / f"{number}").open("wb") as file:
            digest, size = write_tensors(file, in_memory(content))
        files[f"{number}"] = {"sha256": digest, "bytes": size}
    write_state(Folder(path), {"step": 1, "files": files, "tensors": tensors})
    return Folder(path)


def test_boxes_that_make_up_the_tensors_are_read(tmp_path):
    reader = CheckpointReader(
        write(
            tmp_path,
            {"a": torch.zeros(2, 3), "a[2,1]": torch.zeros(2, 2)},
            {"a[2,0]": torch.zeros(2, 1)},
        )
    )
    assert len(reader.read_metadata().state_dict_metadata["a"].chunks) == 3


@pytest.mark.parametrize(
    ("contents", "told"),
    [
        (({"a": torch.zeros(2, 3)},), "hold 6 elements of a, which has 12"),
        ((), "hold 0 elements of a, which has 12"),
        (({"a": torch.zeros(4, 3)}, {"a": torch.zeros(4, 3)}), "hold 24 elements of a,"),
        (
            ({"a": torch.zeros(2, 3), "a[1,0]": torch.zeros(2, 3)},),
            "hold boxes of a that overlap",
        ),
        (({"a": torch.zeros(5, 3)},), "0 holds a of type F32 and shape .* no part"),
        (({"a[1,0]": torch.zeros(4, 3)},), r"0 holds a\[1,0\] of type F32 and shape .* no part"),
        (({"a": torch.zeros(12)},), "0 holds a of type F32 and shape .* no part"),
        (({"a[1]": torch.zeros(3, 3)},), r"0 holds a\[1\] of type F32 and shape .* no part"),
        (({"a": torch.zeros(4, 3).half()},), "0 holds a of type F16 .* no part"),
        (({f"a[{10**19 - 1},0]": torch.zeros(0, 3)},), "no part"),
        (({"a[00,1]": torch.zeros(4, 3)},), r"holds a\[00,1\], which is not listed"),
        (({"a[0,0]": torch.zeros(4, 3)},), r"holds a\[0,0\], which is not listed"),
        (({f"a[{10**19},0]": torch.zeros(4, 3)},), "which is not listed"),
        (({"a[٣,0]": torch.zeros(4, 3)},), "which is not listed"),
        (({"a[1,0][2,0]": torch.zeros(4, 3)},), "which is not listed"),
    ],
)
def test_files_that_do_not_make_up_the_tensors_are_told(tmp_path, contents, told):
    with pytest.raises(CheckpointError, match=told):
        CheckpointReader(write(tmp_path, *contents))


def test_a_file_that_is_not_listed_any_more_is_missed(tmp_path):
    folder = write(tmp_path, {"a": torch.zeros(2, 3)}, {"a[2,0]": torch.zeros(2, 3)})
    state = read_state(folder)
    del state["files"]["1"]
    write_state(folder, state)
    with pytest.raises(CheckpointError, match="hold 6 elements of a, which has 12"):
        CheckpointReader(folder)


def test_a_name_with_brackets_is_not_saved(tmp_path):
    def on_rank(_):
        with pytest.raises(CheckpointError, match=r"a\[0\] cannot be saved"):
            state = {"weights/a[0]": whole(torch.zeros(3))}
            save_checkpoint(Folder(tmp_path), 1, state, {}, SYNCHRONOUS)

    run_on_ranks(1, on_rank)


def test_what_a_state_says_comes_back(tmp_path):
    given = {**STATE, "files": {"x": FILE}, "tensors": LISTED, "free": [1.5, None, {"a": {"b": 1}}]}
    write_state(Folder(tmp_path), {**given, "tuple": (1, 2), "number": {2: "b", 10: "a"}})
    state = read_state(Folder(tmp_path))
    assert {name: state[name] for name in given} == given
    assert (state["tuple"], state["number"]) == ([1, 2], {"2": "b", "10": "a"})
    write_state(Folder(tmp_path), state)  # as a conversion does
    assert read_state(Folder(tmp_path)) == state


def test_a_state_that_was_changed_is_corrupt(tmp_path):
    write_state(Folder(tmp_path), {**STATE, "files": {"x": FILE}, "tensors": LISTED, "seed": 17})
    path = tmp_path / "state.json"
    good = path.read_text()
    path.write_text(json.dumps(json.loads(good)))  # the layout does not matter
    read_state(Folder(tmp_path))
    changes = [('"step": 1', '"step": 2'), ('"seed": 17', '"seed": 16'), ("000", "010")]
    changes += [('"a"', '"b"'), ('"sha256": "', '"sha256": "1'), ('"bytes": 8', '"bytes": 8.0')]
    for old, new in changes:
        assert old in good
        path.write_text(good.replace(old, new, 1))
        with pytest.raises(CheckpointError, match=r"state\.json is corrupt"):
            read_state(Folder(tmp_path))
    digest = re.findall(r',\s*"sha256": "[0-9a-f]{64}"\s*}$', good)[0]
    path.write_text(good.replace(digest, "}"))
    with pytest.raises(CheckpointError, match=r"state\.json is corrupt"):
        read_state(Folder(tmp_path))


@pytest.mark.parametrize(
    "state",
    [
        {"files": {}, "tensors": {}},
        {**STATE, "step": True},
        {**STATE, "step": -1},
        {**STATE, "step": 1.0},
        {**STATE, "files": []},
        {**STATE, "files": {"x": []}},
        {**STATE, "files": {"../x": FILE}},
        {**STATE, "files": {"..": FILE}},
        {**STATE, "files": {"x": {**FILE, "bytes": -1}}},
        {**STATE, "files": {"x": {**FILE, "sha256": "0" * 63 + "\n"}}},
        {**STATE, "files": {"x": {**FILE, "sha256": 0}}},
        {**STATE, "tensors": None},
        {**STATE, "tensors": {"a": {"dtype": "F31", "shape": [1]}}},
        {**STATE, "tensors": {"a": {"dtype": ["F32"], "shape": [1]}}},
        {**STATE, "tensors": {"a": {"dtype": "F32", "shape": [True]}}},
        {**STATE, "tensors": {"a": {"dtype": "F32", "shape": [2**63]}}},
        {**STATE, "tensors": {"a": {"dtype": "F32", "shape": 1}}},
        {**STATE, "tensors": {"a": {"dtype": "F32"}}},
    ],
    ids=str,
)
def test_a_state_of_another_form_is_told(tmp_path, state):
    write_state(Folder(tmp_path), state)
    with pytest.raises(CheckpointError, match=r"cannot read checkpoint .*/state\.json: "):
        read_state(Folder(tmp_path))


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "{}", '"format"', "[" * 100_000, '{"format": 3, "format": 3}', "\xff"]
)
def test_a_state_that_is_none_is_told(tmp_path, text):
    (tmp_path / "state.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"cannot read checkpoint .*/state\.json: "):
        read_state(Folder(tmp_path))


def test_a_checkpoint_is_on_the_disk_before_older_ones_are_deleted(tmp_path, monkeypatch):
    events = []
    fsync = os.fsync

    def recorded(number):
        fsync(number)
        events.append(os.readlink(f"/proc/self/fd/{number}"))

    monkeypatch.setattr(os, "fsync", recorded)
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    writer = CheckpointWriter(Folder(folder), {"step": 1}, lambda: events.append("committed"))
    writer.finish(Metadata({}), [[]])
    written, *later = events
    assert re.fullmatch(rf"{folder}/state\.json\.\w+\.partial", written)
    assert later == [str(folder), str(tmp_path), "committed"]
