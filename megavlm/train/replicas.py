"""Sees that copies of the model hold the same: they drift apart by faulty hardware, or a bug."""

import hashlib
import socket
from collections import defaultdict
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megavlm.checkpoint.shards import State
from megavlm.dist import groups
from megavlm.errors import DivergenceError

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Held(NamedTuple):
    """By one of the copies."""

    rank: int
    host: str
    found_n2: NDArray[np.int64]
    """What names each box, and the sum of its bits."""


@torch.no_grad()
def compare_replicas(replicated: State, steps_done: int) -> None:
    """Raise DivergenceError, on all ranks, unless copies of the model hold the same; collective.

    replicated: what `Engine.replicated` returns. Of each box, its name and the sum of its bits as
    integers travel, 16 bytes.
    """
    names: dict[int, str] = {}
    sums: list[tuple[int, Tensor]] = []
    for name, shards in sorted(replicated.items()):
        for origin, box in shards.boxes.items():
            key = f"{name}{list(origin)}{list(box.shape)}".encode()
            number = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), signed=True)
            names[number] = name
            sums.append((number, _bit_sum(box)))
    found = np.zeros((len(sums), 2), np.int64)
    if sums:
        found[:, 0] = [number for number, _ in sums]
        found[:, 1] = torch.stack([bits for _, bits in sums]).cpu().numpy()
    told: list[str] = []
    if groups.data_ranks() > 1:
        held = groups.from_copies(_Held(groups.rank(), socket.gethostname(), found))
        told = _differences(held, names)
    differences = sorted({line for lines in groups.from_all_ranks(told) for line in lines})
    if differences:
        raise DivergenceError(
            f"after step {steps_done} copies of the model differ: {'; '.join(differences[:5])}"
            f"{'; ...' if len(differences) > 5 else ''} ({len(differences)} in all). Faulty "
            "hardware or a bug has changed one, and nothing of it is saved: look at the host that "
            "stands alone, and run again to go on from the last checkpoint"
        )


def _bit_sum(box: Tensor) -> Tensor:
    """int64, wrapping; differs where a bit does."""
    return box.detach().contiguous().view(_WORDS[box.element_size()]).sum(dtype=torch.int64)


def _differences(held: list[_Held], names: dict[int, str]) -> list[str]:
    """Of what this rank holds: which ranks have something else than the others."""
    every = np.concatenate([one.found_n2 for one in held])
    keys_n, first_n, key_of_n = np.unique(every[:, 0], return_index=True, return_inverse=True)
    differ_n = every[:, 1] != every[first_n[key_of_n], 1]
    lines: list[str] = []
    for key in keys_n[np.unique(key_of_n[differ_n])].tolist():
        if key not in names:
            continue
        alike: dict[int, list[str]] = defaultdict(list)
        for one in held:
            for bits in one.found_n2[one.found_n2[:, 0] == key, 1].tolist():
                alike[bits].append(f"{one.rank} ({one.host})")
        fewest, *others = sorted(alike.values(), key=len)
        rest = [rank for group in others for rank in group]
        against = ", ".join(rest) if len(rest) < 3 else f"{len(rest)} others"
        lines.append(f"{names[key]} of ranks {', '.join(fewest)} against {against}")
    return lines
