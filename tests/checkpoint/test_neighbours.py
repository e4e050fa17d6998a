import pytest
import torch
import torch.distributed as dist

from megavlm.checkpoint import neighbours as module
from megavlm.checkpoint.neighbours import Incoming, Outgoing, neighbours, pass_on
from tests.ranks import run_on_ranks


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        ("a", [None]),
        ("aaa", [None, None, None]),
        ("ab", [1, 0]),
        ("aabbcc", [2, 3, 4, 5, 0, 1]),
        ("abab", [1, 0, 3, 2]),  # ranks in turns
        ("aaab", [3, 3, 3, 0]),  # the larger host's ranks share one
    ],
)
def test_the_next_host_keeps_a_copy(hosts, expected):
    assert neighbours(hosts) == expected


def test_bytes_pass_on_also_where_one_rank_fails(monkeypatch):
    """Ranks 0 and 1 send to 2, which sends to 0; 1 cannot read, and 0 cannot write."""
    monkeypatch.setattr(module, "BLOCK_BYTES", 100)
    targets, sizes = [2, 2, 0], [250, 301, 1]

    def on_rank(rank):
        group = dist.new_group(backend="gloo")

        def read(block):
            if rank == 1:
                raise OSError("cannot read")
            block.fill_(rank + 1)

        def write(taken, block):
            if rank == 0:
                raise OSError("cannot write")
            taken.append(block)

        taken = {source: [] for source, target in enumerate(targets) if target == rank}
        incoming = [
            Incoming(source, sizes[source], lambda block, blocks=blocks: write(blocks, block))
            for source, blocks in taken.items()
        ]
        error = ""
        try:
            pass_on(Outgoing(targets[rank], sizes[rank], read), incoming, group, lambda: None)
        except OSError as failed:
            error = str(failed)
        return error, {source: torch.cat(blocks) for source, blocks in taken.items() if blocks}

    found = run_on_ranks(3, on_rank)
    assert [error for error, _ in found] == ["cannot write", "cannot read", ""]
    assert found[0][1] == {} and found[1][1] == {}
    received = found[2][1]
    assert len(received[0]) == 250, "whose own failure stops nothing"
    assert torch.equal(received[1], torch.zeros(301, dtype=torch.uint8))
