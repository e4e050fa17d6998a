"""What would hang is told: which rank, where, and both calls."""

import pytest

from megavlm.dryrun.compare import disagreements, ranges
from megavlm.dryrun.record import Call


def call(operation: str, *, peer: int | None = None, size: int = 1, ranks=(0, 1)) -> Call:
    return Call(operation, ranks, peer, (("float32", size),), 4 * size)


REDUCE, BARRIER = call("allreduce_"), call("barrier")


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        (
            [BARRIER, REDUCE],
            [BARRIER, call("allreduce_", size=2)],
            "rank 1 is in collective 2 of 2, allreduce_ of 2 float32 over ranks 0-1, but rank 0 is "
            "in collective 2 of 2, allreduce_ of 1 float32 over ranks 0-1",
        ),
        (
            [REDUCE],
            [],
            "rank 1 has ended, after 0 collectives, but rank 0 is in collective 1 of 1, allreduce_ "
            "of 1 float32 over ranks 0-1",
        ),
        (
            [REDUCE, BARRIER],
            [BARRIER, REDUCE],
            "rank 1 is in collective 1 of 2, barrier of 1 float32 over ranks 0-1, but rank 0 is in "
            "collective 1 of 2, allreduce_ of 1 float32 over ranks 0-1",
        ),
        (
            [call("send", peer=1)],
            [],
            "rank 0 sends rank 1 as number 1 of 1 send of 1 float32 over ranks 0-1, but that "
            "receives, of 0, nothing",
        ),
        (
            [call("send", peer=1)],
            [call("recv_", peer=0, size=2)],
            "rank 0 sends rank 1 as number 1 of 1 send of 1 float32 over ranks 0-1, but that "
            "receives, of 1, recv_ of 2 float32 over ranks 0-1",
        ),
    ],
    ids=["size", "missing", "order", "not received", "size received"],
)
def test_disagreements_are_told(first, second, told):
    assert disagreements({0: first, 1: second}) == [told]


def test_agreement():
    both = [REDUCE, BARRIER]
    assert not disagreements({0: [call("send", peer=1), *both], 1: [*both, call("recv_", peer=0)]})


def test_the_odd_one_is_named_before_those_that_wait_for_it():
    everyone, pair = call("allreduce_", ranks=(0, 1, 2, 3)), call("barrier", ranks=(0, 1))
    wrong = call("allreduce_", ranks=(0, 1, 2, 3), size=7)
    queues = {0: [pair, everyone], 1: [pair, everyone], 2: [wrong], 3: [everyone]}
    [problem] = disagreements(queues)
    assert problem.startswith("rank 2 is in collective 1 of 1") and "but rank 0" in problem


def test_ranks_in_different_groups_wait_for_each_other():
    one, other = call("allreduce_", ranks=(0, 1)), call("allreduce_", ranks=(0, 1, 2))
    assert disagreements({0: [one, other], 1: [other, one], 2: [other]})


def test_ranks_that_were_not_run_are_ignored():
    assert disagreements({0: [call("allreduce_", ranks=(0, 7)), call("send", peer=7)]}) == []


def test_ranges():
    assert ranges([0]) == "0"
    assert ranges([0, 1, 2, 8, 9, 16]) == "0-2, 8-9, 16"
    assert ranges(range(0, 100, 10)) == "0, 10, ..., 90"
