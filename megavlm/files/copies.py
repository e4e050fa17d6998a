"""Copies of an object store's small files on this machine, which its processes share."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from megavlm.errors import StorageError


def copy_path(identity: str) -> Path:
    """Where the copy lies of what has this identity, which others have made or will make."""
    return _folder() / hashlib.sha256(identity.encode()).hexdigest()


@contextmanager
def linked_copy(path: Path, read: Callable[[], bytes]) -> Iterator[Path]:
    """Have a copy, of what `read` gives if there is none yet; yields a link to open it by.

    The link is the caller's own: another process may delete the copy at any moment.
    """
    link = path.with_name(f"{path.name}-{uuid4().hex}")
    try:
        try:
            os.link(path, link)
        except FileNotFoundError:
            link.write_bytes(read())
            with suppress(FileExistsError):  # another process was as quick
                os.link(link, path)
        yield link
    finally:
        link.unlink(missing_ok=True)


def _folder() -> Path:
    """In the folder of temporary files; raises StorageError if somebody else has made it."""
    folder = Path(tempfile.gettempdir()) / f"megavlm-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.stat(follow_symlinks=False)
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise StorageError(f"{folder} is not this user's alone; delete it, or set TMPDIR")
    return folder
