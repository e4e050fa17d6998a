import io
import json

import pytest
import torch

from megavlm.checkpoint.lazy import in_memory
from megavlm.checkpoint.tensor_file import read_header, read_tensor, write_tensors
from megavlm.errors import CheckpointError


def read(header, content_bytes=0):
    """The entries of a file with this header, or what is told of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file = len(text).to_bytes(8, "little") + text + bytes(content_bytes)
    try:
        return read_header(io.BytesIO(file), len(file), "x.safetensors")
    except CheckpointError as error:
        return str(error)


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_what_is_written_is_read():
    tensors = {"a": torch.randn(2, 3), "none": torch.zeros(0, 3), "one": torch.tensor(1.5)}
    file = io.BytesIO()
    _, size = write_tensors(file, in_memory(tensors))
    file.seek(0)
    entries = read_header(file, size, "it")
    for name, tensor in tensors.items():
        assert torch.equal(read_tensor(file, entries[name]), tensor)


@pytest.mark.parametrize(
    "fields",
    [
        entry(shape=[True, 2]),
        entry(shape=[2.0]),
        entry(shape=[-2], offsets=(0, -8)),
        entry(shape=[-1, -2]),
        entry(shape=["2"]),
        entry(shape=[2**63]),
        entry(shape=[2**62, 4, 0], offsets=(0, 0)),
        entry(shape=[1] * 9 + [2]),
        entry(shape=[3]),
        entry(offsets=(False, 8)),
        entry(offsets=(0.0, 8)),
        entry(offsets=(0, 8, 8)),
        entry(offsets=(-8, 0)),
        entry(offsets=(8, 16)),
        entry(dtype=[]),
        {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2]},
        [],
        None,
    ],
    ids=str,
)
def test_entries_that_cannot_be_are_told(fields):
    assert read({"a": fields}, 8).startswith("x.safetensors is no safetensors file: ")


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{}" + b"\xff" * 8,
        b"[" * 100_000,
        b'{"a":' * 100_000,
        json.dumps({"a": entry()}).encode("utf-16"),
        b'{"a": %b, "a": %b}' % ((json.dumps(entry()).encode(),) * 2),
        b'{"a": {"dtype": "F32", "shape": [1], "shape": [2], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [%b], "data_offsets": [0, 8]}}' % (b"9" * 5000),
    ],
    ids=range(8),
)
def test_headers_that_are_none_are_told(header):
    assert read(header, 8).startswith("x.safetensors is no safetensors file: ")


def test_entries_leave_no_gaps():
    assert len(read({"b": entry(offsets=(8, 16)), "a": entry(offsets=(0, 8))}, 16)) == 2
    assert "b does not lie" in read({"b": entry(offsets=(9, 17)), "a": entry()}, 17)
    assert "b does not lie" in read({"b": entry(offsets=(4, 12)), "a": entry()}, 12)
    assert "cut short?" in read({"a": entry()}, 9)


def test_a_type_that_is_not_supported_is_told():
    told = read({"a": entry(dtype="F8_E4M3", offsets=(0, 2))}, 2)
    assert told.startswith("a of x.safetensors has type F8_E4M3, which is not supported; ")
