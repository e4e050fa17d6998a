import pytest
import torch

from megavlm.ops import library
from megavlm.ops.cross_attention import cross_attention
from tests.ops.cases import outcome, random_case
from tests.ranks import run_on_ranks


@pytest.mark.skipif(bool(library.MISSING), reason=f"not compiled: {library.MISSING}")
def test_threads_change_nothing():
    def on_threads(_rank):  # in a process of its own: those forked later must find no threads
        outcomes = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            outcomes.append(outcome(cross_attention, random_case(5, long=True)))
        return outcomes

    [(one, *several)] = run_on_ranks(1, on_threads, groups=False)
    for other in several:
        assert all(torch.equal(one[name], other[name]) for name in one)
