"""Captions and answers on a standard benchmark."""

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from megavlm.config.run import RunSettings
from megavlm.data.samples import Turn
from megavlm.data.tokenizer import Tokenizer
from megavlm.errors import BadSampleError, DataError
from megavlm.eval.answers import MAX_ANSWER_TOKENS
from megavlm.eval.benchmarks import (
    NAMED_IN_ERRORS,
    Benchmark,
    Item,
    Task,
    commonest,
    prediction,
    read_picture,
    unjudged,
)
from megavlm.eval.caption import caption_scores, has_ptb_tokenizer
from megavlm.eval.samples import tell
from megavlm.eval.scores import Score
from megavlm.eval.shards import Row
from megavlm.eval.vqa import textvqa_accuracy, vqa_accuracy
from megavlm.infer.generate import generate
from megavlm.infer.prompts import Request, prompt_of
from megavlm.model.vlm import VisionLanguageModel

MOST_BAD_EXAMPLES = 100
"""Of one item; more of them mean that the training pictures are not there."""
RIGHT_CIDER = 1.0
"""From here on the sheet counts a caption as right; 100 in papers, which multiply by 100."""


class Writes:
    """A language model writes captions or answers."""

    def __init__(
        self,
        benchmark: Benchmark,
        examples: Sequence[Item],
        shots: int,
        run: RunSettings,
        model: VisionLanguageModel,
        tokenizer: Tokenizer,
        batch_size: int,
    ) -> None:
        """examples: so many `shots` of them stand before each question.

        batch_size: answers that are written at the same time.
        """
        self._benchmark, self._examples, self._shots = benchmark, examples, shots
        self._run, self._model, self._tokenizer = run, model, tokenizer
        self._batch_size = batch_size
        others = len({example.picture for example in examples}) - 1 - shots
        self._most_bad = min(MOST_BAD_EXAMPLES, others)

    def work(self, numbers: range, advance: Callable[[int], None]) -> list[Row]:
        """An answer for each of these items, and the `bad_examples` that were drawn for it."""
        rows: list[Row] = []
        requests: list[Request] = []
        for number in numbers:
            item = self._benchmark.items[number]
            rows.append({"key": item.key})
            try:
                request, bad_examples = self.request(number)
            except BadSampleError as error:
                rows[-1]["unreadable"] = f"{item.key}: {error}"
                advance(1)
                continue
            requests.append(request)
            if bad_examples:
                rows[-1]["bad_examples"] = bad_examples
        answers = generate(
            self._model,
            self._tokenizer,
            requests,
            batch_size=self._batch_size,
            on_progress=advance,
        )
        asked = [row for row in rows if "unreadable" not in row]
        for row, answer in zip(asked, answers, strict=True):
            row["answer"] = answer.strip()
        return rows

    def request(self, number: int) -> tuple[Request, list[str]]:
        """What is asked of an item, and its bad examples, as below.

        Raises BadSampleError where its picture cannot be read.
        """
        item = self._benchmark.items[number]
        own_pixels = read_picture(item, self._side)
        examples, bad = self.examples_of(number)
        shown = [*examples, (item, own_pixels)]
        turns = [
            Turn(prompt=self._prompt(each), answer=commonest(each.truths), pictures=(place,))
            for place, (each, _) in enumerate(shown)
        ]
        request = Request(
            prompt=prompt_of(self._tokenizer, turns),
            pixels=tuple(pixels for _, pixels in shown),
            max_new_tokens=MAX_ANSWER_TOKENS,
        )
        return request, bad

    def examples_of(self, number: int) -> tuple[list[tuple[Item, Tensor]], list[str]]:
        """Examples of other pictures, drawn by the seed and the item's number alone.

        And why those that were drawn before them cannot be read; raises DataError when they are
        too many.
        """
        draws = np.random.default_rng((self._run.seed, number))
        drawn: list[tuple[Item, Tensor]] = []
        bad: list[str] = []
        taken = {self._benchmark.items[number].picture}
        while len(drawn) < self._shots:
            example = self._examples[int(draws.integers(len(self._examples)))]
            if example.picture in taken:
                continue
            taken.add(example.picture)
            try:
                drawn.append((example, read_picture(example, self._side)))
            except BadSampleError as error:
                bad.append(str(error))
            if len(bad) > self._most_bad:
                raise DataError(
                    f"{self._benchmark.name}: {len(bad)} of the pictures drawn as examples cannot "
                    f"be read: {'; '.join(bad[:NAMED_IN_ERRORS])}; mend the training split"
                )
        return drawn, bad

    @property
    def _side(self) -> int:
        return self._run.model.encoder.image_pixels

    def _prompt(self, item: Item) -> str:
        evaluation = self._run.evaluation
        if self._benchmark.task == "captions":
            return evaluation.caption_prompt
        return evaluation.question_prompt.replace("{}", item.question)

    def judge(self, items: Sequence[Item], rows: Sequence[Row]) -> tuple[list[Score], list[Row]]:
        """Scores over these items, and a line of the predictions file for each."""
        answers = [str(row["answer"]) for row in rows]
        if not self._benchmark.has_truths:
            pairs = zip(items, answers, strict=True)
            return [], [unjudged(item, answer) for item, answer in pairs]
        if self._benchmark.task == "captions":
            scores, each = self._caption_scores(answers, items)
            right = [score >= RIGHT_CIDER for score in each]
        else:
            rule = textvqa_accuracy if self._benchmark.name == "textvqa" else vqa_accuracy
            each = [rule(a, item.truths) for a, item in zip(answers, items, strict=True)]
            scores = self._accuracy_by_kind(items, each)
            right = [score >= 0.5 for score in each]
        judged = zip(items, answers, each, right, strict=True)
        return scores, [prediction(*of_one) for of_one in judged]

    def _caption_scores(
        self, answers: Sequence[str], items: Sequence[Item]
    ) -> tuple[list[Score], list[float]]:
        ptb = has_ptb_tokenizer()
        note = "" if ptb else ", own words"
        if not ptb:
            tell(
                "pycocoevalcap's tokenizer needs Java and a writable folder, and has not both: "
                "captions are compared by words of letters and digits, as `own words` says; do not "
                "compare them with published figures"
            )
        measured = caption_scores(answers, [item.truths for item in items], ptb=ptb)
        exact = np.mean(
            [
                answer in {truth.strip() for truth in item.truths}
                for answer, item in zip(answers, items, strict=True)
            ]
        )
        values = {f"{name}{note}": value for name, value in measured.measures.items()}
        values["exact match"] = float(exact)
        scores = [
            self._benchmark.score(f"caption, {n}", len(items), value) for n, value in values.items()
        ]
        return scores, measured.cider_of_each

    def _accuracy_by_kind(self, items: Sequence[Item], each: Sequence[float]) -> list[Score]:
        by_kind: dict[str, list[float]] = defaultdict(list)
        for item, score in zip(items, each, strict=True):
            by_kind[item.kind].append(score)
        scores = [self._benchmark.score("VQA accuracy", len(each), float(np.mean(each)))]
        if len(by_kind) > 1:
            scores += [
                self._benchmark.score(f"VQA accuracy, {kind}", len(some), float(np.mean(some)))
                for kind, some in sorted(by_kind.items())
            ]
        return scores


def submission(task: Task, rows: Sequence[Row]) -> list[Row]:
    """Answers in the form that the servers of VQA (EvalAI) and of COCO captions read."""
    name, said = ("image_id", "caption") if task == "captions" else ("question_id", "answer")
    return [{name: _number(row["key"]), said: row["answer"]} for row in rows]


def _number(key: str) -> int | str:
    return int(key) if key.isdecimal() else key
