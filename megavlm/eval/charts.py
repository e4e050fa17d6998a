"""The charts of a run's page, as SVG."""

import html
import io
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megavlm.config.plan import Plan
from megavlm.config.schedule import scheduled

SMOOTHING = 0.9  # of the drawn curves: exponential moving average
DRAWN_POINTS = 2_000  # of a curve; more cannot be told apart, and a page of millions cannot be read
COLOURS = ("#1f4e8c", "#b45309", "#15803d", "#7e22ce", "#be123c", "#0e7490")
DARK = "#1c2733"
RANK_TIMES = {
    "work": ("work_seconds", "#1f4e8c"),
    "waiting for data": ("data_seconds", "#f59e0b"),
    "waiting for other ranks": ("communication_wait_seconds", "#cbd5e1"),
}
"""What a rank's steps consist of: the figure, and its colour."""
LOSS_GROUPS = {"loss_source_": "loss by source", "loss_modality_": "loss by modality"}
"""Beginnings of their figures' names."""

Line = dict[str, Any]


def overview(plan: Plan, steps_done: int) -> str:
    """The learning rate over all steps, planned and done, with the stages behind it, as SVG."""
    figure = Figure(figsize=(11, 2), layout="constrained")
    axes = figure.subplots()
    for number, stage in enumerate(plan.stages):
        colour = COLOURS[number % len(COLOURS)]
        axes.axvspan(stage.first_step, stage.end_step, color=colour, alpha=0.12, linewidth=0)
        axes.annotate(
            stage.name,
            ((stage.first_step + stage.end_step) / 2, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            color=colour,
        )
        own = _thinned(range(stage.first_step, stage.end_step))
        rates = [scheduled(plan, stage, step) for step in own]
        axes.plot([step + 1 for step in own], rates, color=DARK, linewidth=1.2)
    if steps_done < plan.steps:
        axes.axvline(steps_done, color=DARK, linewidth=1, linestyle="dotted")
        axes.annotate(" now", (steps_done, 0.9), xycoords=("data", "axes fraction"), va="top")
    axes.set_xlim(0, plan.steps)
    axes.set_ylabel("learning rate")
    _style(axes)
    return _svg(figure, "Learning rate over all steps of " + ", ".join(s.name for s in plan.stages))


def curves(steps: Sequence[Line], heldout: Sequence[Line]) -> str:
    """Losses, gradient norm and throughput over a stage's steps, as SVG."""
    figure = Figure(figsize=(11, 3), layout="constrained")
    losses = [
        name
        for name in steps[0]
        if name.startswith("loss_") and not name.startswith(tuple(LOSS_GROUPS))
    ] or ["loss"]
    panels = [
        (losses, "loss"),
        (["gradient_norm"], "gradient norm"),
        (["samples_per_second"], "samples per second"),
    ]
    all_axes: Iterable[Axes] = figure.subplots(1, 3)
    for axes, (names, title) in zip(all_axes, panels, strict=True):
        for name, colour in zip(names, COLOURS, strict=False):
            label = name.removeprefix("loss_") if len(names) > 1 else "training"
            values = [m[name] for m in steps]
            points = _thinned(range(len(values)))
            numbers = [steps[i]["step"] + 1 for i in points]
            smooth = _smoothed(values)
            raw = [values[i] for i in points]
            axes.plot(numbers, raw, color=colour, linewidth=0.6, alpha=0.35)
            axes.plot(numbers, [smooth[i] for i in points], color=colour, label=label)
            if name in losses:
                kept = [m for m in heldout if f"heldout_{name}" in m]
                of_heldout = [m[f"heldout_{name}"] for m in kept]
                held_out = "held out" if len(names) == 1 else f"{label}, held out"
                axes.plot(
                    [m["step"] for m in kept],
                    of_heldout,
                    color=colour,
                    marker="o",
                    linestyle="none",
                    label=held_out,
                )
        if title == "loss":
            axes.legend(fontsize=8, frameon=False)
        axes.set_title(title, fontsize=10)
        _style(axes)
    first, last = (_smoothed([m["loss"] for m in steps])[i] for i in (0, -1))
    return _svg(
        figure,
        f"Loss, from {first:.3f} to {last:.3f}, gradient norm and samples per second over "
        f"{len(steps)} steps",
    )


def group_curves(steps: Sequence[Line]) -> str:
    """Losses by source and by modality, where several were met, as SVG."""
    names = dict.fromkeys(name for m in steps for name in m)
    panels = [
        (title, [name for name in names if name.startswith(start)])
        for start, title in LOSS_GROUPS.items()
    ]
    panels = [(title, of_panel) for title, of_panel in panels if of_panel]
    if not panels:
        return ""
    figure = Figure(figsize=(11, 3), layout="constrained")
    colours = itertools.cycle(COLOURS)
    for axes, (title, of_panel) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        for name in of_panel:
            met = [m for m in steps if m.get(name) is not None]
            if not met:
                continue
            smooth = _smoothed([m[name] for m in met])
            points = _thinned(range(len(met)))
            label = name.split("_", 2)[2]
            axes.plot(
                [met[i]["step"] + 1 for i in points],
                [smooth[i] for i in points],
                color=next(colours),
                label=label,
            )
        axes.legend(fontsize=8, frameon=False)
        axes.set_title(title, fontsize=10)
        _style(axes)
    return _svg(figure, "Training loss, smoothed, by source or modality of the learned tokens")


def rank_bars(ranks: Sequence[Line], stragglers: Sequence[int]) -> str:
    """A bar of each rank's seconds a step, as SVG; those that hold up others are marked."""
    figure = Figure(figsize=(11, 2.4), layout="constrained")
    axes = figure.subplots()
    bottom = np.zeros(len(ranks))
    for label, (name, colour) in RANK_TIMES.items():
        heights = np.array([rank[name] for rank in ranks])
        axes.bar(range(len(ranks)), heights, 0.9, bottom, label=label, color=colour)
        bottom += heights
    marked = [*stragglers]
    axes.plot(marked, bottom[marked], marker="v", linestyle="none", color="#be123c")
    axes.margins(x=0.01, y=0.15)
    axes.set_ylabel("seconds a step")
    axes.legend(fontsize=8, frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    _style(axes)
    axes.set_xlabel("rank")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    slowest = int(np.argmax([rank["work_seconds"] + rank["data_seconds"] for rank in ranks]))
    return _svg(
        figure, f"Seconds a step of {len(ranks)} ranks, of which rank {slowest} is the busiest"
    )


def _style(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)


def _svg(figure: Figure, description: str) -> str:
    """The figure as an element of the page, with a description for those who do not see it."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    element = buffer.getvalue()
    element = element[element.index("<svg ") :]  # what comes before is for files of their own
    element = re.sub(r'<g id="[^"]*"', "<g", element)  # the same in every figure
    return element.replace("<svg ", f'<svg role="img" aria-label="{html.escape(description)}" ', 1)


def _smoothed(values: Sequence[float]) -> list[float]:
    smooth = [values[0]]
    for value in values[1:]:
        smooth.append(SMOOTHING * smooth[-1] + (1 - SMOOTHING) * value)
    return smooth


def _thinned(numbers: range) -> list[int]:
    """At most some thousands of them, evenly spread, the last one included."""
    return [*numbers[:: max(1, len(numbers) // DRAWN_POINTS)], numbers[-1]]
