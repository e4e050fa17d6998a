"""Loading and checking checkpoints of a run, whatever its engine and its number of ranks.

torch Distributed Checkpoint plans who reads what; `storage.py` reads it.
"""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load

from megavlm.checkpoint.lazy import LazyTensor
from megavlm.checkpoint.planners import ShardsLoadPlanner
from megavlm.checkpoint.shards import State, whole
from megavlm.checkpoint.storage import CheckpointReader, read_state, state_sha256
from megavlm.checkpoint.tensor_file import DTYPES
from megavlm.checkpoint.together import failures_told, on_all_ranks
from megavlm.dist import groups
from megavlm.errors import CheckpointError, DamagedError
from megavlm.files.folder import Folder

CHECKERS = 4
"""Files whose checksums a rank computes at once."""


def load_checkpoint(folder: Folder, shards: State) -> None:
    """Overwrite what this rank holds with a checkpoint's tensors, in place; collective.

    Their types are converted. The ranks first check all files together, each its share. Raises
    CheckpointError, on all ranks, for a file that is missing or not as it was written and for a
    tensor that is missing or of another shape.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    with failures_told():
        reader = on_all_ranks(lambda: CheckpointReader(folder))
        _require_same(folder, state_sha256(reader.state))
        on_all_ranks(lambda: check_shapes(reader, shards))
        on_all_ranks(lambda: check_files(reader, sorted(reader.state["files"])[rank::ranks]))
        load(dict(shards), storage_reader=reader, planner=ShardsLoadPlanner())


def _require_same(folder: Folder, digest: str) -> None:
    """Raise CheckpointError, on all ranks, unless they see the same; collective."""
    seen = groups.from_all_ranks((str(folder), digest))
    if len(set(seen)) > 1:
        raise CheckpointError(
            f"ranks see different checkpoints: {sorted({place for place, _ in seen})}; have all "
            "hosts share the folder of checkpoints, and run again"
        )


def load_present(folder: Folder, shards: State) -> None:
    """Overwrite those tensors that a checkpoint has; collective.

    Raises CheckpointError as `load_checkpoint` does.
    """
    saved = on_all_ranks(lambda: read_state(folder))["tensors"]
    load_checkpoint(folder, {name: held for name, held in shards.items() if name in saved})


def check_shapes(reader: CheckpointReader, shards: State) -> None:
    """Raise CheckpointError unless a checkpoint holds these tensors, in these shapes."""
    saved = reader.state["tensors"]
    missing = sorted(shards.keys() - saved.keys())
    moments = [name for name in missing if name.startswith("exp_avg")]
    if moments:
        raise CheckpointError(
            f"checkpoint {reader.folder} holds no states of the optimiser ({moments[0]}, say); "
            "start a new run from its weights with checkpoint.start_from"
        )
    if missing:
        raise CheckpointError(
            f"checkpoint {reader.folder} holds no tensor {missing[0]} ({len(missing)} are missing);"
            " it is of another model"
        )
    for name, held in shards.items():
        if tuple(saved[name]["shape"]) != held.shape:
            raise CheckpointError(
                f"checkpoint {reader.folder} has {name} of shape {saved[name]['shape']}, the model "
                f"{list(held.shape)}; it is of another model"
            )


def check_files(
    reader: CheckpointReader, names: list[str], on_progress: Callable[[int], None] = lambda _: None
) -> None:
    """Raise CheckpointError unless these files of a checkpoint have their checksums."""

    def digest(name: str) -> str:
        sha256 = hashlib.sha256()
        left = reader.state["files"][name]["bytes"]
        with reader.folder.open(name, "rb", [(0, left)]) as file:
            while block := file.read(min(left, 16 << 20)):  # stores refuse to read past the end
                left -= len(block)
                sha256.update(block)
                on_progress(len(block))
        return sha256.hexdigest()

    with ThreadPoolExecutor(CHECKERS) as pool:
        digests = list(pool.map(digest, names))
    for name, found in zip(names, digests, strict=True):
        if found != reader.state["files"][name]["sha256"]:
            raise DamagedError(
                f"checkpoint file {reader.folder}/{name} is corrupt (its SHA-256 does not match)"
            )


def lazy_tensors(reader: CheckpointReader) -> dict[str, LazyTensor]:
    """All tensors of a checkpoint, each read whole when it is needed, by this process alone."""

    def read(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        planner = ShardsLoadPlanner()
        planner.set_up_planner({name: whole(tensor)}, reader.read_metadata(), True)
        reader.read_data(planner.finish_plan(planner.create_local_plan()), planner)
        return tensor

    lazy: dict[str, LazyTensor] = {}
    for name, fields in reader.state["tensors"].items():
        shape, dtype = tuple(fields["shape"]), DTYPES[fields["dtype"]]
        lazy[name] = LazyTensor(shape, dtype, partial(read, name, shape, dtype))
    return lazy
