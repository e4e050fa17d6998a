"""Copies of a run's newest steps in the memory of its hosts, which outlive its processes.

Each rank's file of a checkpoint lies in a tmpfs of its own host, and of the next one, so that one
of two neighbours may be lost (Gemini, Wang et al. 2023, SOSP). Beside each file lies a piece: what
`state.json` would say of it. No rank has to commit a copy: it is whole where all its pieces are
found, and its `state.json` is their union.
"""

import hashlib
import io
import os
import re
import shutil
import socket
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import cache, partial
from typing import IO, Any, cast
from uuid import uuid4

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megavlm.checkpoint.listing import OWNER_FILE
from megavlm.checkpoint.neighbours import Incoming, Outgoing, TakesBlock, neighbours, pass_on
from megavlm.checkpoint.planners import ShardsSavePlanner
from megavlm.checkpoint.shards import State
from megavlm.checkpoint.storage import (
    CheckpointWriter,
    file_name,
    folder_name,
    parse_state,
    read_state,
    write_state,
)
from megavlm.checkpoint.tensor_file import NAMES, as_bytes, is_count
from megavlm.checkpoint.together import failures_told, on_all_ranks
from megavlm.config.run import CheckpointSettings
from megavlm.dist import groups
from megavlm.errors import CheckpointError
from megavlm.files.folder import Folder
from megavlm.terminal import warn

KEPT = 2
"""Copies that lie in memory at once: the newest may be half written."""
REMEDY = (
    "training goes on. Give checkpoint.memory_folder more room (docker run --shm-size), or switch "
    "copies off with checkpoint.memory_every=null"
)

Piece = dict[str, Any]
"""What `state.json` says, of some of a checkpoint's files; and `file_count`, of all of them, and
`on_disk`, the newest step that was on the disk then."""

_SIZES = struct.Struct("<QQ")
"""Of a piece and of its file, in bytes."""
_COPY = re.compile(r"step-\d{8,}-[0-9a-f]{32}")


class Copies:
    """Where this rank's host keeps copies of a run; the methods that say so are collective."""

    def __init__(self, root: Folder, settings: CheckpointSettings, host: str | None = None) -> None:
        """root: of the run's checkpoints, which is claimed. Collective.

        Raises CheckpointError, on all ranks, where a host has no place for copies.
        """
        self._settings = settings
        self._rank = dist.get_rank()
        host = host or socket.gethostname()
        self.hosts = groups.from_all_ranks(host)
        """Of each rank."""
        self._targets = neighbours(self.hosts)
        self.speaks = self._rank == self.hosts.index(host)
        """Whether this rank is the first of its host."""
        self.on_disk = 0
        """The newest step on the disk; whoever writes there says so."""
        self._whole: str | None = None
        """The newest copy that all ranks have written."""
        on_all_ranks(lambda: self._open(root))

    def _open(self, root: Folder) -> None:
        own = self._settings.memory_folder / f"megavlm-{os.geteuid()}"
        try:
            with suppress(FileExistsError):
                own.mkdir(mode=0o700)
            found = own.lstat()
        except OSError as error:
            raise CheckpointError(
                f"checkpoint.memory_folder={self._settings.memory_folder} cannot be used on "
                f"{self.hosts[self._rank]}: {error.strerror}; name a tmpfs that is there on all "
                "hosts, or set checkpoint.memory_every=null"
            ) from error
        private = stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o077
        if not private or found.st_uid != os.geteuid():
            raise CheckpointError(
                f"{own} on {self.hosts[self._rank]} is no folder that this user alone can enter; "
                "remove it, or choose another checkpoint.memory_folder"
            )
        place = str(root.local_path.resolve()) if root.local_path else root.place
        of_place = Folder(own / hashlib.sha256(place.encode()).hexdigest()[:32], REMEDY)
        name = hashlib.sha256(root.read(OWNER_FILE)).hexdigest()[:32]
        self.folder = of_place / name
        if self.speaks:
            for other in of_place.names():  # of runs whose checkpoints were here before
                if other != name:
                    (of_place / other).delete()

    def check_room(self, checkpoint_bytes: int) -> None:
        """Raise CheckpointError, on all ranks, where a host has no room for its copies; collective.

        checkpoint_bytes: of a checkpoint, of which each rank has an equal share.
        """

        def check() -> None:
            host = self.hosts[self._rank]
            own = self.hosts.count(host)
            others = sum(t is not None and self.hosts[t] == host for t in self._targets)
            needed = KEPT * (own + others) * checkpoint_bytes / len(self.hosts)
            free = shutil.disk_usage(self._settings.memory_folder).free
            if needed > free:
                raise CheckpointError(
                    f"checkpoint.memory_folder={self._settings.memory_folder} on {host} has "
                    f"{free / 1e9:.3g} GB free, and {KEPT} copies of {own + others} ranks, its own "
                    f"{own} and its neighbour's, take about {needed / 1e9:.3g} GB; give it more "
                    "room (docker run --shm-size, or mount -o remount,size=), or set "
                    "checkpoint.memory_every=null"
                )

        on_all_ranks(check)

    def write(
        self,
        step: int,
        tensors: State,
        state: dict[str, Any],
        group: dist.ProcessGroup,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy a step's tensors; collective, over a gloo group.

        Raises CheckpointError, on all ranks, if it fails; the copy before it stays.
        """
        writer = _CopyWriter(self, {"step": step, "on_disk": self.on_disk, **state}, on_progress)
        try:
            with failures_told():
                planner = ShardsSavePlanner()
                save(dict(tensors), storage_writer=writer, planner=planner, process_group=group)
            if len(set(self.hosts)) > 1:
                on_all_ranks(lambda: self._exchange(writer, group, on_progress), group)
        except CheckpointError:
            try:
                self.make_room()  # all ranks have stopped writing: they have told each other
            except CheckpointError as error:
                warn(str(error))
            raise
        self._whole = writer.copy

    def make_room(self) -> None:
        """Delete all of this host's copies but the newest whole one, where this rank speaks."""
        if self.speaks:
            for name in self.folder.names():
                if name != self._whole:
                    (self.folder / name).delete()

    def delete(self) -> None:
        """Delete all of this host's copies, where this rank speaks; what cannot be is told."""
        self._whole = None
        try:
            self.make_room()
        except CheckpointError as error:
            warn(str(error))

    def held(self) -> dict[str, Piece]:
        """What this host holds of each copy, in one piece; what is broken is left out."""
        found: dict[str, Piece] = {}
        for copy in filter(_COPY.fullmatch, self.folder.names()):
            piece = union(_pieces(self.folder / copy))
            if piece is not None:
                found[copy] = piece
        return found

    def _exchange(
        self, writer: "_CopyWriter", group: dist.ProcessGroup, on_progress: Callable[[], None]
    ) -> None:
        """Send this rank's file to its neighbour, and keep those of whom it is the neighbour."""
        folder, target = self.folder / writer.copy, self._targets[self._rank]
        assert target is not None, "there are several hosts"
        sources = [rank for rank, of in enumerate(self._targets) if of == self._rank]

        def exchange(
            size: int, read_into: TakesBlock, sizes: Sequence[int], writes: Sequence[TakesBlock]
        ) -> None:
            incoming = [Incoming(*one) for one in zip(sources, sizes, writes, strict=True)]
            pass_on(Outgoing(target, size, read_into), incoming, group, on_progress)

        def exchange_small(content: bytes, sizes: Sequence[int]) -> list[bytes]:
            left, taken = io.BytesIO(content), [io.BytesIO() for _ in sources]
            writes = [partial(_write, one) for one in taken]
            exchange(len(content), partial(_read, left), sizes, writes)
            return [one.getvalue() for one in taken]

        mine = _SIZES.pack(len(writer.piece), writer.size)
        theirs = exchange_small(mine, [_SIZES.size] * len(sources))
        sizes = [_SIZES.unpack(one) for one in theirs]
        pieces = exchange_small(writer.piece, [size for size, _ in sizes])
        with ExitStack() as stack:

            def opened(name_of: Callable[[], str], mode: str) -> Callable[[], Any]:
                """Only where it is read or written: an error here would leave others waiting."""
                return cache(lambda: stack.enter_context(folder.open(name_of(), mode)))

            out = opened(lambda: writer.file, "rb")
            kept = [opened(partial(_file_of, piece, folder), "wb") for piece in pieces]
            exchange(
                writer.size,
                lambda block: _read(out(), block),
                [size for _, size in sizes],
                [lambda block, file=file: _write(file(), block) for file in kept],
            )
        for piece in pieces:
            folder.write_atomically(_piece_name(_file_of(piece, folder)), piece)


class _CopyWriter(CheckpointWriter):
    """Writes a rank's file of a copy, and then its piece."""

    copy = file = ""
    """Names, once the ranks have agreed on them."""
    piece, size = b"", 0
    """What was written of the piece, and of the file in bytes."""

    def __init__(
        self, copies: Copies, state: dict[str, Any], on_progress: Callable[[], None]
    ) -> None:
        super().__init__(copies.folder, state, on_progress=on_progress)
        self._copies = copies

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Runs on all ranks, before any of them writes."""
        self._copies.make_room()
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        copy = f"{folder_name(self._state['step'])}-{uuid4().hex}"
        count = len(plans)
        state = {**self._state, "file_count": count}  # this rank's, on all
        return [
            replace(plan, storage_data=(copy, file_name(number, count), state))
            for number, plan in enumerate(plans, start=1)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        self.copy, self.file, state = plan.storage_data
        folder = self._folder / self.copy
        folder.create()
        entry = self.write_file(folder, self.file, plan, planner)
        tensors = {
            item.index.fqn: {
                "dtype": NAMES[item.tensor_data.properties.dtype],
                "shape": list(item.tensor_data.size),
            }
            for item in plan.items
            if item.tensor_data is not None
        }
        self.size = entry["bytes"]
        piece = {**state, "files": {self.file: entry}, "tensors": tensors}
        self.piece = write_state(folder, piece, _piece_name(self.file))
        results: Future[list[WriteResult]] = Future()
        results.set_result([])
        return results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Nothing commits a copy."""


def union(pieces: Iterable[Piece]) -> Piece | None:
    """What pieces say together; None if there are none, or if they contradict each other."""
    joined: Piece | None = None
    for piece in pieces:
        if joined is None:
            joined = {**piece, "files": {}, "tensors": {}}
        for key in ("files", "tensors"):
            for name, entry in piece[key].items():
                if joined[key].setdefault(name, entry) != entry:
                    return None
        if {**piece, "files": joined["files"], "tensors": joined["tensors"]} != joined:
            return None
    return joined


def is_whole(piece: Piece) -> bool:
    """Whether a piece says all that there is to say of its checkpoint."""
    count = len(piece["files"])
    names = {file_name(number, count) for number in range(1, count + 1)}
    return count == piece["file_count"] and names == piece["files"].keys()


def _pieces(folder: Folder) -> Iterator[Piece]:
    """Those whose files are there, in full length."""
    sizes = folder.sizes()
    for name in sizes:
        if name.endswith(".json"):
            with suppress(CheckpointError):
                piece = _checked(read_state(folder, name), folder)
                if all(sizes.get(n) == file["bytes"] for n, file in piece["files"].items()):
                    yield piece


def _checked(piece: Piece, folder: Folder) -> Piece:
    """Raise CheckpointError unless it is of a copy, and of the form that is written here."""
    if not (
        f"/{folder_name(piece['step'])}-" in folder.place
        and is_count(piece.get("file_count"))
        and is_count(piece.get("on_disk"))
    ):
        raise CheckpointError(f"a piece of {folder} is not what it should be")
    return piece


def _file_of(piece: bytes, folder: Folder) -> str:
    [name] = _checked(parse_state(piece, folder), folder)["files"]
    return name


def _piece_name(file: str) -> str:
    return file.removesuffix(".safetensors") + ".json"


def _read(file: IO[bytes], block: Tensor) -> None:
    if cast(Any, file).readinto(as_bytes(block)) != len(block):
        raise CheckpointError(f"{getattr(file, 'name', 'a copy')} is cut short")


def _write(file: IO[bytes], block: Tensor) -> None:
    file.write(as_bytes(block))
