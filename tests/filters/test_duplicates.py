import tracemalloc

import numpy as np
import pytest

from megavlm.files.folder import Folder
from megavlm.filters import duplicates
from megavlm.filters.duplicates import (
    BANDS,
    FEW,
    HASH_BYTES,
    PERMUTATIONS,
    SIGNATURE_BYTES,
    Same,
    band_of,
    choose,
    distinct,
    find_copies,
    find_same,
    keys_of,
    load,
    nearness,
    numbers_of,
    save,
    sign_captions,
)
from tests.filters.hashes import RULES, clusters, gone_by_all_pairs, with_flipped


def gone_among(reason, hashes, parts=1):
    """What goes if each part of each band is compared by itself."""
    found = []
    for band in range(BANDS[reason]):
        values = band_of(reason, hashes, band)
        for part in range(parts):
            here = np.flatnonzero(values % np.uint64(parts) == part)
            found.append(find_same(here, hashes[here], values[here], nearness(reason, RULES)))
    copies, pairs = (distinct(getattr(same, n) for same in found) for n in ("copies", "pairs"))
    same_as, number = numbers_of(choose(copies, pairs, len(hashes)))
    return dict(zip(number.tolist(), same_as.tolist(), strict=True))


@pytest.mark.parametrize("reason", BANDS)
def test_the_same_goes_as_by_comparing_all_pairs(reason, monkeypatch):
    hashes = clusters(reason, np.random.default_rng(4), 600)
    expected = gone_by_all_pairs(reason, hashes)
    assert 100 < len(expected) < 590
    assert gone_among(reason, hashes) == gone_among(reason, hashes, parts=5) == expected
    monkeypatch.setattr(duplicates, "_QUERIES", 7)
    monkeypatch.setattr(duplicates, "_COMPARED_AT_ONCE", 50)
    assert gone_among(reason, hashes) == expected


@pytest.mark.slow
@pytest.mark.parametrize("reason", BANDS)
def test_the_same_goes_at_sizes_at_which_buckets_are_crowds(reason):
    """Pictures near 32 earlier ones, all of which go for others, stay."""
    hashes = clusters(reason, np.random.default_rng(4), 6_000)
    expected = gone_by_all_pairs(reason, hashes)
    assert 3_000 < len(expected) < 5_000
    assert gone_among(reason, hashes) == expected


def test_all_pictures_within_15_bits_are_found():
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 256, (400, 32), np.uint8)
    for n in range(100):
        bits = generator.choice(256, 15, replace=False)
        hashes[300 + n] = with_flipped(hashes[2 * n], bits)
    assert gone_among("duplicate_picture", hashes) == {300 + n: 2 * n for n in range(100)}


def test_pictures_within_20_bits_are_nearly_all_found():
    generator = np.random.default_rng(1)
    hashes = generator.integers(0, 256, (4_000, 32), np.uint8)
    for n in range(2_000):
        hashes[2_000 + n] = with_flipped(hashes[n], generator.choice(256, 20, replace=False))
    share = len(gone_among("duplicate_picture", hashes)) / 2_000
    assert share > 0.997  # expected 0.9993


def test_a_picture_goes_only_for_an_earlier_one_that_stays():
    first = np.random.default_rng(2).integers(0, 256, 32, np.uint8)
    second = with_flipped(first, [*range(25)])
    third = with_flipped(first, [*range(50)])  # near the second alone
    hashes = np.stack([first, second, third, second, first, third])
    # The third is a copy of the second, and is told as what stays.
    assert gone_among("duplicate_picture", hashes) == {1: 0, 3: 0, 4: 0, 5: 2}


@pytest.mark.parametrize("reason", BANDS)
@pytest.mark.parametrize("size", [2, FEW + 1])
def test_the_limit_is_near(reason, size):
    """In small buckets and large ones."""
    near, bits, places = nearness(reason, RULES), np.zeros(256, np.uint8), np.zeros(126, "<u2")
    rows = {}
    for step in (-1, 0, 1):
        if reason == "duplicate_picture":
            rows[step] = np.packbits(np.where(np.arange(256) < 31 + step, 1, bits))
        else:  # 0.8 of 126: 101 agree
            rows[step] = np.where(np.arange(126) < 25 + step, 1, places).view(np.uint8)
    zero = np.zeros_like(rows[0])
    filler = np.random.default_rng(8).integers(1, 256, (size - 2, len(zero)), np.uint8)
    for step, is_near in ((-1, True), (0, True), (1, False)):
        hashes = np.stack([zero, *filler, rows[step]])
        same = find_same(np.arange(size), hashes, np.zeros(size, np.uint64), near)
        assert (
            same.pairs.tolist() == keys_of(np.array([0]), np.array([size - 1])).tolist() * is_near
        )


def test_a_copy_of_a_million_is_no_more_work_than_one():
    hashes = np.zeros((200_000, 32), np.uint8)  # in pairs, 2e10 comparisons
    values = band_of("duplicate_picture", hashes, 0)
    near = nearness("duplicate_picture", RULES)
    same = find_same(np.arange(len(hashes)), hashes, values, near)
    assert len(same.pairs) == 0 and len(same.copies) == len(hashes) - 1


@pytest.mark.parametrize("reason", BANDS)
def test_a_crowd_that_is_all_the_same_stays_linear(reason, monkeypatch):
    monkeypatch.setattr(duplicates, "MOST_PAIRS", 2**17)
    hashes = np.zeros((20_000, HASH_BYTES[reason]), np.uint8)  # each differs from each: 2e8 pairs
    hashes[:, -4:] = (
        np.random.default_rng(5).permutation(20_000).reshape(-1, 1).view(np.uint8)[:, :4]
    )
    compared = []
    near = nearness(reason, RULES)

    def search(a, b):
        compared.append(len(a) * len(b))
        return near.search(a, b)

    numbers, values = np.arange(len(hashes)), np.zeros(len(hashes), np.uint64)
    same = find_same(numbers, hashes, values, near._replace(search=search))
    assert len(same.pairs) <= 2**17 + duplicates.ENOUGH * len(hashes)
    assert sum(compared) < 2_000 * len(hashes)
    gone = choose(same.copies, same.pairs, len(hashes))
    assert numbers_of(gone)[1].tolist() == [*range(1, len(hashes))]  # with all that are left out
    assert 19_000 < len(same.left_out) < 20_000


def test_few_pairs_are_found_at_once(monkeypatch):
    """Many candidates, each near most queries, though not near each other."""
    monkeypatch.setattr(duplicates, "_FOUND_AT_ONCE", 2**14)
    generator = np.random.default_rng(9)
    centre = generator.integers(0, 256, 32, np.uint8)
    around = [
        with_flipped(centre, generator.choice(256, 28, replace=False).tolist())
        for _ in range(3_000)
    ]
    near_it = [with_flipped(centre, [n, n + 1]) for n in range(200)]
    near, found = nearness("duplicate_picture", RULES), []

    def search(a, b):
        later, earlier = near.search(a, b)
        found.append(len(later))
        return later, earlier

    hashes = np.stack([*around, *near_it])
    numbers, values = np.arange(len(hashes)), np.zeros(len(hashes), np.uint64)
    find_same(numbers, hashes, values, near._replace(search=search))
    assert sum(found) > 300_000 and max(found) < 2**15


def test_what_a_full_bucket_has_no_room_for_is_counted(monkeypatch):
    monkeypatch.setattr(duplicates, "_QUERIES", 10)
    hashes = np.random.default_rng(6).integers(0, 256, (100, 32), np.uint8)
    hashes[95], hashes[96] = with_flipped(hashes[3], [40]), with_flipped(hashes[70], [40])
    near = nearness("duplicate_picture", RULES)
    numbers, values = np.arange(100), np.zeros(100, np.uint64)
    same = find_same(numbers, hashes, values, near._replace(candidates=50))
    assert same.pairs.tolist() == keys_of(np.array([3]), np.array([95])).tolist()
    assert same.left_out.tolist() == [*range(50, 100)]
    same = find_same(numbers, hashes, values, near)
    assert len(same.pairs) == 2 and not len(same.left_out)


def test_only_the_pairs_of_a_crowd_have_a_limit(monkeypatch):
    """Those near many earlier ones are told, and near a few noted in full."""
    monkeypatch.setattr(duplicates, "MOST_PAIRS", 3)
    monkeypatch.setattr(duplicates, "ENOUGH", 2)
    hashes = np.zeros((20, 32), np.uint8)
    hashes[:5, 0], hashes[5:] = np.arange(5), np.random.default_rng(6).integers(0, 256, (15, 32))
    hashes[19] = with_flipped(hashes[18], [40])
    near = nearness("duplicate_picture", RULES)
    same = find_same(np.arange(20), hashes, np.zeros(20, np.uint64), near)
    assert [*zip(*(n.tolist() for n in numbers_of(same.pairs)), strict=True)] == [
        *[(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (0, 4), (1, 4), (18, 19)]
    ]
    assert same.left_out.tolist() == [3, 4]


def test_choosing_takes_little_memory(monkeypatch):
    """For each pair, beside the pairs themselves."""
    monkeypatch.setattr(duplicates, "_COMPARED_AT_ONCE", 2**10)
    samples = 2 * 10**5
    pairs = keys_of(np.zeros(samples, np.int64), np.arange(1, samples + 1))
    tracemalloc.start()
    gone = choose(pairs[:0], pairs, samples + 1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(gone) == len(pairs) and peak < 20 * len(pairs)


def test_hashes_that_fold_to_the_same_value_are_no_copies(monkeypatch):
    numbers, hashes = np.array([5, 6, 9]), np.array([[1] * 32, [2] * 32, [1] * 32], np.uint8)
    for _ in range(2):
        copies, is_copy = find_copies(numbers, hashes)
        assert copies.tolist() == [9 << 32 | 5] and is_copy.tolist() == [False, False, True]
        monkeypatch.setattr(duplicates, "_folded", lambda words: np.zeros(len(words), np.uint64))


def test_captions():
    captions = [
        "a photo of a red car parked on the street",
        "A photo of a red car, parked on the street!",
        "a photo of a blue car parked on the street",
        "two dogs play in the deep snow near the frozen lake",
        "two dogs play in the deep snow near the frozen lakes",
        "赤い車が道に停まっている",
        "cat",
        None,
        "...",
        "Cat",
    ]
    signatures = sign_captions(captions)
    assert [n for n, s in enumerate(signatures) if s is None] == [7, 8]
    there = [n for n, s in enumerate(signatures) if s is not None]
    rows = np.frombuffer(b"".join(signatures[n] for n in there), np.uint8)
    gone = gone_among("duplicate_caption", rows.reshape(-1, SIGNATURE_BYTES))
    assert {there[late]: there[early] for late, early in gone.items()} == {1: 0, 4: 3, 9: 6}
    assert sign_captions([]) == [] and sign_captions([None]) == [None]


def test_signatures_estimate_the_share_of_common_pieces():
    text = "".join(chr(97 + n) for n in np.random.default_rng(3).integers(0, 26, 2_000))
    other = text[:1_000]  # of 1,996 pieces it has 996
    a, b = (np.frombuffer(s, np.uint16) for s in sign_captions([text, other]) if s)
    assert len(a) == PERMUTATIONS
    assert (a == b).mean() == pytest.approx(996 / 1_996, abs=0.13)  # 3 standard deviations


def test_nothing_to_compare():
    hashes = np.empty((0, 32), np.uint8)
    assert gone_among("duplicate_picture", hashes) == {}


def test_what_was_found_is_kept(tmp_path):
    same = Same(
        keys_of(np.array([1]), np.array([2**32 - 1])), np.empty(0, np.uint64), np.array([3])
    )
    save(Folder(tmp_path), "x.npz", same)
    again = load(Folder(tmp_path), "x.npz")
    assert numbers_of(again.copies) == ([1], [2**32 - 1])
    assert again.pairs.shape == (0,) and again.left_out.tolist() == [3]
