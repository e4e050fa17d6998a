"""One HTML page that shows a run: its plan, then each stage's curves, scores and pictures."""

import importlib.resources
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from megavlm.config.load import plan_as_tree
from megavlm.config.objectives import is_pretraining
from megavlm.config.plan import Plan, Stage
from megavlm.data.image import thumbnail_url
from megavlm.data.sources import Sources
from megavlm.data.texts import evenly_spaced
from megavlm.eval import charts
from megavlm.eval.run import read_evaluation, read_predictions
from megavlm.eval.scores import Score, baselines_of
from megavlm.model.params import count_by_part, parameters_of
from megavlm.planner.report import words
from megavlm.redact import tree_without_secrets
from megavlm.train.goodput import goodput_of
from megavlm.train.metrics import read_metrics
from megavlm.train.stragglers import read_ranks

REPORT_FILE = "report.html"
SHEET_PICTURES = 60
RETRIEVED_TEXTS = 12
USE_COLOURS = {
    "productive": "#15803d",
    "start-up": "#7e22ce",
    "loading": "#a78bfa",
    "saving": "#0e7490",
    "evaluation": "#1f4e8c",
    "repeated steps": "#be123c",
    "skipped steps": "#f59e0b",
    "down": "#94a3b8",
    "other": "#cbd5e1",
}
"""Of what a run's time went into."""
BUSIEST_RANKS = 8

Line = dict[str, Any]


def write_report(plan: Plan, run_file: Path) -> Path:
    """Draw the page from what the run folder holds; parts that are not there yet are left out.

    run_file: of the plan; the page says how to ask the model, once it has answered anything.
    """
    run_folder = plan.first.run_folder
    metrics = read_metrics(run_folder)
    steps = _learned(metrics)
    evaluation = read_evaluation(run_folder)
    predictions = {stage.name: read_predictions(run_folder, stage.name) for stage in plan.stages}
    environment = jinja2.Environment(autoescape=True)
    template = environment.from_string(
        (importlib.resources.files("megavlm.eval") / "report.html.j2").read_text()
    )
    page = template.render(
        name=run_folder.name,
        run_file=run_file,
        answers=any(
            predictions[stage.name]
            for stage in plan.stages
            if not is_pretraining(stage.run.objectives)
        ),
        settings=json.dumps(tree_without_secrets(plan_as_tree(plan)), indent=2),
        parameters=sum(count_by_part(parameters_of(plan.last)).values()),
        steps=len(steps),
        all_steps=plan.steps,
        samples=sum(m["samples"] for m in steps),
        skipped=sum(m["skipped_samples"] for m in steps),
        colours=charts.COLOURS,
        overview=charts.overview(
            plan, max((m["step"] + 1 for m in metrics if "loss" in m), default=0)
        ),
        time=_time(run_folder),
        ranks=_ranks(run_folder),
        stages=[
            _stage(stage, metrics, evaluation.get(stage.name, {}), predictions[stage.name])
            for stage in plan.stages
        ],
        sheet=_contact_sheet(plan, predictions),
    )
    path = run_folder / REPORT_FILE
    path.write_text(page)
    return path


def _stage(
    stage: Stage, metrics: Sequence[Line], evaluation: Line, predictions: Sequence[Line]
) -> dict[str, Any]:
    """What the page shows of one stage."""
    run = stage.run
    mine = [m for m in metrics if m.get("stage") == stage.name]
    steps = _learned(mine)
    gone_through = sum("loss" in m for m in mine)
    heldout = [m for m in mine if "heldout_loss" in m]
    scores = [Score(**row) for row in evaluation.get("scores", [])]
    return {
        "name": stage.name,
        "state": "done"
        if gone_through == run.train.steps
        else "under way"
        if gone_through
        else "to come",
        "objectives": run.objectives,
        "planned_steps": run.train.steps,
        "steps": len(steps),
        "samples": sum(m["samples"] for m in steps),
        "trained": words(run.trained_parts),
        "frozen": words(run.train.frozen),
        "optimizer": run.optimizer,
        "heldout": _heldout_losses(heldout),
        "curves": charts.curves(steps, heldout) if steps else "",
        "group_curves": charts.group_curves(steps),
        "speed": _speed(steps) if steps else None,
        "evaluated_step": evaluation.get("step"),
        "scores": scores,
        "splits": {row.split for row in scores},
        "baselines": baselines_of(scores),
        "retrieved": _retrieved(stage, predictions) if is_pretraining(run.objectives) else [],
    }


def _learned(metrics: Sequence[Line]) -> list[Line]:
    """The lines of steps that the weights have followed."""
    return [m for m in metrics if "loss" in m and not m.get("skipped_step")]


def _time(run_folder: Path) -> dict[str, Any] | None:
    """Where the time of the run went; None for a run without events."""
    found = goodput_of(run_folder)
    if found is None:
        return None
    used = {use: seconds for use, seconds in found.seconds.items() if seconds >= 0.05}
    return {
        "found": found,
        "used": used,
        "colours": USE_COLOURS,
        "last": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(found.last_unix_seconds)),
    }


def _ranks(run_folder: Path) -> dict[str, Any] | None:
    """What each rank's steps consist of, and who is busiest; None where it was not measured."""
    found = read_ranks(run_folder)
    if found is None:
        return None
    rows = [
        {"rank": n, "straggles": n in found["stragglers"], **times}
        for n, times in enumerate(found["ranks"])
    ]
    rows.sort(key=lambda row: -row["work_seconds"] - row["data_seconds"])
    return {
        "step": found["step"] + 1,
        "measured_steps": found["measured_steps"],
        "all": len(rows),
        "busiest": rows[:BUSIEST_RANKS],
        "times": {label: name for label, (name, _) in charts.RANK_TIMES.items()},
        "chart": charts.rank_bars(found["ranks"], found["stragglers"]),
    }


def _speed(steps: Sequence[Line]) -> dict[str, Any]:
    """A stage's throughput: the median step, which no first step or hiccup moves."""
    names = {
        "samples a second": "samples_per_second",
        "pictures a second": "images_per_second",
        "image tokens a second": "image_tokens_per_second",
        "text tokens a second": "text_tokens_per_second",
        "seconds a step": "step_seconds",
    }
    # Lines of older versions have fewer figures.
    rows = {label: _median(steps, name) for label, name in names.items()}
    flops, utilisation = (
        _median(steps, f"model_flops_{name}") for name in ("per_second", "utilisation")
    )
    seconds = sum(m.get("step_seconds", 0.0) for m in steps)
    waits = sum(m.get("data_seconds", 0.0) for m in steps)
    measured = [m for m in steps if "communication_wait_seconds" in m]
    rank_waits = sum(m["communication_wait_seconds"] for m in measured)
    memory = {
        "of this process": _most(steps, "process_rss_bytes"),
        "of its host": _most(steps, "host_used_bytes"),
        "of its GPU": _most(steps, "gpu_peak_allocated_bytes"),
    }
    return {
        "rows": {label: value for label, value in rows.items() if value is not None},
        "teraflops": None if flops is None else flops / 1e12,
        "utilisation": utilisation,
        "data_wait": waits / seconds if seconds else None,
        "rank_wait": rank_waits / sum(m["step_seconds"] for m in measured) if measured else None,
        "memory_gib": {of: m / 2**30 for of, m in memory.items() if m is not None},
    }


def _median(steps: Sequence[Line], name: str) -> float | None:
    values = [m[name] for m in steps if m.get(name) is not None]
    return float(np.median(values)) if values else None


def _most(steps: Sequence[Line], name: str) -> float | None:
    return max((m[name] for m in steps if m.get(name) is not None), default=None)


def _heldout_losses(heldout: Sequence[Line]) -> list[dict[str, Any]]:
    """Each held-out loss before the stage and after it, or so far."""
    if len(heldout) < 2:
        return []
    names = [name for name in heldout[0] if name.startswith("heldout_loss")]
    return [
        {
            "name": name.removeprefix("heldout_loss").lstrip("_"),
            "before": heldout[0][name],
            "after": heldout[-1][name],
        }
        for name in names
    ]


def _retrieved(stage: Stage, predictions: Sequence[Line]) -> list[dict[str, Any]]:
    """Held-out texts, evenly spread, with the pictures that they find."""
    sources = Sources([stage.run.data.heldout], stage.run.seed)
    texts = {row["sample"]: row["text"] for row in predictions}
    return [
        {
            "text": row["text"],
            "best": [
                {
                    "picture": _thumbnail(sources, number, 0),
                    "text": texts[number],
                    "right": texts[number] == row["text"],
                }
                for number in row["best_samples"]
            ],
        }
        for row in _spread(predictions, RETRIEVED_TEXTS)
    ]


def _contact_sheet(plan: Plan, predictions: dict[str, list[Line]]) -> dict[str, Any] | None:
    """Held-out pictures, evenly spread, with what the last language stage says of them."""
    written = [
        stage
        for stage in plan.stages
        if predictions[stage.name] and not is_pretraining(stage.run.objectives)
    ]
    if not written:
        return None
    stage = written[-1]
    by_picture: dict[tuple[int, int], list[dict[str, str]]] = {}
    for prediction in predictions[stage.name]:
        if prediction["split"] == "heldout":
            [turn] = prediction["text"]["turns"]
            said = {
                "prompt": turn["prompt"],
                "truth": turn["answer"],
                "answer": prediction["answer"],
            }
            by_picture.setdefault((prediction["sample"], turn["pictures"][0]), []).append(said)
    sources = Sources([stage.run.data.heldout], stage.run.seed)
    cards = [
        {"picture": _thumbnail(sources, *place), "predictions": by_picture[place]}
        for place in _spread(sorted(by_picture), SHEET_PICTURES)
    ]
    return {"stage": stage.name, "cards": cards}


def _spread(items: Sequence[Any], count: int) -> Sequence[Any]:
    return [items[number] for number in evenly_spaced(len(items), count)]


def _thumbnail(sources: Sources, sample: int, number: int) -> str:
    """One picture of a held-out sample, small, as a URL that holds it."""
    read = sources.read(sources.in_order(sample))
    return thumbnail_url(read.pictures[number], read.key)
