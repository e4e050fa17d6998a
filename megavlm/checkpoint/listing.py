"""The checkpoints in a run's folder: which there are, whose they are, and which of them stay."""

import json
import re
import socket
from collections.abc import Collection, Iterator
from pathlib import Path
from uuid import uuid4

import torch.distributed as dist

from megavlm.checkpoint.storage import STATE_FILE, folder_name, read_state
from megavlm.checkpoint.together import on_all_ranks
from megavlm.config.run import CheckpointSettings
from megavlm.errors import CheckpointError, StorageError
from megavlm.files.folder import Folder
from megavlm.terminal import warn

OWNER_FILE = "run.json"
"""Whose checkpoints a folder holds; a folder that is made anew has another one."""

_STEP = re.compile(r"step-(\d{8,})")


def latest_checkpoint(root: Folder) -> Folder | None:
    """The newest complete checkpoint of a run, or None."""
    return next(whole_checkpoints(root), None)


def newest_checkpoint(root: Folder, settings: CheckpointSettings) -> Folder | None:
    """The same; where damaged ones are left out, of those that can tell what they hold."""
    if settings.on_damage == "stop":
        return latest_checkpoint(root)
    return next(filter(_tells, whole_checkpoints(root)), None)


def _tells(folder: Folder) -> bool:
    try:
        read_state(folder)
    except StorageError:
        raise
    except CheckpointError:
        return False
    return True


def newest_step(root: Folder) -> int:
    """Of the newest complete checkpoint, by its name, as it may be damaged; 0 if there is none."""
    return next(_whole_steps(root), 0)


def whole_checkpoints(root: Folder) -> Iterator[Folder]:
    """The complete checkpoints of a run, the newest first."""
    return (root / folder_name(step) for step in _whole_steps(root))


def _whole_steps(root: Folder) -> Iterator[int]:
    return (step for step in reversed(_steps(root)) if _is_whole(root / folder_name(step)))


def _is_whole(folder: Folder) -> bool:
    return folder.has(STATE_FILE)


def delete_old(root: Folder, settings: CheckpointSettings, keep: Collection[int] = ()) -> None:
    """Delete what the settings do not keep, and what crashes have left before the newest.

    What cannot be listed or deleted is told, and stays.
    """
    try:
        steps = _steps(root)
        complete = [step for step in steps if _is_whole(root / folder_name(step))]
    except CheckpointError as error:
        warn(str(error))
        return
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
            warn(str(error))


def _steps(root: Folder) -> list[int]:
    names = (_STEP.fullmatch(name) for name in root.names())
    return sorted(int(name[1]) for name in names if name)


def delete_partial(folder: Folder) -> None:
    """Delete what is no whole checkpoint; all ranks must have stopped writing there."""
    try:
        if folder.names() and not _is_whole(folder):
            folder.delete()
    except CheckpointError as error:
        warn(str(error))


def claim(root: Folder, run_folder: Path) -> None:
    """Have a folder of checkpoints to oneself, and see that all ranks share it; collective.

    Raises CheckpointError, on all ranks, if it belongs to another run, or if the hosts each have
    their own.
    """
    owner = str(run_folder.resolve())

    def write() -> None:
        if dist.get_rank() == 0 and not root.has(OWNER_FILE):
            root.create()
            content = {"run_folder": owner, "id": uuid4().hex}  # a folder made anew has another
            root.write_atomically(OWNER_FILE, json.dumps(content).encode())

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

    on_all_ranks(write)
    on_all_ranks(check)
