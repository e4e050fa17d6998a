"""Linear probe: what a linear classifier reads off the frozen encoder.

Letters in shapes: n pictures, w width of the encoder, c classes.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from megavlm.dist import groups
from megavlm.eval.samples import Split, batched, joined, tell
from megavlm.eval.scores import Score
from megavlm.model.pretraining import PretrainingModel

TRAINING_SAMPLES = 10_000
"""At most so many samples, the first ones, train the classifier."""
PIXELS = 12
"""Side of the shrunken pictures that a classifier reads without any encoder."""
L2 = 1e-4
"""Times half the squared weights, beside the mean cross entropy over standardised features. Of
1e-5, 1e-4 and so on to 1e-1, it serves about best on training pictures that are kept back."""
MAX_STEPS = 200
"""Of LBFGS. Seven times as many changed no accuracy."""


class Labelled(NamedTuple):
    """Pictures with a label."""

    labels: list[str]
    features: list[Tensor]
    """For each model, and last of the shrunken pictures themselves, fp32 (n, w)."""


def linear_probe(
    model: PretrainingModel, untrained: PretrainingModel, train: Split, heldout: Split, kind: str
) -> list[Score]:
    """Accuracy on held-out pictures of a classifier that the training pictures have trained.

    A picture's class is the answer of its sample's first text of this kind. Collective: ranks share
    the encoder's work.
    """
    models = model, untrained
    known, asked = (encode_labelled(models, split, kind) for split in (train, heldout))
    classes = {label: number for number, label in enumerate(sorted(set(known.labels)))}
    for split, labelled in ((train, known), (heldout, asked)):
        if not labelled.labels:
            tell(f"no picture of {split} has a text of kind {kind!r}; no linear probe")
            return []
    train_n = torch.tensor([classes[label] for label in known.labels])
    heldout_n = torch.tensor([classes.get(label, -1) for label in asked.labels])
    reached, untrained_reached, pixels_reached = (
        probe_accuracy(train_nw, train_n, heldout_nw, heldout_n)
        for train_nw, heldout_nw in zip(known.features, asked.features, strict=True)
    )
    [(most_frequent, _)] = Counter(known.labels).most_common(1)
    majority = asked.labels.count(most_frequent) / len(asked.labels)
    return [
        Score(
            split=heldout.name,
            measure=f"linear probe, {kind}",
            items=len(asked.labels),
            model=reached,
            baselines={
                "majority answer": majority,
                "untrained": untrained_reached,
                "pixels": pixels_reached,
            },
        )
    ]


@torch.no_grad()
def encode_labelled(models: Sequence[PretrainingModel], split: Split, kind: str) -> Labelled:
    """What is read of a split's pictures that have a label; collective, ranks share the work."""
    samples: list[int] = []
    labels: list[str] = []
    features: list[list[Tensor]] = [[] for _ in (*models, "pixels")]
    labelled = (
        shown for shown in split.share() if shown.pictures and shown.answer_of(kind) is not None
    )
    for some in batched(labelled):
        pixels = torch.stack([shown.pictures[0] for shown in some]).to(groups.device())
        for model, rows in zip(models, features, strict=False):
            rows.append(model.pooled(model.encoder(pixels)).float().cpu())
        features[-1].append(functional.adaptive_avg_pool2d(pixels.float(), PIXELS).flatten(1).cpu())
        samples += [shown.sample for shown in some]
        labels += [str(shown.answer_of(kind)) for shown in some]
    _, all_labels, whole = joined(samples, labels, features)
    return Labelled(all_labels, whole)


def probe_accuracy(
    train_nw: Tensor, train_labels_n: Tensor, heldout_nw: Tensor, heldout_labels_n: Tensor
) -> float:
    """Top-1 accuracy, 0 to 1, of multinomial logistic regression on standardised features.

    Labels: int64, classes from 0 on; below 0 for a class that training has not, which is never
    right. In fp64 and from zero weights on, so that it depends on nothing else.
    """
    device = groups.device()
    train_nw, heldout_nw = (nw.to(device, torch.float64) for nw in (train_nw, heldout_nw))
    labels_n = train_labels_n.to(device)
    std_w, mean_w = torch.std_mean(train_nw, dim=0, correction=0)
    std_w = torch.where(std_w > 1e-6, std_w, 1.0)  # what is constant tells nothing
    x_nw = (train_nw - mean_w) / std_w
    classes = int(labels_n.max()) + 1
    weight_wc = torch.zeros(x_nw.shape[1], classes, dtype=torch.float64, device=device)
    bias_c = torch.zeros(classes, dtype=torch.float64, device=device)
    learned = [weight_wc.requires_grad_(), bias_c.requires_grad_()]
    lbfgs = torch.optim.LBFGS(learned, max_iter=MAX_STEPS, line_search_fn="strong_wolfe")

    def loss() -> float:
        lbfgs.zero_grad()
        cross_entropy = functional.cross_entropy(x_nw @ weight_wc + bias_c, labels_n)
        value = cross_entropy + L2 / 2 * weight_wc.square().sum()
        value.backward()
        return value.item()

    lbfgs.step(loss)
    with torch.no_grad():
        predicted_n = ((heldout_nw - mean_w) / std_w @ weight_wc + bias_c).argmax(1)
    return float((predicted_n.cpu() == heldout_labels_n).double().mean())
