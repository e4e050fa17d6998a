"""Recall against its definition, by sorting all similarities."""

import math
from itertools import permutations

import pytest
import torch

from megavlm.eval import retrieval
from megavlm.eval.retrieval import best, chance, numbered, recall_at


def random_features(items, width=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    # Norms differ by orders of magnitude: only the direction may count.
    scale = 10 ** torch.empty(2, items, 1).uniform_(-2, 2, generator=generator)
    return (torch.randn(2, items, width, generator=generator) * scale).unbind()


def by_definition(k, queries, candidates, texts):
    """Share of queries for which one of the k nearest candidates has the query's text."""
    hits = 0
    for number, query in enumerate(queries.double()):
        cosines = [float(query @ c / query.norm() / c.norm()) for c in candidates.double()]
        nearest = sorted(range(len(cosines)), key=lambda i: -cosines[i])[:k]
        hits += any(texts[i] == texts[number] for i in nearest)
    return hits / len(queries)


@pytest.mark.parametrize("block", [1, 7, 1000])
@pytest.mark.parametrize("k", [1, 3, 5, 100])
def test_recall_is_as_defined(monkeypatch, k, block):
    monkeypatch.setattr(retrieval, "BLOCK", block)
    pictures, texts = random_features(40)
    texts = texts / texts.norm(dim=1, keepdim=True) + pictures / pictures.norm(dim=1, keepdim=True)
    for captions in ([f"text {n}" for n in range(40)], [f"text {n % 9}" for n in range(40)]):
        for queries, candidates in ((texts, pictures), (pictures, texts)):
            expected = by_definition(k, queries, candidates, captions)
            assert recall_at(k, queries, candidates, numbered(captions)) == expected
            assert k == 100 or 0 < expected < 1


def test_the_best_come_first_and_no_more_than_there_are():
    queries, candidates = torch.eye(3), torch.tensor([[0.1, 1, 2], [3, 2, 0.5], [2, 3, 1.0]])
    assert best(5, queries, candidates).tolist() == [[1, 2, 0], [2, 1, 0], [0, 2, 1]]


def test_chance_is_the_mean_over_all_orders():
    texts = ["a", "b", "a", "c", "a", "b"]
    for k in (1, 2, 5, 9):
        orders = list(permutations(range(len(texts))))
        hits = sum(any(texts[i] == text for i in order[:k]) for text in texts for order in orders)
        assert chance(k, numbered(texts)) == pytest.approx(hits / len(orders) / len(texts))
    assert chance(5, torch.arange(200)) == pytest.approx(5 / 200)
    assert math.isclose(chance(5, torch.arange(3)), 1)
