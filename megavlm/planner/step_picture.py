"""One predicted optimiser step as a picture: what every lane does when, and what it adds up to."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path as Outline

from megavlm.config.run import RunSettings
from megavlm.planner.hardware import Cluster
from megavlm.planner.picture import PICTURE_STYLE, save_picture
from megavlm.planner.predict import Prediction
from megavlm.planner.span import Span
from megavlm.planner.step import Step

DARK = "#334155"
# Okabe and Ito 2008, and tints of theirs: told apart by colour-blind readers too.
COLOURS = {
    "forward": "#0072B2",
    "backward": "#E69F00",
    "gather": "#009E73",
    "reduce": "#8AD9BF",
    "communication": "#009E73",
    "optimizer": "#CC79A7",
    "compute": DARK,
    "recompute": "#B8C4D6",
    "bubble": "white",
}
PALEST = 0.65  # share of white in the colour of a rank's last chunk
HATCHED: dict[str, Any] = {"hatch": "/////", "edgecolor": "#9A9A9A", "linewidth": 0}  # idle
STREAMS = ("compute", "network")
SUMMED = {
    "compute": "compute",
    "recompute": "recompute",
    "communication": "communication",
    "bubble": "bubble",
    "optimizer": "optimiser",
}

PIXELS_WIDE = 1100  # in a browser, which has 96 to the inch
INCHES_WIDE = PIXELS_WIDE / 96
LEFT, RIGHT = 1.25, 0.85  # inches beside the lanes
AXIS = INCHES_WIDE - LEFT - RIGHT
TOP, BETWEEN, BOTTOM = 0.9, 0.9, 0.55  # inches over, between and under the axes
PASS_LANE, STREAM_LANE, LARGE_LANE, SUM_LANE = 0.32, 0.45, 1.12, 0.45  # inches
BAR = 0.84  # height of a bar, as a share of its lane
SMALL = 7  # points: the font in bars
CHARACTER = 0.62 * SMALL / 72  # inches: what a character of it takes
MOST_NUMBERED = 16  # micro-batches: the numbers of more are clutter
LEAST_SHARE = 1e-9  # of a step: what is less is a rounding error
NEAR_TURN = 5  # blocks before and after the backward pass begins, drawn again and larger


def draw_step(prediction: Prediction, run: RunSettings, cluster: Cluster, path: Path) -> None:
    """Write a picture of a predicted step: svg, png or pdf.

    Of a pipeline all passes on all its ranks; of ZeRO-3 and FSDP2 the first micro-batch, and its
    middle larger. Raises ConfigError for another format and a path that cannot be written.
    """
    with matplotlib.rc_context(PICTURE_STYLE):
        save_picture(_figure(prediction.step, run, cluster), path)


def shades_of(kind: str, chunks: int) -> list[str]:
    """The colours of a rank's chunks: the later, the paler."""
    red, green, blue = to_rgb(COLOURS[kind])
    whites = [PALEST * chunk / max(1, chunks - 1) for chunk in range(chunks)]
    return [
        to_hex((red + w * (1 - red), green + w * (1 - green), blue + w * (1 - blue)))
        for w in whites
    ]


def ink_on(colour: str) -> str:
    """Black or white, whichever contrasts more (WCAG 2.1, relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "white"


def gaps_of(spans: Sequence[Span], start: float, end: float) -> list[tuple[float, float]]:
    """When nothing is done between two times; the spans are in order and do not overlap."""
    edges = [start, *(edge for span in spans for edge in (span.start, span.end)), end]
    return [gap for gap in zip(edges[::2], edges[1::2], strict=True) if gap[1] > gap[0]]


def write_title(figure: Figure, title: str, below: str) -> None:
    """Two lines above everything else."""
    tall = figure.get_figheight()
    figure.text(0.012, 1 - 0.1 / tall, title, va="top", fontsize=12, fontweight="bold")
    figure.text(0.012, 1 - 0.37 / tall, below, va="top", color=DARK)


def _figure(step: Step, run: RunSettings, cluster: Cluster) -> Figure:
    if run.engine == "megatron":
        heights = [PASS_LANE * run.model_parallel.pipeline_parallel, SUM_LANE]
    else:
        heights = [2 * STREAM_LANE, 2 * LARGE_LANE, SUM_LANE]
    tall = TOP + sum(heights) + BETWEEN * (len(heights) - 1) + BOTTOM
    figure = Figure(figsize=(INCHES_WIDE, tall))
    axes: list[Any] = []
    base = tall - TOP + BETWEEN
    for height in heights:
        base -= BETWEEN + height
        box = (LEFT / INCHES_WIDE, base / tall, AXIS / INCHES_WIDE, height / tall)
        axes.append(figure.add_axes(box))
    if run.engine == "megatron":
        shown = _draw_pipeline(axes[0], step, run)
    else:
        shown = _draw_micro_batch(axes[0], axes[1], step, run)
    _draw_sum(axes[-1], step, pipelined=run.engine == "megatron")
    title = f"Predicted: a step takes {_milliseconds(step.seconds)} on {cluster.ranks} GPUs"
    title += f" ({cluster.gpu.name})"
    write_title(figure, title, shown)
    return figure


def _draw_pipeline(axes: Any, step: Step, run: RunSettings) -> str:
    """A lane for each pipeline rank, then what follows the passes; returns what is shown."""
    parallel, micro_batches = run.model_parallel, run.train.micro_batches
    ranks, chunks = parallel.pipeline_parallel, parallel.virtual_pipeline
    shades = {kind: shades_of(kind, chunks) for kind in ("forward", "backward")}
    ended = max(span.end for span in step.spans)
    updated = step.seconds - step.optimizer_seconds
    _set_lanes(axes, [f"pipeline rank {rank}" for rank in range(ranks)], 0, step.seconds)
    beside: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "ha": "right"}
    axes.text(1.06, -0.6, "idle", va="bottom", fontsize=8, **beside)
    for rank in range(ranks):
        on_rank = [span for span in step.spans if span.lane == f"rank {rank}"]
        alike: dict[str, list[Span]] = {}
        for span in on_rank:
            chunk, micro_batch = (int(number) for number in re.findall(r"\d+", span.name))
            colour = shades[span.kind][chunk // ranks]
            alike.setdefault(colour, []).append(span)
            if micro_batches <= MOST_NUMBERED:
                _write(axes, str(micro_batch), (span.start, span.end), rank, colour)
        for colour, spans in alike.items():
            _draw_bars(axes, [(s.start, s.end) for s in spans], rank, colour)
        idle = ended - sum(span.end - span.start for span in on_rank)
        axes.text(1.06, rank, _share(max(0.0, idle) / step.seconds), va="center", **beside)
    after = {"communication": (ended, updated), "optimizer": (updated, step.seconds)}
    for kind, times in after.items():
        _draw_bars(axes, [times], (ranks - 1) / 2, COLOURS[kind], ranks - 1 + BAR)
    axes.set_xlabel(
        "milliseconds, predicted; passes include recomputation and tensor-parallel messages"
        + ("; numbers: micro-batches, from 0" if micro_batches <= MOST_NUMBERED else ""),
        loc="left",
    )
    forward, backward = shades.values()
    waits, optimizer = [COLOURS["communication"]], [COLOURS["optimizer"]]
    _legend(
        axes,
        {"forward": forward, "backward": backward}
        | {"waiting for gradients and weights": waits, "optimiser": optimizer},
    )
    of_chunks = f", {chunks} chunks on each rank: the later, the paler" if chunks > 1 else ""
    count = "its only micro-batch" if micro_batches == 1 else f"all {micro_batches} micro-batches"
    return f"{count}; tensor {parallel.tensor_parallel} x pipeline {ranks}{of_chunks}"


def _draw_micro_batch(whole: Any, near: Any, step: Step, run: RunSettings) -> str:
    """The streams in the first micro-batch, and its middle larger; returns what is shown."""
    computed = [span for span in step.spans if span.lane == "compute"]
    ended = max(span.end for span in step.spans)
    turn = next(n for n, span in enumerate(computed) if span.kind == "backward")
    first, last = computed[max(0, turn - NEAR_TURN)], computed[: turn + NEAR_TURN][-1]
    for axes, start, end in ((whole, 0.0, ended), (near, first.start, last.end)):
        _set_lanes(axes, list(STREAMS), start, end)
        spans = _within(step.spans, start, end)
        for row, lane in enumerate(STREAMS):
            on_lane = [span for span in spans if span.lane == lane]
            for kind in dict.fromkeys(span.kind for span in on_lane):
                bars = [(span.start, span.end) for span in on_lane if span.kind == kind]
                _draw_bars(axes, bars, row, COLOURS[kind])
            for span in on_lane:
                name = span.name.removesuffix(" layer")
                _write(axes, name, (span.start, span.end), row, COLOURS[span.kind])
        idle = gaps_of([span for span in spans if span.lane == "compute"], start, end)
        _draw_bars(axes, idle, 0, "white", hatched=True)
        axes.set_xlabel("milliseconds, predicted", loc="left")
    frame: dict[str, Any] = {"facecolor": "none", "edgecolor": "black", "clip_on": False}
    corner, wide = (first.start, -0.5), last.end - first.start
    whole.add_patch(Rectangle(corner, wide, 2, linewidth=1.2, zorder=3, **frame))
    near.set_title("in the frame: where the backward pass begins", loc="left", fontsize=9)
    _legend(
        whole,
        {kind: [COLOURS[kind]] for kind in ("forward", "backward", "gather", "reduce")}
        | {"waiting for the network": ["white"]},
    )
    busy = sum(span.end - span.start for span in computed)
    beside: dict[str, Any] = {"transform": whole.get_yaxis_transform(), "va": "center"}
    whole.text(1.01, 0, f"{_share(1 - busy / ended)}\nwaiting", **beside)
    shown = f"the first of {run.train.micro_batches} micro-batches"
    if run.train.micro_batches == 1:
        shown = "its only micro-batch"
    elif run.engine == "zero3" and run.zero3.secondary_partition > 1:
        shown += "; the others gather all weights from the secondary partition"
    return shown


def _draw_sum(axes: Any, step: Step, *, pipelined: bool) -> None:
    """What the whole step adds up to."""
    _set_lanes(axes, ["whole step"], 0, step.seconds)
    parts: dict[str, list[str]] = {}
    start = 0.0
    for kind, name in SUMMED.items():
        seconds = getattr(step, f"{kind}_seconds")
        if seconds >= LEAST_SHARE * step.seconds:
            hatched = kind == "bubble"
            _draw_bars(axes, [(start, start + seconds)], 0, COLOURS[kind], hatched=hatched)
            told = f"{name} {_milliseconds(seconds)}, {_share(seconds / step.seconds)}"
            parts[told] = [COLOURS[kind]]
            start += seconds
    told = "milliseconds, predicted; communication: waiting, and computing slowed down beside it"
    if pipelined:
        told = "milliseconds, predicted, of the rank that computes longest; bubble: its idle "
        told += "time; communication: within passes and after them"
    axes.set_xlabel(told, loc="left")
    _legend(axes, parts)


def _set_lanes(axes: Any, names: Sequence[str], start: float, end: float) -> None:
    """A lane for each name, from top to bottom, and milliseconds from left to right."""
    axes.set_xlim(start, end)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(lambda seconds, _: f"{1e3 * seconds:,.6g}")
    axes.spines[["top", "right", "left"]].set_visible(False)


def _within(spans: Sequence[Span], start: float, end: float) -> list[Span]:
    """What of the spans lies between two times."""
    cut = [s._replace(start=max(start, s.start), end=min(end, s.end)) for s in spans]
    return [span for span in cut if span.start < span.end]


def _draw_bars(
    axes: Any,
    times: Sequence[tuple[float, float]],
    row: float,
    colour: str,
    height: float = BAR,
    *,
    hatched: bool = False,
) -> None:
    """Bars in one row, of one colour: together one outline, since there may be thousands."""
    if not times:
        return
    low, high = row - height / 2, row + height / 2
    corners = [[(a, low), (b, low), (b, high), (a, high), (a, low)] for a, b in times]
    outline = Outline.make_compound_path(*(Outline(c, closed=True) for c in corners))
    style = HATCHED
    if not hatched:
        mean_points = 72 * _inches_per_second(axes) * sum(b - a for a, b in times) / len(times)
        style = {"edgecolor": "white", "linewidth": min(0.6, 0.08 * mean_points)}
    axes.add_patch(PathPatch(outline, facecolor=colour, **style))


def _write(axes: Any, text: str, times: tuple[float, float], row: float, colour: str) -> None:
    """Write in a bar, upright if need be; nothing where it is too narrow."""
    wide = (times[1] - times[0]) * _inches_per_second(axes)
    tall = BAR * axes.bbox.height / axes.figure.dpi / abs(axes.get_ylim()[0] - axes.get_ylim()[1])
    long, high = CHARACTER * len(text) + 0.02, 1.2 * SMALL / 72
    if long <= wide and high <= tall:
        rotation = 0
    elif high <= wide and long <= tall:
        rotation = 90
    else:
        return
    style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": SMALL}
    axes.text(sum(times) / 2, row, text, color=ink_on(colour), rotation=rotation, **style)


def _inches_per_second(axes: Any) -> float:
    start, end = axes.get_xlim()
    return AXIS / (end - start)


def _legend(axes: Any, colours: dict[str, list[str]]) -> None:
    """Names and their colours, above the axes."""
    handles = [
        tuple(
            Rectangle((0, 0), 1, 1, facecolor=colour, **(HATCHED if colour == "white" else {}))
            for colour in shades
        )
        for shades in colours.values()
    ]
    axes.legend(
        handles,
        list(colours),
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0.4,
        borderpad=0,
        ncols=len(colours),
        frameon=False,
        handlelength=1.4,
        columnspacing=1.2,
        fontsize=8.5,
    )


def _milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _share(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"
