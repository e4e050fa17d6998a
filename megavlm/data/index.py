"""Where each sample lies in a tar shard, so that any is one read away.

Beside a shard `name.tar` lies `name.index.npy`, an array of its members; in a folder of shards
`shards.json` tells how many samples each has.
"""

import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Mapping
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megavlm.data.headers import members_of, open_tar
from megavlm.errors import DataError
from megavlm.files.folder import Folder

MANIFEST = "shards.json"
JSON, CAPTION, PICTURE = range(3)
"""Kinds of members."""
KINDS = {
    "json": JSON,
    "txt": CAPTION,
    **dict.fromkeys(("jpg", "jpeg", "png", "webp"), PICTURE),
    # Refused when they are read: a sample must not seem to have no picture.
    **dict.fromkeys(("gif", "bmp", "tif", "tiff", "avif", "heic", "jp2"), PICTURE),
}
MOST_NUMBER = 255
"""Of a picture; far more than a sample may have."""
MEMBER = np.dtype(
    [("sample", "<u4"), ("kind", "u1"), ("number", "u1"), ("offset", "<u8"), ("size", "<u8")]
)
"""One file in a tar; number: of the picture in its sample."""
HEADER_BYTES = 1024
"""What numpy writes before the members is shorter."""
END_BYTES = 1024
"""Zeros that end a tar."""
_NAME = re.compile(r"(?P<key>[^.]*)(\.(?P<number>\d{1,9}))?\.(?P<suffix>[^.]+)", re.DOTALL)

Members = NDArray[np.void]
"""Of MEMBER: sorted by sample, then kind, then number."""


class ShardSize(NamedTuple):
    """What `shards.json` tells of a shard."""

    samples: int
    size: int
    """Bytes of the tar."""


def index_name(shard: str) -> str:
    """The name of a shard's index."""
    return f"{shard.removesuffix('.tar')}.index.npy"


def index_tar(file: IO[bytes], ignored: Counter[str] | None = None) -> Members:
    """The members of a tar; those next to each other with the same key are a sample (WebDataset).

    ignored: counts, by suffix, members that no sample uses. Raises TarError unless the tar is whole
    and members of a sample lie together.
    """
    members: list[tuple[int, int, int, int, int]] = []
    keys = set[str]()
    last_key = None
    with open_tar(file) as tar:
        for member in members_of(tar):
            if not member.isfile():
                continue
            folder, _, base = member.name.rpartition("/")
            parts = _NAME.fullmatch(base)
            kind = KINDS.get(parts["suffix"].lower()) if parts else None
            if parts is None or kind is None:
                if ignored is not None:
                    ignored[base.rpartition(".")[2]] += 1
                continue
            key = f"{folder}/{parts['key']}"
            if key != last_key and key in keys:
                raise tarfile.TarError(
                    f"members of the sample {parts['key']!r} do not lie next to each other; write "
                    "it with `tar --sort=name`"
                )
            keys.add(key)
            last_key = key
            number = min(MOST_NUMBER, int(parts["number"] or 0))
            members.append((len(keys) - 1, kind, number, member.offset_data, member.size))
        # Cut off between two members, it would read like a shorter one.
        file.seek(tar.offset)
        if file.read(END_BYTES) != bytes(END_BYTES):
            raise tarfile.TarError("its end is missing; copy it again")
    return np.sort(np.array(members, MEMBER), order=["sample", "kind", "number"], kind="stable")


def samples_of(members: Members) -> int:
    """How many samples a shard has."""
    return int(members["sample"][-1]) + 1 if len(members) else 0


def members_per_sample(members: Members, kind: int, samples: int) -> NDArray[np.int64]:
    """How many members of a kind each sample of a shard has."""
    return np.bincount(members["sample"][members["kind"] == kind], minlength=samples)


def bytes_per_sample(members: Members, kind: int, samples: int) -> NDArray[np.int64]:
    """How many bytes each sample's members of a kind have."""
    chosen = members[members["kind"] == kind]
    return np.bincount(chosen["sample"], chosen["size"], minlength=samples).astype(np.int64)


def read_index(folder: Folder, shard: str, expected: ShardSize | None = None) -> Members:
    """A shard's index, mapped into memory if it is a local file; raises DataError if broken.

    expected: what `shards.json` says, if it does.
    """
    name = index_name(shard)
    content = folder.mapped(name)
    try:
        members = _members_of(content)
        if expected is None:
            return members
        steps = np.diff(members["sample"].astype(np.int64), prepend=-1)
        if samples_of(members) != expected.samples or not ((steps == 0) | (steps == 1)).all():
            raise ValueError(f"it does not number {expected.samples} samples, as {MANIFEST} says")
        room = expected.size - np.minimum(members["offset"], expected.size)
        if (members["size"] > room).any():
            raise ValueError(f"it reaches beyond the shard's {expected.size} bytes")
    except ValueError as error:
        raise DataError(
            f"index {folder}/{name} is broken: {error}; delete it and run `megavlm data index "
            f"{folder}`"
        ) from error
    return members


def _members_of(content: NDArray[np.uint8]) -> Members:
    """Those in an array file of numpy's, not copied; raises ValueError if it has no such."""
    header = io.BytesIO(content[:HEADER_BYTES].tobytes())
    np.lib.format.read_magic(header)
    shape, _, dtype = np.lib.format.read_array_header_1_0(header)
    if dtype != MEMBER or len(shape) != 1:
        raise ValueError("it is no list of members")
    return content[header.tell() :].view(MEMBER).reshape(shape)


def write_index(folder: Folder, shard: str, members: Members) -> None:
    """Have it beside its shard, whole or not at all."""
    content = io.BytesIO()
    np.save(content, members, allow_pickle=False)
    folder.write_atomically(index_name(shard), content.getvalue())


def write_manifest(folder: Folder, shards: Mapping[str, ShardSize]) -> None:
    """Write `shards.json`."""
    record = {"shards": {name: list(size) for name, size in shards.items()}}
    folder.write_atomically(MANIFEST, json.dumps(record).encode())


def read_manifest(folder: Folder) -> dict[str, ShardSize]:
    """How large a folder's shards are, in the order of their names; raises DataError."""
    try:
        record = json.loads(folder.read(MANIFEST))
        # There may be hundreds of thousands: numpy looks at them at once.
        sizes = np.array([*record["shards"].values()] or [[0, 0]])
        if sizes.dtype.kind != "i" or sizes.shape[1:] != (2,) or (sizes < 0).any():
            raise ValueError("each shard must have two whole numbers from 0 on")
        if not sizes[:, 0].any():
            raise ValueError("no shard has a sample")
        shards = {name: ShardSize(*record["shards"][name]) for name in sorted(record["shards"])}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{folder}/{MANIFEST} is broken: {error}; delete it and run `megavlm data index "
            f"{folder}`"
        ) from error
    return shards
