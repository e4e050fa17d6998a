import itertools

import pytest

from megavlm.data.cursor import permute, sample_at


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
