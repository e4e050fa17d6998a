"""Evaluates a checkpoint on standard benchmarks (docs/evaluation.md)."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megavlm.checkpoint.storage import read_state
from megavlm.config.objectives import is_pretraining
from megavlm.config.plan import Plan, Stage
from megavlm.data.tokenizer import Tokenizer
from megavlm.dist import groups
from megavlm.errors import ConfigError, DataError
from megavlm.eval.answers import MAX_ANSWER_TOKENS
from megavlm.eval.benchmark_answers import Writes
from megavlm.eval.benchmark_towers import Classifies, Retrieves
from megavlm.eval.benchmarks import NAMED_IN_ERRORS, Benchmark, Item, read_benchmark
from megavlm.eval.run import newest_of
from megavlm.eval.samples import tell
from megavlm.eval.scores import Score, print_scores
from megavlm.eval.shards import SHARD_ITEMS, Row, forget, in_shards, write_atomically, write_lines
from megavlm.eval.sheet import write_sheet
from megavlm.files.folder import Folder
from megavlm.infer.load import check_language, load_language, load_pretraining
from megavlm.infer.quantize import Quantization
from megavlm.model.pretraining import PretrainingModel
from megavlm.model.vlm import VisionLanguageModel
from megavlm.terminal import counted

FOLDER = "benchmarks"
RESULTS_FILE, PREDICTIONS_FILE, SHEET_FILE = "results.json", "predictions.jsonl", "sheet.html"


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
    quantization: Quantization | None = None
    """Of the language model; None: as it is."""


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
        if wanted.quantization is not None:
            check_language(stage)
        if is_pretraining(stage.run.objectives):
            model = load_pretraining(stage.run, checkpoint)
        else:
            model = load_language(stage.run, checkpoint, quantization=wanted.quantization)
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
    two_towers = is_pretraining(objectives)
    needed = ""
    if benchmark.task == "classes":
        needed = "" if "contrastive" in objectives else "contrastive"
    elif benchmark.task == "vqa" or shots:
        needed = "captioning or instruction" if two_towers else ""
    elif two_towers and "contrastive" not in objectives:
        needed = "contrastive, captioning or instruction"
    if needed:
        raise ConfigError(
            f"{name}{' with --shots' if shots else ''} needs a stage of {needed}, and stage "
            f"{stage.name} is of {', '.join(objectives)}; name another with --stage"
        )
    if shots and two_towers:
        raise ConfigError(f"{name} with --shots={shots}: two towers read no examples")
    if examples is not None and len({item.picture for item in examples.items}) <= shots:
        raise ConfigError(
            f"--shots={shots} needs more pictures than the {len(examples.items)} entries of the "
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
        self.run = stage.run
        self.benchmark, self.wanted = benchmark, wanted
        self.model, self.tokenizer = model, tokenizer
        self.stage = stage.name
        self.step = 0 if checkpoint is None else read_state(checkpoint)["step"]
        self.checkpoint = str(checkpoint)
        shots = f"-{wanted.shots}-shot" if wanted.shots else ""
        kind = f"-{wanted.quantization}" if wanted.quantization else ""
        name = f"{benchmark.name}{shots}{kind}"
        self.folder = self.run.run_folder / FOLDER / stage.name / name

    def evaluate(self, examples: Sequence[Item]) -> None:
        """Collective; the first rank writes."""
        benchmark, run = self.benchmark, self.run
        items = benchmark.items
        if isinstance(self.model, VisionLanguageModel):
            how = Writes(benchmark, examples, self.wanted.shots, run, self.model, self.tokenizer)
        else:
            kind = Classifies if benchmark.task == "classes" else Retrieves
            how = kind(benchmark, run, self.model, self.tokenizer)
        settings = self._settings(examples)
        rows = in_shards(self.folder, settings, len(items), how.work, benchmark.name)
        pairs = list(zip(items, rows, strict=True)) if rows else []
        unreadable = [str(row["unreadable"]) for _, row in pairs if "unreadable" in row]
        self._settle(groups.from_all_ranks(unreadable)[0], len(items))
        if groups.rank() == 0:
            usable = [(item, row) for item, row in pairs if "unreadable" not in row]
            assert [row["key"] for _, row in usable] == [item.key for item, _ in usable]
            scores, predictions = how.judge([i for i, _ in usable], [row for _, row in usable])
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
            "quantization": self.wanted.quantization,
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
        if self.wanted.quantization:
            title += f", {self.wanted.quantization}"
        write_sheet(self.folder / SHEET_FILE, title, scores, predictions)
        results = {
            "benchmark": name,
            "stage": self.stage,
            "step": self.step,
            "checkpoint": self.checkpoint,
            "shots": self.wanted.shots,
            "quantization": self.wanted.quantization,
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


def _digest(items: object) -> str:
    return hashlib.sha256(repr(items).encode()).hexdigest()
