import pytest

from megavlm.planner.network import (
    Group,
    all_reduce_seconds,
    neighbours,
    ring_seconds,
    send_seconds,
)
from tests.planner.machines import of_round

LAUNCH, LINK_HOP, NETWORK_HOP = 15e-6, 1.5e-6, 8e-6
CLUSTER = of_round(hosts=4, gpus_per_host=8)


@pytest.mark.parametrize(
    ("group", "seconds"),
    [
        # Links: half of 100 GB/s. A ring of four sends three quarters of the tensor.
        (Group(4, 4), 3 * LINK_HOP + 8e9 * 3 / 4 / 50e9),
        # One card of 10 GB/s a host, half of it reached.
        (Group(4, 1), 4 * NETWORK_HOP + 8e9 * 3 / 4 / 5e9),
        # Four cards a host.
        (Group(8, 4), 6 * LINK_HOP + 2 * NETWORK_HOP + 8e9 * 7 / 8 / 20e9),
        # More cards than the links can feed.
        (Group(32, 16), 30 * LINK_HOP + 2 * NETWORK_HOP + 8e9 * 31 / 32 / 50e9),
    ],
)
def test_a_ring_sends_all_but_its_own_part(group, seconds):
    assert ring_seconds(CLUSTER, group, 8e9) == pytest.approx(LAUNCH + seconds, rel=1e-12)
    assert all_reduce_seconds(CLUSTER, group, 8e9) == 2 * ring_seconds(CLUSTER, group, 8e9)


def test_nothing_to_send_takes_no_time():
    assert ring_seconds(CLUSTER, Group(1, 1), 8e9) == ring_seconds(CLUSTER, Group(8, 8), 0) == 0


def test_a_pipeline_sends_over_the_link_or_one_card():
    assert send_seconds(CLUSTER, True, 5e9) == pytest.approx(LAUNCH + 0.1)
    assert send_seconds(CLUSTER, False, 5e9) == pytest.approx(LAUNCH + NETWORK_HOP + 1)


@pytest.mark.parametrize(
    ("ranks", "stride", "per_host"),
    [
        *((8, 1, 8), (4, 1, 4), (1, 1, 1), (32, 1, 8)),
        *((16, 2, 4), (2, 8, 1), (4, 8, 1), (8, 4, 2), (2, 16, 1)),
        # Ranks 0 to 11 are one host and half of another, as 12 to 23 are: no ring stays inside.
        (12, 1, 4),
    ],
)
def test_neighbours_share_hosts_as_ranks_are_numbered(ranks, stride, per_host):
    assert neighbours(CLUSTER, ranks, stride) == Group(ranks, per_host)
