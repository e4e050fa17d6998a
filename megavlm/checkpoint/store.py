"""Saving and loading checkpoints of a run, whatever its engine and its number of ranks.

torch Distributed Checkpoint plans who writes and reads what; `storage.py` writes and reads.
"""

import hashlib
import json
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from megavlm.checkpoint.lazy import LazyTensor
from megavlm.checkpoint.planners import ShardsLoadPlanner, ShardsSavePlanner
from megavlm.checkpoint.shards import Shards, State, whole
from megavlm.checkpoint.storage import (
    STATE_FILE,
    CheckpointReader,
    CheckpointWriter,
    folder_name,
    read_state,
    state_sha256,
)
from megavlm.checkpoint.tensor_file import DTYPES
from megavlm.config.run import CheckpointSettings
from megavlm.dist import groups
from megavlm.errors import CheckpointError, MegavlmError
from megavlm.files.folder import Folder

OWNER_FILE = "run.json"
"""Whose checkpoints a folder holds."""
CHECKERS = 4
"""Files whose checksums a rank computes at once."""

Value = TypeVar("Value")
_STEP = re.compile(r"step-(\d{8,})")


class CheckpointSaver:
    """Saves checkpoints of a run, one after the other; every method is collective.

    In the background, if so set: `save` then returns when the tensors are copied.
    """

    def __init__(
        self,
        root: Folder,
        settings: CheckpointSettings,
        keep: Collection[int] = (),
        on_progress: Callable[[], None] = lambda: None,
        tell: Callable[..., None] = lambda event, **fields: None,
    ) -> None:
        """keep: steps whose checkpoints stay in any case. on_progress: called while writing.

        tell: hears, as an event's name and fields, when checkpoints are begun and committed, and
        how long the training has waited for them.
        """
        self._root = root
        self._settings = settings
        self._keep = keep
        self._on_progress = on_progress
        self._tell = tell
        # Of its own: the training goes on meanwhile, over its own groups.
        self._group = dist.new_group(backend="gloo")
        self._staging = _Staging()
        self._running: Future[Any] | None = None
        self._planner = ShardsSavePlanner()
        self._step, self._begun = 0, 0.0
        """Of the newest save; when it was begun, on the clock `time.perf_counter`."""
        self._failures: list[CheckpointError] = []
        """Of the newest saves, one after the other."""

    def __enter__(self) -> "CheckpointSaver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finish the save in the background, also when the training ends with an error."""
        if kind is None:
            self.wait()
        elif issubclass(kind, Exception):
            with suppress(CheckpointError):  # the first error is the one to tell
                self.wait()

    def save(self, step: int, shards: State, state: dict[str, Any]) -> None:
        """Write the checkpoint of a step, after the one before it is written.

        `state` is plain data. If this checkpoint, or the one before it, cannot be written, raises
        CheckpointError on all ranks, or tells it, as `on_failure` says; nothing older is touched.
        """
        self._settle()
        self._tell("checkpoint_begun", step=step)
        self._step, self._begun = step, time.perf_counter()
        self._planner = ShardsSavePlanner()
        writer = CheckpointWriter(
            self._root / folder_name(step),
            {"step": step, **state},
            on_committed=lambda: delete_old(self._root, self._settings, self._keep),
            on_progress=self._on_progress,
        )
        how: dict[str, Any] = {
            "storage_writer": writer,
            "planner": self._planner,
            "process_group": self._group,
        }
        if self._settings.asynchronous:
            with _failures_told():
                running = async_save(dict(shards), async_stager=self._staging, **how)
            assert isinstance(running, Future)
            self._running = running
        else:
            self._finish(lambda: save(dict(shards), **how))
            self._go_on()
        stalled_seconds = time.perf_counter() - self._begun
        self._tell("checkpoint_copied", step=step, stalled_seconds=stalled_seconds)

    def check(self) -> None:
        """Raise, or tell, that a save in the background has failed by now, on all ranks."""
        if self._running is not None:
            # A rank may see the end of it a little earlier than another.
            [done] = groups.sum_over_ranks(self._running.done())
            if done == dist.get_world_size():
                self._settle()

    def wait(self) -> None:
        """Return when everything is written; raises CheckpointError if the last could not be."""
        if self._running is not None:
            self._finish(self._running.result)
        if self._failures:
            raise self._failures[-1]

    def _settle(self) -> None:
        if self._running is not None:
            self._finish(self._running.result)
            self._go_on()

    def _finish(self, written: Callable[[], object]) -> None:
        """Count the failures, and leave nothing of the checkpoint that has failed."""
        self._running = None
        started = time.perf_counter()
        try:
            with _failures_told():
                written()
        except CheckpointError as error:
            self._failures.append(error)
            if dist.get_rank() == 0:
                self._delete_partial()
                self._failures[-1] = CheckpointError(f"{error} ({self._space()})")
                self._failures[-1].__cause__ = error
        else:
            self._failures.clear()
        now = time.perf_counter()
        self._tell(
            "checkpoint_failed" if self._failures else "checkpoint_committed",
            step=self._step,
            seconds=now - self._begun,
            # In the foreground `save` tells it.
            stalled_seconds=now - started if self._settings.asynchronous else 0.0,
        )

    def _go_on(self) -> None:
        if not self._failures:
            return
        if self._settings.on_failure == "stop":
            raise self._failures[-1]
        if dist.get_rank() == 0:
            print(
                f"warning: no checkpoint of step {self._step}, the {len(self._failures)}. failure "
                f"in a row; training goes on to the next: {self._failures[-1]}",
                file=sys.stderr,
                flush=True,
            )

    def _space(self) -> str:
        needed = f"a checkpoint takes {self._planner.total_bytes / 1e9:.3g} GB"
        with suppress(OSError):
            if self._root.local_path is not None:
                free = shutil.disk_usage(self._root.local_path).free
                return f"{needed}, {free / 1e9:.3g} GB are free in {self._root}"
        return f"{needed} in {self._root}"

    def _delete_partial(self) -> None:
        """All ranks have stopped writing: they have told each other."""
        folder = self._root / folder_name(self._step)
        try:
            if folder.names() and not folder.has(STATE_FILE):
                folder.delete()
        except CheckpointError as error:
            print(f"warning: {error}", file=sys.stderr, flush=True)


def load_checkpoint(folder: Folder, shards: State) -> None:
    """Overwrite what this rank holds with a checkpoint's tensors, in place; collective.

    Their types are converted. The ranks first check all files together, each its share. Raises
    CheckpointError, on all ranks, for a file that is missing or not as it was written and for a
    tensor that is missing or of another shape.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    with _failures_told():
        reader = _on_all_ranks(lambda: CheckpointReader(folder))
        _require_same(folder, state_sha256(reader.state))
        _on_all_ranks(lambda: check_shapes(reader, shards))
        _on_all_ranks(lambda: check_files(reader, sorted(reader.state["files"])[rank::ranks]))
        load(dict(shards), storage_reader=reader, planner=ShardsLoadPlanner())


def _require_same(folder: Folder, digest: str) -> None:
    """Raise CheckpointError, on all ranks, unless they see the same; collective."""
    seen = groups.from_all_ranks((str(folder), digest))
    if len(set(seen)) > 1:
        raise CheckpointError(
            f"ranks see different checkpoints: {sorted({place for place, _ in seen})}; have all "
            "hosts share the folder of checkpoints, and run again"
        )


def load_present(folder: Folder, shards: State) -> None:
    """Overwrite those tensors that a checkpoint has; collective.

    Raises CheckpointError as `load_checkpoint` does.
    """
    saved = _on_all_ranks(lambda: read_state(folder))["tensors"]
    load_checkpoint(folder, {name: held for name, held in shards.items() if name in saved})


def check_shapes(reader: CheckpointReader, shards: State) -> None:
    """Raise CheckpointError unless a checkpoint holds these tensors, in these shapes."""
    saved = reader.state["tensors"]
    missing = sorted(shards.keys() - saved.keys())
    moments = [name for name in missing if name.startswith("exp_avg")]
    if moments:
        raise CheckpointError(
            f"checkpoint {reader.folder} holds no states of the optimiser ({moments[0]}, say); "
            "start a new run from its weights with checkpoint.start_from"
        )
    if missing:
        raise CheckpointError(
            f"checkpoint {reader.folder} holds no tensor {missing[0]} ({len(missing)} are missing);"
            " it is of another model"
        )
    for name, held in shards.items():
        if tuple(saved[name]["shape"]) != held.shape:
            raise CheckpointError(
                f"checkpoint {reader.folder} has {name} of shape {saved[name]['shape']}, the model "
                f"{list(held.shape)}; it is of another model"
            )


def check_files(
    reader: CheckpointReader, names: list[str], on_progress: Callable[[int], None] = lambda _: None
) -> None:
    """Raise CheckpointError unless these files of a checkpoint have their checksums."""

    def digest(name: str) -> str:
        sha256 = hashlib.sha256()
        left = reader.state["files"][name]["bytes"]
        with reader.folder.open(name, "rb", [(0, left)]) as file:
            while block := file.read(min(left, 16 << 20)):  # stores refuse to read past the end
                left -= len(block)
                sha256.update(block)
                on_progress(len(block))
        return sha256.hexdigest()

    with ThreadPoolExecutor(CHECKERS) as pool:
        digests = list(pool.map(digest, names))
    for name, found in zip(names, digests, strict=True):
        if found != reader.state["files"][name]["sha256"]:
            raise CheckpointError(
                f"checkpoint file {reader.folder}/{name} is corrupt (its SHA-256 does not match); "
                f"delete {reader.folder} to go on from an earlier one"
            )


def lazy_tensors(reader: CheckpointReader) -> dict[str, LazyTensor]:
    """All tensors of a checkpoint, each read whole when it is needed, by this process alone."""

    def read(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        planner = ShardsLoadPlanner()
        planner.set_up_planner({name: whole(tensor)}, reader.read_metadata(), True)
        reader.read_data(planner.finish_plan(planner.create_local_plan()), planner)
        return tensor

    lazy: dict[str, LazyTensor] = {}
    for name, fields in reader.state["tensors"].items():
        shape, dtype = tuple(fields["shape"]), DTYPES[fields["dtype"]]
        lazy[name] = LazyTensor(shape, dtype, partial(read, name, shape, dtype))
    return lazy


def latest_checkpoint(root: Folder) -> Folder | None:
    """The newest complete checkpoint of a run, or None."""
    folders = (root / folder_name(step) for step in reversed(_steps(root)))
    return next((folder for folder in folders if folder.has(STATE_FILE)), None)


def delete_old(root: Folder, settings: CheckpointSettings, keep: Collection[int] = ()) -> None:
    """Delete what the settings do not keep, and what crashes have left before the newest.

    What cannot be deleted is told, and stays.
    """
    steps = _steps(root)
    complete = [step for step in steps if (root / folder_name(step)).has(STATE_FILE)]
    kept = {*complete[-settings.keep_last :], *keep}
    if settings.keep_every:
        kept |= {step for step in complete if step % settings.keep_every == 0}
    for step in steps:
        if step in kept or step > complete[-1]:
            continue
        folder = root / folder_name(step)
        try:
            if step in complete:
                folder.delete_file(STATE_FILE)  # first, so that it never looks whole again
            folder.delete()
        except CheckpointError as error:
            print(f"warning: {error}", file=sys.stderr, flush=True)


def _steps(root: Folder) -> list[int]:
    names = (_STEP.fullmatch(name) for name in root.names())
    return sorted(int(name[1]) for name in names if name)


def claim(root: Folder, run_folder: Path) -> None:
    """Have a folder of checkpoints to oneself, and see that all ranks share it; collective.

    Raises CheckpointError, on all ranks, if it belongs to another run, or if the hosts each have
    their own.
    """
    owner = str(run_folder.resolve())

    def write() -> None:
        if dist.get_rank() == 0 and not root.has(OWNER_FILE):
            root.create()
            root.write_atomically(OWNER_FILE, json.dumps({"run_folder": owner}).encode())

    def check() -> None:
        if not root.has(OWNER_FILE):
            raise CheckpointError(
                f"{root} is not shared by all hosts: {socket.gethostname()} does not see what the "
                "first one writes there; set checkpoint.folder to storage that all of them share"
            )
        found = json.loads(root.read(OWNER_FILE))["run_folder"]
        if found != owner:
            raise CheckpointError(
                f"{root} belongs to the run in {found}; choose another checkpoint.folder, or, if "
                f"that run has moved to {owner}, delete {root}/{OWNER_FILE}"
            )

    _on_all_ranks(write)
    _on_all_ranks(check)


class _Staging(AsyncStager):
    """Copies what a rank holds to memory of the host, which is pinned and kept between saves."""

    _synchronize_after_execute = False  # `stage` waits for its copies

    def __init__(self) -> None:
        self._copies: dict[str, Shards] = {}

    def stage(self, state_dict: dict[str, Shards]) -> dict[str, Shards]:
        if not self._copies:
            self._copies = _allocate_alike(state_dict)
        for name, shards in state_dict.items():
            for origin, box in shards.boxes.items():
                self._copies[name].boxes[origin].copy_(box.detach(), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self._copies


def _allocate_alike(state: State) -> dict[str, Shards]:
    """The same boxes in one block of memory."""
    alignment = 64
    boxes = [box for shards in state.values() for box in shards.boxes.values()]
    size = sum(-(-box.nbytes // alignment) * alignment for box in boxes)
    block = torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    used = 0

    def take(box: Tensor) -> Tensor:
        nonlocal used
        part = block[used : used + box.nbytes].view(box.dtype).view(box.shape)
        used += -(-box.nbytes // alignment) * alignment
        return part

    return {
        name: Shards(shards.shape, {origin: take(box) for origin, box in shards.boxes.items()})
        for name, shards in state.items()
    }


def _on_all_ranks(step: Callable[[], Value]) -> Value:
    """What it returns; an error of one rank is raised, as CheckpointError, on all. Collective."""
    value, error = None, ""
    try:
        value = step()
    except Exception as failed:
        error = str(failed) if isinstance(failed, CheckpointError) else repr(failed)
    for told in filter(None, groups.from_all_ranks(error)):
        raise CheckpointError(told)
    return cast(Value, value)


@contextmanager
def _failures_told() -> Iterator[None]:
    """Raise the first rank's error; torch wraps those of all ranks."""
    try:
        yield
    except CheckpointException as failed:
        rank, (error, trace) = min(failed.failures.items())
        if isinstance(error, MegavlmError):
            raise error from failed
        raise CheckpointError(f"rank {rank}: {error!r}\n{''.join(trace.format())}") from failed
