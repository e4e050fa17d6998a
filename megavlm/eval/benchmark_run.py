"""Evaluates a checkpoint on standard benchmarks (docs/evaluation.md)."""

import base64
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megavlm.checkpoint.storage import read_state
from megavlm.config.objectives import is_pretraining
from megavlm.config.plan import Plan, Stage
from megavlm.config.run import RunSettings
from megavlm.data.image import read_square
from megavlm.data.samples import Turn
from megavlm.data.tokenizer import Tokenizer
from megavlm.dist import groups
from megavlm.errors import BadSampleError, ConfigError, DataError
from megavlm.eval.answers import MAX_ANSWER_TOKENS
from megavlm.eval.benchmarks import NAMED_IN_ERRORS, Benchmark, Item, commonest, read_benchmark
from megavlm.eval.caption import caption_scores, has_ptb_tokenizer
from megavlm.eval.retrieval import best
from megavlm.eval.run import newest_of
from megavlm.eval.samples import BATCH_SIZE, progress, tell
from megavlm.eval.scores import Score, print_scores
from megavlm.eval.shards import SHARD_ITEMS, Row, forget, in_shards, write_atomically, write_lines
from megavlm.eval.sheet import write_sheet
from megavlm.eval.vqa import textvqa_accuracy, vqa_accuracy
from megavlm.eval.zero_shot import (
    RECALLS,
    class_accuracies,
    class_features,
    image_features,
    ranked,
    recalls,
    text_features,
)
from megavlm.files.folder import Folder
from megavlm.infer.generate import generate
from megavlm.infer.load import load_language, load_pretraining
from megavlm.infer.prompts import Request, prompt_of
from megavlm.model.pretraining import PretrainingModel
from megavlm.model.vlm import VisionLanguageModel
from megavlm.terminal import counted

FOLDER = "benchmarks"
RESULTS_FILE, PREDICTIONS_FILE, SHEET_FILE = "results.json", "predictions.jsonl", "sheet.html"
BEST_CLASSES = 5
RIGHT_CIDER = 1.0
"""From here on the sheet counts a caption as right; 100 in papers, which multiply by 100."""
TEMPLATES_AT_ONCE = 8  # classes whose prompts are encoded together

Advance = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is to be evaluated, and how."""

    folders: Mapping[str, Path]
    """By the benchmarks' names."""
    shots: int = 0
    """Examples of the training split that stand before each question."""
    limit: int | None = None
    """At most so many items of each, the first ones; None: all."""
    skip_bad: bool = False
    """Leave out, count and name what cannot be used; otherwise it is an error."""
    stage: str | None = None
    """Whose newest checkpoint is evaluated; None: that of the run."""


def evaluate_benchmarks(plan: Plan, wanted: Wanted) -> None:
    """Evaluate a checkpoint on benchmarks, and write and print what comes out.

    Raises DataError for files that are missing or wrong, ConfigError for what the stage's model
    cannot do.
    """
    benchmarks = [
        _limited(read_benchmark(*named, skip_bad=wanted.skip_bad), wanted.limit)
        for named in wanted.folders.items()
    ]
    examples = {
        name: read_benchmark(name, folder, "examples", skip_bad=True)
        for name, folder in wanted.folders.items()
        if wanted.shots
    }
    with groups.process_groups(plan.first.seed):
        stage, checkpoint = newest_of(plan, wanted.stage)
        for benchmark in benchmarks:
            _check(stage, benchmark, examples.get(benchmark.name), wanted.shots)
        two_towers = is_pretraining(stage.run.objectives)
        model = (load_pretraining if two_towers else load_language)(stage.run, checkpoint)
        tokenizer = Tokenizer(stage.run.data.tokenizer)
        for benchmark in benchmarks:
            one = _Evaluation(stage, checkpoint, benchmark, wanted, model, tokenizer)
            shown = examples.get(benchmark.name)
            if shown is not None and shown.left_out:
                left_out = counted(len(shown.left_out), "entry", "entries")
                tell(f"{benchmark.name}: {left_out} of the training split cannot be examples")
            one.evaluate(shown.items if shown else ())


def _limited(benchmark: Benchmark, limit: int | None) -> Benchmark:
    return replace(benchmark, items=benchmark.items[:limit])


def _check(stage: Stage, benchmark: Benchmark, examples: Benchmark | None, shots: int) -> None:
    name, objectives = benchmark.name, stage.run.objectives
    if is_pretraining(objectives):
        if benchmark.task == "vqa" or "contrastive" not in objectives or shots:
            what = "--shots needs" if shots else f"{name} needs"
            raise ConfigError(
                f"{what} a model that writes, and stage {stage.name} is of {', '.join(objectives)}; "
                "name a stage of captioning or instruction with --stage"
                if benchmark.task == "vqa" or shots
                else f"{name} needs two towers, and stage {stage.name} is of mim alone; name a "
                "contrastive stage with --stage"
            )
    elif benchmark.task == "classes":
        raise ConfigError(
            f"{name} needs the two towers of a contrastive stage, and stage {stage.name} is of "
            f"{', '.join(objectives)}; name a contrastive one with --stage"
        )
    if examples is not None and len({item.picture for item in examples.items}) <= shots:
        raise ConfigError(
            f"--shots {shots} needs more pictures than the {len(examples.items)} entries of the "
            f"training split of {name} have"
        )


class _Evaluation:
    """Of one benchmark."""

    def __init__(
        self,
        stage: Stage,
        checkpoint: Folder | None,
        benchmark: Benchmark,
        wanted: Wanted,
        model: VisionLanguageModel | PretrainingModel,
        tokenizer: Tokenizer,
    ) -> None:
        self.run: RunSettings = stage.run
        self.benchmark, self.wanted = benchmark, wanted
        self.model, self.tokenizer = model, tokenizer
        self.stage = stage.name
        self.step = 0 if checkpoint is None else read_state(checkpoint)["step"]
        self.checkpoint = str(checkpoint)
        shots = f"-{wanted.shots}-shot" if wanted.shots else ""
        self.folder = self.run.run_folder / FOLDER / stage.name / f"{benchmark.name}{shots}"

    def evaluate(self, examples: Sequence[Item]) -> None:
        """Collective; the first rank writes."""
        task, items = self.benchmark.task, self.benchmark.items
        if isinstance(self.model, VisionLanguageModel):
            work, judge = self._write(self.model, examples), self._judge_answers
        elif task == "classes":
            work, judge = self._classify(self.model), self._judge_classes
        else:
            work, judge = self._encode(self.model), self._judge_retrieval
        settings = self._settings(examples)
        rows = in_shards(self.folder, settings, len(items), work, f"{self.benchmark.name}")
        pairs = list(zip(items, rows, strict=True)) if rows else []
        unreadable = [str(row["unreadable"]) for _, row in pairs if "unreadable" in row]
        self._settle(groups.from_all_ranks(unreadable)[0], len(items))
        if groups.rank() == 0:
            usable = [(item, row) for item, row in pairs if "unreadable" not in row]
            assert [row["key"] for _, row in usable] == [item.key for item, _ in usable]
            scores, predictions = judge([i for i, _ in usable], [row for _, row in usable])
            self._publish(scores, predictions, [*self.benchmark.left_out, *unreadable])

    def _settings(self, examples: Sequence[Item]) -> dict[str, Any]:
        """All that the rows depend on."""
        evaluation = self.run.evaluation
        return {
            "benchmark": self.benchmark.name,
            "checkpoint": self.checkpoint,
            "step": self.step,
            "seed": self.run.seed,
            "shots": self.wanted.shots,
            "caption_prompt": evaluation.caption_prompt,
            "question_prompt": evaluation.question_prompt,
            "max_new_tokens": MAX_ANSWER_TOKENS,
            "items": len(self.benchmark.items),
            "items_sha256": _digest(self.benchmark.items),
            "examples_sha256": _digest(examples),
            "classes_sha256": _digest([self.benchmark.classes, self.benchmark.templates]),
            "piece_items": SHARD_ITEMS,
        }

    def _settle(self, unreadable: Sequence[str], items: int) -> None:
        """Raise DataError for pictures that could not be read, unless they are to be left out."""
        name = self.benchmark.name
        some = "; ".join(unreadable[:NAMED_IN_ERRORS])
        if unreadable and not self.wanted.skip_bad:
            raise DataError(
                f"{name}: {counted(len(unreadable), 'item')} of {items:,} cannot be read: {some}; "
                "mend them and start again, which goes on from here, or leave them out with "
                "--skip-bad"
            )
        if len(unreadable) == items:
            raise DataError(f"{name}: not one of {counted(items, 'item')} can be read: {some}")

    def _publish(
        self, scores: Sequence[Score], predictions: list[Row], left_out: Sequence[str]
    ) -> None:
        name = self.benchmark.name
        if left_out:
            some = "; ".join(left_out[:NAMED_IN_ERRORS])
            tell(f"{name}: {counted(len(left_out), 'entry', 'entries')} left out: {some}")
        write_lines(self.folder / PREDICTIONS_FILE, predictions)
        title = f"{name}, stage {self.stage}, step {self.step}"
        if self.wanted.shots:
            title += f", {counted(self.wanted.shots, 'shot')}"
        write_sheet(self.folder / SHEET_FILE, title, scores, predictions)
        results = {
            "benchmark": name,
            "stage": self.stage,
            "step": self.step,
            "checkpoint": self.checkpoint,
            "shots": self.wanted.shots,
            "limit": self.wanted.limit,
            "items": len(predictions),
            "left_out": left_out,
            "scores": [asdict(row) for row in scores],
        }
        # Last: it says that the others are there.
        write_atomically(self.folder / RESULTS_FILE, json.dumps(results, indent=1))
        forget(self.folder)
        print_scores(title, scores)
        tell(f"{self.folder}: {RESULTS_FILE}, {PREDICTIONS_FILE}, {SHEET_FILE}")

    def _score(self, measure: str, items: int, value: float) -> Score:
        return Score(split=self.benchmark.name, measure=measure, items=items, model=value)

    # Captions and answers

    def _write(
        self, model: VisionLanguageModel, examples: Sequence[Item]
    ) -> Callable[[range, Advance], list[Row]]:
        def work(numbers: range, advance: Advance) -> list[Row]:
            rows: list[Row] = []
            requests: list[Request] = []
            for number in numbers:
                item = self.benchmark.items[number]
                rows.append({"key": item.key})
                try:
                    requests.append(self._request(item, self._examples_of(number, examples)))
                except BadSampleError as error:
                    rows[-1]["unreadable"] = f"{item.key}: {error}"
                    advance(1)
            answers = generate(
                model, self.tokenizer, requests, batch_size=BATCH_SIZE, on_progress=advance
            )
            asked = [row for row in rows if "unreadable" not in row]
            for row, answer in zip(asked, answers, strict=True):
                row["answer"] = answer.strip()
            return rows

        return work

    def _examples_of(self, number: int, examples: Sequence[Item]) -> list[Item]:
        """Of other pictures, drawn by the seed and the item's number alone."""
        draws = np.random.default_rng((self.run.seed, number))
        drawn: list[Item] = []
        taken = {self.benchmark.items[number].picture}
        while len(drawn) < self.wanted.shots:
            example = examples[int(draws.integers(len(examples)))]
            if example.picture not in taken:
                taken.add(example.picture)
                drawn.append(example)
        return drawn

    def _request(self, item: Item, examples: Sequence[Item]) -> Request:
        shown = [*examples, item]
        turns = [
            Turn(prompt=self._prompt(each), answer=commonest(each.truths), pictures=(number,))
            for number, each in enumerate(shown)
        ]
        return Request(
            prompt=prompt_of(self.tokenizer, turns),
            pixels=tuple(self._pixels(each) for each in shown),
            max_new_tokens=MAX_ANSWER_TOKENS,
        )

    def _prompt(self, item: Item) -> str:
        evaluation = self.run.evaluation
        if self.benchmark.task == "captions":
            return evaluation.caption_prompt
        return evaluation.question_prompt.replace("{}", item.question)

    def _pixels(self, item: Item) -> Tensor:
        try:
            encoded = item.picture.read_bytes()
        except OSError as error:
            raise BadSampleError(f"cannot read {item.picture}: {error.strerror}") from error
        return read_square(encoded, str(item.picture), self.run.model.encoder.image_pixels)

    def _judge_answers(
        self, items: Sequence[Item], rows: Sequence[Row]
    ) -> tuple[list[Score], list[Row]]:
        answers = [str(row["answer"]) for row in rows]
        if self.benchmark.task == "captions":
            scores, each = self._caption_scores(answers, items)
            right = [score >= RIGHT_CIDER for score in each]
        else:
            rule = textvqa_accuracy if self.benchmark.name == "textvqa" else vqa_accuracy
            each = [rule(a, item.truths) for a, item in zip(answers, items, strict=True)]
            scores = self._accuracy_by_kind(items, each)
            right = [score >= 0.5 for score in each]
        judged = zip(items, answers, each, right, strict=True)
        return scores, [_prediction(*of_one) for of_one in judged]

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
        scores = [self._score(f"caption, {n}", len(items), value) for n, value in values.items()]
        return scores, measured.cider_of_each

    def _accuracy_by_kind(self, items: Sequence[Item], each: Sequence[float]) -> list[Score]:
        by_kind: dict[str, list[float]] = defaultdict(list)
        for item, score in zip(items, each, strict=True):
            by_kind[item.kind].append(score)
        scores = [self._score("VQA accuracy", len(each), float(np.mean(each)))]
        if len(by_kind) > 1:
            scores += [
                self._score(f"VQA accuracy, {kind}", len(some), float(np.mean(some)))
                for kind, some in sorted(by_kind.items())
            ]
        return scores

    # Two towers

    def _readable(self, numbers: range, advance: Advance) -> tuple[list[Row], list[Tensor]]:
        """A row for each item, and the pictures of those that are not unreadable."""
        rows: list[Row] = []
        pixels: list[Tensor] = []
        for number in numbers:
            item = self.benchmark.items[number]
            rows.append({"key": item.key})
            try:
                pixels.append(self._pixels(item))
            except BadSampleError as error:
                rows[-1]["unreadable"] = f"{item.key}: {error}"
            advance(1)
        return rows, pixels

    def _classify(self, model: PretrainingModel) -> Callable[[range, Advance], list[Row]]:
        classes_cd = self._class_features(model)

        def work(numbers: range, advance: Advance) -> list[Row]:
            rows, pixels = self._readable(numbers, advance)
            if pixels:
                most = min(BEST_CLASSES, len(classes_cd))
                best_nk = best(most, image_features(model, pixels), classes_cd).tolist()
                readable = [row for row in rows if "unreadable" not in row]
                for row, numbers_k in zip(readable, best_nk, strict=True):
                    row["best"] = numbers_k
            return rows

        return work

    def _class_features(self, model: PretrainingModel) -> Tensor:
        """Fp32 (c, d); collective, ranks share the classes."""
        classes, templates = self.benchmark.classes, self.benchmark.templates
        parts = range(0, len(classes), TEMPLATES_AT_ONCE)
        mine: list[Tensor] = []
        cut = 0
        own = parts[groups.rank() :: groups.world_size()]
        with progress(f"{self.benchmark.name}, prompts", len(own)) as advance:
            for start in own:
                some = classes[start : start + TEMPLATES_AT_ONCE]
                prompts = [template.replace("{}", c) for c in some for template in templates]
                prompts_nd, cut_now = text_features(model, prompts, self.tokenizer, self.run)
                mine.append(class_features(prompts_nd.unflatten(0, (len(some), -1))))
                cut += cut_now
                advance(1)
        self._tell_cut(cut)
        shares = groups.from_all_ranks(mine)
        ranks = len(shares)
        return torch.cat([shares[n % ranks][n // ranks] for n in range(len(parts))])

    def _tell_cut(self, cut: int) -> None:
        [all_cut] = groups.sum_over_ranks(cut)
        if all_cut:
            tell(f"{all_cut:.0f} texts are cut to data.row_tokens={self.run.data.row_tokens}")

    def _judge_classes(
        self, items: Sequence[Item], rows: Sequence[Row]
    ) -> tuple[list[Score], list[Row]]:
        best_nk = np.array([row["best"] for row in rows])
        truths_n = np.array([int(item.truths[0]) for item in items])
        measured = class_accuracies(best_nk, truths_n)
        names = self.benchmark.classes
        predictions = [
            _prediction(
                replace(item, truths=(names[truth],)),
                names[found[0]],
                float(found[0] == truth),
                found[0] == truth,
                best=[names[number] for number in found],
            )
            for item, truth, found in zip(items, truths_n.tolist(), best_nk.tolist(), strict=True)
        ]
        scores = [
            self._score(f"zero-shot, {name}", len(items), value) for name, value in measured.items()
        ]
        return scores, predictions

    def _encode(self, model: PretrainingModel) -> Callable[[range, Advance], list[Row]]:
        def work(numbers: range, advance: Advance) -> list[Row]:
            rows, pixels = self._readable(numbers, advance)
            readable = [
                (row, self.benchmark.items[number])
                for row, number in zip(rows, numbers, strict=True)
                if "unreadable" not in row
            ]
            if not readable:
                return rows
            images_nd = image_features(model, pixels)
            captions = [truth for _, item in readable for truth in item.truths]
            texts_md, cut = text_features(model, captions, self.tokenizer, self.run)
            texts = iter(texts_md)
            for (row, item), image_d in zip(readable, images_nd, strict=True):
                row["picture"] = _as_text(image_d)
                row["captions"] = [_as_text(next(texts)) for _ in item.truths]
            readable[0][0]["cut"] = cut
            return rows

        return work

    def _judge_retrieval(
        self, items: Sequence[Item], rows: Sequence[Row]
    ) -> tuple[list[Score], list[Row]]:
        cut = sum(int(row.get("cut", 0)) for row in rows)
        if cut:
            tell(f"{cut} captions are cut to data.row_tokens={self.run.data.row_tokens}")
        image_nd = torch.stack([_as_tensor(row["picture"]) for row in rows])
        text_md = torch.stack([_as_tensor(text) for row in rows for text in row["captions"]])
        captions = [truth for item in items for truth in item.truths]
        picture_of_m = np.repeat(np.arange(len(items)), [len(item.truths) for item in items])
        texts_nk, pictures_mk = ranked(image_nd, text_md)
        hits = recalls(texts_nk, pictures_mk, picture_of_m)
        scores = [self._score(name, len(each), float(np.mean(each))) for name, each in hits.items()]
        found_by = iter(pictures_mk.tolist())
        predictions = [
            _prediction(
                item,
                captions[found[0]],
                float(is_right),
                is_right,
                best=[captions[number] for number in found],
                found_by_captions=[[items[i].key for i in next(found_by)] for _ in item.truths],
            )
            for item, found, is_right in zip(
                items, texts_nk.tolist(), hits[f"picture to text, recall@{RECALLS[0]}"], strict=True
            )
        ]
        return scores, predictions


def _prediction(item: Item, answer: str, score: float, right: bool, **more: Any) -> Row:
    """A line of the predictions file."""
    asked = {"question": item.question} if item.question else {}
    return {
        "key": item.key,
        "picture": str(item.picture),
        **asked,
        "truths": list(item.truths),
        "answer": answer,
        "score": score,
        "right": bool(right),
        **more,
    }


def _digest(items: object) -> str:
    return hashlib.sha256(repr(items).encode()).hexdigest()


def _as_text(feature_d: Tensor) -> str:
    return base64.b64encode(feature_d.numpy().astype("<f4").tobytes()).decode()


def _as_tensor(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), "<f4").copy())
