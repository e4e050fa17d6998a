"""One HTML page that shows a run: curves, scores and a contact sheet of held-out pictures."""

import base64
import importlib.resources
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from megavlm.config.load import run_as_tree
from megavlm.config.run import RunSettings
from megavlm.data.shards import ShardFolder
from megavlm.eval.run import EVALUATION_FILE, PREDICTIONS_FILE
from megavlm.model.params import count_by_part
from megavlm.train.metrics import read_metrics

REPORT_FILE = "report.html"
SHEET_PICTURES = 60
SMOOTHING = 0.9  # of the drawn loss: exponential moving average


def write_report(run: RunSettings) -> Path:
    """Draw the page from what the run folder holds; parts that are not there yet are left out."""
    metrics = read_metrics(run.run_folder)
    steps = [m for m in metrics if "loss" in m]
    template = jinja2.Environment(autoescape=True).from_string(
        (importlib.resources.files("megavlm.eval") / "report.html.j2").read_text()
    )
    evaluation = run.run_folder / EVALUATION_FILE
    page = template.render(
        name=run.run_folder.name,
        settings=json.dumps(run_as_tree(run), indent=2),
        parameters=sum(count_by_part(run.model).values()),
        steps=steps,
        samples=sum(m["samples"] for m in steps),
        skipped=sum(m["skipped_samples"] for m in steps),
        heldout=[m for m in metrics if "heldout_loss" in m],
        curves=_curves(steps) if steps else "",
        scores=json.loads(evaluation.read_text())["scores"] if evaluation.is_file() else [],
        sheet=_contact_sheet(run),
    )
    path = run.run_folder / REPORT_FILE
    path.write_text(page)
    return path


def _curves(steps: Sequence[dict[str, Any]]) -> str:
    """Loss, learning rate and throughput over the steps, as SVG."""
    figure = Figure(figsize=(11, 3), layout="constrained")
    numbers = [m["step"] + 1 for m in steps]
    panels = [("loss", "training loss, nats per token")]
    panels += [("learning_rate", "learning rate"), ("samples_per_second", "samples per second")]
    for axes, (name, title) in zip(figure.subplots(1, 3), panels, strict=True):
        values = [m[name] for m in steps]
        axes.plot(numbers, values, color="#9db4d0", linewidth=0.8)
        if name == "loss":
            axes.plot(numbers, _smoothed(values), color="#1f4e8c", linewidth=1.6)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return buffer.getvalue()


def _smoothed(values: Sequence[float]) -> list[float]:
    smooth = [values[0]]
    for value in values[1:]:
        smooth.append(SMOOTHING * smooth[-1] + (1 - SMOOTHING) * value)
    return smooth


def _contact_sheet(run: RunSettings) -> list[dict[str, Any]]:
    """Held-out pictures, evenly spread, with the model's captions and answers beside the truth."""
    predictions = run.run_folder / PREDICTIONS_FILE
    if not predictions.is_file():
        return []
    by_sample: dict[int, list[dict[str, Any]]] = {}
    for line in predictions.read_text().splitlines():
        prediction = json.loads(line)
        if prediction["split"] == "heldout":
            by_sample.setdefault(prediction["sample"], []).append(prediction)
    folder = ShardFolder(run.data.heldout)
    numbers = sorted(by_sample)
    sheet: list[dict[str, Any]] = []
    for number in numbers[:: max(1, len(numbers) // SHEET_PICTURES)][:SHEET_PICTURES]:
        picture = folder.read(number).picture
        assert picture is not None, "only pictures are evaluated"
        encoded = base64.b64encode(picture).decode()
        sheet.append({"picture": encoded, "predictions": by_sample[number]})
    return sheet
