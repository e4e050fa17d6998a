"""Scores of captions against their truth."""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.tokenizer import ptbtokenizer

# Scripts without spaces between words are scored by character.
_CHARACTERS = "々ぁ-ヿ㐀-鿿ｦ-ﾟ"
_WORD_OR_CHARACTER = re.compile(rf"[{_CHARACTERS}]|[^\W_{_CHARACTERS}]+")
CIDER, BLEU = "CIDEr", tuple(f"BLEU-{n}" for n in range(1, 5))


class CaptionScores(NamedTuple):
    """Of all captions together."""

    measures: dict[str, float]
    """CIDEr-D, 0 to 10, and BLEU-1 to BLEU-4, 0 to 1."""
    cider_of_each: list[float]


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


def caption_scores(
    predicted: Sequence[str], truths: Sequence[Sequence[str]], *, ptb: bool
) -> CaptionScores:
    """What the COCO caption evaluation says of captions with any number of truths each.

    ptb: words are those of its PTBTokenizer, as in published figures (see `has_ptb_tokenizer`);
    otherwise runs of letters and digits, as in `cider`, which come close but are not it.
    """
    split = _ptb if ptb else _own
    references = split(dict(enumerate(truths)))
    captions = split({i: [caption] for i, caption in enumerate(predicted)})
    of_all, of_each = Cider().compute_score(references, captions)
    bleu, _ = Bleu(4).compute_score(references, captions, verbose=0)
    measures = {CIDER: float(of_all), **dict(zip(BLEU, map(float, bleu), strict=True))}
    return CaptionScores(measures, [float(score) for score in of_each])


def has_ptb_tokenizer() -> bool:
    """Whether pycocoevalcap's tokenizer can run: it needs Java, and writes beside itself."""
    folder = Path(ptbtokenizer.__file__).parent
    return shutil.which("java") is not None and os.access(folder, os.W_OK)


def _ptb(captions: Mapping[int, Sequence[str]]) -> dict[int, list[str]]:
    # On one line each: the tokenizer counts lines.
    lines = {i: [{"caption": " ".join(c.split())} for c in some] for i, some in captions.items()}
    words: dict[int, list[str]] = ptbtokenizer.PTBTokenizer().tokenize(lines)
    counts = {i: len(some) for i, some in captions.items()}
    assert {i: len(some) for i, some in words.items()} == counts, "a line for each caption"
    return words


def _own(captions: Mapping[int, Sequence[str]]) -> dict[int, list[str]]:
    return {i: [_words(caption) for caption in some] for i, some in captions.items()}


def _words(caption: str) -> str:
    """Lower-case words without punctuation, joined by spaces."""
    return " ".join(_WORD_OR_CHARACTER.findall(caption.lower()))
