"""Going on from copies in memory: the newest whole one becomes a checkpoint on the disk.

So it is loaded as any other, on any number of ranks and any engine, and hosts may be gone.
"""

import hashlib
import socket
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, cast

import torch.distributed as dist

from megavlm.checkpoint.copies import Copies, Piece, is_whole, union
from megavlm.checkpoint.listing import delete_partial, newest_step
from megavlm.checkpoint.storage import folder_name, make_empty, write_state
from megavlm.checkpoint.together import on_all_ranks
from megavlm.dist import groups
from megavlm.errors import CheckpointError
from megavlm.files.folder import Folder, sync
from megavlm.terminal import warn

BLOCK_BYTES = 16 << 20
"""Copied at once."""


class Candidate(NamedTuple):
    """A copy that is whole, as far as its pieces tell."""

    name: str
    piece: Piece
    holders: dict[str, set[str]]
    """Of each file, the hosts that have it."""


class Recovered(NamedTuple):
    """What copies have brought."""

    step: int
    on_disk: int
    """The newest step that was there; 0 if there was none."""


def recover(root: Folder, copies: Copies) -> Recovered | None:
    """Make the newest whole copy a checkpoint, if it is newer than those on the disk; collective.

    None where it is not. A damaged copy, and a disk that cannot be written, are told; the run then
    goes on from what there is. Copies are deleted, unless the disk could not be written.
    """
    on_disk = copies.on_disk = step_on_disk(root)
    told = groups.from_all_ranks(on_all_ranks(lambda: copies.held() if copies.speaks else {}))
    held = {host: one for host, one in zip(copies.hosts, told, strict=True) if one}
    recovered = None
    try:
        for candidate in candidates(held, on_disk):
            if _write(root / folder_name(candidate.piece["step"]), candidate, copies):
                copies.on_disk = candidate.piece["step"]
                recovered = Recovered(copies.on_disk, on_disk)
                break
    except CheckpointError as error:
        if dist.get_rank() == 0:
            warn(f"copies in memory stay unused, as they cannot be written to the disk: {error}")
        return None
    later = {one["step"] for pieces in held.values() for one in pieces.values()}
    if recovered is None and dist.get_rank() == 0 and max(later, default=0) > on_disk:
        warn(
            f"copies in memory, the newest of step {max(later)}, are not used: they are not whole, "
            f"or were made after a checkpoint that is gone; the newest is of step {on_disk}"
        )
    copies.delete()
    return recovered


def candidates(held: Mapping[str, Mapping[str, Piece]], on_disk: int) -> list[Candidate]:
    """Whole copies that are newer than the newest step on the disk, the newest first.

    held: by host, what it holds of each copy. Not those that were made when a newer step was on the
    disk: whoever has deleted that one wants to go back.
    """
    found: list[Candidate] = []
    for name in {name for pieces in held.values() for name in pieces}:
        pieces = {host: one[name] for host, one in held.items() if name in one}
        piece = union(pieces.values())
        if piece is None or not is_whole(piece) or not piece["on_disk"] <= on_disk < piece["step"]:
            continue
        holders = {
            file: {host for host, one in pieces.items() if file in one["files"]}
            for file in piece["files"]
        }
        found.append(Candidate(name, piece, holders))
    return sorted(found, key=lambda one: (-one.piece["step"], one.name))


def shares(
    sizes: Mapping[str, int], holders: Mapping[str, Collection[str]], hosts: Sequence[str]
) -> dict[str, int] | None:
    """The rank that copies each file, from its own host; None if there is one that no host has.

    hosts: of each rank. The largest file comes first, and goes to the rank with least to copy.
    """
    load = [0] * len(hosts)
    found: dict[str, int] = {}
    for file in sorted(sizes, key=lambda file: (-sizes[file], file)):
        ranks = [rank for rank, host in enumerate(hosts) if host in holders[file]]
        if not ranks:
            return None
        found[file] = min(ranks, key=load.__getitem__)
        load[found[file]] += sizes[file]
    return found


def step_on_disk(root: Folder) -> int:
    """Of the newest checkpoint, as the first rank sees it; 0 if there is none. Collective."""
    mine = on_all_ranks(lambda: newest_step(root) if dist.get_rank() == 0 else 0)
    return groups.from_all_ranks(mine)[0]


def _write(folder: Folder, candidate: Candidate, copies: Copies) -> bool:
    """Make a copy a checkpoint; False if files of it are damaged wherever they are. Collective.

    Raises CheckpointError, on all ranks, if the disk cannot be written. Nothing of it stays then.
    """
    first, written = dist.get_rank() == 0, False

    def commit() -> None:
        if first:
            left_out = ("format", "file_count", "on_disk")
            state = {k: value for k, value in candidate.piece.items() if k not in left_out}
            write_state(folder, {**state, "files": dict(sorted(state["files"].items()))})
            folder.sync_name()

    on_all_ranks(lambda: make_empty(folder) if first else None)
    try:
        written = _write_files(folder, candidate, copies)
        if written:
            on_all_ranks(commit)
    finally:
        if first:
            delete_partial(folder)
    return written


def _write_files(folder: Folder, candidate: Candidate, copies: Copies) -> bool:
    """Write each file from a host whose copy is as it was written; False where none is."""
    files, holders = candidate.piece["files"], candidate.holders
    source = copies.folder / candidate.name
    # NCCL's ranks wait ten minutes for each other, gloo's thirty.
    group: dist.ProcessGroup = cast(Any, dist.new_group(backend="gloo"))
    left = set(files)
    try:
        while left:
            by_file = shares({name: files[name]["bytes"] for name in left}, holders, copies.hosts)
            if by_file is None:
                return False

            def write_mine(by_file: dict[str, int] = by_file) -> list[str]:
                mine = [name for name, rank in by_file.items() if rank == dist.get_rank()]
                return [name for name in mine if not _copy(source, folder, name, files[name])]

            damaged = groups.from_all_ranks(on_all_ranks(write_mine, group))
            left = {name for names in damaged for name in names}
            holders = {name: {*holders[name]} - {copies.hosts[by_file[name]]} for name in left}
    finally:  # all ranks come here alike
        dist.destroy_process_group(group)
    return True


def _copy(source: Folder, target: Folder, name: str, entry: Mapping[str, Any]) -> bool:
    """Write a file to the disk; False, and told, unless it is as it was once written."""
    digest = hashlib.sha256()
    with target.open(name, "wb") as out:
        for block in _blocks(source, name):
            digest.update(block)
            out.write(block)
        sync(out)
    whole = digest.hexdigest() == entry["sha256"]
    if not whole:
        warn(f"{source}/{name} on {socket.gethostname()} is damaged, and not used")
    return whole


def _blocks(source: Folder, name: str) -> Iterator[bytes]:
    """What can be read of a file; this memory may be gone bad, too."""
    with suppress(CheckpointError), source.open(name, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            yield block
