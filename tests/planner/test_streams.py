import pytest

from megavlm.planner.compute import BlockSeconds
from megavlm.planner.streams import CONTENTION, ShardedBlock, run_micro_batch


def block(name, gather=0.0, reduce=0.0, backward=2.0):
    compute = BlockSeconds(
        forward=1.0, backward=backward, recomputed_core=0.25, recomputed_in_full=1.0
    )
    return ShardedBlock(
        name=name, compute=compute, gather_forward=gather, gather_backward=gather, reduce=reduce
    )


def end_of(spans):
    return max(span.end for span in spans)


@pytest.mark.parametrize(("recompute", "seconds"), [("none", 9), ("selective", 9.75), ("full", 12)])
def test_one_rank_only_computes(recompute, seconds):
    spans = run_micro_batch([block(n) for n in "abc"], recompute, ahead=1)
    assert {span.lane for span in spans} == {"compute"}
    assert [s.name for s in spans] == [*"abccba"]
    assert end_of(spans) == pytest.approx(seconds)
    frozen = run_micro_batch([block(n, backward=0) for n in "abc"], recompute, ahead=1)
    assert end_of(frozen) == 3


def test_a_block_waits_for_its_weights_and_is_slowed_by_messages_beside_it():
    spans = run_micro_batch([block("a", gather=3, reduce=3)], "none", ahead=1)
    # The forward pass computes from 3 on, beside the gather for the backward pass, which waits.
    assert [(s.kind, s.start, s.end) for s in spans] == [
        *[("gather", 0, 3), ("gather", 3, 6), ("forward", 3, 4 + CONTENTION)],
        *[("backward", 6, 8), ("reduce", 8, 11)],
    ]


def test_computation_waits_for_reductions_that_do_not_overlap_and_for_no_gather():
    def of(gather, reduce, overlapped_reduction):
        blocks = [block(n, gather=gather, reduce=reduce) for n in "ab"]
        return run_micro_batch(blocks, "none", 1, overlapped_reduction=overlapped_reduction)

    assert end_of(of(0, 2, False)) == 2 * (1 + 2 + 2)
    assert end_of(of(0, 2, True)) == 2 * (1 + 2) + 2 + CONTENTION * 2
    assert of(3, 0, False) == of(3, 0, True)  # gathers alone

    def beside_computation(kind):
        spans = of(0.5, 2, False)
        computed = [s for s in spans if s.lane == "compute"]
        sent = [s for s in spans if s.kind == kind]
        return any(a.start < b.end and b.start < a.end for a in sent for b in computed)

    assert beside_computation("gather") and not beside_computation("reduce")


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_weights_are_gathered_so_many_blocks_ahead_and_no_more(ahead):
    blocks = [block(str(n), gather=0.1, reduce=0.1) for n in range(8)]
    spans = run_micro_batch(blocks, "none", ahead)
    compute = [span for span in spans if span.lane == "compute"]
    gathers = [span for span in spans if span.kind == "gather"]
    assert [s.name for s in gathers] == [s.name for s in compute]
    for number, (gather, own) in enumerate(zip(gathers, compute, strict=True)):
        assert gather.end <= own.start
        if number > ahead > 0:
            assert gather.start >= compute[number - ahead].start
    waits = end_of(spans) - sum(span.end - span.start for span in compute)
    # Without a look-ahead each of 16 passes waits for its gather, and 14 for a reduction before.
    assert waits == pytest.approx(0.2 if ahead else 16 * 0.1 + 7 * 0.1 + 0.1)


def test_a_network_that_is_slower_than_the_computer_sets_the_pace():
    blocks = [block(str(n), gather=10, reduce=10) for n in range(4)]
    spans = run_micro_batch(blocks, "none", ahead=1)
    network = [span for span in spans if span.lane == "network"]
    assert sum(span.end - span.start for span in network) == 120
    assert 120 <= end_of(spans) < 120 + 4 * 3 * (1 + CONTENTION)
