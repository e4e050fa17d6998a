"""Which sample comes at which position of training: a pure function, nothing is stored.

The whole data state of a run is one global sample position.
"""

import hashlib
from collections.abc import Sequence

FEISTEL_ROUNDS = 4


def sample_at(position: int, samples: int, seed: int) -> int:
    """Number of the sample at a global position; each epoch is a new permutation of all samples.

    Source: cycle-walking Feistel permutation (Black and Rogaway 2002).
    """
    epoch, place = divmod(position, samples)
    return permute(place, samples, key=f"{seed}:{epoch}")


def source_at(position: int, parts: Sequence[int], seed: int) -> tuple[int, int]:
    """Which source of a mixture a global position takes from, and at which position of its own.

    parts: how many of every sum(parts) samples come from each source; in each such block they come
    in an order of its own.
    """
    if len(parts) == 1:
        return 0, position
    block, place = divmod(position, sum(parts))
    place = permute(place, sum(parts), key=f"{seed}:mixture:{block}")
    for source, of_source in enumerate(parts):
        if place < of_source:
            return source, block * of_source + place
        place -= of_source
    raise AssertionError("the parts add up to the block")


def permute(place: int, size: int, key: str) -> int:
    """A permutation of range(size), chosen by the key, applied to one place."""
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    while True:
        place = _feistel(place, half_bits, key)
        if place < size:  # outside: walk the cycle until it comes back in
            return place


def _feistel(value: int, half_bits: int, key: str) -> int:
    mask = (1 << half_bits) - 1
    left, right = value >> half_bits, value & mask
    for turn in range(FEISTEL_ROUNDS):
        digest = hashlib.blake2b(f"{key}:{turn}:{right}".encode(), digest_size=8).digest()
        left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
    return left << half_bits | right
