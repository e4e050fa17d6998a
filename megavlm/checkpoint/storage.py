"""How torch Distributed Checkpoint stores ours: safetensors files with their checksums.

A checkpoint is a folder with one file a rank, and `state.json`, which is written last: a folder
without it is no checkpoint. A file's entry `NAME[3,0]` is the box of the tensor NAME whose first
element is NAME[3, 0]; a box at the origin goes by the name alone. torch's own storage keeps its
metadata in a pickle, which can run code when it is read, and has no checksums.
"""

import dataclasses
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from megavlm.checkpoint.lazy import LazyTensor
from megavlm.checkpoint.planners import check_boxes
from megavlm.checkpoint.shards import Origin
from megavlm.checkpoint.tensor_file import (
    DTYPES,
    NAMES,
    Entry,
    is_count,
    is_shape,
    parse_json,
    read_header,
    read_rows,
    write_tensors,
)
from megavlm.errors import CheckpointError, DamagedError, StorageError
from megavlm.files.folder import Folder, is_plain, sync
from megavlm.files.ranges import Range

FORMAT = 4
STATE_FILE = "state.json"
READERS = 16
"""Files opened at once: an object store answers each in its own time."""

_NUMBER = "(?:0|[1-9][0-9]{0,18})"
_BOX = re.compile(rf"([^[]+)\[({_NUMBER}(?:,{_NUMBER})*)\]")
_SHA256 = re.compile("[0-9a-f]{64}")


class CheckpointWriter(StorageWriter):
    """Writes one checkpoint folder.

    `on_committed` is called, on one rank, when it is whole; `on_progress` before each box.
    """

    def __init__(
        self,
        folder: Folder,
        state: dict[str, Any],
        on_committed: Callable[[], None] = lambda: None,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        self._folder = folder
        self._state = state
        self._on_committed = on_committed
        self._on_progress = on_progress

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, **__: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Runs on one rank, before any writes."""
        make_empty(self._folder)
        return [
            dataclasses.replace(plan, storage_data=file_name(i, len(plans)))
            for i, plan in enumerate(plans, start=1)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name: str = plan.storage_data
        written = {name: self.write_file(self._folder, name, plan, planner)}
        results: Future[list[WriteResult]] = Future()
        results.set_result([WriteResult(MetadataIndex(name), written[name]["bytes"], written)])
        return results

    def write_file(
        self, folder: Folder, name: str, plan: SavePlan, planner: SavePlanner
    ) -> dict[str, Any]:
        """Write what this rank is to write into one file; returns its SHA-256 and its bytes."""
        tensors = {}

        def read(item: WriteItem) -> Tensor:
            self._on_progress()
            return _on_cpu(planner.resolve_data(item))

        for item in plan.items:
            assert item.tensor_data is not None and item.index.offset is not None
            shape, dtype = item.tensor_data.chunk.sizes, item.tensor_data.properties.dtype
            tensors[_box_name(item.index.fqn, tuple(item.index.offset))] = LazyTensor(
                tuple(shape), dtype, partial(read, item)
            )
        with folder.open(name, "wb") as file:
            digest, size = write_tensors(file, tensors)
            sync(file)
        return {"sha256": digest, "bytes": size}

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        files = {k: v for result in results for one in result for k, v in one.storage_data.items()}
        tensors = {
            name: {"dtype": NAMES[tensor.properties.dtype], "shape": list(tensor.size)}
            for name, tensor in sorted(metadata.state_dict_metadata.items())
            if isinstance(tensor, TensorStorageMetadata)
        }
        write_state(self._folder, {**self._state, "files": files, "tensors": tensors})
        self._folder.sync_name()
        self._on_committed()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def folder_name(step: int) -> str:
    """Of a step's checkpoint, below the run's folder of checkpoints."""
    return f"step-{step:08d}"


def file_name(number: int, files: int) -> str:
    """Of one of a checkpoint's files, counted from 1."""
    return f"tensors-{number:05d}-of-{files:05d}.safetensors"


def make_empty(folder: Folder) -> None:
    """Have a folder for a checkpoint that is about to be written; raises if it holds one."""
    names = folder.names()
    if STATE_FILE in names:
        raise CheckpointError(
            f"{folder} already holds a checkpoint; delete it, or choose another folder"
        )
    if names:
        folder.delete()  # what a crash has left
    folder.create()


def write_state(folder: Folder, state: dict[str, Any], name: str = STATE_FILE) -> bytes:
    """Make a folder, whose files are written, a checkpoint; returns what that file holds."""
    assert "sha256" not in state
    state = json.loads(json.dumps({"format": FORMAT, **state}))  # as it is read back
    content = json.dumps({**state, "sha256": state_sha256(state)}, indent=1).encode()
    folder.write_atomically(name, content)
    return content


def read_state(folder: Folder, name: str = STATE_FILE) -> dict[str, Any]:
    """The plain data of a checkpoint; raises CheckpointError when it is missing or broken.

    It has the `step`, the `files` and the `tensors`; the other keys are whatever was saved.
    """
    return parse_state(folder.read(name), folder, name)


def checked_state(folder: Folder) -> dict[str, Any]:
    """The same, where all files are there and as long as they were written."""
    state, sizes = read_state(folder), folder.sizes()
    for name, file in state["files"].items():
        path, expected = f"{folder}/{name}", file["bytes"]
        if name not in sizes:
            raise DamagedError(f"checkpoint file {path} is missing")
        if sizes[name] != expected:
            raise DamagedError(
                f"checkpoint file {path} has {sizes[name]} bytes instead of {expected}"
            )
    return state


def parse_state(content: bytes, folder: Folder, name: str = STATE_FILE) -> dict[str, Any]:
    """The same, from what the file holds."""
    try:
        state = parse_json(content)
        version, digest = state["format"], state.pop("sha256", None)
        if version != FORMAT:
            raise CheckpointError(
                f"checkpoint {folder} has format {version}; this version reads {FORMAT}"
            )
        if digest != state_sha256(state):
            raise DamagedError(
                f"checkpoint file {folder}/{name} is corrupt (its SHA-256 does not match)"
            )
        _check_form(state)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"cannot read checkpoint {folder}/{name}: {error}") from error
    return state


def state_sha256(state: dict[str, Any]) -> str:
    """Of what a state says, however it is laid out."""
    text = json.dumps(state, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _check_form(state: dict[str, Any]) -> None:
    """Raise an error of Python's unless what is read here is of the form that is written here."""
    if not is_count(state["step"]):
        raise ValueError(f"step {state['step']}")
    for name, file in state["files"].items():
        if not (is_plain(name) and _SHA256.fullmatch(file["sha256"]) and is_count(file["bytes"])):
            raise ValueError(f"file {name}: {file}")
    for name, tensor in state["tensors"].items():
        if not (tensor["dtype"] in DTYPES and is_shape(tensor["shape"])):
            raise ValueError(f"tensor {name}: {tensor}")


@contextmanager
def _as_damage() -> Iterator[None]:
    """What is wrong with a file that was written here is damage."""
    try:
        yield
    except StorageError:
        raise
    except CheckpointError as error:
        raise DamagedError(str(error)) from error


class CheckpointReader(StorageReader):
    """Reads one checkpoint folder; any program on torch Distributed Checkpoint can use it.

    Raises DamagedError for files that are missing or not what they should be. Their checksums
    are another step, `check_files`: it reads everything.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.state = checked_state(folder)
        self._places: dict[tuple[str, Origin], tuple[str, Entry]] = {}
        tensors = {
            name: TensorStorageMetadata(
                properties=TensorProperties(dtype=DTYPES[fields["dtype"]]),
                size=torch.Size(fields["shape"]),
                chunks=[],
            )
            for name, fields in self.state["tensors"].items()
        }
        with ThreadPoolExecutor(READERS) as pool:
            headers = list(pool.map(self._header, self.state["files"]))
        for file_name, entries in zip(self.state["files"], headers, strict=True):
            for box_name, entry in entries.items():
                name, origin = _name_and_origin(box_name, len(entry.shape))
                if name not in tensors:
                    raise DamagedError(f"{folder}/{file_name} holds {name}, which is not listed")
                listed = tensors[name]
                if entry.dtype != listed.properties.dtype or not _fits(origin, entry, listed.size):
                    raise DamagedError(
                        f"{folder}/{file_name} holds {box_name} of type {NAMES[entry.dtype]} and "
                        f"shape {list(entry.shape)}, which is no part of the tensor that is listed"
                    )
                self._places[name, origin] = (file_name, entry)
                chunk = ChunkStorageMetadata(torch.Size(origin), torch.Size(entry.shape))
                listed.chunks.append(chunk)
        with _as_damage():
            for name, tensor in tensors.items():
                boxes = [(chunk.offsets, chunk.sizes) for chunk in tensor.chunks]
                check_boxes(f"the files of {folder} hold", name, tensor.size, boxes)
        self._metadata = Metadata(tensors)  # pyright: ignore[reportArgumentType]

    def _header(self, name: str) -> dict[str, Entry]:
        file_bytes = self.state["files"][name]["bytes"]
        with _as_damage(), self.folder.open(name, "rb") as file:
            return read_header(file, file_bytes, f"{self.folder}/{name}")

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self._metadata

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *_: Any, **__: Any
    ) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[tuple[Entry, ReadItem]]] = defaultdict(list)
        for item in plan.items:
            index = item.storage_index
            assert index.offset is not None
            name, entry = self._places[index.fqn, tuple(index.offset)]
            by_file[name].append((entry, item))
        for name, items in by_file.items():
            items.sort(key=lambda pair: _range_of(*pair))
            with self.folder.open(name, "rb", [_range_of(*pair) for pair in items]) as file:
                for entry, item in items:
                    target = planner.resolve_tensor(item).detach()
                    _read_box(file, entry, item.storage_offsets, target)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def _range_of(entry: Entry, item: ReadItem) -> Range:
    """The bytes of a file that hold an item: whole rows, also where it is a part of each."""
    first, rows = (item.storage_offsets[0], item.lengths[0]) if entry.shape else (0, 1)
    start = entry.first_byte + first * entry.row_bytes
    return start, start + rows * entry.row_bytes


def _read_box(file: Any, entry: Entry, origin: Iterable[int], target: Tensor) -> None:
    """Fill a tensor of any dtype, device and strides with a box of an entry."""
    if target.ndim == 0:
        rows, first, inner = (), 0, ()
    else:
        first, *rest = origin
        rows = (target.shape[0],)
        inner = tuple(slice(o, o + s) for o, s in zip(rest, target.shape[1:], strict=True))
    full_rows = (*rows, *entry.shape[1:])
    direct = (
        target.dtype == entry.dtype
        and target.device.type == "cpu"
        and target.is_contiguous()
        and target.shape == full_rows
    )
    read = target if direct else torch.empty(full_rows, dtype=entry.dtype)
    read_rows(file, entry, first, read)
    if not direct:
        target.copy_(read[(slice(None), *inner)] if rows else read)


def _fits(origin: Origin, entry: Entry, shape: Sequence[int]) -> bool:
    return len(origin) == len(entry.shape) == len(shape) and all(
        first + n <= whole for first, n, whole in zip(origin, entry.shape, shape, strict=True)
    )


def _box_name(name: str, origin: Origin) -> str:
    if "[" in name:
        raise CheckpointError(f"tensor {name} cannot be saved: brackets are for boxes; rename it")
    return f"{name}[{','.join(map(str, origin))}]" if any(origin) else name


def _name_and_origin(box_name: str, axes: int) -> tuple[str, Origin]:
    """What `_box_name` was given; a name that it does not make is a tensor's own."""
    box = _BOX.fullmatch(box_name)
    origin = tuple(map(int, box[2].split(","))) if box else ()
    return (box[1], origin) if box and any(origin) else (box_name, (0,) * axes)


def _on_cpu(value: Any) -> Tensor:
    return value.detach().cpu()
