import pytest

from megavlm.dist.told import agreed, told_once
from megavlm.errors import ConfigError
from tests.ranks import run_on_ranks


def find_a_mistake(rank):
    if rank == 2:
        raise ConfigError("rank 2 alone has found it")


def test_what_all_ranks_raise_is_told_once(capfd):
    def on_rank(rank):
        for message in ("the same on all", f"another on rank {rank}"):
            with pytest.raises(ConfigError) as raised, told_once():
                raise ConfigError(message)
            assert raised.value.is_told
        with pytest.raises(ConfigError, match="rank 2 alone has found it"), told_once():
            agreed(lambda: find_a_mistake(rank))
        assert agreed(lambda: rank) == rank
        with pytest.raises(ZeroDivisionError), told_once():
            raise ZeroDivisionError("no mistake of a user's")

    run_on_ranks(3, on_rank)
    lines = capfd.readouterr().err.splitlines()
    told = sorted(line.partition("): ")[2] for line in lines if line.startswith("megavlm: error"))
    assert told == [
        *(f"another on rank {rank}" for rank in range(3)),
        "rank 2 alone has found it",
        "the same on all",
    ]
