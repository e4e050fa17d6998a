"""The predicted memory of every rank as a picture: what it is made of, and what the GPU has."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from megavlm.config.run import RunSettings, data_parallel_ranks
from megavlm.planner.hardware import GIB, Cluster
from megavlm.planner.memory import Memory
from megavlm.planner.picture import PICTURE_STYLE, save_picture
from megavlm.planner.step_picture import CHARACTER, INCHES_WIDE, SMALL, ink_on, write_title

PARTS = (*(field.name for field in fields(Memory)), "runtime")
NAMES = {"optimizer": "optimiser", "runtime": "CUDA, NCCL, allocator"}
# Okabe and Ito 2008: told apart by colour-blind readers too. The last one is the runtime's.
PALETTE = ("#0072B2", "#56B4E9", "#CC79A7", "#E69F00", "#009E73", "#F0E442", "#D55E00")
COLOURS = dict(zip(PARTS, (*PALETTE[: len(PARTS) - 1], "#5A5A5A"), strict=True))

LEFT, TOP, BOTTOM, LANE = 1.7, 1.2, 0.6, 0.42  # inches: margins, and a bar with its gap
WHOLE, BETWEEN, PARTED = 2.6, 1.5, 5.3  # inches: the GPU's memory, totals, what it is made of
BAR = 0.72  # height of a bar, as a share of its lane


def draw_memory(
    memories: Sequence[Memory], labels: Sequence[str], cluster: Cluster, path: Path
) -> None:
    """Write a picture with a bar for each memory: svg, png or pdf.

    Beside the GPU's memory, and larger. Raises ConfigError for another format and a path that
    cannot be written.
    """
    with matplotlib.rc_context(PICTURE_STYLE):
        save_picture(_figure(memories, labels, cluster), path)


def labels_of(run: RunSettings, cluster: Cluster) -> list[str]:
    """Who holds each memory of `memory_of`: the global ranks of each pipeline rank, or all."""
    pipeline = run.model_parallel.pipeline_parallel
    if pipeline == 1:
        return [f"all {cluster.ranks} ranks"]
    # Megatron-core's order: tensor-parallel ranks are neighbours, pipeline ranks farthest apart.
    alike = run.model_parallel.tensor_parallel * data_parallel_ranks(run, cluster.ranks)
    labels: list[str] = []
    for stage in range(pipeline):
        first, last = stage * alike, (stage + 1) * alike - 1
        ranks = f"ranks {first}-{last}" if first < last else f"rank {first}"
        labels.append(f"pipeline rank {stage}\n{ranks}")
    return labels


def _figure(memories: Sequence[Memory], labels: Sequence[str], cluster: Cluster) -> Figure:
    height = LANE * len(memories)
    tall = TOP + height + BOTTOM
    figure = Figure(figsize=(INCHES_WIDE, tall))
    fullest, has = max(memory.total for memory in memories) / GIB, cluster.gpu.memory_bytes / GIB
    lefts, wides = (LEFT, LEFT + WHOLE + BETWEEN), (WHOLE, PARTED)
    for left, wide, end in zip(lefts, wides, (max(fullest, has), fullest), strict=True):
        box = (left / INCHES_WIDE, BOTTOM / tall, wide / INCHES_WIDE, height / tall)
        axes: Any = figure.add_axes(box)
        axes.set_xlim(0, 1.02 * end)
        axes.set_ylim(len(memories) - 0.5, -0.5)
        axes.set_yticks(range(len(memories)), labels if left == LEFT else [""] * len(memories))
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        for row, memory in enumerate(memories):
            _draw_bar(axes, memory, row, wide if left > LEFT else 0.0)
        if has <= 1.02 * end:
            axes.axvline(has, color="black", linewidth=1.2, linestyle=(0, (4, 2)))
            axes.annotate(
                f"GPU: {has:.1f} GiB",
                (has, 1),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="right" if has > 0.5 * end else "left",
                fontsize=8,
            )
    whole, parted = figure.axes
    whole.set_xlabel("GiB, predicted", loc="left")
    parted.set_xlabel("the same, larger: GiB, predicted", loc="left")
    for row, memory in enumerate(memories):
        total = memory.total / GIB
        told = f"{total:.1f} GiB, {total / has:.0%}"
        weight = "bold" if total > has else "normal"
        place: Any = whole.get_yaxis_transform()
        whole.text(1.05, row, told, va="center", transform=place, fontweight=weight)
    fits = "the fullest GPU holds" if fullest <= has else "too much, the fullest GPU would hold"
    title = f"Predicted: {fits} {fullest:.1f} of {has:.1f} GiB ({cluster.gpu.name})"
    write_title(figure, title, "each rank when it holds most")
    present = [part for part in PARTS if any(getattr(memory, part) > 0 for memory in memories)]
    figure.legend(
        [Rectangle((0, 0), 1, 1, facecolor=COLOURS[part]) for part in present],
        [NAMES.get(part, part) for part in present],
        loc="upper left",
        bbox_to_anchor=(LEFT / INCHES_WIDE, 1 - 0.65 / tall),
        borderaxespad=0,
        borderpad=0,
        ncols=len(present),
        frameon=False,
        handlelength=1.4,
        columnspacing=1.5,
    )
    return figure


def _draw_bar(axes: Any, memory: Memory, row: int, wide: float) -> None:
    """What a rank holds, part after part; numbers where an axis so wide, in inches, has room."""
    start = 0.0
    for part in PARTS:
        size, colour = getattr(memory, part) / GIB, COLOURS[part]
        if size == 0:
            continue
        corner = (start, row - BAR / 2)
        style: dict[str, Any] = {"facecolor": colour, "edgecolor": "white", "linewidth": 0.5}
        axes.add_patch(Rectangle(corner, size, BAR, **style))
        number = f"{size:.1f}"
        if len(number) * CHARACTER < wide * size / axes.get_xlim()[1]:
            style = {"ha": "center", "va": "center", "fontsize": SMALL, "color": ink_on(colour)}
            axes.text(start + size / 2, row, number, **style)
        start += size
