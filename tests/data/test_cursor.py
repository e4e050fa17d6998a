import itertools
from collections import Counter

import pytest

from megavlm.data.cursor import permute, sample_at, source_at


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 1000])
def test_every_epoch_shows_every_sample_once(size):
    for epoch in range(3):
        positions = range(epoch * size, (epoch + 1) * size)
        assert sorted(sample_at(p, size, seed=5) for p in positions) == list(range(size))


def test_epochs_and_seeds_differ():
    orders = {tuple(permute(i, 100, key) for i in range(100)) for key in ("1:0", "1:1", "2:0")}
    assert len(orders) == 3


def test_the_order_is_golden():
    # A change here silently reshuffles every run that is resumed.
    assert [sample_at(p, 10, seed=1) for p in range(10)] == [8, 7, 3, 2, 4, 5, 9, 6, 1, 0]


def test_neighbours_are_scattered():
    size = 10_000
    order = [sample_at(p, size, seed=3) for p in range(size)]
    distances = [abs(a - b) for a, b in itertools.pairwise(order)]
    # The mean distance of random pairs is a third of the range.
    assert abs(sum(distances) / len(distances) - size / 3) < size / 60


def test_a_mixture_is_exact_in_every_block():
    parts, seed = (5, 1, 2), 3
    taken = [source_at(position, parts, seed) for position in range(800)]
    for start in range(0, 800, 8):
        counts = Counter(source for source, _ in taken[start : start + 8])
        assert [counts[source] for source in range(3)] == list(parts)
    for source in range(3):  # each position of its own once, though not in order within a block
        own = [position for taken_source, position in taken if taken_source == source]
        assert sorted(own) == list(range(len(own)))
    orders = {tuple(s for s, _ in taken[start : start + 8]) for start in range(0, 800, 8)}
    assert len(orders) > 20, "blocks have orders of their own"


def test_one_source_takes_every_position():
    assert [source_at(position, (3,), 1) for position in range(5)] == [(0, p) for p in range(5)]
