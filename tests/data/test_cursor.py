from collections import Counter

import numpy as np
import pytest

from megavlm.data.cursor import Shuffle, key_of, permute, sources_at

SIZES = [[1], [5], [3, 4, 5, 6], [7] * 10, [0, 3, 2], [100, 1, 1, 60]]


@pytest.mark.parametrize("group_shards", [1, 2, 64])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_epoch_shows_every_sample_once(sizes, group_shards):
    shuffle = Shuffle(sizes, group_shards, seed=5)
    size = len(shuffle)
    for epoch in range(3):
        numbers = shuffle.numbers(np.arange(epoch * size, (epoch + 1) * size))
        assert sorted(numbers.tolist()) == list(range(size))


def test_positions_may_come_in_any_order_and_by_themselves():
    shuffle = Shuffle([30] * 7, 3, seed=2)
    positions = np.arange(100, 400)
    numbers = shuffle.numbers(positions)
    mixed = np.random.default_rng(1).permutation(300)
    assert (shuffle.numbers(positions[mixed]) == numbers[mixed]).all()
    assert shuffle.numbers(np.array([234])).tolist() == [numbers[134]]


def test_a_group_of_shards_is_gone_through_before_the_next():
    shuffle = Shuffle([10] * 12, 3, seed=4)
    shards = shuffle.numbers(np.arange(120)) // 10
    groups = [set(shards[start : start + 30].tolist()) for start in range(0, 120, 30)]
    assert [len(group) for group in groups] == [3] * 4
    assert set().union(*groups) == set(range(12))
    assert groups != [set(range(first, first + 3)) for first in range(0, 12, 3)]
    again = shuffle.numbers(np.arange(120, 240)) // 10
    assert set(again[:30].tolist()) not in groups, "the next epoch groups other shards"


def test_epochs_and_seeds_differ():
    places = np.arange(100)
    keys = [key_of(*parts) for parts in ((1, 0), (1, 1), (2, 0))]
    assert len({tuple(permute(places, 100, key).tolist()) for key in keys}) == 3


def test_the_order_is_golden():
    # A change here silently reshuffles every run that is resumed.
    numbers = Shuffle([4, 3, 3], 2, seed=1).numbers(np.arange(10))
    assert numbers.tolist() == GOLDEN
    assert [n.tolist() for n in sources_at(np.arange(8), (5, 1, 2), seed=3)] == GOLDEN_MIXTURE


GOLDEN = [6, 8, 9, 7, 4, 5, 0, 1, 3, 2]
GOLDEN_MIXTURE = [[0, 2, 0, 2, 0, 0, 1, 0], [1, 1, 3, 0, 0, 2, 0, 4]]


def test_neighbours_are_scattered():
    size = 10_000
    order = Shuffle([100] * 100, 100, seed=3).numbers(np.arange(size))
    # The mean distance of random pairs is a third of the range.
    assert abs(np.abs(np.diff(order)).mean() - size / 3) < size / 60
    # And each place of the second half is as likely to come early as late.
    assert abs(order[: size // 2].mean() - size / 2) < size / 60


def test_a_mixture_is_exact_in_every_block():
    parts, seed = (5, 1, 2), 3
    sources, own = (found.tolist() for found in sources_at(np.arange(800), parts, seed))
    for start in range(0, 800, 8):
        counts = Counter(sources[start : start + 8])
        assert [counts[source] for source in range(3)] == list(parts)
    for source in range(3):  # each position of its own once, though not in order within a block
        positions = [p for taken, p in zip(sources, own, strict=True) if taken == source]
        assert sorted(positions) == list(range(len(positions)))
    orders = {tuple(sources[start : start + 8]) for start in range(0, 800, 8)}
    assert len(orders) > 20, "blocks have orders of their own"


def test_one_source_takes_every_position():
    sources, own = sources_at(np.arange(5), (3,), 1)
    assert sources.tolist() == [0] * 5 and own.tolist() == list(range(5))


def test_a_position_among_billions_is_found_at_once():
    """180,000 shards of 10,000; only counted, since timings are not tested."""
    shuffle = Shuffle(np.full(180_000, 10_000), 64, seed=1)
    numbers = shuffle.numbers(1_234_567_890 + np.arange(2048))
    assert len(set(numbers.tolist())) == 2048
    assert len(set((numbers // 10_000).tolist())) <= 2 * 64
