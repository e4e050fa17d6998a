"""Samples that are nearly the same, over all shards: the first stays.

Pictures are the same if their perceptual hashes differ in few bits, captions if their MinHash
signatures (Broder 1997) agree in most places. Both are cut into bands; only samples that share a
band are compared (locality-sensitive hashing). A sample goes if it is the same as an earlier one
that stays.
"""

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megavlm.config.filters import DuplicateRules
from megavlm.files.folder import Folder
from megavlm.filters.arrays import load_arrays, save_arrays

Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]
"""(samples, bytes of a hash or signature)."""

Nearness = Callable[[Bytes, Bytes], NDArray[np.bool_]]
Duplicate = Literal["duplicate_picture", "duplicate_caption"]
"""Why a sample goes."""

PICTURE_BANDS = 16
"""Of 16 bits. Two hashes that differ in up to 15 bits share one for sure; if the bits lie anywhere,
at 20 bits 99.9 % do, and at 31 bits 91 % (simulated)."""
CAPTION_BANDS, BAND_VALUES = 21, 6
"""1 - (1 - s**6)**21 of captions with similarity s share one: 99.8 % at 0.8, 92 % at 0.7."""
PERMUTATIONS = CAPTION_BANDS * BAND_VALUES
SIGNATURE_BYTES = 2 * PERMUTATIONS
"""The lower 16 bits of each value tell as much (b-bit MinHash, Li and Konig 2010)."""
PIECE_CHARACTERS = 5
BANDS: dict[Duplicate, int] = {
    "duplicate_picture": PICTURE_BANDS,
    "duplicate_caption": CAPTION_BANDS,
}
_COMPARED_AT_ONCE = 2**20
_SEED = 20_200_101


class Same(NamedTuple):
    """Samples found to be the same, by their numbers."""

    copies: Ints
    """(copies, 2): each with the first one that has exactly its hash, which comes before it."""
    pairs: Ints
    """(pairs, 2): nearly the same, the earlier one first; copies left out."""


def sign_captions(captions: Sequence[str | None]) -> list[bytes | None]:
    """MinHash signatures of captions; None of None, and of captions without words."""
    from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]  (it is native)

    pieces = [_pieces(caption) if caption else [] for caption in captions]
    there = [n for n, of_caption in enumerate(pieces) if of_caption]
    signatures: list[bytes | None] = [None] * len(captions)
    rows = RMinHash.digest_matrix_from_token_sets(
        [pieces[n] for n in there], num_perm=PERMUTATIONS, seed=_SEED
    ).to_rows()
    for n, row in zip(there, rows, strict=True):
        signatures[n] = (np.array(row, np.uint32) & 0xFFFF).astype("<u2").tobytes()
    return signatures


def _pieces(caption: str) -> list[str]:
    """Runs of characters, whatever their case, spaces and punctuation."""
    normal = unicodedata.normalize("NFKC", caption).casefold()
    normal = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in normal)
    normal = " ".join(normal.split())
    starts = range(max(1, len(normal) - PIECE_CHARACTERS + 1)) if normal else ()
    return sorted({normal[start : start + PIECE_CHARACTERS] for start in starts})


def bands_of(reason: Duplicate, hashes: Bytes) -> NDArray[np.uint64]:
    """(samples, bands): samples are compared if they share the value of a band."""
    return picture_bands(hashes) if reason == "duplicate_picture" else caption_bands(hashes)


def nearness(reason: Duplicate, rules: DuplicateRules) -> Nearness:
    """What tells of hashes, row by row, whether they are nearly the same."""
    if reason == "duplicate_picture":
        return near_pictures(rules.picture_bits or 0)
    return near_captions(rules.caption_similarity or 1)


def picture_bands(hashes: Bytes) -> NDArray[np.uint64]:
    """16 bits of a hash each."""
    return np.ascontiguousarray(hashes).view("<u2").astype(np.uint64)


def caption_bands(signatures: Bytes) -> NDArray[np.uint64]:
    """A hash each of some values of a signature."""
    values = np.ascontiguousarray(signatures).view("<u2").astype(np.uint64)
    values = values.reshape(len(signatures), CAPTION_BANDS, BAND_VALUES)
    bands = np.zeros(values.shape[:2], np.uint64)
    for n in range(BAND_VALUES):
        bands = (bands ^ values[:, :, n]) * np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing
        bands ^= bands >> np.uint64(29)
    return bands


def near_pictures(bits: int) -> Nearness:
    """Tells of hashes, row by row, whether they differ in at most so many bits."""
    return lambda a, b: np.bitwise_count((a ^ b).view(np.uint64)).sum(1) <= bits


def near_captions(similarity: float) -> Nearness:
    """Tells of signatures, row by row, whether they agree in such a share of places."""
    least = similarity * PERMUTATIONS
    return lambda a, b: (a.view(np.uint16) == b.view(np.uint16)).sum(1) >= least


def find_same(
    numbers: Ints,
    hashes: Bytes,
    band_of: NDArray[np.uint64],
    are_near: Nearness,
) -> Same:
    """What is the same among samples, as far as they share the value of one band.

    numbers: of the samples, ascending; band_of: their value of the band.
    """
    # Of copies the first stands for all; a placeholder that is there a million times costs nothing.
    whole_rows = np.ascontiguousarray(hashes).view(f"V{hashes.shape[1]}").ravel()
    _, firsts, first_of = np.unique(whole_rows, return_index=True, return_inverse=True)
    is_copy = np.ones(len(numbers), np.bool_)
    is_copy[firsts] = False
    copies = np.stack([numbers[firsts[first_of[is_copy]]], numbers[is_copy]], 1)
    unique = np.flatnonzero(~is_copy)
    order = unique[np.argsort(band_of[unique], kind="stable")]
    cuts = np.flatnonzero(np.diff(band_of[order])) + 1
    found: list[Ints] = [np.empty((0, 2), np.int64)]
    for a, b in _pairs_within(np.array([0, *cuts.tolist(), len(order)])):
        a, b = order[a], order[b]
        near = are_near(hashes[a], hashes[b])
        found.append(np.stack([numbers[a[near]], numbers[b[near]]], 1))
    return Same(copies, np.concatenate(found))


def _pairs_within(bounds: Ints) -> Iterator[tuple[Ints, Ints]]:
    """All pairs of places in the same group, the earlier first, some at a time.

    bounds: where groups begin and end.
    """
    # Each place with those after it in its group: `later` of them.
    later = np.repeat(bounds[1:], np.diff(bounds)) - np.arange(bounds[-1]) - 1
    ends = np.cumsum(later)
    start = 0
    while start < len(later):
        done = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + _COMPARED_AT_ONCE, "right")))
        counts = later[start:stop]
        first = np.repeat(np.arange(start, stop), counts)
        steps = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        yield first, first + 1 + steps
        start = stop


def choose(same: Sequence[Same]) -> dict[int, int]:
    """The samples that go, each with the earlier one that it is the same as.

    same: of all bands.
    """
    gone = {copy: first for found in same for first, copy in found.copies.tolist()}
    pairs = np.unique(np.concatenate([found.pairs for found in same]), axis=0)
    pairs = pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))]  # by the later one
    for earlier, later in pairs.tolist():
        if earlier not in gone and later not in gone:
            gone[later] = earlier
    return gone


def save(folder: Folder, name: str, same: Same) -> None:
    """Write it for the process that chooses."""
    save_arrays(folder, name, copies=same.copies, pairs=same.pairs)


def load(folder: Folder, name: str) -> Same:
    """What was saved."""
    return Same(**load_arrays(folder, name))
