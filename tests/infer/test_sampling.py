import math

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from megavlm.errors import RequestError
from megavlm.infer.sampling import GREEDY, Sampling, choose

VOCABULARY = 50
DRAWS = 20_000


def logits(rows):
    return 2 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.3, top_k=5),
        Sampling(temperature=1.0, top_p=0.6),
        Sampling(temperature=2.0, top_k=12, top_p=0.8),
        Sampling(temperature=1.0, top_p=0.01),
    ],
)
def test_tokens_are_drawn_as_by_transformers(sampling):
    row = logits(1)
    scores = TemperatureLogitsWarper(sampling.temperature)(None, row)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    scores = TopPLogitsWarper(sampling.top_p)(None, scores) if sampling.top_p < 1 else scores
    expected = scores.softmax(-1)[0].double()
    # Evenly spread numbers, so that shares are exact but for one draw at each bound.
    uniform = [(n + 0.5) / DRAWS for n in range(DRAWS)]
    drawn = choose(row.expand(DRAWS, -1), [sampling] * DRAWS, uniform)
    shares = torch.bincount(drawn, minlength=VOCABULARY).double() / DRAWS
    assert (
        torch.equal(shares > 0, expected > 1.5 / DRAWS) or (expected[shares == 0] < 2 / DRAWS).all()
    )
    assert (shares - expected).abs().max() < 1.5 / DRAWS


def test_rows_are_drawn_by_their_own_settings():
    rows = logits(4)
    sampling = [GREEDY, Sampling(temperature=1), GREEDY, Sampling(temperature=1, top_k=1)]
    together = choose(rows, sampling, [0.9] * 4)
    apart = [choose(rows[n : n + 1], [sampling[n]], [0.9])[0] for n in range(4)]
    assert together.tolist() == [int(token) for token in apart]
    assert together[[0, 2, 3]].tolist() == rows[[0, 2, 3]].argmax(-1).tolist()
    assert together[1] != rows[1].argmax()


@pytest.mark.parametrize("sampling", [Sampling(temperature=1), Sampling(temperature=1, top_k=9)])
def test_the_largest_number_draws_a_token_that_may_be_drawn(sampling):
    rows = logits(300)
    largest = math.nextafter(1, 0)
    drawn = choose(rows, [sampling] * 300, [largest] * 300)
    places = (rows > rows.gather(1, drawn[:, None])).sum(-1)
    assert set(places.tolist()) == {(sampling.top_k or VOCABULARY) - 1}
    assert choose(torch.zeros(1, 10), [Sampling(temperature=1)], [1 - 1e-8]).item() < 10


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", 0),
        ("top_k", 2**63),
        ("top_p", 0.0),
    ],
)
def test_settings_that_mean_nothing_are_refused(name, value):
    with pytest.raises(RequestError, match=f"{name}={value} must"):
        Sampling(**{name: value})
