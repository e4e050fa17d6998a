"""What the two towers of a contrastive stage know without being trained for it.

Letters in shapes: n pictures or texts, d feature width, c classes, p prompts of a class.
"""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from megavlm.eval.retrieval import best

PUBLISHED_RECALLS = (1, 5, 10)
"""Those of papers; held-out samples, which are fewer, have `retrieval.RECALLS`."""


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
    most = max(PUBLISHED_RECALLS)
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
        for k in PUBLISHED_RECALLS
    }
