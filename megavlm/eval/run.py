"""Evaluates a trained model on held-out pictures and questions."""

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from megavlm.config.run import RunSettings
from megavlm.data.image import decode_picture, fit_square, to_uint8_tensor
from megavlm.data.samples import Text
from megavlm.data.shards import ShardFolder
from megavlm.dist.groups import process_groups
from megavlm.errors import BadSampleError
from megavlm.eval.caption import cider, exact_match
from megavlm.eval.vqa import ANNOTATORS, majority_answers, vqa_accuracy
from megavlm.infer.generate import Request, generate
from megavlm.infer.load import load_trained
from megavlm.train.metrics import read_metrics

EVALUATION_FILE = "evaluation.json"
PREDICTIONS_FILE = "predictions.jsonl"
MAX_ANSWER_TOKENS = 48
BATCH_SIZE = 64
EVALUATED_TASKS = ("caption", "vqa")


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


@dataclass(frozen=True, kw_only=True)
class Score:
    """One row of the evaluation table; None where a baseline makes no sense."""

    split: str
    measure: str
    items: int
    model: float
    wrong_picture: float
    majority: float | None


def evaluate(run: RunSettings) -> list[Score]:
    """Caption and answer everything held out; print the table and write it to the run folder."""
    majority = majority_answers(ShardFolder(run.data.train).readable_texts())
    with process_groups(run.seed):
        model, tokenizer = load_trained(run)
        predictions: list[Prediction] = []
        for split, folder in _splits(run).items():
            samples, texts, pixels = _read_split(folder, run.model.encoder.image_pixels)
            wrong = _wrong_pictures(samples, run.seed)
            with Progress(console=Console(stderr=True)) as progress:
                task = progress.add_task(f"evaluating {split}", total=2 * len(texts))
                answers, wrong_answers = (
                    generate(
                        model,
                        tokenizer,
                        [
                            Request(prompt=text.prompt, pixels=pixels[shown])
                            for text, shown in zip(texts, pictures, strict=True)
                        ],
                        max_new_tokens=MAX_ANSWER_TOKENS,
                        batch_size=BATCH_SIZE,
                        on_progress=lambda done, task=task, bar=progress: bar.advance(task, done),
                    )
                    for pictures in (samples, wrong)
                )
            predictions += [
                Prediction(
                    split=split,
                    sample=sample,
                    text=text,
                    answer=answer,
                    answer_to_wrong_picture=wrong_answer,
                )
                for sample, text, answer, wrong_answer in zip(
                    samples, texts, answers, wrong_answers, strict=True
                )
            ]
    scores = score(predictions, majority)
    _write(run.run_folder, predictions, scores)
    print_scores(run.run_folder, scores)
    return scores


def score(predictions: Sequence[Prediction], majority: dict[str, str]) -> list[Score]:
    """The evaluation table: captions by language, answers over all and by kind of question."""
    groups: dict[tuple[str, str], list[Prediction]] = defaultdict(list)
    for prediction in predictions:
        if prediction.text.task == "vqa":
            groups[prediction.split, "VQA accuracy"].append(prediction)
        name = "VQA accuracy" if prediction.text.task == "vqa" else "caption"
        groups[prediction.split, f"{name}, {prediction.text.kind}"].append(prediction)
    rows: list[Score] = []
    for (split, measure), members in groups.items():
        truths = [p.text.answer for p in members]
        answers = [p.answer for p in members]
        wrong = [p.answer_to_wrong_picture for p in members]
        common: dict[str, Any] = {"split": split, "items": len(members)}
        if measure.startswith("VQA"):
            blind = [majority.get(p.text.prompt, "") for p in members]
            rows.append(
                Score(
                    **common,
                    measure=measure,
                    model=_mean_accuracy(answers, truths),
                    wrong_picture=_mean_accuracy(wrong, truths),
                    majority=_mean_accuracy(blind, truths),
                )
            )
            continue
        for kind, measured in (("exact match", exact_match), ("CIDEr", cider)):
            rows.append(
                Score(
                    **common,
                    measure=f"{measure}, {kind}",
                    model=measured(answers, truths),
                    wrong_picture=measured(wrong, truths),
                    majority=None,
                )
            )
    return rows


def print_scores(run_folder: Path, scores: Sequence[Score]) -> None:
    """Print the evaluation table, with the held-out loss before and after training."""
    table = Table("split", "measure", "items", "model", "wrong picture", "majority answer")
    for column in table.columns[2:]:
        column.justify = "right"
    for row in scores:
        majority = "" if row.majority is None else f"{row.majority:.3f}"
        figures = (str(row.items), f"{row.model:.3f}", f"{row.wrong_picture:.3f}", majority)
        table.add_row(row.split, row.measure, *figures)
    # Wide enough for the table where nothing says how wide the page is.
    console = Console() if Console().is_terminal else Console(width=110)
    losses = [m["heldout_loss"] for m in read_metrics(run_folder) if "heldout_loss" in m]
    if len(losses) > 1:
        console.print(f"held-out loss {losses[0]:.3f} before, {losses[-1]:.3f} after training")
    console.print(table)


def _splits(run: RunSettings) -> dict[str, ShardFolder]:
    splits = {"heldout": run.data.heldout, "heldout_questions": run.data.heldout_questions}
    return {name: ShardFolder(path) for name, path in splits.items() if path is not None}


def _read_split(folder: ShardFolder, side: int) -> tuple[list[int], list[Text], dict[int, Tensor]]:
    """All prompts to evaluate, the sample of each, and the samples' pictures."""
    samples: list[int] = []
    texts: list[Text] = []
    pixels: dict[int, Tensor] = {}
    for number in range(len(folder)):
        try:
            sample = folder.read(number)
            if sample.picture is None:
                continue
            picture = decode_picture(sample.picture, sample.key, side)
        except BadSampleError as error:
            print(f"skipped {folder.locate(number)}: {error}", file=sys.stderr)
            continue
        pixels[number] = to_uint8_tensor(fit_square(picture, side))
        for text in sample.texts:
            if text.task in EVALUATED_TASKS:
                samples.append(number)
                texts.append(text)
    return samples, texts, pixels


def _wrong_pictures(samples: Sequence[int], seed: int) -> list[int]:
    """For each prompt, a sample other than its own: the samples' order shuffled, then rotated."""
    order = np.random.default_rng(seed).permutation(sorted(set(samples)))
    other = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))
    return [other[sample] for sample in samples]


def _mean_accuracy(answers: Sequence[str], truths: Sequence[str]) -> float:
    """The data has one truth a question; all annotators are taken to agree on it."""
    pairs = zip(answers, truths, strict=True)
    return float(np.mean([vqa_accuracy(answer, [truth] * ANNOTATORS) for answer, truth in pairs]))


def _write(folder: Path, predictions: Sequence[Prediction], scores: Sequence[Score]) -> None:
    with (folder / PREDICTIONS_FILE).open("w") as file:
        for prediction in predictions:
            file.write(json.dumps(asdict(prediction), ensure_ascii=False) + "\n")
    content = {"scores": [asdict(row) for row in scores]}
    (folder / EVALUATION_FILE).write_text(json.dumps(content, indent=1))
