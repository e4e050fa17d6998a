"""Leaving behind checkpoints that are not as they were written."""

import torch.distributed as dist

from megavlm.checkpoint.listing import whole_checkpoints
from megavlm.checkpoint.load import check_files
from megavlm.checkpoint.storage import STATE_FILE, CheckpointReader
from megavlm.checkpoint.together import on_all_ranks
from megavlm.dist import groups
from megavlm.errors import CheckpointError, StorageError
from megavlm.files.folder import Folder


def leave_damaged(root: Folder) -> list[str]:
    """Have the newest checkpoint be one that is as it was written; collective.

    Returns what is wrong with those after it, which lose their `state.json` and so are no
    checkpoints any more. Raises CheckpointError, on all ranks, if none is as it was written, or if
    the storage cannot be read: nothing is changed then.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine = [str(folder) for folder in whole_checkpoints(root)] if rank == 0 else []
    places = groups.from_all_ranks(mine)[0]
    told: list[str] = []
    for place in places:
        folder = Folder(place)
        damage = on_all_ranks(lambda folder=folder: _damage(folder, rank, ranks))
        found = sorted(filter(None, groups.from_all_ranks(damage)))
        if not found:
            break
        told.append(found[0])
    else:
        if told:
            raise CheckpointError(f"no checkpoint is as it was written: {'; '.join(told)}")

    def delete() -> None:
        for place in places[: len(told)] if rank == 0 else []:
            Folder(place).delete_file(STATE_FILE)

    on_all_ranks(delete)
    return told


def _damage(folder: Folder, rank: int, ranks: int) -> str:
    """Of this rank's share of the files."""
    try:
        reader = CheckpointReader(folder)
        check_files(reader, sorted(reader.state["files"])[rank::ranks])
    except StorageError:
        raise
    except CheckpointError as error:
        return str(error)
    return ""
