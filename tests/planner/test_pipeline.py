from itertools import pairwise

import pytest
from megatron.core.pipeline_parallel.schedules import get_schedule_table

from megavlm.planner.pipeline import Pass, most_in_flight, passes_of, run_pipeline

SCHEDULES = [(4, 1, 8), (4, 1, 4), (4, 1, 2), (3, 1, 7), (2, 2, 4), (4, 3, 8), (4, 2, 4), (1, 1, 3)]

ALIKE = dict.fromkeys(range(16), 1.0)


@pytest.mark.parametrize(("ranks", "virtual", "micro_batches"), SCHEDULES)
def test_equal_chunks_wait_for_the_bubble_alone(ranks, virtual, micro_batches):
    """(p - 1) / (m v) of the time that a rank computes: Narayanan et al. 2021, section 2.2."""
    chunks = ranks * virtual
    seconds = ([1.0] * chunks, [2.0] * chunks)
    spans = run_pipeline(*seconds, 0.0, ranks=ranks, micro_batches=micro_batches)
    busy = 3 * micro_batches * virtual
    bubble = (ranks - 1) / (micro_batches * virtual)
    assert max(span.end for span in spans) == pytest.approx(busy * (1 + bubble))


@pytest.mark.parametrize(("ranks", "virtual", "micro_batches"), SCHEDULES)
def test_every_pass_runs_once_after_what_it_needs_and_alone_on_its_rank(
    ranks, virtual, micro_batches
):
    chunks, sent = ranks * virtual, 0.5
    forward = [1.0 + 0.1 * chunk for chunk in range(chunks)]
    backward = [2.0 - 0.1 * chunk for chunk in range(chunks)]
    spans = run_pipeline(forward, backward, sent, ranks=ranks, micro_batches=micro_batches)
    at = {(s.kind, s.name): s for s in spans}
    assert len(spans) == len(at) == 2 * chunks * micro_batches
    for rank in range(ranks):
        own = sorted((s.start, s.end) for s in spans if s.lane == f"rank {rank}")
        assert all(one[1] <= two[0] for one, two in pairwise(own))
    for m in range(micro_batches):
        names = [f"chunk {chunk}, micro-batch {m}" for chunk in range(chunks)]
        for chunk, name in enumerate(names):
            there, back = at["forward", name], at["backward", name]
            assert there.lane == back.lane == f"rank {chunk % ranks}"
            assert there.end - there.start == pytest.approx(forward[chunk])
            assert back.end - back.start == pytest.approx(backward[chunk])
            assert back.start >= there.end
            if chunk:
                assert there.start >= at["forward", names[chunk - 1]].end + sent - 1e-9
                assert at["backward", names[chunk - 1]].start >= back.end + sent - 1e-9


@pytest.mark.parametrize(("ranks", "virtual", "micro_batches"), [s for s in SCHEDULES if s[1] > 1])
def test_chunks_take_turns_as_megatron_core_has_them(ranks, virtual, micro_batches):
    table = get_schedule_table(micro_batches, virtual, ranks)
    for rank in range(ranks):
        passes = passes_of(rank, ranks, virtual, micro_batches)
        for kind, order in (("forward", 1), ("backward", -1)):
            local = list(range(virtual))[::order]
            assert [p for p in passes if p.kind == kind] == [
                Pass(kind, local[chunk] * ranks + rank, m) for m, chunk in table
            ]


def test_micro_batches_in_flight():
    for rank in range(4):
        assert most_in_flight(rank, 4, 1, 8, ALIKE) == {rank: 4 - rank}
        assert most_in_flight(rank, 4, 1, 2, ALIKE) == {rank: min(2, 4 - rank)}
        # Interleaved: 2 (p - r - 1) + (v - 1) p + 1 of all chunks together.
        assert sum(most_in_flight(rank, 4, 3, 8, ALIKE).values()) == 2 * (3 - rank) + 8 + 1
    assert most_in_flight(0, 4, 2, 4, ALIKE) == {0: 4, 4: 4}  # all forward passes come first
    assert most_in_flight(0, 1, 1, 8, ALIKE) == {0: 1}
