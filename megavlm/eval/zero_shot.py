"""What the two towers of a contrastive stage know without being trained for it.

Letters in shapes: n pictures or texts, d feature width, c classes, p prompts of a class.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from megavlm.config.run import RunSettings
from megavlm.data.collate import Drawn, pairs
from megavlm.data.samples import CAPTION_TASK, text
from megavlm.data.tokenizer import Tokenizer
from megavlm.dist import groups
from megavlm.eval.retrieval import best
from megavlm.eval.samples import BATCH_SIZE
from megavlm.model.pretraining import PretrainingModel

RECALLS = (1, 5, 10)
TEXTS_AT_ONCE = 4 * BATCH_SIZE


@torch.no_grad()
def image_features(model: PretrainingModel, pixels: Sequence[Tensor]) -> Tensor:
    """Of uint8 (3, side, side) pictures: fp32 (n, d) on the CPU, of any norm."""
    assert model.contrastive_head is not None, "the stage is checked for it"
    features: list[Tensor] = []
    for start in range(0, len(pixels), BATCH_SIZE):
        batch = torch.stack([*pixels[start : start + BATCH_SIZE]]).to(groups.device())
        pooled_nw = model.pooled(model.encoder(batch))
        features.append(model.contrastive_head.image(pooled_nw).float().cpu())
    return torch.cat(features)


@torch.no_grad()
def text_features(
    model: PretrainingModel, texts: Sequence[str], tokenizer: Tokenizer, run: RunSettings
) -> tuple[Tensor, int]:
    """Of texts: fp32 (n, d) on the CPU, of any norm, and how many were cut to the row length.

    Texts share rows as in training, so that a feature depends on what else is encoded with it, but
    by rounding alone.
    """
    assert model.contrastive_head is not None and model.text_tower is not None
    side = run.model.encoder.image_pixels
    blank = torch.zeros((3, side, side), dtype=torch.uint8)  # a pair has a picture; it is not read
    features: list[Tensor] = []
    cut = 0
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        drawn = [
            Drawn("", (blank,), (text("", each, CAPTION_TASK),), np.random.default_rng(0))
            for each in texts[start : start + TEXTS_AT_ONCE]
        ]
        batch = pairs(drawn, tokenizer, run, len(drawn))
        cut += batch.truncated_texts
        batch = batch.to(groups.device())
        states_nw = model.text_tower(batch.tokens_bt, batch.text_numbers_bt, batch.ends_n)
        features.append(model.contrastive_head.text(states_nw).float().cpu())
    return torch.cat(features), cut


def class_features(prompts_cpd: Tensor) -> Tensor:
    """A prompt ensemble, fp32 (c, d) of norm 1: the mean of its prompts' directions (CLIP).

    As open_clip's `build_zero_shot_classifier`.
    """
    return functional.normalize(functional.normalize(prompts_cpd, dim=-1).mean(1), dim=-1)


def class_accuracies(best_nk: NDArray[np.int64], truths_n: NDArray[np.int64]) -> dict[str, float]:
    """accuracy@1 and accuracy@5 over all pictures, and the mean over classes of their accuracy@1.

    best_nk: classes of each picture, the likeliest first.
    """
    hits_n = best_nk[:, 0] == truths_n
    return {
        "accuracy@1": float(hits_n.mean()),
        "accuracy@5": float((best_nk[:, :5] == truths_n[:, None]).any(1).mean()),
        "mean per-class accuracy": float(
            np.mean([hits_n[truths_n == number].mean() for number in np.unique(truths_n)])
        ),
    }


def ranked(image_nd: Tensor, text_md: Tensor) -> tuple[Tensor, Tensor]:
    """The ten best texts of each picture, and the ten best pictures of each text, int64."""
    most = max(RECALLS)
    return best(most, image_nd, text_md), best(most, text_md, image_nd)


def recalls(
    texts_nk: Tensor, pictures_mk: Tensor, picture_of_m: NDArray[np.int64]
) -> dict[str, list[bool]]:
    """Whether each query has a right candidate among its k best, by the measure's name.

    A picture has several captions, any of which is right for it, as is usual for COCO and Flickr30k
    (recall counts a picture once). picture_of_m: whose caption each text is.
    """
    own_nk = picture_of_m[texts_nk.numpy()] == np.arange(len(texts_nk))[:, None]
    own_mk = pictures_mk.numpy() == picture_of_m[:, None]
    return {
        f"{direction}, recall@{k}": hits[:, :k].any(1).tolist()
        for direction, hits in (("text to picture", own_mk), ("picture to text", own_nk))
        for k in RECALLS
    }
