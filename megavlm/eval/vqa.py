"""Scores of answers to questions about pictures.

Rule, order of steps and tables are those of the VQA evaluation tool (github.com/GT-Vision-Lab/VQA,
vqaEval.py; tables (c) 2014 Aishwarya Agrawal, 2-clause BSD licence). Its quirks are kept, because
published figures have them.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from megavlm.data.samples import Text

_ARTICLES = {"a", "an", "the"}
_NUMBERS = "zero one two three four five six seven eight nine ten".split()
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = int(re.UNICODE)
"""So many periods go: the tool gives the flag where `re.sub` takes a count."""
_CONTRACTIONS = {
    bare: whole
    for bare, whole in (
        pair.split(":")
        for pair in """
aint:ain't arent:aren't cant:can't couldve:could've couldnt:couldn't couldn'tve:couldn't've
couldnt've:couldn't've didnt:didn't doesnt:doesn't dont:don't hadnt:hadn't hadnt've:hadn't've
hadn'tve:hadn't've hasnt:hasn't havent:haven't hed:he'd hed've:he'd've he'dve:he'd've hes:he's
howd:how'd howll:how'll hows:how's Id've:I'd've I'dve:I'd've Im:I'm Ive:I've isnt:isn't itd:it'd
itd've:it'd've it'dve:it'd've itll:it'll let's:let's maam:ma'am mightnt:mightn't
mightnt've:mightn't've mightn'tve:mightn't've mightve:might've mustnt:mustn't mustve:must've
neednt:needn't notve:not've oclock:o'clock oughtnt:oughtn't ow's'at:'ow's'at 'ows'at:'ow's'at
'ow'sat:'ow's'at shant:shan't shed've:she'd've she'dve:she'd've she's:she's shouldve:should've
shouldnt:shouldn't shouldnt've:shouldn't've shouldn'tve:shouldn't've somebody'd:somebodyd
somebodyd've:somebody'd've somebody'dve:somebody'd've somebodyll:somebody'll somebodys:somebody's
someoned:someone'd someoned've:someone'd've someone'dve:someone'd've someonell:someone'll
someones:someone's somethingd:something'd somethingd've:something'd've something'dve:something'd've
somethingll:something'll thats:that's thered:there'd thered've:there'd've there'dve:there'd've
therere:there're theres:there's theyd:they'd theyd've:they'd've they'dve:they'd've theyll:they'll
theyre:they're theyve:they've twas:'twas wasnt:wasn't wed've:we'd've we'dve:we'd've weve:we've
werent:weren't whatll:what'll whatre:what're whats:what's whatve:what've whens:when's
whered:where'd wheres:where's whereve:where've whod:who'd whod've:who'd've who'dve:who'd've
wholl:who'll whos:who's whove:who've whyll:why'll whyre:why're whys:why's wont:won't
wouldve:would've wouldnt:wouldn't wouldnt've:wouldn't've wouldn'tve:wouldn't've yall:y'all
yall'll:y'all'll y'allll:y'all'll yall'd've:y'all'd've y'alld've:y'all'd've y'all'dve:y'all'd've
youd:you'd youd've:you'd've you'dve:you'd've youll:you'll youre:you're youve:you've
""".split()
    )
}


def vqa_accuracy(answer: str, annotated: Sequence[str]) -> float:
    """VQAv2 accuracy of one answer, 0 to 1 (Antol et al. 2015; Goyal et al. 2017).

    The mean, over annotators, of min(1, matches among the other annotators / 3). Where all
    annotators agree to the letter, nothing is normalised, as in the tool.
    """
    given, truths = _one_line(answer), [_one_line(truth) for truth in annotated]
    if len(set(truths)) > 1:
        given, truths = normalise_answer(given), [normalise_answer(truth) for truth in truths]
    return _agreement(given, truths)


def textvqa_accuracy(answer: str, annotated: Sequence[str]) -> float:
    """TextVQA's accuracy of one answer, 0 to 1: the same mean (Singh et al. 2019).

    As MMF's evaluator has it: everything is normalised, and before that loses commas and question
    marks, and has a space before `'s`.
    """
    return _agreement(_textvqa_normalised(answer), [_textvqa_normalised(a) for a in annotated])


def _agreement(given: str, truths: Sequence[str]) -> float:
    matches = [truth == given for truth in truths]
    total = sum(matches)
    return sum(min(1.0, (total - m) / 3) for m in matches) / len(matches)


def normalise_answer(answer: str) -> str:
    """Without punctuation, in lower case, number words as digits, without articles, and more."""
    text = answer = _one_line(answer)
    for mark in _PUNCTUATION:
        goes = f"{mark} " in answer or f" {mark}" in answer or _COMMA_IN_NUMBER.search(answer)
        text = text.replace(mark, "" if goes else " ")
    text = _PERIOD.sub("", text, _MOST_PERIODS)
    words = [_DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _textvqa_normalised(answer: str) -> str:
    answer = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalise_answer(answer.strip())


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
