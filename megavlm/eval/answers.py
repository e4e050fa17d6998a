"""Captions and answers to questions about held-out pictures, generated and scored."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megavlm.data.samples import Text
from megavlm.data.tokenizer import Tokenizer
from megavlm.dist import groups
from megavlm.eval.caption import cider, exact_match
from megavlm.eval.samples import BATCH_SIZE, Split, tell
from megavlm.eval.scores import Baseline, Score
from megavlm.eval.vqa import normalise_answer
from megavlm.infer.generate import generate
from megavlm.infer.prompts import Request, question
from megavlm.model.vlm import VisionLanguageModel

MAX_ANSWER_TOKENS = 48
PROMPTS_AT_ONCE = 16 * BATCH_SIZE
"""So many have their pictures in memory."""


class Picture(NamedTuple):
    """One picture of a split."""

    sample: int
    number: int
    """Among the sample's pictures."""


class Prompt(NamedTuple):
    """A text to answer."""

    picture: Picture
    text: Text


class Asked(NamedTuple):
    """What is asked of a split."""

    split: Split
    prompts: list[Prompt]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The model's answer to one held-out prompt."""

    split: str
    """`heldout` (pictures never seen) or `heldout_questions` (questions never asked)."""
    sample: int
    """Number of the sample in its split."""
    text: Text
    answer: str
    answer_to_wrong_picture: str
    """What the model says when it is shown another sample's picture."""


def find_prompts(split: Split, tasks: Sequence[str]) -> list[Prompt]:
    """All texts of these tasks that have one turn and show one picture, in order; collective."""
    mine: list[Prompt] = []
    left_out = 0
    for shown in split.share():
        for text in shown.texts:
            pictures = text.turns[0].pictures
            if text.task in tasks and len(text.turns) == 1 and len(pictures) == 1:
                mine.append(Prompt(Picture(shown.sample, pictures[0]), text))
            elif text.task in tasks:
                left_out += 1
    [all_left_out] = groups.sum_over_ranks(left_out)
    if all_left_out:
        tell(
            f"{split.name}: {all_left_out:.0f} texts of several turns, or not of one picture, "
            "are not evaluated"
        )
    prompts = [prompt for share in groups.from_all_ranks(mine) for prompt in share]
    return sorted(prompts, key=lambda prompt: prompt.picture.sample)


def answered(
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    split: Split,
    prompts: Sequence[Prompt],
    seed: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[Prediction]:
    """The model's answers, to the right picture and to a wrong one; collective.

    Ranks share the work. `on_progress` hears how many more answers of this rank there are; it has
    two to each of its prompts.
    """
    rank, ranks = groups.rank(), groups.world_size()
    wrong = wrong_pictures([prompt.picture for prompt in prompts], seed)
    mine = prompts[rank::ranks]
    answers: list[tuple[str, str]] = []
    for start in range(0, len(mine), PROMPTS_AT_ONCE):
        some = mine[start : start + PROMPTS_AT_ONCE]
        right_and_wrong: list[list[str]] = []
        for pictures in ([p.picture for p in some], [wrong[p.picture] for p in some]):
            prompts_of_some = [p.text.prompt for p in some]
            requests = _requests(tokenizer, split, pictures, prompts_of_some)
            right_and_wrong.append(
                generate(
                    model,
                    tokenizer,
                    requests,
                    batch_size=BATCH_SIZE,
                    on_progress=on_progress,
                )
            )
        answers += zip(*right_and_wrong, strict=True)
    by_rank = groups.from_all_ranks(answers)
    return [
        Prediction(
            split=split.name,
            sample=prompt.picture.sample,
            text=prompt.text,
            answer=by_rank[number % ranks][number // ranks][0],
            answer_to_wrong_picture=by_rank[number % ranks][number // ranks][1],
        )
        for number, prompt in enumerate(prompts)
    ]


def _requests(
    tokenizer: Tokenizer, split: Split, pictures: Sequence[Picture], prompts: Sequence[str]
) -> list[Request]:
    shown = {sample: split.show(sample) for sample in {picture.sample for picture in pictures}}
    return [
        Request(
            prompt=question(tokenizer, prompt, pictures=1),
            pixels=(shown[picture.sample].pictures[picture.number],),
            max_new_tokens=MAX_ANSWER_TOKENS,
        )
        for picture, prompt in zip(pictures, prompts, strict=True)
    ]


def wrong_pictures(pictures: Sequence[Picture], seed: int) -> dict[Picture, Picture]:
    """A picture of another sample for each; its own where no other sample is asked about.

    The samples' order is shuffled, then rotated.
    """
    first = {picture.sample: picture for picture in sorted(set(pictures), reverse=True)}
    order = np.random.default_rng(seed).permutation(sorted(first)).tolist()
    other = dict(zip(order, np.roll(order, 1).tolist(), strict=True))
    return {picture: first[other[picture.sample]] for picture in pictures}


def score(predictions: Sequence[Prediction], majority: dict[str, str]) -> list[Score]:
    """The evaluation table: captions by language, answers over all and by their kinds."""
    by_measure: dict[tuple[str, str], list[Prediction]] = defaultdict(list)
    with_kinds = {(p.split, p.text.task) for p in predictions if p.text.kind}
    for prediction in predictions:
        split, text = prediction.split, prediction.text
        name = "VQA accuracy" if text.task == "vqa" else "caption"
        has_kinds = (split, text.task) in with_kinds
        if text.task == "vqa" or not has_kinds:
            by_measure[split, name].append(prediction)
        if has_kinds:
            by_measure[split, f"{name}, {text.kind or 'without kind'}"].append(prediction)
    rows: list[Score] = []
    for (split, measure), members in by_measure.items():
        truths = [p.text.answer for p in members]
        spoken = {
            "model": [p.answer for p in members],
            "wrong picture": [p.answer_to_wrong_picture for p in members],
        }
        measured = {", exact match": exact_match, ", CIDEr": cider}
        if measure.startswith("VQA"):
            spoken["majority answer"] = [majority.get(p.text.prompt, "") for p in members]
            measured = {"": _mean_accuracy}
        for name, of in measured.items():
            model, *others = (of(answers, truths) for answers in spoken.values())
            names: tuple[Baseline, ...] = ("wrong picture", "majority answer")
            rows.append(
                Score(
                    split=split,
                    measure=measure + name,
                    items=len(members),
                    model=model,
                    baselines=dict(zip(names, others, strict=False)),
                )
            )
    return rows


def _mean_accuracy(answers: Sequence[str], truths: Sequence[str]) -> float:
    """The data has one truth a question; it is taken for what all annotators would say."""
    pairs = zip(answers, truths, strict=True)
    return float(np.mean([normalise_answer(a) == normalise_answer(t) for a, t in pairs]))
