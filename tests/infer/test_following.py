import os
import signal
import time
from datetime import timedelta
from unittest.mock import patch

import pytest
import torch

from megavlm.config.engines import MegatronSettings
from megavlm.errors import RanksError, RequestError
from megavlm.infer import following
from megavlm.infer.engine import Engine
from megavlm.infer.following import follow, leading
from megavlm.model.vlm import VisionLanguageModel
from tests.batches import TINY
from tests.infer.test_engine import LIMITS, random_requests
from tests.infer.tokens import request_of, run
from tests.model.test_vlm import random_model
from tests.ranks import alone, run_on_ranks

TP2 = MegatronSettings(tensor_parallel=2)
SECRET = "nobody may log this question"
REQUESTS = random_requests(12)


@pytest.fixture(autouse=True)
def quick_beats(monkeypatch):
    monkeypatch.setattr(following, "BEAT_SECONDS", 0.05)


@pytest.fixture(scope="module")
def whole():
    with alone():
        return random_model().eval()


def engine_of_rank(whole):
    part = VisionLanguageModel(TINY, dtype=torch.float32, parallel=TP2).eval()
    ledger = part.ledger()
    with torch.no_grad():
        for (name, parameter), weights in zip(
            part.named_parameters(), whole.parameters(), strict=True
        ):
            parameter.copy_(part.shard(ledger[name], weights))
    return Engine(part, LIMITS)


def wont_be_lost(error):
    raise AssertionError(error)


def test_one_is_asked_and_the_others_follow(whole):
    with alone():
        expected = run(Engine(whole, LIMITS), REQUESTS)

    def on_rank(rank):
        engine = engine_of_rank(whole)
        if rank:
            step = engine.step

            def signalled():
                os.kill(os.getpid(), signal.SIGTERM)
                return step()

            engine.step = signalled
            follow(engine)
            return engine.pictures.encoded, engine.running
        with leading(engine, wont_be_lost) as leader:
            got = run(leader, REQUESTS)
            assert leader.pictures.encoded == 5
            with pytest.raises(RequestError, match="max_new_tokens=0"):
                leader.add(request_of([20], [], 0))
            cancelled = leader.add(REQUESTS[0])
            leader.step()
            leader.cancel(cancelled)
            time.sleep(0.2)  # beats, while nobody asks
            return got, run(leader, REQUESTS)

    assert run_on_ranks(2, on_rank, parallel=TP2) == [(expected, expected), (5, 0)]


class Ended(Exception):  # noqa: N818 - no error
    """In place of the process's end."""


@pytest.mark.parametrize("how", ["fails", "drifts"])
def test_one_that_ends_ends_all(whole, how, caplog):
    def on_rank(rank):
        engine = engine_of_rank(whole)
        if rank:
            step = engine.step

            def failing():
                if len(engine._rows) < 4:
                    return step()
                if how == "fails":
                    raise RuntimeError(SECRET)
                return step()[1:]

            engine.step = failing
            with patch.object(os, "_exit", side_effect=Ended), pytest.raises(Ended):
                follow(engine)
            return caplog.text
        told = []
        with pytest.raises(RanksError) as raised, leading(engine, told.append) as leader:
            run(leader, REQUESTS)
        return str(raised.value), [str(error) for error in told]

    (says, told), log = run_on_ranks(2, on_rank, parallel=TP2)
    assert says.startswith("rank 1 has ended")
    assert set(told) <= {says}
    assert SECRET not in log
    expected = {"fails": "rank 1: the engine failed (RuntimeError)", "drifts": "other tokens than"}
    assert expected[how] in log


def test_a_failure_of_the_first_ends_all(whole):
    def on_rank(rank):
        engine = engine_of_rank(whole)
        if rank:
            with patch.object(os, "_exit", side_effect=Ended), pytest.raises(Ended):
                follow(engine)
            return None
        with pytest.raises(RanksError) as raised, leading(engine, wont_be_lost) as leader:
            leader.add(REQUESTS[0])
            leader.step()
            raise MemoryError
        return str(raised.value)

    says, _ = run_on_ranks(2, on_rank, parallel=TP2)
    assert "the engine failed on rank 0 (MemoryError)" in says


def test_one_that_says_nothing_is_lost(whole, monkeypatch):
    monkeypatch.setattr(following, "SILENCE", timedelta(seconds=0.5))

    def on_rank(rank):
        engine = engine_of_rank(whole)
        if rank:
            with patch.object(following._Watch, "_beat_other"):
                follow(engine)
            return None
        told = []
        with pytest.raises(RanksError, match="rank 1 has said nothing for"):
            with leading(engine, told.append) as leader:
                while not told:
                    time.sleep(0.02)
                leader.stop()
        return len(told)

    assert run_on_ranks(2, on_rank, parallel=TP2) == [1, None]
