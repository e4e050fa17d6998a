import pytest

from megavlm.dist.told import told_once
from megavlm.errors import ConfigError
from tests.ranks import run_on_ranks


def test_what_all_ranks_raise_is_told_once(capfd):
    def on_rank(rank):
        for message in ("the same on all", f"another on rank {rank}"):
            with pytest.raises(ConfigError) as raised, told_once():
                raise ConfigError(message)
            assert raised.value.is_told
        with pytest.raises(ZeroDivisionError), told_once():
            raise ZeroDivisionError("no mistake of a user's")

    run_on_ranks(3, on_rank)
    lines = capfd.readouterr().err.splitlines()
    told = sorted(line.partition("): ")[2] for line in lines if line.startswith("megavlm: error"))
    assert told == [*(f"another on rank {rank}" for rank in range(3)), "the same on all"]
