"""Which sample comes at which position of training: a pure function, nothing is stored.

The whole data state of a run is one global sample position.
"""

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]

FEISTEL_ROUNDS = 4


class Shuffle:
    """The samples of many shards, in an order of its own for each epoch.

    Shards are permuted, and so many of them at once are a group; the samples of a group are
    permuted among each other. One group is open at a time, so that what lies where must be known of
    few shards alone. With no more shards than a group has, any order of all samples can come.

    shard_samples: of each shard.
    """

    def __init__(
        self, shard_samples: Sequence[int] | Numbers, group_shards: int, seed: int
    ) -> None:
        self._sizes = np.asarray(shard_samples, np.int64)
        self._firsts = np.cumsum(self._sizes) - self._sizes
        self._group_shards = group_shards
        self._seed = seed
        self._epoch = lru_cache(2)(self._lay_out)  # a step may end one and begin the next

    def __len__(self) -> int:
        return int(self._sizes.sum())

    def numbers(self, positions: Numbers) -> Numbers:
        """Numbers of the samples at global positions; the shards' samples are numbered in order."""
        out = np.empty_like(positions)
        epochs, places = np.divmod(positions, len(self))
        for epoch in np.unique(epochs).tolist():
            order = self._epoch(epoch)
            of_epoch = epochs == epoch
            groups = np.searchsorted(order.group_ends, places, side="right")
            for group in np.unique(groups[of_epoch]).tolist():
                here = of_epoch & (groups == group)
                out[here] = self._in_group(places[here], epoch, group, order)
        return out

    def _lay_out(self, epoch: int) -> "_Epoch":
        shards = permute(
            np.arange(len(self._sizes)), len(self._sizes), key_of(self._seed, epoch, "shards")
        )
        ends = np.cumsum(self._sizes[shards])
        lasts = [*range(self._group_shards - 1, len(ends) - 1, self._group_shards), len(ends) - 1]
        return _Epoch(shards, ends[lasts])

    def _in_group(self, places: Numbers, epoch: int, group: int, order: "_Epoch") -> Numbers:
        first = group * self._group_shards
        shards = order.shards[first : first + self._group_shards]
        ends = np.cumsum(self._sizes[shards])
        start = int(order.group_ends[group] - ends[-1])
        own = permute(places - start, int(ends[-1]), key_of(self._seed, epoch, group))
        shard = np.searchsorted(ends, own, side="right")
        return self._firsts[shards][shard] + own - (ends - self._sizes[shards])[shard]


class _Epoch(NamedTuple):
    shards: Numbers
    """In the order of the epoch."""
    group_ends: Numbers
    """Places at which groups of shards end."""


def sources_at(positions: Numbers, parts: Sequence[int], seed: int) -> tuple[Numbers, Numbers]:
    """Which sources of a mixture global positions take from, and at which positions of their own.

    parts: how many of every sum(parts) samples come from each source; in each such block they come
    in an order of its own.
    """
    blocks, places = np.divmod(positions, sum(parts))
    if len(parts) > 1:
        places = permute(
            places, sum(parts), _mixed(blocks.astype(np.uint64) ^ key_of(seed, "mixture"))
        )
    firsts = np.cumsum([0, *parts[:-1]])
    sources = np.searchsorted(firsts, places, side="right") - 1
    return sources, blocks * np.asarray(parts)[sources] + places - firsts[sources]


def passed_over(positions: Numbers, skipped: Sequence[tuple[int, int]]) -> Numbers:
    """Where positions lie when some ranges, ascending and apart, are left out."""
    for first, stop in skipped:
        positions = np.where(positions >= first, positions + (stop - first), positions)
    return positions


def joined_ranges(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same positions as ranges that ascend and are apart."""
    joined: list[tuple[int, int]] = []
    for first, stop in sorted(ranges):
        if joined and first <= joined[-1][1]:
            first, stop = joined[-1][0], max(stop, joined.pop()[1])
        joined.append((first, stop))
    return joined


def key_of(*parts: int | str) -> np.uint64:
    """Chooses a permutation."""
    digest = hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def permute(places: Numbers, size: int, key: np.uint64 | NDArray[np.uint64]) -> Numbers:
    """A permutation of range(size), chosen by the key, applied to some places.

    Source: cycle-walking Feistel permutation (Black and Rogaway 2002).
    """
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    values = places.astype(np.uint64)
    keys = np.broadcast_to(key, values.shape)
    outside = np.ones(values.shape, bool)
    while outside.any():  # walk the cycle until it comes back in
        values[outside] = _feistel(values[outside], half_bits, keys[outside])
        outside = values >= size
    return values.astype(np.int64)


def _feistel(
    values: NDArray[np.uint64], half_bits: np.uint64, keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & mask
    for turn in range(FEISTEL_ROUNDS):
        left, right = right, left ^ (_mixed(right ^ _mixed(keys + np.uint64(turn))) & mask)
    return left << half_bits | right


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Each bit depends on all others (splitmix64's finalizer; Steele, Lea and Flood 2014)."""
    values = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
