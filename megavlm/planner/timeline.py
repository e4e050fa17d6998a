"""The stages of a run as a picture: when each part of the model learns, and how fast."""

from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from megavlm.config.objectives import Part, parts_of
from megavlm.config.plan import Plan, Stage
from megavlm.config.schedule import scheduled
from megavlm.model.params import parameters_of
from megavlm.planner.picture import PICTURE_STYLE, save_picture
from megavlm.planner.report import short_count, words

PARTS: tuple[Part, ...] = (
    "encoder",
    "heads",
    "text_tower",
    "projector",
    "cross_attention",
    "decoder",
)
# Okabe and Ito 2008: told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
ON_COLOURS = ("white", "black", "white", "black", "black", "white")
DARK = "#334155"
NARROWEST = 0.13
"""Share of the picture's width that a short stage gets, so that its labels have room."""
POINTS = 400  # of the learning rate that are drawn for each stage
BAR = 0.6  # height of a bar


def draw_timeline(plan: Plan, path: Path) -> None:
    """Write a picture of a plan: svg, png or pdf.

    Raises ConfigError for another format and a path that cannot be written.
    """
    with matplotlib.rc_context(PICTURE_STYLE):
        save_picture(_figure(plan), path)


def edges_of(plan: Plan) -> list[float]:
    """Where stages begin and end in the picture, from 0 to 1: in proportion, but none too narrow.

    What the short stages take beyond their share, the others give in proportion.
    """
    steps = [stage.run.train.steps for stage in plan.stages]
    narrowest = min(NARROWEST, 1 / len(steps))
    narrow: set[int] = set()
    while True:
        left = 1 - narrowest * len(narrow)
        total = sum(n for i, n in enumerate(steps) if i not in narrow)
        too = {i for i, n in enumerate(steps) if i not in narrow and n * left < narrowest * total}
        if not too:
            break
        narrow |= too
    widths = [narrowest if i in narrow else left * n / total for i, n in enumerate(steps)]
    return list(accumulate(widths, initial=0.0))


def _figure(plan: Plan) -> Figure:
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.3))
    rates, parts = axes
    present: list[Part] = [
        p for p in PARTS if any(p in parts_of(s.run.objectives) for s in plan.stages)
    ]
    edges = edges_of(plan)
    for number, stage in enumerate(plan.stages):
        left, right = edges[number : number + 2]
        for each in axes:
            each.axvspan(left, right, color=COLOURS[number % len(COLOURS)], alpha=0.08, linewidth=0)
        train = stage.run.train
        objectives = " + ".join(stage.run.objectives)
        samples = f"{short_count(train.steps * train.samples_per_step)} samples"
        style: dict[str, Any] = {"color": DARK, "fontsize": 8}
        _note(rates, f"{objectives}\n{train.steps:,} steps\n{samples}", left, right, 0, **style)
        style = {"color": "black", "fontsize": 11, "fontweight": "bold"}
        _note(rates, stage.name, left, right, 36, **style)
        _draw_rates(rates, plan, number, left, right)
        _draw_parts(parts, stage, number, present, left, right)
    _scale_rates(rates, plan)
    rates.set_ylabel("learning rate")
    parts.set_yticks(range(len(present)), [words([part]) for part in present])
    parts.set_ylim(len(present) - 0.4, -0.6)
    parts.set_xlim(0, 1)
    parts.set_xticks(edges, ["0", *(f"{stage.end_step:,}" for stage in plan.stages)])
    told = "steps.  Solid: trained, hatched: frozen; parameters, and factors on the learning rate"
    stretched = [
        stage.name
        for stage, left, right in zip(plan.stages, edges, edges[1:], strict=False)
        if right - left > 1.001 * stage.run.train.steps / plan.steps
    ]
    if stretched:
        told += f".  Drawn wider than to scale: {', '.join(stretched)}"
    parts.set_xlabel(told, loc="left", fontsize=8, color=DARK)
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.tick_params(axis="x", length=0 if each is rates else 3)
    return figure


def _note(axes: Any, text: str, left: float, right: float, above: int, **style: Any) -> None:
    """Write over a stage."""
    axes.annotate(
        text,
        ((left + right) / 2, 1),
        xycoords=("data", "axes fraction"),
        xytext=(0, 6 + above),
        textcoords="offset points",
        ha="center",
        va="bottom",
        **style,
    )


def _scales(stage: Stage) -> dict[Part, float]:
    """The factor on the learning rate of each part that a stage trains."""
    given = stage.run.optimizer.scales
    return {part: given.get(part, 1.0) for part in stage.run.trained_parts}


def _scale_rates(axes: Any, plan: Plan) -> None:
    """Choose the learning rates' axis so that the lowest curve is seen beside the highest one."""
    peaks = [scale * s.run.optimizer.learning_rate for s in plan.stages for scale in _lowest(s)]
    peaks = [peak for peak in peaks if peak > 0]
    if peaks and max(peaks) > 10 * min(peaks):
        axes.set_yscale("log")
        axes.set_ylim(min(peaks) / 30, 2 * max(peaks))
    else:
        axes.set_ylim(bottom=0, top=1.15 * axes.get_ylim()[1])
        axes.yaxis.set_major_formatter(lambda rate, _: f"{rate:g}")


def _lowest(stage: Stage) -> list[float]:
    """All factors of a stage, layer decay included."""
    scales = _scales(stage)
    lowest = [scales["encoder"] * _decay(stage)] if "encoder" in scales else []
    return [*scales.values(), *lowest]


def _decay(stage: Stage) -> float:
    """The factor on what lies below the encoder's first layer."""
    return stage.run.optimizer.encoder_layer_decay ** (stage.run.model.encoder.layers + 1)


def _draw_rates(axes: Any, plan: Plan, number: int, left: float, right: float) -> None:
    """The learning rate, and what each scale makes of it; a band over the encoder's layers."""
    stage, colour = plan.stages[number], COLOURS[number % len(COLOURS)]
    count = stage.run.train.steps
    steps = sorted({min(count - 1, i * count // POINTS) for i in range(POINTS)} | {count - 1})
    base = [scheduled(plan, stage, stage.first_step + step) for step in steps]
    x = [left + (right - left) * (step + 1) / count for step in steps]
    peak = base.index(max(base))
    scales = _scales(stage)
    for scale in sorted(set(scales.values()), reverse=True):
        style = "-" if scale == max(scales.values()) else "--"
        y = [scale * rate for rate in base]
        marker = "." if count == 1 else None  # a line of one point is none
        axes.plot(x, y, color=colour, linestyle=style, linewidth=1.6, marker=marker)
        if scale != 1:
            _label(axes, f"x {scale:g}", (x[peak], y[peak]))
    if _decay(stage) < 1 and "encoder" in scales:
        high = [scales["encoder"] * rate for rate in base]
        low = [_decay(stage) * rate for rate in high]
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        _label(axes, "encoder's layers", (x[peak], (low[peak] * high[peak]) ** 0.5))


def _label(axes: Any, text: str, at: tuple[float, float]) -> None:
    axes.annotate(text, at, xytext=(5, 3), textcoords="offset points", fontsize=7.5, color=DARK)


def _draw_parts(
    axes: Any, stage: Stage, number: int, present: list[Part], left: float, right: float
) -> None:
    """A bar for each part that the stage has."""
    entries = parameters_of(stage.run)
    colour = COLOURS[number % len(COLOURS)]
    scales = _scales(stage)
    for row, part in enumerate(present):
        count = sum(entry.numel for entry in entries if entry.setting == part)
        if not count:
            continue
        trained = part in scales
        scaled = f", x {scales[part]:g}" if scales.get(part, 1.0) != 1 else ""
        axes.barh(
            row,
            right - left,
            left=left,
            height=BAR,
            facecolor=colour if trained else "white",
            edgecolor="white" if trained else colour,
            hatch=None if trained else "////",
            linewidth=0.8,
        )
        axes.text(
            (left + right) / 2,
            row,
            short_count(count) + scaled,
            ha="center",
            va="center",
            fontsize=8,
            color=ON_COLOURS[number % len(COLOURS)] if trained else DARK,
            bbox=None if trained else {"facecolor": "white", "edgecolor": "none", "pad": 1.5},
        )
