from functools import cache
from itertools import combinations, pairwise
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import PathPatch

from megavlm.errors import ConfigError
from megavlm.planner import step_picture
from megavlm.planner.hardware import cluster_of
from megavlm.planner.picture import PICTURE_STYLE
from megavlm.planner.predict import predict
from megavlm.planner.span import Span
from megavlm.planner.step_picture import COLOURS, draw_step, gaps_of, ink_on, shades_of
from tests.planner.sight import contrast, distance
from tests.runs import load_run

CONFIGS = Path(__file__).parents[2] / "configs"
CLUSTER = cluster_of("h100-80", 16, 8)
PIPELINE = ("vlm-30b-megatron", ())
INTERLEAVED = (
    "vlm-30b-megatron",
    (
        "megatron.tensor_parallel=4",
        "megatron.pipeline_parallel=2",
        "megatron.virtual_pipeline=2",
        "train.micro_batches=32",
    ),
)
LONG = (
    "vlm-30b-megatron",
    (
        "megatron.tensor_parallel=1",
        "megatron.sequence_parallel=false",
        "megatron.pipeline_parallel=16",
        "megatron.virtual_pipeline=2",
        "train.micro_batches=128",
    ),
)
ALONE = ("vlm-30b-megatron", ("megatron.pipeline_parallel=1", "train.micro_batches=1"))
ZERO3 = ("vlm-30b", ())
FSDP2 = ("vlm-30b", ("engine=fsdp2",))


@cache
def drawn(case):
    name, overrides = case
    run = load_run(CONFIGS / f"{name}.yaml", overrides)
    step = predict(run, CLUSTER, 64).step
    with matplotlib.rc_context(PICTURE_STYLE):
        figure = step_picture._figure(step, run, CLUSTER)
        figure.draw_without_rendering()  # it places the labels
    return run, step, figure


def bars_of(axes):
    """Middle, start, end and colour of each bar; and its hatch."""
    bars = []
    for patch in axes.patches:
        if isinstance(patch, PathPatch):
            for (left, low), (right, _), (_, high), *_ in patch.get_path().vertices.reshape(
                -1, 5, 2
            ):
                colour = to_hex(patch.get_facecolor()).lower()
                bars.append(((low + high) / 2, left, right, colour, patch.get_hatch()))
    return sorted(bars)


def same(bars, expected):
    assert [bar[3] for bar in bars] == [bar[3].lower() for bar in expected]
    numbers = [[bar[:3] for bar in each] for each in (bars, expected)]
    np.testing.assert_allclose(*numbers, rtol=0, atol=1e-12)


def written_in_bars(axes):
    """Texts with the time and the row they stand at."""
    low, high = axes.get_xlim()
    return [t for t in axes.texts if low <= t.get_position()[0] <= high and t.get_fontsize() == 7]


def texts_of(figure):
    texts = [*figure.texts]
    for axes in figure.axes:
        texts += [*axes.texts, *axes.get_yticklabels(), axes.xaxis.label, axes.title]
        low, high = axes.get_xlim()
        ticks = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
        texts += [label for tick, label in ticks if low <= tick <= high]
        texts += axes.get_legend().get_texts() if axes.get_legend() else []
    return [text for text in texts if text.get_text()]


@pytest.mark.parametrize("case", [PIPELINE, INTERLEAVED, LONG, ALONE])
def test_every_pass_of_a_pipeline_is_drawn_and_what_follows_on_all_ranks(case):
    run, step, figure = drawn(case)
    ranks, chunks = run.megatron.pipeline_parallel, run.megatron.virtual_pipeline
    expected = []
    for lane, name, kind, start, end in step.spans:
        chunk = int(name.split(",")[0].removeprefix("chunk "))
        colour = shades_of(kind, chunks)[chunk // ranks]
        expected.append((float(lane.removeprefix("rank ")), start, end, colour))
    ended, updated = max(s.end for s in step.spans), step.seconds - step.optimizer_seconds
    middle = (ranks - 1) / 2
    expected.append((middle, ended, updated, COLOURS["communication"]))
    expected.append((middle, updated, step.seconds, COLOURS["optimizer"]))
    assert len(step.spans) == 2 * ranks * chunks * run.train.micro_batches
    same(bars_of(figure.axes[0]), sorted(expected))
    assert figure.axes[0].get_xlim() == (0, step.seconds)
    lanes = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert lanes == [f"pipeline rank {rank}" for rank in range(ranks)]


def test_the_busiest_ranks_idle_time_is_the_bubble():
    _, step, figure = drawn(PIPELINE)
    shares = [t.get_text() for t in figure.axes[0].texts if t.get_text().endswith("%")]
    assert len(shares) == 4
    least = min(float(share.removesuffix("%")) / 100 for share in shares)
    assert least == pytest.approx(step.bubble_seconds / step.seconds, abs=0.006)
    for case in (ALONE, ("vlm-30b-megatron", ("megatron.pipeline_parallel=1",))):
        shares = [t.get_text() for t in drawn(case)[2].axes[0].texts]
        assert "0.0%" in shares  # and not -0.0%


@pytest.mark.parametrize("case", [ZERO3, FSDP2])
def test_both_streams_are_drawn_and_the_compute_streams_idle_time_hatched(case):
    _, step, figure = drawn(case)
    whole, near, _ = figure.axes
    ended = max(span.end for span in step.spans)
    compute = [span for span in step.spans if span.lane == "compute"]
    turn = next(n for n, span in enumerate(compute) if span.kind == "backward")
    window = compute[turn - 5].start, compute[turn + 4].end
    assert 0 < window[0] < window[1] < ended / 2
    for axes, (first, last) in ((whole, (0.0, ended)), (near, window)):
        assert axes.get_xlim() == (first, last)
        bars = bars_of(axes)
        expected = [
            (float(s.lane == "network"), max(first, s.start), min(last, s.end), COLOURS[s.kind])
            for s in step.spans
            if s.end > first and s.start < last
        ]
        same([bar for bar in bars if not bar[4]], sorted(expected))
        # Idle and busy times take turns and leave nothing out.
        lane = [bar for bar in bars if bar[0] == 0]
        assert (lane[0][1], lane[-1][2]) == (first, last)
        np.testing.assert_allclose([b[1] for b in lane[1:]], [b[2] for b in lane[:-1]], atol=1e-12)
        assert not any(one[4] and two[4] for one, two in pairwise(lane))
        assert {bar[0] for bar in bars if bar[4]} == {0}
    busy = sum(span.end - span.start for span in compute)
    assert whole.texts[-1].get_text() == f"{1 - busy / ended:.0%}\nwaiting"
    [frame] = [patch for patch in whole.patches if not isinstance(patch, PathPatch)]
    assert frame.get_x() == window[0] and frame.get_x() + frame.get_width() == window[1]


@pytest.mark.parametrize("case", [PIPELINE, INTERLEAVED, LONG, ALONE, ZERO3, FSDP2])
def test_the_last_bar_adds_up_to_the_step(case):
    _, step, figure = drawn(case)
    bars = bars_of(figure.axes[-1])
    kinds = ("compute", "recompute", "communication", "bubble", "optimizer")
    parts = {kind: getattr(step, f"{kind}_seconds") for kind in kinds}
    parts = {kind: seconds for kind, seconds in parts.items() if seconds > 1e-9 * step.seconds}
    ends = np.cumsum([0.0, *parts.values()])
    assert ends[-1] == pytest.approx(step.seconds)
    colours = ["#ffffff" if kind == "bubble" else COLOURS[kind] for kind in parts]
    same(bars, [(0.0, *times, c) for times, c in zip(pairwise(ends), colours, strict=True)])
    assert [bool(bar[4]) for bar in bars] == [kind == "bubble" for kind in parts]
    labels = [text.get_text() for text in figure.axes[-1].get_legend().get_texts()]
    for label, (kind, seconds) in zip(labels, parts.items(), strict=True):
        name, milliseconds, unit, share = label.replace(",", "").split()
        assert (name, unit) == (kind.replace("optimizer", "optimiser"), "ms")
        assert float(milliseconds) == pytest.approx(1e3 * seconds, rel=0.005)
        assert float(share.removesuffix("%")) == pytest.approx(
            100 * seconds / step.seconds, abs=0.5
        )


def test_numbers_of_micro_batches_stand_in_their_bars():
    _, step, figure = drawn(PIPELINE)
    texts = written_in_bars(figure.axes[0])
    written = sorted((*text.get_position()[::-1], text.get_text()) for text in texts)
    expected = sorted(
        (int(s.lane[-1]), (s.start + s.end) / 2, s.name.split()[-1]) for s in step.spans
    )
    assert written == expected  # all bars are wide enough
    for case in (INTERLEAVED, LONG):
        assert not written_in_bars(drawn(case)[2].axes[0])


@pytest.mark.parametrize("case", [PIPELINE, ALONE, ZERO3, FSDP2])
def test_what_stands_in_bars_has_room_in_them(case):
    _, _, figure = drawn(case)
    names = set()
    for axes in figure.axes[:-1]:
        bars = bars_of(axes)
        for text in written_in_bars(axes):
            x, y = text.get_position()
            [(_, left, right, colour, _)] = [b for b in bars if b[0] == y and b[1] < x < b[2]]
            box = text.get_window_extent()
            edges = axes.transData.transform([(left, y - 0.42), (right, y + 0.42)])
            assert edges[0, 0] <= box.x0 and box.x1 <= edges[1, 0], text
            assert edges[1, 1] <= box.y0 and box.y1 <= edges[0, 1], text
            assert contrast(text.get_color(), colour) >= 4.5
            names.add(text.get_text())
    if case in (ZERO3, FSDP2):
        assert names == {"self-attention", "cross-attention", "head"}


@pytest.mark.parametrize("case", [PIPELINE, INTERLEAVED, LONG, ALONE, ZERO3, FSDP2])
def test_labels_stay_inside_and_apart(case):
    _, _, figure = drawn(case)
    texts = texts_of(figure)
    boxes = [text.get_window_extent() for text in texts]
    for i, box in enumerate(boxes):
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1, texts[i]
        assert box.y0 >= 0 and box.y1 <= figure.bbox.y1, texts[i]
        assert not any(box.overlaps(other) for other in boxes[:i]), texts[i]


def test_the_title_says_what_is_shown_and_what_the_step_takes():
    def title_of(case):
        _, step, figure = drawn(case)
        title, below = (text.get_text() for text in figure.texts)
        assert f"a step takes {1e3 * step.seconds:,.0f} ms on 128 GPUs (H100 80 GB)" in title
        assert title.startswith("Predicted")
        return below

    assert title_of(PIPELINE) == "all 8 micro-batches; tensor 8 x pipeline 4"
    assert "all 32 micro-batches" in title_of(INTERLEAVED)
    assert "2 chunks on each rank" in title_of(INTERLEAVED)
    assert title_of(ALONE).startswith("its only micro-batch")
    assert "the first of 8 micro-batches; the others gather" in title_of(ZERO3)
    assert title_of(FSDP2) == "the first of 8 micro-batches"
    only = ("vlm-30b", ("train.micro_batches=1",))
    assert title_of(only) == "its only micro-batch"


def test_gaps():
    spans = [Span("", "", "", *times) for times in ((1, 2), (2, 4), (5, 5), (6, 7))]
    assert gaps_of(spans, 0, 9) == [(0, 1), (4, 5), (5, 6), (7, 9)]
    assert gaps_of(spans, 1, 7) == [(4, 5), (5, 6)]
    assert gaps_of([], 3, 4) == [(3, 4)]
    assert gaps_of(spans, 1, 7 + 1e-6)[-1] == (7, 7 + 1e-6)


def test_colours_can_be_told_apart_and_written_on():
    """By colour-blind readers too: at least 15 of CIE76's units, measured 15.8."""
    beside = ("communication", "optimizer", "bubble")
    for chunks in (1, 2):
        shades = [*shades_of("forward", chunks), *shades_of("backward", chunks)]
        assert shades[0] == COLOURS["forward"].lower()
        for pair in combinations([*shades, *(COLOURS[kind] for kind in beside)], 2):
            assert distance(*pair) > 15, pair
    for kinds in (("forward", "backward", "gather", "reduce"), ("compute", "recompute", *beside)):
        for pair in combinations(kinds, 2):
            assert distance(*(COLOURS[kind] for kind in pair)) > 15, pair
    for kind in ("forward", "backward"):  # measured 6.6
        assert all(distance(*pair) > 6 for pair in pairwise(shades_of(kind, 4)))
    grey = [f"#{level:02x}{level:02x}{level:02x}" for level in range(256)]
    for colour in [*grey, *(c for c in COLOURS.values() if c.startswith("#"))]:
        best = max(contrast(colour, "white"), contrast(colour, "black"))
        assert contrast(colour, ink_on(colour)) == pytest.approx(best, rel=1e-3)


def test_the_picture_of_a_step(tmp_path):
    run = load_run(CONFIGS / "vlm-30b.yaml")
    prediction = predict(run, CLUSTER, 64)
    first, second = tmp_path / "new" / "step.svg", tmp_path / "again.svg"
    for path in (first, second):
        draw_step(prediction, run, CLUSTER, path)
    picture = first.read_text()
    assert 'width="825pt"' in picture  # 1,100 pixels
    for text in ("Predicted: a step takes", "milliseconds, predicted", "cross-attention"):
        assert text in picture
    assert picture == second.read_text() and len(picture) < 200_000
    with pytest.raises(ConfigError, match="must end in one of"):
        draw_step(prediction, run, CLUSTER, tmp_path / "step.jpg")


def test_thousands_of_passes_make_no_huge_file(tmp_path):
    run = load_run(CONFIGS / f"{LONG[0]}.yaml", LONG[1])
    draw_step(predict(run, CLUSTER, 64), run, CLUSTER, tmp_path / "step.svg")
    assert (tmp_path / "step.svg").stat().st_size < 1_200_000  # 8,192 bars
