"""A folder on a local disk or in an object store."""

import os
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from megavlm.errors import CheckpointError


class Folder:
    """A path, or a URL that fsspec knows (`s3://bucket/run`, say); it need not exist yet.

    Raises CheckpointError for a URL whose protocol is unknown or lacks its package.
    """

    def __init__(self, place: str | Path) -> None:
        self.place = str(place).rstrip("/")
        try:
            fs, self._root = url_to_fs(self.place)
        except (ImportError, ValueError) as error:
            raise CheckpointError(f"cannot use folder {self.place}: {error}") from error
        self._fs: Any = fs
        self.is_local = isinstance(fs, LocalFileSystem)

    def __str__(self) -> str:
        return self.place

    def __truediv__(self, name: str) -> "Folder":
        return Folder(f"{self.place}/{name}")

    def names(self) -> list[str]:
        """Of the files and folders in it, sorted; none if it does not exist."""
        self._fs.invalidate_cache()  # others write here, too
        if not self._fs.isdir(self._root):
            return []
        paths = self._fs.ls(self._root, detail=False)
        return sorted(path.rstrip("/").rpartition("/")[2] for path in paths)

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return self._fs.isfile(self._path(name))

    def size(self, name: str) -> int:
        """Of a file, in bytes."""
        return self._fs.size(self._path(name))

    def create(self) -> None:
        """Make it, and what lies above it."""
        self._fs.makedirs(self._root, exist_ok=True)

    def read(self, name: str) -> bytes:
        """A small file, whole."""
        return self._fs.cat_file(self._path(name))

    def open(self, name: str, mode: str) -> IO[bytes]:
        """A file, for reading ("rb") or writing anew ("wb")."""
        return self._fs.open(self._path(name), mode)

    def write_atomically(self, name: str, content: bytes) -> None:
        """Write a small file that is there whole or not at all, whatever happens.

        Object stores only ever show whole files. On a disk the file gets its name last.
        """
        partial = f"{name}.partial" if self.is_local else name
        with self.open(partial, "wb") as file:
            file.write(content)
            sync(file)
        if self.is_local:
            os.replace(self._path(partial), self._path(name))
            directory = os.open(self._root, os.O_RDONLY)
            os.fsync(directory)
            os.close(directory)

    def check_writable(self) -> None:
        """Raise CheckpointError unless files can be written here."""
        try:
            self.create()
            probe = f"writable-{uuid4().hex}"  # the ranks do this at once
            self.write_atomically(probe, b"?")
            self.delete_file(probe)
        except Exception as error:  # object stores have errors of their own
            raise CheckpointError(
                f"cannot write to {self}: {error}; permit writing there or choose another "
                "checkpoint.folder"
            ) from error

    def delete_file(self, name: str) -> None:
        self._fs.rm_file(self._path(name))

    def delete(self) -> None:
        """Remove it with everything in it."""
        self._fs.rm(self._root, recursive=True)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


def sync(file: IO[bytes]) -> None:
    """Have what was written to a local file on its disk."""
    file.flush()
    if hasattr(file, "fileno"):
        os.fsync(file.fileno())
