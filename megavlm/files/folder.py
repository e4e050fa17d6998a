"""A folder on a local disk or in an object store."""

import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import partial
from multiprocessing.util import Finalize
from pathlib import Path
from typing import IO, Any, NamedTuple, cast
from uuid import uuid4

import numpy as np
import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from megavlm.errors import StorageError
from megavlm.files.copies import copy_path, linked_copy
from megavlm.files.ranges import Range, RangeReader

WRITE_REMEDY = (
    "earlier checkpoints are untouched. Free space or permit writing there, and run again"
)
READ_REMEDY = "check that place, and that you may read there"
DELETE_REMEDY = "permit deleting there, and run again"
UNWRITABLE_REMEDY = "permit writing there or choose another checkpoint.folder"
WRITE_BYTES = 16 << 20
"""At once: a file in an object store keeps a copy until it has enough for a request."""
MAX_SMALL_BYTES = 100_000_000
"""Of a file that is read whole; the `state.json` of 30.5 billion parameters has 0.4 MB."""


class Entry(NamedTuple):
    """What a folder's listing tells of a file."""

    size: int
    """Bytes."""
    modified: float
    """When it was written, in seconds; 0 if that is not told."""


class Folder:
    """A path, or a URL that fsspec knows (`s3://bucket/run`, say); it need not exist yet.

    Raises StorageError for a URL whose protocol is unknown or lacks its package, and for
    whatever its disk or store says later. It belongs to the process that has made it.

    write_remedy: what errors of writing advise.
    """

    def __init__(self, place: str | Path, write_remedy: str = WRITE_REMEDY) -> None:
        self.place = str(place).rstrip("/")
        self._write_remedy = write_remedy
        try:
            fs, self._root = url_to_fs(self.place)
        except (ImportError, ValueError) as error:
            raise StorageError(f"cannot use folder {self.place}: {error}") from error
        self._fs: Any = fs
        self._copies: dict[str, Path] = {}
        # Not weakref's, which the end of a process that was forked leaves out.
        Finalize(self, _delete, [self._copies], exitpriority=0)
        self.is_local = isinstance(fs, LocalFileSystem)
        # Paths of object stores start with a bucket.
        self._in_bucket = not self._root.startswith("/")

    @property
    def local_path(self) -> Path | None:
        """Where it lies on this machine; None in an object store."""
        return Path(self._root) if self.is_local else None

    def __str__(self) -> str:
        return self.place

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Folder) and self.place == other.place

    def __hash__(self) -> int:
        return hash(self.place)

    def __truediv__(self, name: str) -> "Folder":
        return Folder(f"{self.place}/{name}", self._write_remedy)

    def sizes(self) -> dict[str, int]:
        """Of the files and folders in it, in bytes, by name; none if it does not exist."""
        return {name: entry.size for name, entry in self.entries().items()}

    def entries(self) -> dict[str, Entry]:
        """The files and folders in it, by name; none if it does not exist."""
        self._fs.invalidate_cache()  # others write here, too
        with _told(f"cannot list {self}", READ_REMEDY):
            try:
                entries = self._fs.ls(self._root, detail=True)
            except FileNotFoundError:
                return {}
        # Of a file, and of a bucket's key that ends with a slash, stores list itself.
        if [(entry["name"], entry["type"]) for entry in entries] == [(self._root, "file")]:
            raise StorageError(f"{self} is a file, not a folder; name a folder")
        paths = {entry["name"].rstrip("/"): _entry(entry) for entry in entries}
        return {path.rpartition("/")[2]: paths[path] for path in paths if path != self._root}

    def names(self) -> list[str]:
        """Of the files and folders in it, sorted; none if it does not exist."""
        return sorted(self.sizes())

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        # fsspec's own `exists` and `isfile` say no when the store does not answer.
        self._fs.invalidate_cache()
        with _told(f"cannot find {self}/{name}", READ_REMEDY):
            try:
                return self._fs.info(self._path(name))["type"] == "file"
            except FileNotFoundError:
                return False

    def size(self, name: str) -> int:
        """Of a file, in bytes."""
        with _told(f"cannot read {self}/{name}", READ_REMEDY):
            return self._fs.size(self._path(name))

    def create(self) -> None:
        """Make it, and what lies above it."""
        # A bucket needs no folders, and the file systems would make a bucket that is misspelt.
        if not self._in_bucket:
            with _told(f"cannot write to {self}", self._write_remedy):
                self._fs.makedirs(self._root, exist_ok=True)

    def read(self, name: str) -> bytes:
        """A small file, whole."""
        with _told(f"cannot read {self}/{name}", READ_REMEDY):
            content = self._fs.cat_file(self._path(name), start=0, end=MAX_SMALL_BYTES + 1)
        if len(content) > MAX_SMALL_BYTES:
            raise StorageError(f"{self}/{name} is larger than {MAX_SMALL_BYTES} bytes")
        return content

    def mapped(self, name: str) -> NDArray[np.uint8]:
        """A small file, whole, mapped into memory; none stays open.

        Of one in an object store it is a copy, which all processes of this machine share until one
        of them calls `forget`, or ends.
        """
        with _told(f"cannot read {self}/{name}", READ_REMEDY):
            path = self._path(name)
            if self.is_local:
                return _mapped(path)
            copy = copy_path(f"{self}/{name} {self._fs.ukey(path)}")
            with linked_copy(copy, lambda: self.read(name)) as link:
                self._copies[name] = copy
                return _mapped(link)

    def forget(self, name: str) -> None:
        """Delete the copy of an object store's file that `mapped` has made; maps of it stay."""
        if name in self._copies:
            _delete({name: self._copies.pop(name)})

    def open(self, name: str, mode: str, ranges: Iterable[Range] = ()) -> IO[bytes]:
        """A file, for reading ("rb") or writing anew ("wb").

        ranges: what will be read, one after the other; it spares an object store requests.
        """
        if mode == "wb":
            new = _NewFile(self._fs, self._path(name), f"{self}/{name}", self._write_remedy)
            return cast(IO[bytes], new)
        if not self.is_local:
            return io.BufferedReader(RangeReader(partial(self._fetch, name), ranges))
        with _told(f"cannot read {self}/{name}", READ_REMEDY):
            return io.BufferedReader(_LocalFile(self._path(name)))

    def read_ranges(self, names: Sequence[str], ranges: Sequence[Range]) -> list[bytes]:
        """A range of each file; those of an object store come at once."""
        starts, stops = map(list, zip(*ranges, strict=True))
        with _told(f"cannot read files of {self}", READ_REMEDY):
            contents = self._fs.cat_ranges([self._path(name) for name in names], starts, stops)
        for name, content in zip(names, contents, strict=True):
            if isinstance(content, Exception):
                with _told(f"cannot read {self}/{name}", READ_REMEDY):
                    raise content
        return contents

    def _fetch(self, name: str, ranges: list[Range]) -> list[bytes]:
        return self.read_ranges([name] * len(ranges), ranges)

    def write_atomically(self, name: str, content: bytes | memoryview) -> None:
        """Write a file that is there whole or not at all, whatever happens.

        Object stores only ever show whole files. On a disk the file gets its name last; several
        processes may write the same one, of which those that are killed leave `NAME.*.partial`.
        """
        first_name = name if self._in_bucket else f"{name}.{uuid4().hex}.partial"
        try:
            with self.open(first_name, "wb") as file:
                file.write(content)
                sync(file)
        except StorageError:
            if first_name != name:  # in a bucket that would be the file from before
                with suppress(StorageError):
                    self.delete_file(first_name)
            raise
        with _told(f"cannot write {self}/{name}", self._write_remedy):
            if self.is_local:
                os.replace(self._path(first_name), self._path(name))
                sync_path(self._root)
            elif not self._in_bucket:
                self._fs.mv(self._path(first_name), self._path(name))

    def sync_name(self) -> None:
        """Have it on its disk, if it is a local one, that the folder above has this one."""
        if self.is_local:
            with _told(f"cannot write {self}", self._write_remedy):
                sync_path(os.path.dirname(self._root))

    def check_writable(self, remedy: str = UNWRITABLE_REMEDY) -> None:
        """Raise StorageError unless files can be written here, and deleted."""
        try:
            self.create()
            probe = f"writable-{uuid4().hex}"  # the ranks do this at once
            self.write_atomically(probe, b"?")
            self.delete_file(probe)
        except StorageError as error:
            raise StorageError(
                f"cannot write to {self}: {_problem(error.__cause__, remedy)}"
            ) from error

    def delete_file(self, name: str) -> None:
        """Pass over one that is not there: whoever else writes here may have taken it away."""
        with (
            _told(f"cannot delete {self}/{name}", DELETE_REMEDY),
            suppress(FileNotFoundError),
        ):
            self._fs.rm_file(self._path(name))

    def delete(self) -> None:
        """Remove it with everything in it."""
        with _told(f"cannot delete {self}", DELETE_REMEDY):
            self._fs.rm(self._root, recursive=True)

    def _path(self, name: str) -> str:
        if not is_plain(name):
            raise StorageError(f"{name!r} is no name of a file in {self}")
        return f"{self._root}/{name}"


def _mapped(path: str | Path) -> NDArray[np.uint8]:
    # numpy's and Python's maps each keep their file open, and a process may have few.
    return torch.from_file(str(path), size=os.path.getsize(path), dtype=torch.uint8).numpy()


def _delete(copies: Mapping[str, Path]) -> None:
    for copy in copies.values():
        copy.unlink(missing_ok=True)


def is_plain(name: str) -> bool:
    """Whether a name is that of something in a folder, not below it or elsewhere."""
    return "/" not in name and name not in ("", ".", "..")


def is_partial(name: str) -> bool:
    """Whether a name is that of a file that `write_atomically` has not finished."""
    return re.search(r"\.[0-9a-f]{32}\.partial$", name) is not None


class _LocalFile(io.FileIO):
    """A file on a disk, for reading, whose errors are told as those of a store are."""

    def readinto(self, target: Any, /) -> int | None:
        with self._told():
            return super().readinto(target)

    def readall(self) -> bytes:
        with self._told():
            return super().readall()

    def _told(self) -> AbstractContextManager[None]:
        return _told(f"cannot read {self.name}", READ_REMEDY)


class _NewFile:
    """A file that is being written; half of one never appears in an object store."""

    def __init__(self, fs: Any, path: str, where: str, remedy: str) -> None:
        self._where, self._remedy = where, remedy
        with self._told():
            self._file: Any = fs.open(path, "wb")
        self._is_local = isinstance(fs, LocalFileSystem)

    def write(self, content: bytes | memoryview) -> None:
        content = memoryview(content)
        with self._told():
            for start in range(0, len(content), WRITE_BYTES):
                self._file.write(content[start : start + WRITE_BYTES])

    def sync(self) -> None:
        with self._told():
            if self._is_local:
                self._file.flush()
                os.fsync(self._file.fileno())

    def __enter__(self) -> "_NewFile":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            with self._told():
                self._file.close()
        else:
            with suppress(Exception):
                if self._is_local:
                    self._file.close()  # else a full disk stays full when it is deleted
                else:  # closing it would make it a file
                    self._file.discard()
                    self._file.closed = True

    def _told(self) -> AbstractContextManager[None]:
        return _told(f"cannot write {self._where}", self._remedy)


def sync_path(path: str | Path) -> None:
    """Have a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync(file: Any) -> None:
    """Have what was written to a file on its disk, if it is a local one."""
    file.sync()


def _entry(listed: Mapping[str, Any]) -> Entry:
    modified = listed.get("mtime") or listed.get("LastModified")
    return Entry(listed["size"], _seconds(modified))


def _seconds(modified: Any) -> float:
    """A time as any of fsspec's file systems tells it."""
    match modified:
        case int() | float():
            return float(modified)
        case datetime():
            return modified.timestamp()
        case str():
            with suppress(ValueError):
                return float(modified)
            with suppress(ValueError):
                return datetime.fromisoformat(modified).timestamp()
            with suppress(ValueError):
                return parsedate_to_datetime(modified).timestamp()  # as in HTTP
    return 0.0


@contextmanager
def _told(what: str, remedy: str) -> Iterator[None]:
    """Turn what a disk or a store says into a StorageError."""
    try:
        yield
    except Exception as error:  # object stores have errors of their own
        raise StorageError(f"{what}: {_problem(error, remedy)}") from error


def _problem(error: BaseException | None, remedy: str) -> str:
    """What a disk or a store says, with the remedy; for what names the wrong thing its own."""
    match error:
        case NotADirectoryError() | FileExistsError():
            return f"{_file_on_the_way(error.filename)} is a file, not a folder; name a folder"
        case IsADirectoryError():
            folder = error.filename2 or error.filename or "it"  # the second is where a move goes
            return f"{folder} is a folder, not a file; name a file"
        case _:
            return f"{_said(error)}; {remedy}"


def _file_on_the_way(path: str | None) -> str:
    """The file that stands where a path needs a folder."""
    if path is None:
        return "one of its parts"
    return next((str(p) for p in reversed([Path(path), *Path(path).parents]) if p.is_file()), path)


def _said(error: BaseException | None) -> str:
    """In words; some errors have only a type."""
    return getattr(error, "strerror", None) or str(error).rstrip(".") or type(error).__name__
