"""Evaluates what a stage has learned, on held-out samples."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megavlm.checkpoint.storage import read_state
from megavlm.config.data import SourceSettings
from megavlm.config.engines import UNDIVIDED
from megavlm.config.evaluation import Measure
from megavlm.config.objectives import is_pretraining
from megavlm.config.plan import Plan, Stage
from megavlm.config.run import RunSettings
from megavlm.data.tokenizer import Tokenizer
from megavlm.dist import groups
from megavlm.errors import CheckpointError, ConfigError
from megavlm.eval.answers import Asked, Prediction, answered, find_prompts, score
from megavlm.eval.probe import TRAINING_SAMPLES, linear_probe
from megavlm.eval.retrieval import retrieval
from megavlm.eval.samples import Split, progress, tell
from megavlm.eval.scores import Score, print_scores
from megavlm.eval.shards import Row, read_lines, write_atomically, write_lines
from megavlm.eval.vqa import count_answers, majority_answers
from megavlm.files.folder import Folder
from megavlm.infer.load import (
    load_language,
    load_pretraining,
    newest,
    untrained_pretraining,
)
from megavlm.model.vlm import VisionLanguageModel
from megavlm.train.start import last_checkpoint

EVALUATION_FILE = "evaluation.json"
MAJORITY_SAMPLES = 100_000
"""At most so many training samples, the first ones, say which answers are frequent."""

_TASKS: dict[Measure, str] = {"captions": "caption", "vqa": "vqa"}


def evaluate_stage(plan: Plan, stage: Stage) -> None:
    """Evaluate a stage that is done, unless it has been already; collective, in `world_group`.

    Each rank holds the whole model, and does its share of the work. The first one writes and prints
    what comes out.
    """
    run = stage.run
    # One rank looks: the others may see an older file.
    looks = groups.rank() == 0
    done = looks and read_evaluation(run.run_folder).get(stage.name, {}).get("step")
    if groups.from_all_ranks(done)[0] != stage.end_step and run.measures:
        with groups.model_groups(run.seed, UNDIVIDED):
            _evaluate(stage, last_checkpoint(stage), show_progress=False)


def evaluate(plan: Plan, stage_name: str | None = None) -> None:
    """Evaluate the newest checkpoint of a run, or of a stage of it, anew.

    Raises CheckpointError where there is none.
    """
    with groups.process_groups(plan.first.seed):
        stage, checkpoint = newest_of(plan, stage_name)
        _evaluate(stage, checkpoint, show_progress=True)


def newest_of(plan: Plan, stage_name: str | None) -> tuple[Stage, Folder | None]:
    """The newest checkpoint of a run, if it has one, and its stage; or those of the stage named.

    Raises ConfigError for a stage that the run has not, CheckpointError for one without checkpoint.
    """
    if stage_name is None:
        return newest(plan)
    named = [stage for stage in plan.stages if stage.name == stage_name]
    if not named:
        names = ", ".join(stage.name for stage in plan.stages)
        raise ConfigError(f"the run has no stage {stage_name}; it has {names}")
    reached, checkpoint = newest(plan)
    if checkpoint is None or reached.first_step < named[0].first_step:
        raise CheckpointError(f"stage {stage_name} has no checkpoint yet; train it first")
    return named[0], checkpoint if reached.name == stage_name else last_checkpoint(named[0])


def read_evaluation(run_folder: Path) -> dict[str, Any]:
    """Step and scores of each stage, by its name; empty before the first evaluation."""
    path = run_folder / EVALUATION_FILE
    return json.loads(path.read_text()) if path.is_file() else {}


def read_predictions(run_folder: Path, stage: str) -> list[Row]:
    """What a stage's evaluation has written or found, an item a row; empty before it."""
    path = _predictions_file(run_folder, stage)
    return read_lines(path) if path.is_file() else []


def write_evaluation(
    folder: Path, stage: str, step: int, scores: Sequence[Score], rows: Sequence[Row], title: str
) -> None:
    """Write and print what has come out for a stage."""
    folder.mkdir(exist_ok=True)
    write_lines(_predictions_file(folder, stage), rows)
    found = read_evaluation(folder)
    found[stage] = {"step": step, "scores": [asdict(row) for row in scores]}
    # Last: it says that the stage is done.
    write_atomically(folder / EVALUATION_FILE, json.dumps(found, indent=1))
    print_scores(title, scores)


def _predictions_file(folder: Path, stage: str) -> Path:
    return folder / f"predictions-{stage}.jsonl"


def _evaluate(stage: Stage, checkpoint: Folder | None, *, show_progress: bool) -> None:
    run, measures = stage.run, stage.run.measures
    tell(f"evaluating stage {stage.name}: {', '.join(measures) or 'nothing is to be measured'}")
    if is_pretraining(run.objectives):
        scores, rows = _pretraining(run, checkpoint, measures)
    else:
        model, tokenizer = load_language(run, checkpoint), Tokenizer(run.data.tokenizer)
        asked = asked_of(run, measures)
        scores, rows = language_scores(
            model, tokenizer, run, measures, asked, show_progress=show_progress
        )
    if groups.rank() == 0:
        step = 0 if checkpoint is None else read_state(checkpoint)["step"]
        title = f"stage {stage.name}, step {step}"
        write_evaluation(run.run_folder, stage.name, step, scores, rows, title)


def _pretraining(
    run: RunSettings, checkpoint: Folder | None, measures: Sequence[Measure]
) -> tuple[list[Score], list[Row]]:
    model, untrained = load_pretraining(run, checkpoint), untrained_pretraining(run)
    scores: list[Score] = []
    rows: list[Row] = []
    if "retrieval" in measures:
        heldout = Split("heldout", (run.data.heldout,), run, run.evaluation.samples)
        tokenizer = Tokenizer(run.data.tokenizer)
        scores, found = retrieval(model, untrained, heldout, tokenizer, run)
        rows = [row._asdict() for row in found]
    if "probe" in measures:
        kind = run.evaluation.probe_kind
        assert kind is not None, "without it no probe is measured"
        # Labels are of whatever task.
        train = Split("train", _all_tasks(run.data.train), run, TRAINING_SAMPLES)
        heldout = Split("heldout", _all_tasks([run.data.heldout]), run, run.evaluation.samples)
        scores = [*scores, *linear_probe(model, untrained, train, heldout, kind)]
    return scores, rows


def asked_of(run: RunSettings, measures: Sequence[Measure]) -> list[Asked]:
    """What a language model is asked about the held-out samples; collective."""
    tasks = [_TASKS[measure] for measure in measures]
    sources = {"heldout": run.data.heldout, "heldout_questions": run.data.heldout_questions}
    splits = [
        Split(name, _all_tasks([source]), run, run.evaluation.samples)
        for name, source in sources.items()
        if source is not None
    ]
    return [Asked(split, find_prompts(split, tasks)) for split in splits]


def language_scores(
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    run: RunSettings,
    measures: Sequence[Measure],
    asked: Sequence[Asked],
    *,
    show_progress: bool,
) -> tuple[list[Score], list[Row]]:
    """Scores of a model's answers, and the answers; collective."""
    predictions: list[Prediction] = []
    for split, prompts in asked:
        # Two answers to each prompt. During training, which has a bar of its own, none is shown.
        answers = 2 * len(prompts[groups.rank() :: groups.world_size()])
        with progress(f"evaluating {split.name}", answers, show=show_progress) as advance:
            predictions += answered(model, tokenizer, split, prompts, run.seed, advance)
    majority: Mapping[str, str] = {}
    if "vqa" in measures:
        train = Split("train", _all_tasks(run.data.train), run, MAJORITY_SAMPLES)
        counts = groups.from_all_ranks(count_answers(train.share_of_texts()))
        majority = majority_answers(counts)
    for measure, task in _TASKS.items():
        if measure in measures and not any(p.text.task == task for p in predictions):
            tell(f"no held-out picture has a text of task {task!r}; {measure} are not measured")
    return score(predictions, majority), [asdict(p) for p in predictions]


def _all_tasks(sources: Sequence[SourceSettings]) -> list[SourceSettings]:
    """What is measured chooses among texts of all tasks, whatever is trained on."""
    return [replace(source, tasks=()) for source in sources]
