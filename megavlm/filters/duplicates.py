"""Samples that are nearly the same, over all shards: the first stays.

Pictures are the same if their perceptual hashes differ in few bits, captions if their MinHash
signatures (Broder 1997) agree in most places. Both are cut into bands; only samples that share a
band, a bucket, are compared (locality-sensitive hashing). A sample goes if it is the same as an
earlier one that stays.
"""

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megavlm.config.filters import DuplicateRules
from megavlm.files.folder import Folder
from megavlm.filters.arrays import load_arrays, save_arrays

Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]
"""(samples, bytes of a hash or signature)."""

Values = NDArray[np.uint64]
Keys = NDArray[np.uint64]
"""Of two samples that are the same: the later number in the upper half, the earlier below."""
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
HASH_BYTES: dict[Duplicate, int] = {
    "duplicate_picture": 2 * PICTURE_BANDS,
    "duplicate_caption": SIGNATURE_BYTES,
}
MOST_SAMPLES = 2**32
FEW = 16
"""Samples in a bucket: all pairs of all such buckets are compared in one go."""
MOST_PAIRS, ENOUGH = 2**20, 32
"""Once a bucket has so many pairs, samples near more than ENOUGH earlier ones are noted with the
first of them alone, and later ones are not compared with them: a million that are all nearly the
same stay linear. If such a sample goes, as nearly all do, nothing is lost."""
PICTURE_CANDIDATES, CAPTION_CANDIDATES = 2**17, 2**13
"""Samples of a bucket that later ones are compared with, at most: 0.2 ms and 0.3 ms for each."""
_QUERIES, _FOUND_AT_ONCE = 512, 2**22
"""At most, of a bucket: samples that are looked up at once, and pairs that these could be in."""
_COMPARED_AT_ONCE = 2**17
_FOLDED_AT_ONCE = 2**11
"""Rows that stay in a core's cache."""
_SEED = 20_200_101


class Nearness(NamedTuple):
    """What tells whether hashes are nearly the same."""

    of_rows: Callable[[Bytes, Bytes], NDArray[np.bool_]]
    """Whether those in the same row are."""
    search: Callable[[Bytes, Bytes], tuple[Ints, Ints]]
    """Rows of the first and rows of the second that are, sorted."""
    candidates: int


class Same(NamedTuple):
    """Samples found to be the same."""

    copies: Keys
    """Each with the first one that has exactly its hash."""
    pairs: Keys
    """Nearly the same; copies left out."""
    left_out: Ints
    """Samples of full buckets, which later ones were not compared with; it matters if they stay."""


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


def band_of(reason: Duplicate, hashes: Bytes, band: int) -> Values:
    """Values of a band; samples are compared if they share one."""
    values = hashes.view("<u2")
    if reason == "duplicate_picture":
        return values[:, band].astype(np.uint64)
    return _folded(values[:, band * BAND_VALUES : (band + 1) * BAND_VALUES])


def _folded(values: NDArray[np.unsignedinteger]) -> Values:
    """Each row as one value, which other rows hardly ever have."""
    folded = np.zeros(len(values), np.uint64)
    for start in range(0, len(values), _FOLDED_AT_ONCE):
        some = folded[start : start + _FOLDED_AT_ONCE]
        for column in values[start : start + _FOLDED_AT_ONCE].T:
            some ^= column
            some *= np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing
            some ^= some >> np.uint64(29)
    return folded


def nearness(reason: Duplicate, rules: DuplicateRules) -> Nearness:
    """Of the pictures or captions that the rules call the same."""
    if reason == "duplicate_picture":
        return near_pictures(rules.picture_bits or 0)
    return near_captions(rules.caption_similarity or 1)


def near_pictures(bits: int) -> Nearness:
    """Of hashes that differ in at most so many bits."""
    import faiss

    faiss.omp_set_num_threads(1)

    def of_rows(a: Bytes, b: Bytes) -> NDArray[np.bool_]:
        return np.bitwise_count((a ^ b).view(np.uint64)).sum(1) <= bits

    def search(a: Bytes, b: Bytes) -> tuple[Ints, Ints]:
        index: Any = faiss.IndexBinaryFlat(8 * b.shape[1])
        index.add(b)
        ends, _, found = index.range_search(a, bits + 1)  # finds what is below that
        return np.repeat(np.arange(len(a)), np.diff(ends.astype(np.int64))), found

    return Nearness(of_rows, search, PICTURE_CANDIDATES)


def near_captions(similarity: float) -> Nearness:
    """Of signatures that agree in such a share of places."""
    least = similarity * PERMUTATIONS

    def of_rows(a: Bytes, b: Bytes) -> NDArray[np.bool_]:
        return (a.view("<u2") == b.view("<u2")).sum(1) >= least

    def search(a: Bytes, b: Bytes) -> tuple[Ints, Ints]:
        columns = np.ascontiguousarray(b.view("<u2").T)
        equal = ((row[:, None] == columns).view(np.uint8) for row in a.view("<u2"))
        found = [np.flatnonzero(e.sum(0, dtype=np.uint8) >= least) for e in equal]
        return np.repeat(np.arange(len(a)), [*map(len, found)]), np.concatenate(found)

    return Nearness(of_rows, search, CAPTION_CANDIDATES)


def find_same(numbers: Ints, hashes: Bytes, values: Values, near: Nearness) -> Same:
    """What is the same among samples, as far as they share the value of one band.

    numbers: of the samples, ascending; values: theirs of the band.
    """
    copies, is_copy = find_copies(numbers, hashes)
    unique = np.flatnonzero(~is_copy)
    order = unique[np.argsort(values[unique], kind="stable")]
    starts = np.flatnonzero(np.diff(values[order], prepend=values[order[:1]] ^ np.uint64(1)))
    sizes = np.diff(starts, append=len(order))
    is_small = sizes <= FEW
    found, left_out = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    small = order[np.repeat(is_small, sizes)]
    for a, b in _pairs_within(np.cumsum([0, *sizes[is_small]])):
        a, b = small[a], small[b]
        is_near = near.of_rows(hashes[a], hashes[b])
        found.append(keys_of(numbers[a[is_near]], numbers[b[is_near]]))
    for start, size in zip(starts[~is_small].tolist(), sizes[~is_small].tolist(), strict=True):
        bucket = order[start : start + size]
        pairs, of_bucket = _same_in(numbers[bucket], hashes[bucket], near)
        found.append(pairs)
        left_out.append(of_bucket)
    pairs = np.concatenate(found)
    pairs.sort()
    return Same(copies, pairs, np.concatenate(left_out))


def find_copies(numbers: Ints, hashes: Bytes) -> tuple[Keys, NDArray[np.bool_]]:
    """Samples with the first one that has exactly their hash, and which of all they are.

    The first stands for all: a placeholder that is there a million times costs nothing.
    """
    folded = _folded(hashes.view("<u4"))
    _, firsts, group_of = np.unique(folded, return_index=True, return_inverse=True)
    first_of = firsts[group_of]
    late = np.flatnonzero(first_of != np.arange(len(hashes)))
    for start in range(0, len(late), _COMPARED_AT_ONCE):
        some = late[start : start + _COMPARED_AT_ONCE]
        differ = (hashes[some] != hashes[first_of[some]]).any(1)
        first_of[some[differ]] = some[differ]  # by chance they have the same folded value
    is_copy = first_of != np.arange(len(hashes))
    return keys_of(numbers[first_of[is_copy]], numbers[is_copy]), is_copy


def _same_in(numbers: Ints, hashes: Bytes, near: Nearness) -> tuple[Keys, Ints]:
    """Pairs that are nearly the same in a bucket, and the samples that it had no room for."""
    kept = np.empty(0, np.int64)
    found: list[Keys] = []
    left_out: list[Ints] = []
    start = pairs = 0
    while start < len(numbers):
        queries = max(1, min(_QUERIES, _FOUND_AT_ONCE // (len(kept) + 1)))
        block = np.arange(start, min(start + queries, len(numbers)))
        candidates = np.concatenate([kept, block])
        later, earlier = near.search(hashes[block], hashes[candidates])
        later, earlier = block[later], candidates[earlier]
        later, earlier = later[earlier < later], earlier[earlier < later]
        near_n = np.bincount(later - start, minlength=len(block))
        ends = np.cumsum(near_n)
        is_cut = (near_n > ENOUGH) & (pairs + ends > MOST_PAIRS)
        rank = np.arange(len(later)) - np.repeat(ends - near_n, near_n)
        is_noted = (rank < ENOUGH) | ~is_cut[later - start]
        found.append(keys_of(numbers[earlier[is_noted]], numbers[later[is_noted]]))
        new = block[~is_cut]
        room = near.candidates - len(kept)
        kept = np.concatenate([kept, new[:room]])
        left_out += [numbers[block[is_cut]], numbers[new[room:]]]
        start, pairs = start + len(block), pairs + len(found[-1])
    return np.concatenate(found), np.concatenate(left_out)


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


def keys_of(earlier: Ints, later: Ints) -> Keys:
    """Pairs of samples, by their numbers."""
    return later.astype(np.uint64) << np.uint64(32) | earlier.astype(np.uint64)


def numbers_of(keys: Keys) -> tuple[Ints, Ints]:
    """The earlier samples of pairs, and the later ones."""
    earlier, later = keys & np.uint64(MOST_SAMPLES - 1), keys >> np.uint64(32)
    return earlier.view(np.int64), later.view(np.int64)


def distinct(parts: Iterable[Keys]) -> Keys:
    """All keys once, sorted."""
    keys = np.concatenate([np.empty(0, np.uint64), *parts])
    keys.sort()  # np.unique hashes them, which takes far longer
    is_first = np.ones(len(keys), np.bool_)
    np.not_equal(keys[1:], keys[:-1], out=is_first[1:])
    return keys[is_first]


def not_among(keys: Keys, known: Keys) -> Keys:
    """Those of sorted keys that are not among other sorted ones."""
    return keys[np.searchsorted(known, keys) == np.searchsorted(known, keys, "right")]


def choose(copies: Keys, pairs: Keys, samples: int) -> Keys:
    """The samples that go, each with an earlier one that it is the same as and that stays; sorted.

    If what a sample is a copy of goes, too, it is given with what that goes for. copies, pairs: of
    all bands, distinct and sorted. samples: how many there are.
    """
    gone = bytearray(samples)
    is_gone = np.frombuffer(gone, np.bool_)
    is_gone[numbers_of(copies)[1]] = True
    chosen = [copies]
    for start in range(0, len(pairs), _COMPARED_AT_ONCE):
        earlier, later = numbers_of(pairs[start : start + _COMPARED_AT_ONCE])
        is_open = ~(is_gone[earlier] | is_gone[later])
        new: list[int] = []
        for first, second in zip(earlier[is_open].tolist(), later[is_open].tolist(), strict=True):
            if not (gone[first] or gone[second]):
                gone[second] = True
                new.append(second << 32 | first)
        chosen.append(np.array(new, np.uint64))
    keys = np.concatenate(chosen)
    keys.sort()
    # The first one of a group of shards may be a copy of one in an earlier group, and any go.
    for start in range(0, len(keys), _COMPARED_AT_ONCE):
        some = keys[start : start + _COMPARED_AT_ONCE]
        same_as, number = numbers_of(some)
        while (goes := is_gone[same_as]).any():
            place = np.searchsorted(keys, same_as[goes].astype(np.uint64) << np.uint64(32))
            same_as[goes], _ = numbers_of(keys[place])
        some[:] = keys_of(same_as, number)
    return keys


def save(folder: Folder, name: str, same: Same) -> None:
    """Write it for the process that chooses."""
    save_arrays(folder, name, **same._asdict())


def load(folder: Folder, name: str) -> Same:
    """What was saved."""
    arrays = load_arrays(folder, name)
    return Same(arrays["copies"], arrays["pairs"], arrays["left_out"])
