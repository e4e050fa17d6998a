from dataclasses import fields, replace
from functools import cache
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex

from megavlm.errors import ConfigError
from megavlm.planner import memory_picture
from megavlm.planner.hardware import GIB, cluster_of
from megavlm.planner.memory import Memory, memory_of
from megavlm.planner.memory_picture import COLOURS, PARTS, draw_memory, labels_of
from megavlm.planner.picture import PICTURE_STYLE
from megavlm.planner.step_picture import ink_on
from tests.planner.sight import contrast, distance
from tests.runs import load_run

CONFIGS = Path(__file__).parents[2] / "configs"
CLUSTER = cluster_of("h100-80", 16, 8)
PIPELINE = ("vlm-30b-megatron", ())
LONG = ("vlm-30b-megatron", ("megatron.tensor_parallel=4", "megatron.pipeline_parallel=16"))
ZERO3 = ("vlm-30b", ())
FSDP2 = ("vlm-30b", ("engine=fsdp2",))
EVERY = [PIPELINE, LONG, ZERO3, FSDP2]


def run_of(case):
    return load_run(CONFIGS / f"{case[0]}.yaml", case[1])


@cache
def drawn(case, cluster=CLUSTER):
    run = run_of(case)
    memories = memory_of(run, cluster, 64)
    with matplotlib.rc_context(PICTURE_STYLE):
        figure = memory_picture._figure(memories, labels_of(run, cluster), cluster)
        figure.draw_without_rendering()  # it places the labels
    return memories, figure


def cluster_with(memory_gib):
    return replace(CLUSTER, gpu=replace(CLUSTER.gpu, memory_bytes=memory_gib * GIB))


def bars_of(axes):
    """Of each row, the colours and widths from left to right; nothing lies between two."""
    rows = {}
    for bar in axes.patches:
        row = bar.get_y() + bar.get_height() / 2
        rows.setdefault(row, []).append((bar.get_x(), bar.get_width(), to_hex(bar.get_facecolor())))
    for bars in rows.values():
        ends = np.cumsum([width for _, width, _ in bars])
        np.testing.assert_allclose([x for x, _, _ in bars], [0, *ends[:-1]], atol=1e-9)
    return [[(colour, width) for _, width, colour in rows[row]] for row in sorted(rows)]


@pytest.mark.parametrize("case", EVERY)
def test_every_part_of_every_rank_is_drawn_twice(case):
    memories, figure = drawn(case)
    assert len(figure.axes) == 2
    for axes in figure.axes:
        rows = bars_of(axes)
        for bars, memory in zip(rows, memories, strict=True):
            sizes = {field.name: getattr(memory, field.name) for field in fields(Memory)}
            sizes["runtime"] = memory.runtime
            expected = [(COLOURS[name].lower(), size / GIB) for name, size in sizes.items() if size]
            assert [colour for colour, _ in bars] == [colour for colour, _ in expected]
            np.testing.assert_allclose([w for _, w in bars], [w for _, w in expected], rtol=1e-9)
            assert sum(width for _, width in bars) == pytest.approx(memory.total / GIB)
            assert axes.get_xlim()[1] >= memory.total / GIB
    whole, parted = figure.axes
    assert whole.get_xlim()[1] >= 80 > parted.get_xlim()[1]
    totals = [text.get_text() for text in whole.texts if text.get_text().endswith("%")]
    gib = [memory.total / GIB for memory in memories]
    assert totals == [f"{total:.1f} GiB, {total / 80:.0%}" for total in gib]


def test_the_gpus_memory_is_a_line():
    _, figure = drawn(PIPELINE)
    [line] = figure.axes[0].get_lines()
    assert set(line.get_xdata()) == {80} and not figure.axes[1].get_lines()
    assert figure.texts[0].get_text().startswith("Predicted: the fullest GPU holds ")
    assert not any(text.get_fontweight() == "bold" for text in figure.axes[0].texts)


def test_what_does_not_fit_is_told():
    memories, figure = drawn(PIPELINE, cluster_with(10))
    for axes in figure.axes:
        [line] = axes.get_lines()
        assert set(line.get_xdata()) == {10}
    assert "too much, the fullest GPU would hold" in figure.texts[0].get_text()
    bold = [text.get_fontweight() == "bold" for text in figure.axes[0].texts if "%" in text._text]
    assert bold == [memory.total > 10 * GIB for memory in memories] and set(bold) == {True, False}


def test_alike_ranks_are_named():
    assert labels_of(run_of(ZERO3), CLUSTER) == ["all 128 ranks"]
    assert labels_of(run_of(FSDP2), CLUSTER) == ["all 128 ranks"]
    run = run_of(("vlm-30b-megatron", ("megatron.pipeline_parallel=1",)))
    assert labels_of(run, CLUSTER) == ["all 128 ranks"]
    labels = labels_of(run_of(PIPELINE), CLUSTER)
    assert labels[0] == "pipeline rank 0\nranks 0-31"
    assert labels[3] == "pipeline rank 3\nranks 96-127"
    overrides = ["megatron.tensor_parallel=1", "megatron.sequence_parallel=false"]
    alone = run_of(("vlm-30b-megatron", overrides))
    assert labels_of(alone, cluster_of("h100-80", 1, 4))[2] == "pipeline rank 2\nrank 2"
    _, figure = drawn(PIPELINE)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == labels


@pytest.mark.parametrize("case", EVERY)
def test_the_legend_names_what_is_there(case):
    memories, figure = drawn(case)
    [legend] = figure.legends
    shown = {part for part in PARTS if any(getattr(memory, part) for memory in memories)}
    colours = [to_hex(handle.get_facecolor()) for handle in legend.legend_handles]
    assert set(colours) == {COLOURS[part].lower() for part in shown}
    names = [text.get_text() for text in legend.get_texts()]
    assert ("gathered" in names) == (case in (ZERO3, FSDP2))
    assert "optimiser" in names and names[-1] == "CUDA, NCCL, allocator"


@pytest.mark.parametrize("cluster", [CLUSTER, cluster_with(10)])
@pytest.mark.parametrize("case", EVERY)
def test_labels_stay_inside_and_apart(case, cluster):
    memories, figure = drawn(case, cluster)
    texts = [*figure.texts, *figure.legends[0].get_texts()]
    for axes in figure.axes:
        low, high = axes.get_xlim()
        ticks = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
        texts += [label for tick, label in ticks if low <= tick <= high]
        texts += [*axes.texts, *axes.get_yticklabels(), axes.xaxis.label]
    texts = [text for text in texts if text.get_text()]
    boxes = [text.get_window_extent() for text in texts]
    for i, box in enumerate(boxes):
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1, texts[i]
        assert box.y0 >= 0 and box.y1 <= figure.bbox.y1, texts[i]
        assert not any(box.overlaps(other) for other in boxes[:i]), texts[i]
    parted = figure.axes[1]
    for text in parted.texts:
        if "GPU" not in text.get_text():
            x, y = text.get_position()
            [bar] = [
                b
                for b in parted.patches
                if b.get_x() < x < b.get_x() + b.get_width()
                and b.get_y() < y < b.get_y() + b.get_height()
            ]
            assert f"{bar.get_width():.1f}" == text.get_text()
            edges = bar.get_window_extent()
            assert edges.x0 <= text.get_window_extent().x0
            assert text.get_window_extent().x1 <= edges.x1
    assert len(parted.texts) >= 3 * len(memories)


def test_colours_can_be_told_apart_and_written_on():
    """By colour-blind readers too: at least 15 of CIE76's units, measured 16.1."""
    assert len(COLOURS) == len(fields(Memory)) + 1
    for pair in combinations(COLOURS.values(), 2):
        assert distance(*pair) > 15, pair
    assert all(contrast(colour, ink_on(colour)) > 4.5 for colour in COLOURS.values())


def test_the_picture_of_the_memory(tmp_path):
    run = run_of(PIPELINE)
    memories, labels = memory_of(run, CLUSTER, 64), labels_of(run, CLUSTER)
    first, second = tmp_path / "new" / "memory.svg", tmp_path / "again.svg"
    for path in (first, second):
        draw_memory(memories, labels, CLUSTER, path)
    picture = first.read_text()
    assert 'width="825pt"' in picture  # 1,100 pixels
    for text in ("Predicted", "GiB, predicted", "ranks 32-63", "activations", "80.0 GiB"):
        assert text in picture
    assert picture == second.read_text() and len(picture) < 100_000
    with pytest.raises(ConfigError, match="must end in one of"):
        draw_memory(memories, labels, CLUSTER, tmp_path / "memory.jpg")
