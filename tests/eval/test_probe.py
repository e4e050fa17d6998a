"""The linear probe on features that are easy, hard and impossible to tell apart."""

import torch

from megavlm.eval.probe import probe_accuracy


def clusters(items, spread, seed):
    """Four classes around the corners of a square, in 8 dimensions of very different scale."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(items) % 4
    corners = torch.tensor([[-1.0, -1], [-1, 1], [1, -1], [1, 1]])
    features = spread * torch.randn(items, 8, generator=generator)
    features[:, :2] += corners[labels]
    return features * 10.0 ** torch.arange(-4, 4) + 100, labels


def test_separable_classes_are_all_told_apart():
    assert probe_accuracy(*clusters(200, 0.05, seed=1), *clusters(100, 0.05, seed=2)) == 1.0


def test_noise_tells_nothing():
    generator = torch.Generator().manual_seed(3)
    train, heldout = torch.randn(2, 2000, 8, generator=generator)
    labels = torch.randint(4, (2, 2000), generator=generator)
    accuracy = probe_accuracy(train, labels[0], heldout, labels[1])
    assert abs(accuracy - 0.25) < 0.04  # four standard deviations of 2,000 fair guesses


def test_overlapping_classes_are_told_as_well_as_can_be():
    """The best rule is the sign of each of two coordinates, whose noise is normal."""
    best = float(torch.distributions.Normal(0, 1).cdf(torch.tensor(1 / 0.8))) ** 2
    accuracy = probe_accuracy(*clusters(4000, 0.8, seed=1), *clusters(4000, 0.8, seed=2))
    assert abs(accuracy - best) < 0.02


def test_classes_that_training_lacks_are_wrong():
    train, labels = clusters(200, 0.05, seed=1)
    heldout, truth = clusters(100, 0.05, seed=2)
    truth[:30] = -1
    assert probe_accuracy(train, labels, heldout, truth) == 0.7


def test_a_constant_feature_changes_nothing():
    train, labels = clusters(200, 0.5, seed=1)
    heldout, truth = clusters(100, 0.5, seed=2)
    constant, other = torch.full((200, 1), 3.0), torch.full((100, 1), 3.0)
    # In training it is constant; a held-out one that is not cannot drown the others.
    other[0] = 3.5
    without = probe_accuracy(train, labels, heldout, truth)
    with_it = probe_accuracy(
        torch.cat([train, constant], 1), labels, torch.cat([heldout, other], 1), truth
    )
    assert with_it == without
