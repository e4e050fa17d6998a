import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from megavlm.errors import RequestError
from megavlm.infer.sampling import GREEDY, Sampling, choose

VOCABULARY = 50
DRAWS = 20_000


def logits(rows):
    return 2 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(3))


def generators(rows):
    return [torch.Generator().manual_seed(row) for row in range(rows)]


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
    draws = torch.Generator().manual_seed(1)
    drawn = choose(row.expand(DRAWS, -1), [sampling] * DRAWS, [draws] * DRAWS)
    shares = torch.bincount(drawn, minlength=VOCABULARY).double() / DRAWS
    deviations = (expected * (1 - expected) / DRAWS).sqrt()
    assert not shares[expected == 0].any()
    # 3.2 standard deviations were seen.
    assert ((shares - expected).abs() <= 4 * deviations + 1 / DRAWS).all()


def test_rows_are_drawn_by_their_own_settings():
    rows = logits(4)
    sampling = [GREEDY, Sampling(temperature=1), GREEDY, Sampling(temperature=1, top_k=1)]
    together = choose(rows, sampling, generators(4))
    apart = [choose(rows[n : n + 1], sampling[n : n + 1], generators(4)[n:])[0] for n in range(4)]
    assert together.tolist() == [int(token) for token in apart]
    assert together[[0, 2, 3]].tolist() == rows[[0, 2, 3]].argmax(-1).tolist()
    assert together[1] != rows[1].argmax()


def test_rounding_changes_no_draw():
    """Of nearly even rows, in which many tokens are as likely as another."""
    count, size = 2_000, 512
    noise = torch.Generator().manual_seed(2)
    rows = torch.randn(count, size, generator=noise)
    rounded = rows + 1e-4 * torch.randn(count, size, generator=noise)
    sampling = [Sampling(temperature=1.2)] * count
    drawn = choose(rows, sampling, generators(count))
    # None was seen; 5 in 120,000 with other numbers.
    assert (choose(rounded, sampling, generators(count)) != drawn).sum() <= 2


@pytest.mark.parametrize("restricted", [{}, {"top_k": 3}, {"top_p": 0.5}])
def test_extremes_choose_the_likeliest(restricted):
    row = torch.tensor([[1.0, 5.0, 3.0, -2.0, -torch.inf]])
    for temperature in (1e-300, 5e-324):
        sampling = Sampling(temperature=temperature, **restricted)
        assert choose(row, [sampling], generators(1)).item() == 1
    assert choose(row, [Sampling(temperature=1, top_p=1e-300)], generators(1)).item() == 1


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
