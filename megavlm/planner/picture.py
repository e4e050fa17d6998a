"""The layout of a pipeline as a picture: a bar for each rank, as long as what it computes."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.transforms import ScaledTranslation

from megavlm.config.run import RunSettings
from megavlm.errors import ConfigError
from megavlm.model.params import (
    CROSS_LAYERS,
    EMBEDDINGS,
    ENCODER,
    SELF_LAYERS,
    count_by_part,
    parameters_of,
)
from megavlm.planner.layout import Chunk, Layout, layout_of

FORMATS = (".svg", ".png", ".pdf")
PICTURE_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "megavlm",  # the same settings give the same file
}
# Okabe and Ito 2008: told apart by colour-blind readers too.
COLOURS = {
    ENCODER: "#E69F00",
    SELF_LAYERS: "#A9C6DE",
    CROSS_LAYERS: "#0072B2",
    EMBEDDINGS: "#8A8A8A",
}
NAMES = {EMBEDDINGS: "head"}  # embeddings cost nothing
BAR = 0.5  # height of a bar
CHARACTER = 0.0125  # width of a small character, as a share of the axis


def draw_layout(run: RunSettings, path: Path) -> None:
    """Write a picture of the stage cut: svg, png or pdf.

    Raises ConfigError for another format, another engine and a path that cannot be written.
    """
    if run.engine != "megatron":
        raise ConfigError(f"engine={run.engine} has no stages to draw; set engine=megatron")
    layout = layout_of(run)
    with matplotlib.rc_context(PICTURE_STYLE):
        save_picture(_figure(layout, sum(count_by_part(parameters_of(run)).values())), path)


def save_picture(figure: Figure, path: Path) -> None:
    """Write a figure, the same bytes each time.

    Raises ConfigError for an unknown format and a path that cannot be written.
    """
    if path.suffix not in FORMATS:
        raise ConfigError(f"--picture {path} must end in one of {', '.join(FORMATS)}")
    metadata: dict[str, Any] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, metadata=metadata.get(path.suffix))
    except OSError as error:
        raise ConfigError(f"cannot write picture {path}: {error.strerror}") from error


def _figure(layout: Layout, count: int) -> Figure:
    figure = Figure(figsize=(9, 1.7 + 0.62 * layout.pipeline), layout="constrained")
    axes: Any = figure.subplots()
    longest = max(1.0, layout.costliest_over_mean)
    # What stands right of the bars: two columns of numbers.
    cost_x, parameters_x = longest * 1.07, longest * 1.19
    for rank in range(layout.pipeline):
        _draw_rank(axes, layout, rank, longest)
        parameters = sum(chunk.parameters for chunk in layout.on(rank))
        cost = layout.cost(rank) * layout.pipeline
        axes.text(cost_x, rank, f"{cost:.2f}", va="center", ha="right")
        axes.text(parameters_x, rank, f"{parameters / 1e9:.2f} B", va="center", ha="right")
    heading: dict[str, Any] = {"va": "bottom", "fontsize": 8, "clip_on": False}
    top = -0.62
    axes.text(cost_x, top, "cost", ha="right", **heading)
    axes.text(parameters_x, top, "parameters\nof each GPU", ha="right", **heading)
    axes.text(1, top, "mean", ha="center", **heading)
    axes.axvline(1, color="black", linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    axes.set_xlim(0, parameters_x)
    axes.set_ylim(layout.pipeline - 0.55, top)
    names = [f"pipeline rank {rank}" for rank in range(layout.pipeline)]
    axes.set_yticks(range(layout.pipeline), names)
    axes.tick_params(axis="y", length=0)
    axes.set_xticks([tick / 4 for tick in range(int(4 * longest) + 1)])
    axes.spines["bottom"].set_bounds(0, longest)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("cost: training FLOPs, over the mean of all pipeline ranks", loc="left")
    division = f"tensor {layout.tensor} x pipeline {layout.pipeline}"
    if layout.virtual > 1:
        division += f", {layout.virtual} chunks on each rank"
    axes.set_title(
        f"{count / 1e9:.1f} billion parameters, {division}", loc="left", pad=46, fontsize=11
    )
    handles = [Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    axes.legend(
        handles,
        [NAMES.get(part, part) for part in COLOURS],
        loc="lower left",
        bbox_to_anchor=(0, 1),
        bbox_transform=axes.transAxes + ScaledTranslation(0, 0.35, figure.dpi_scale_trans),
        borderaxespad=0,
        borderpad=0,
        ncols=len(COLOURS),
        frameon=False,
        handlelength=1,
        columnspacing=1.5,
    )
    return figure


def _draw_rank(axes: Any, layout: Layout, rank: int, longest: float) -> None:
    """A rank's bar, chunk after chunk and layer after layer."""
    x = 0.0
    for chunk in layout.on(rank):
        start = x
        for part, cost in chunk.costs:
            width = cost * layout.pipeline
            corner = (x, rank - BAR / 2)
            style: dict[str, Any] = {"facecolor": COLOURS[part], "edgecolor": "white"}
            axes.add_patch(Rectangle(corner, width, BAR, linewidth=0.4, **style))
            x += width
        if start > 0:
            axes.vlines(start, rank - BAR / 2, rank + BAR / 2, color="white", linewidth=3)
        axes.text(
            start,
            rank - BAR / 2 - 0.06,
            _label(layout, chunk, (x - start) / longest),
            va="bottom",
            fontsize=7.5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )


def _label(layout: Layout, chunk: Chunk, width: float) -> str:
    """As much of a chunk's name as its width, a share of the longest bar's, has room for."""
    first, last = chunk.layers.start, chunk.layers.stop - 1
    layers = f"{first}-{last}" if first < last else f"{first}"
    name = f"layers {layers}" if first < last else f"layer {layers}"
    names = [f"chunk {chunk.number}: {name}", layers] if layout.virtual > 1 else [name, layers]
    return next((name for name in names if len(name) * CHARACTER < width), "")
