"""Scores of answers to questions about pictures."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from megavlm.data.samples import Text

ANNOTATORS = 10  # VQAv2 has ten answers a question
_ARTICLES = {"a", "an", "the"}
_NUMBERS = "zero one two three four five six seven eight nine ten".split()
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}


def vqa_accuracy(answer: str, annotated: Sequence[str]) -> float:
    """VQAv2 accuracy of one answer, 0 to 1 (Antol et al. 2015; Goyal et al. 2017).

    The mean, over annotators, of min(1, matches among the other annotators / 3).
    """
    given = normalise_answer(answer)
    matches = [normalise_answer(a) == given for a in annotated]
    total = sum(matches)
    return sum(min(1.0, (total - m) / 3) for m in matches) / len(matches)


def normalise_answer(answer: str) -> str:
    """Lower case, number words as digits, without punctuation and articles, single spaces."""
    words = re.sub(r"[^\w\s]", " ", answer.lower()).split()
    return " ".join(_DIGITS.get(word, word) for word in words if word not in _ARTICLES)


def count_answers(texts: Iterable[Text]) -> dict[str, Counter[str]]:
    """How often each prompt has each answer."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for text in texts:
        for turn in text.turns:
            counts[turn.prompt][turn.answer] += 1
    return dict(counts)


def majority_answers(counted: Iterable[Mapping[str, Counter[str]]]) -> dict[str, str]:
    """The most frequent answer to each prompt: what a model that never looks should say.

    counted: as `count_answers` returns them, of any parts of the texts. Of answers that are as
    frequent it is the first in the alphabet, however the texts were parted.
    """
    totals: dict[str, Counter[str]] = defaultdict(Counter)
    for part in counted:
        for prompt, counts in part.items():
            totals[prompt].update(counts)
    return {p: min(counts, key=lambda a: (-counts[a], a)) for p, counts in totals.items()}
