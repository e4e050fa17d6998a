"""Copies of an object store's small files on this machine, which its processes share."""

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from megavlm.errors import StorageError


def copy_path(identity: str) -> Path:
    """Where the copy lies of what has this identity, which others have made or will make."""
    return _folder() / hashlib.sha256(identity.encode()).hexdigest()


def have_copy(path: Path, read: Callable[[], bytes]) -> None:
    """Make a copy of what `read` gives, unless there is one; it appears whole."""
    if path.exists():
        return
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(read())
    os.rename(file.name, path)


def _folder() -> Path:
    """In the folder of temporary files; raises StorageError if somebody else has made it."""
    folder = Path(tempfile.gettempdir()) / f"megavlm-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.stat(follow_symlinks=False)
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise StorageError(f"{folder} is not this user's alone; delete it, or set TMPDIR")
    return folder
