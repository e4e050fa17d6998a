"""Saving and loading checkpoints of a run, whatever its engine and its number of ranks.

torch Distributed Checkpoint plans who writes and reads what; `storage.py` writes and reads.
"""

import hashlib
import shutil
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from threading import Thread
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from megavlm.checkpoint.copies import Copies
from megavlm.checkpoint.lazy import LazyTensor
from megavlm.checkpoint.listing import delete_old, delete_partial
from megavlm.checkpoint.planners import ShardsLoadPlanner, ShardsSavePlanner
from megavlm.checkpoint.shards import Shards, State, whole
from megavlm.checkpoint.storage import (
    CheckpointReader,
    CheckpointWriter,
    folder_name,
    read_state,
    state_sha256,
)
from megavlm.checkpoint.tensor_file import DTYPES
from megavlm.checkpoint.together import failures_told, on_all_ranks
from megavlm.config.run import CheckpointSettings
from megavlm.dist import groups
from megavlm.errors import CheckpointError, DivergenceError, MegavlmError, StoppedError
from megavlm.files.folder import Folder
from megavlm.terminal import warn

CHECKERS = 4
"""Files whose checksums a rank computes at once."""


@dataclass
class _Save:
    """One save, from its beginning to where all ranks know how it has ended."""

    step: int
    to_disk: bool
    to_memory: bool
    begun: float
    """On the clock `time.perf_counter`, as all here."""
    copied: float = 0.0
    """When its copy in memory was done, or had failed."""
    copy_error: CheckpointError | None = None


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
        copies: Copies | None = None,
    ) -> None:
        """keep: steps whose checkpoints stay in any case. on_progress: called while writing.

        tell: hears, as an event's name and fields, when checkpoints are begun and committed, and
        how long the training has waited for them. copies: in memory, which `save` may make.
        """
        self._root = root
        self._settings = settings
        self._keep = keep
        self._on_progress = on_progress
        self._tell = tell
        self._copies = copies
        # Of its own: the training goes on meanwhile, over its own groups.
        self._group: dist.ProcessGroup = cast(Any, dist.new_group(backend="gloo"))
        self._staging = _Staging()
        self._running: Future[None] | None = None
        self._planner = ShardsSavePlanner()
        self._newest = _Save(0, to_disk=False, to_memory=False, begun=0.0)
        self._failures: list[CheckpointError] = []
        """Of the newest saves to the disk, one after the other."""
        self._last_copy_failed = False

    def __enter__(self) -> "CheckpointSaver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finish the save in the background, also when the training ends with an error of ours.

        Others are raised, too, where a rank is gone that the save needs, and others wait for this
        one. Copies are deleted where all ranks come here alike: it goes on from the disk.
        """
        if kind is None:
            self._settle()
        elif issubclass(kind, MegavlmError | StoppedError):
            with suppress(Exception):  # the first error is the one to tell
                self.wait()
        if kind is None or issubclass(kind, StoppedError | DivergenceError):
            if self._copies is not None:
                on_all_ranks(self._copies.delete)  # none ends before all are gone
            dist.destroy_process_group(self._group)

    def save(
        self,
        step: int,
        shards: State,
        state: dict[str, Any],
        *,
        to_disk: bool = True,
        to_memory: bool = False,
    ) -> None:
        """Write the checkpoint of a step, after the one before it is written.

        `state` is plain data. If this checkpoint, or the one before it, cannot be written, raises
        CheckpointError on all ranks, or tells it, as `on_failure` says; nothing older is touched.

        to_memory: to the hosts' memory first. A copy that fails is told. One that is to go there
        alone is left out while the save before it is under way: the training would wait.
        """
        if not to_disk and self._running is not None:
            self._tell("memory_copy_left_out", step=step)
            return
        self._settle()
        now = _Save(step, to_disk, to_memory, time.perf_counter())
        self._newest = now
        if to_disk:
            self._tell("checkpoint_begun", step=step)
        if self._settings.asynchronous:
            tensors = self._staging.copy(shards)
            self._running = _in_background(lambda: self._write(now, tensors, state))
        else:
            self._finish(lambda: self._write(now, shards, state))
            self._go_on()
        copied = "checkpoint_copied" if to_disk else "memory_copy_begun"
        self._tell(copied, step=step, stalled_seconds=time.perf_counter() - now.begun)

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

    def _write(self, now: _Save, tensors: State, state: dict[str, Any]) -> None:
        if now.to_memory:
            assert self._copies is not None
            try:
                self._copies.write(now.step, tensors, state, self._group, self._on_progress)
            except CheckpointError as error:
                now.copy_error = error
            now.copied = time.perf_counter()
        if now.to_disk:
            self._planner = ShardsSavePlanner()
            writer = CheckpointWriter(
                self._root / folder_name(now.step),
                {"step": now.step, **state},
                on_committed=lambda: delete_old(self._root, self._settings, self._keep),
                on_progress=self._on_progress,
            )
            with failures_told():
                save(
                    dict(tensors),
                    storage_writer=writer,
                    planner=self._planner,
                    process_group=self._group,
                )
            if self._copies is not None:  # whoever deletes this checkpoint wants to go back
                self._copies.delete()

    def _settle(self) -> None:
        if self._running is not None:
            self._finish(self._running.result)
            self._go_on()

    def _finish(self, written: Callable[[], object]) -> None:
        """Count the failures, and leave nothing of the checkpoint that has failed."""
        self._running = None
        started, now, error = time.perf_counter(), self._newest, None
        try:
            written()
        except CheckpointError as failed:
            error = failed
        # In the foreground `save` tells it.
        stalled_seconds = time.perf_counter() - started if self._settings.asynchronous else 0.0
        if now.to_memory:
            self._copy_done(now, 0.0 if now.to_disk else stalled_seconds)
        if now.to_disk:
            self._checkpoint_done(now, error, stalled_seconds)

    def _copy_done(self, now: _Save, stalled_seconds: float) -> None:
        self._tell(
            "memory_copy_failed" if now.copy_error else "memory_copy_made",
            step=now.step,
            seconds=now.copied - now.begun,
            stalled_seconds=stalled_seconds,
        )
        if now.copy_error and not self._last_copy_failed and dist.get_rank() == 0:
            warn(f"no copy of step {now.step} in memory: {now.copy_error}")
        self._last_copy_failed = now.copy_error is not None

    def _checkpoint_done(
        self, now: _Save, error: CheckpointError | None, stalled_seconds: float
    ) -> None:
        if error is None:
            self._failures.clear()
            if self._copies is not None:
                self._copies.on_disk = now.step
        else:
            self._failures.append(error)
            if dist.get_rank() == 0:
                delete_partial(self._root / folder_name(now.step))  # no rank writes any more
                self._failures[-1] = CheckpointError(f"{error} ({self._space()})")
                self._failures[-1].__cause__ = error
        self._tell(
            "checkpoint_failed" if error else "checkpoint_committed",
            step=now.step,
            seconds=time.perf_counter() - now.begun,
            stalled_seconds=stalled_seconds,
        )

    def _go_on(self) -> None:
        if not self._failures or not self._newest.to_disk:
            return
        if self._settings.on_failure == "stop":
            raise self._failures[-1]
        if dist.get_rank() == 0:
            warn(
                f"no checkpoint of step {self._newest.step}, the {len(self._failures)}. failure in "
                f"a row; training goes on to the next: {self._failures[-1]}"
            )

    def _space(self) -> str:
        needed = f"a checkpoint takes {self._planner.total_bytes / 1e9:.3g} GB"
        with suppress(OSError):
            if self._root.local_path is not None:
                free = shutil.disk_usage(self._root.local_path).free
                return f"{needed}, {free / 1e9:.3g} GB are free in {self._root}"
        return f"{needed} in {self._root}"


def _in_background(write: Callable[[], None]) -> Future[None]:
    """In a thread that no process waits for when it ends."""
    written: Future[None] = Future()

    def run() -> None:
        try:
            written.set_result(write())
        except BaseException as error:
            written.set_exception(error)

    Thread(target=run, name="checkpoint", daemon=True).start()
    return written


def load_checkpoint(folder: Folder, shards: State) -> None:
    """Overwrite what this rank holds with a checkpoint's tensors, in place; collective.

    Their types are converted. The ranks first check all files together, each its share. Raises
    CheckpointError, on all ranks, for a file that is missing or not as it was written and for a
    tensor that is missing or of another shape.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    with failures_told():
        reader = on_all_ranks(lambda: CheckpointReader(folder))
        _require_same(folder, state_sha256(reader.state))
        on_all_ranks(lambda: check_shapes(reader, shards))
        on_all_ranks(lambda: check_files(reader, sorted(reader.state["files"])[rank::ranks]))
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
    saved = on_all_ranks(lambda: read_state(folder))["tensors"]
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


class _Staging:
    """Memory of the host, which is pinned and kept between saves, for what a rank holds."""

    def __init__(self) -> None:
        self._copies: dict[str, Shards] = {}

    def copy(self, state: State) -> State:
        """What it is now, however it changes."""
        if not self._copies:
            self._copies = _allocate_alike(state)
        for name, shards in state.items():
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
