"""Files of a run that only grow, and whose disk may be full for a while."""

import errno
import os
from pathlib import Path

from megavlm.terminal import warn


class Appended:
    """What the disk does not take waits for the next write: a full one does not end a run."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: list[bytes] = []

    def write(self, content: bytes) -> None:
        """Add to the file, whole or later."""
        told = len(self._waiting) > 0
        self._waiting.append(content)
        try:
            self._write(b"".join(self._waiting))
        except OSError as error:
            if not told:
                warn(
                    f"cannot write {self._path}: {error.strerror}; training goes on, and what is "
                    "to stand there is kept in memory until there is room"
                )
        else:
            self._waiting.clear()

    def sync(self) -> None:
        """Have what was written on the disk."""
        with self._path.open("ab") as file:
            os.fsync(file.fileno())

    def _write(self, content: bytes) -> None:
        with self._path.open("ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            try:
                if file.write(content) < len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(size)  # else the next would stand behind half a line
                raise
