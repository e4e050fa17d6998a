import io
import random

import pytest

from megavlm.files import ranges
from megavlm.files.ranges import RangeReader, pieces_of

CONTENT = random.Random(1).randbytes(10_000)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in (("SMALL_BYTES", 10), ("PIECE_BYTES", 100), ("PIECES_AT_ONCE", 4)):
        monkeypatch.setattr(ranges, name, value)


def opened(wanted):
    """A file, and the requests that it makes."""
    requests = []

    def fetch(pieces):
        requests.append(pieces)
        return [CONTENT[first:stop] for first, stop in pieces]

    return io.BufferedReader(RangeReader(fetch, wanted), 1), requests


def test_near_ranges_share_a_request_and_long_ones_are_cut():
    assert pieces_of([(20, 30), (0, 10)]) == [(0, 30)]
    assert pieces_of([(0, 10), (21, 30)]) == [(0, 10), (21, 30)]
    assert pieces_of([(0, 50), (10, 20), (5, 250)]) == [(0, 100), (100, 200), (200, 250)]
    assert pieces_of([]) == []


def test_what_is_announced_comes_in_few_requests():
    file, requests = opened([(0, 950)])
    assert file.read(950) == CONTENT[:950]
    assert [len(pieces) for pieces in requests] == [4, 4, 2]
    wanted = [(first, first + 8) for first in range(5, 10_000, 500)]
    file, requests = opened(wanted)
    for first, stop in wanted:
        file.seek(first)
        assert file.read(8) == CONTENT[first:stop]
    assert [len(pieces) for pieces in requests] == [4] * 5
    assert [piece for pieces in requests for piece in pieces] == wanted


@pytest.mark.parametrize("seed", range(20))
def test_any_read_brings_its_bytes(seed):
    pick = random.Random(seed)
    wanted = [(first, first + pick.randrange(300)) for first in pick.sample(range(9000), 8)]
    file, _ = opened(pick.choice([wanted, []]))
    for first, stop in pick.choice([wanted, sorted(wanted)]):
        file.seek(first)
        assert file.read(stop - first) == CONTENT[first:stop]
    file.seek(9_990)
    assert file.read(100) == CONTENT[9_990:]
