"""Headers of members, read from the middle of a tar.

A name that a member's header has no room for lies in headers of their own before it: GNU's of the
types L and K, PAX's of the type x.
"""

import io
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from typing import IO

BLOCK_BYTES = 512
HEADERS_BYTES = 8 * BLOCK_BYTES
"""So far before a member's header those of its name are looked for."""

_EXTENSIONS = (b"L", b"K", b"x")


def from_own(content: bytes, header: int) -> bytes:
    """Content from the first header on that belongs to the member whose own is at `header`."""
    start = header
    while (before := _extension_before(content, start)) is not None:
        start = before
    return content[start:]


def _extension_before(content: bytes, end: int) -> int | None:
    """Where a header begins whose data ends here."""
    for start in range(end - 2 * BLOCK_BYTES, max(0, end - HEADERS_BYTES) - 1, -BLOCK_BYTES):
        if _extension_blocks(content, start) == (end - start) // BLOCK_BYTES:
            return start
    return None


def _extension_blocks(content: bytes, at: int) -> int:
    """Blocks of the header of a name that is here, with its data; 0 of anything else."""
    block = content[at : at + BLOCK_BYTES]
    if block[156:157] not in _EXTENSIONS:  # most are none, which costs little
        return 0
    with suppress(tarfile.HeaderError):
        size = tarfile.TarInfo.frombuf(block, "utf-8", "replace").size
        return 1 + -(-size // BLOCK_BYTES) if 0 < size < HEADERS_BYTES else 0
    return 0


def own_header(content: bytes) -> int:
    """Where the own header is of the member whose headers content begins with."""
    at = 0
    while blocks := _extension_blocks(content, at):
        at += blocks * BLOCK_BYTES
    return at


def key_of(content: bytes) -> str:
    """The key that the name of a member begins with; raises tarfile.HeaderError.

    content: begins with the member's headers.
    """
    end = own_header(content) + BLOCK_BYTES
    name = tarfile.TarInfo.frombuf(content[end - BLOCK_BYTES : end], "utf-8", "replace").name
    if end > BLOCK_BYTES:
        # Whoever wrote such headers may have written anything in them.
        with (
            suppress(tarfile.TarError),
            open_tar(io.BytesIO(content[:end])) as tar,
        ):
            name = next((member.name for member in members_of(tar)), name)
    return name.rpartition("/")[2].partition(".")[0]


def size_in(header: bytes) -> int | None:
    """The size that a member's own header tells; None if it is no header."""
    with suppress(tarfile.HeaderError):
        return tarfile.TarInfo.frombuf(header, "utf-8", "replace").size
    return None


def open_tar(file: IO[bytes]) -> tarfile.TarFile:
    """For reading; raises TarError where its first headers say what cannot be."""
    try:
        return tarfile.open(fileobj=file, mode="r:")
    except (ValueError, OverflowError) as error:
        raise tarfile.TarError(f"a header is broken: {error}") from error


def members_of(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """In order; raises TarError where a header says what cannot be."""
    last = -1
    try:
        for member in tar:
            if member.size < 0 or member.offset_data <= last:
                raise tarfile.TarError(f"member {member.name!r} has an impossible size")
            last = member.offset_data
            yield member
    except (ValueError, OverflowError) as error:
        raise tarfile.TarError(f"a header is broken: {error}") from error
