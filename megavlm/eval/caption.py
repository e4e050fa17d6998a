"""Scores of captions against their truth."""

import re
from collections.abc import Sequence

from pycocoevalcap.cider.cider import Cider

# Scripts without spaces between words are scored by character.
_CHARACTERS = "々ぁ-ヿ㐀-鿿ｦ-ﾟ"
_WORD_OR_CHARACTER = re.compile(rf"[{_CHARACTERS}]|[^\W_{_CHARACTERS}]+")


def exact_match(predicted: Sequence[str], truths: Sequence[str]) -> float:
    """Share of captions that equal their truth to the letter, 0 to 1."""
    pairs = zip(predicted, truths, strict=True)
    return sum(p.strip() == t.strip() for p, t in pairs) / max(1, len(truths))


def cider(predicted: Sequence[str], truths: Sequence[str]) -> float:
    """CIDEr-D (Vedantam et al. 2015) with one truth a caption, 0 to 10, by pycocoevalcap.

    The words' rarity is counted over the given truths.
    """
    score, _ = Cider().compute_score(
        {i: [_words(truth)] for i, truth in enumerate(truths)},
        {i: [_words(caption)] for i, caption in enumerate(predicted)},
    )
    return float(score)


def _words(caption: str) -> str:
    """Lower-case words without punctuation, joined by spaces."""
    return " ".join(_WORD_OR_CHARACTER.findall(caption.lower()))
