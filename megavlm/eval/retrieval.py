"""Zero-shot retrieval on held-out pairs: a text finds its picture among all, and the reverse.

Letters in shapes: n queries, m candidates, d feature width.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from megavlm.config.run import RunSettings
from megavlm.data.collate import Drawn
from megavlm.data.tokenizer import Tokenizer
from megavlm.dist import groups
from megavlm.eval.samples import Shown, Split, batched, joined, tell
from megavlm.eval.scores import Score
from megavlm.infer.features import encode
from megavlm.model.pretraining import PretrainingModel

RECALLS = (1, 5)
BLOCK = 1024  # queries whose similarities are held at once; all n x n would not fit for large n


class Found(NamedTuple):
    """What one held-out text has found."""

    split: str
    sample: int
    """Number of the sample whose text it is."""
    text: str
    best_samples: list[int]
    """Samples whose pictures are most like it, the best first."""


class Pairs(NamedTuple):
    """Held-out pairs of a picture and a text."""

    samples: list[int]
    texts: list[str]
    features: list[tuple[Tensor, Tensor]]
    """For each model, of the pictures and of the texts: fp32 (n, d), of any norm."""


def retrieval(
    model: PretrainingModel,
    untrained: PretrainingModel,
    split: Split,
    tokenizer: Tokenizer,
    run: RunSettings,
) -> tuple[list[Score], list[Found]]:
    """Recall at 1 and at 5 in both directions, and what every text has found; collective.

    A pair is a sample's first picture with its first text, as in training. Where several samples
    have the same text any of them is right, as is usual for duplicates.
    """
    heldout = encode_pairs((model, untrained), split, tokenizer, run)
    if not heldout.samples:
        tell("no held-out picture has a text; retrieval is not measured")
        return [], []
    same_text_n = numbered(heldout.texts)
    scores: list[Score] = []
    directions = (("text to picture", 1, 0), ("picture to text", 0, 1))
    for direction, query, candidate in directions:
        for k in RECALLS:
            reached, untrained_reached = (
                recall_at(k, features[query], features[candidate], same_text_n)
                for features in heldout.features
            )
            scores.append(
                Score(
                    split=split.name,
                    measure=f"{direction}, recall@{k}",
                    items=len(heldout.samples),
                    model=reached,
                    baselines={"chance": chance(k, same_text_n), "untrained": untrained_reached},
                )
            )
    image_nd, text_nd = heldout.features[0]
    best_nk = best(max(RECALLS), text_nd, image_nd).tolist()
    found = [
        Found(split.name, sample, text, [heldout.samples[i] for i in row])
        for sample, text, row in zip(heldout.samples, heldout.texts, best_nk, strict=True)
    ]
    return scores, found


def encode_pairs(
    models: Sequence[PretrainingModel], split: Split, tokenizer: Tokenizer, run: RunSettings
) -> Pairs:
    """Features of all held-out pairs by each model; collective, ranks share the work."""
    samples: list[int] = []
    texts: list[str] = []
    features: list[list[Tensor]] = [[] for _ in range(2 * len(models))]
    cut = 0
    with_pair = (shown for shown in split.share() if shown.pictures and shown.texts)
    for some in batched(with_pair):
        encoded = encode(models, [_drawn(shown) for shown in some], tokenizer, run)
        cut += encoded.truncated_texts
        for number, (image_nd, text_nd) in enumerate(encoded.features):
            features[2 * number].append(image_nd)
            features[2 * number + 1].append(text_nd)
        samples += [shown.sample for shown in some]
        texts += [shown.texts[0].turns[-1].answer for shown in some]
    [all_cut] = groups.sum_over_ranks(cut)
    if all_cut:
        tell(f"{all_cut:.0f} held-out texts are cut to data.row_tokens={run.data.row_tokens}")
    all_samples, all_texts, whole = joined(samples, texts, features)
    return Pairs(all_samples, all_texts, list(zip(whole[::2], whole[1::2], strict=True)))


def _drawn(shown: Shown) -> Drawn:
    """As it is trained on; its first text is the one that is drawn."""
    return Drawn("", shown.pictures, shown.texts[:1], shown.generator())


def numbered(texts: Sequence[str]) -> Tensor:
    """A number for each text, int64 (n,), the same for texts that are the same."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(text, len(numbers)) for text in texts])


def recall_at(k: int, query_nd: Tensor, candidate_md: Tensor, same_text_n: Tensor) -> float:
    """Share of queries with a right candidate among the k that are most like them, 0 to 1.

    Query i and candidate j are right for each other where same_text_n, int (n,), is the same for
    both; n = m.
    """
    found_nk = same_text_n[best(k, query_nd, candidate_md)]
    return float((found_nk == same_text_n[:, None]).any(1).double().mean())


def best(k: int, query_nd: Tensor, candidate_md: Tensor) -> Tensor:
    """Numbers, int64 (n, min(k, m)), of the candidates most like each query, the best first.

    By the cosine, in fp32.
    """
    device = groups.device()
    candidates = functional.normalize(candidate_md.to(device), dim=-1)
    found: list[Tensor] = []
    for block_nd in functional.normalize(query_nd.to(device), dim=-1).split(BLOCK):
        found.append((block_nd @ candidates.T).topk(min(k, len(candidates))).indices.cpu())
    return torch.cat(found)


def chance(k: int, same_text_n: Tensor) -> float:
    """The recall at k that candidates in random order are expected to reach: k / n, or more.

    More where texts are the same: with r right ones among n, all k miss in C(n - r, k) of C(n, k)
    cases.
    """
    items = len(same_text_n)
    k = min(k, items)
    missed = 0.0
    for right in torch.unique(same_text_n, return_counts=True)[1].tolist():
        missed += right * math.comb(items - right, k) / math.comb(items, k)
    return 1 - missed / items
