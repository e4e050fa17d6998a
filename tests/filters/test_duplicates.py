import numpy as np
import pytest

from megavlm.config.filters import DuplicateRules
from megavlm.files.folder import Folder
from megavlm.filters.duplicates import (
    BANDS,
    PERMUTATIONS,
    SIGNATURE_BYTES,
    Same,
    bands_of,
    choose,
    find_same,
    load,
    nearness,
    save,
    sign_captions,
)

RULES = DuplicateRules(picture_bits=31, caption_similarity=0.8)


def with_flipped(hash_: np.ndarray, bits: list[int]) -> np.ndarray:
    flipped = np.unpackbits(hash_)
    flipped[bits] ^= 1
    return np.packbits(flipped)


def gone_among(reason, hashes, parts=1):
    """What goes if each part of each band is compared by itself."""
    bands, found = bands_of(reason, hashes), []
    for band in range(BANDS[reason]):
        for part in range(parts):
            here = np.flatnonzero(bands[:, band] % np.uint64(parts) == part)
            same = find_same(here, hashes[here], bands[here, band], nearness(reason, RULES))
            found.append(same)
    return choose(found)


def test_all_pictures_within_15_bits_are_found():
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 256, (400, 32), np.uint8)
    for n in range(100):
        bits = generator.choice(256, 15, replace=False)
        hashes[300 + n] = with_flipped(hashes[2 * n], bits)
    assert gone_among("duplicate_picture", hashes) == {300 + n: 2 * n for n in range(100)}
    assert gone_among("duplicate_picture", hashes, parts=3) == {300 + n: 2 * n for n in range(100)}


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
    assert gone_among("duplicate_picture", hashes) == {1: 0, 3: 1, 4: 0, 5: 2}


def test_a_copy_of_a_million_is_no_more_work_than_one():
    hashes = np.zeros((200_000, 32), np.uint8)  # in pairs, 2e10 comparisons
    bands = bands_of("duplicate_picture", hashes)
    same = find_same(
        np.arange(len(hashes)), hashes, bands[:, 0], nearness("duplicate_picture", RULES)
    )
    assert len(same.pairs) == 0 and len(same.copies) == len(hashes) - 1


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
    same = Same(np.array([[1, 2]]), np.empty((0, 2), np.int64))
    save(Folder(tmp_path), "x.npz", same)
    again = load(Folder(tmp_path), "x.npz")
    assert again.copies.tolist() == [[1, 2]] and again.pairs.shape == (0, 2)
