import random
from dataclasses import replace

import pytest
import torch

from megavlm.errors import RequestError
from megavlm.infer.engine import Engine, Limits
from megavlm.infer.sampling import Sampling
from tests.infer.test_generate import pictures
from tests.infer.tokens import request_of, run
from tests.model.test_vlm import random_model
from tests.ranks import alone


@pytest.fixture(autouse=True)
def groups():
    with alone():
        yield


@pytest.fixture(scope="module")
def model():
    with alone():
        return random_model().eval()


def random_requests(count, seed=5):
    """Of all lengths, with up to three of five pictures, half of them greedy."""
    chance = random.Random(seed)
    shown = pictures(5)
    requests = []
    for number in range(count):
        prompt = [chance.randrange(10, 500) for _ in range(chance.randint(1, 9))]
        sampling = Sampling(temperature=1.5, seed=number) if number % 2 else Sampling()
        pixels = chance.sample(shown, chance.randint(0, 3))
        requests.append(request_of(prompt, pixels, chance.randint(1, 12), sampling))
    return requests


LIMITS = Limits(rows=4, tokens=24, pictures=3)


def test_rows_that_join_and_leave_do_not_change_each_other(model):
    requests = random_requests(24)
    engine = Engine(model, LIMITS)
    alone_with = Engine(model, replace(LIMITS, rows=1))
    singly = [run(alone_with, [request])[0] for request in requests]
    assert run(engine, requests) == singly
    assert len({tuple(tokens) for tokens in singly}) > 12
    assert engine.pictures.encoded == 5
    assert engine.pictures.reused == sum(len(r.pixels) for r in requests) - 5

    # Requests that come while others run, and some that are called off.
    chance = random.Random(1)
    tokens, numbers, cancelled = {}, [], set()
    waiting = list(requests)
    while waiting or engine.running or engine.waiting:
        for _ in range(chance.randint(0, 2)):
            if waiting:
                numbers.append(engine.add(waiting.pop(0)))
                tokens[numbers[-1]] = []
        if numbers and chance.random() < 0.2:
            cancelled.add(chance.choice(numbers))
            engine.cancel(max(cancelled))
        for event in engine.step():
            assert event.request not in cancelled or event.request != max(cancelled)
            tokens[event.request] += [] if event.token is None else [event.token]
    for number, expected in zip(numbers, singly, strict=True):
        got = tokens[number]
        assert got == (expected[: len(got)] if number in cancelled else expected)
    assert any(tokens[n] != e for n, e in zip(numbers, singly, strict=True)), "none was cut short"


def test_padding_for_cuda_graphs_changes_no_token(model, monkeypatch):
    requests = random_requests(40)
    expected = run(Engine(model, LIMITS), requests)
    monkeypatch.setattr("megavlm.infer.engine._has_graphs", lambda device: True)
    monkeypatch.setattr("megavlm.infer.engine.GRAPH_TOKENS", 8)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    shapes = set()
    engine = Engine(model, replace(LIMITS, rows=3), compiled=True)
    write = engine._write

    def observed(tokens_b1, step, caches):
        shapes.add(tuple(step.visible_bc.shape))
        return write(tokens_b1, step, caches)

    monkeypatch.setattr(engine, "_write", observed)
    assert run(engine, requests) == expected
    assert {rows for rows, _ in shapes} == {1, 2, 4}
    assert {tokens for _, tokens in shapes} == {8, 16, 24}  # the caches end there


@pytest.mark.slow
@pytest.mark.parametrize("has_graphs", [False, True])
def test_compiled_layers_choose_the_same_tokens(model, monkeypatch, has_graphs):
    requests = [r for r in random_requests(24) if len(r.prompt.tokens) > 1]
    expected = run(Engine(model, LIMITS), requests)
    monkeypatch.setattr("megavlm.infer.engine._has_graphs", lambda device: has_graphs)
    engine = Engine(model, LIMITS, compiled=True)
    engine.warm_up()
    assert engine.pictures.encoded == 3
    with torch.compiler.set_stance("default" if has_graphs else "fail_on_recompile"):
        assert run(engine, requests) == expected


def test_an_answer_ends_by_the_model_or_by_length(model):
    engine = Engine(model, LIMITS)
    engine.add(request_of([20, 30], [], 3))
    ends = []
    while engine.running or engine.waiting:
        ends += [(event.token, event.finish) for event in engine.step()]
    assert [finish for _, finish in ends] == [None, None, "length"]
    assert all(token is not None for token, _ in ends)


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (request_of([20] * 20, [], 5), "20 tokens and max_new_tokens=5 exceed the limit of 24"),
        (request_of([20], pictures(4), 5), "4 pictures exceed the limit of 3"),
        (request_of([20], [], 0), "max_new_tokens=0 must be at least 1"),
    ],
)
def test_what_finds_no_room_is_refused(model, request_, says):
    with pytest.raises(RequestError, match=says):
        Engine(model, LIMITS).add(request_)


def test_few_pictures_are_kept(model):
    engine = Engine(model, LIMITS)
    states = engine.pictures(pictures(5))
    each = sum(t.nbytes for pair in states[0] for t in pair)
    small = Engine(model, LIMITS)
    small.pictures._most = 2
    with torch.inference_mode():
        small.pictures(pictures(5))
        small.pictures(pictures(5)[3:])
    assert (small.pictures.encoded, small.pictures.reused) == (5, 2)
    assert each == 2 * 2 * model.sizes.encoder.tokens * 2 * 12 * 4
