"""Saving checkpoints of a run, whatever its engine and its number of ranks.

torch Distributed Checkpoint plans who writes what; `storage.py` writes it.
"""

import shutil
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from threading import Thread
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import save

from megavlm.checkpoint.copies import Copies
from megavlm.checkpoint.listing import delete_old, delete_partial
from megavlm.checkpoint.planners import ShardsSavePlanner
from megavlm.checkpoint.shards import Shards, State
from megavlm.checkpoint.storage import CheckpointWriter, folder_name
from megavlm.checkpoint.together import failures_told, on_all_ranks
from megavlm.config.run import CheckpointSettings
from megavlm.dist import groups
from megavlm.errors import CheckpointError, DivergenceError, MegavlmError, StoppedError
from megavlm.files.folder import Folder
from megavlm.terminal import warn


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
