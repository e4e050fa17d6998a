from dataclasses import replace

import numpy as np
import pytest

from megavlm.config.schedule import scheduled
from megavlm.errors import ConfigError
from megavlm.planner import timeline
from megavlm.planner.timeline import NARROWEST, draw_timeline, edges_of
from tests.runs import plan_of


def stage_of(run, objective, steps, frozen=(), **optimizer):
    return replace(
        run,
        objectives={objective: 1.0},
        train=replace(run.train, steps=steps, frozen=frozen),
        optimizer=replace(run.optimizer, **optimizer),
    )


@pytest.fixture
def plan(tiny_run):
    """A long stage, one with frozen parts and one that is too short to see."""
    return plan_of(
        stage_of(tiny_run, "mim", 5000, learning_rate=1e-3),
        stage_of(tiny_run, "captioning", 3000, ("encoder", "decoder"), learning_rate=1e-3),
        stage_of(tiny_run, "instruction", 10, scales={"encoder": 0.1}, learning_rate=2e-4),
    )


def widths_of(tiny_run, *steps):
    return np.diff(edges_of(plan_of(*(stage_of(tiny_run, "captioning", n) for n in steps))))


def test_stages_are_drawn_to_scale_where_all_can_be_seen(tiny_run):
    np.testing.assert_allclose(widths_of(tiny_run, 200, 400, 600), [1 / 6, 1 / 3, 1 / 2])
    np.testing.assert_allclose(widths_of(tiny_run, 7), [1])


def test_short_stages_get_room_and_the_others_keep_their_proportions(tiny_run):
    first, second, third = widths_of(tiny_run, 600, 300, 1)
    assert third == pytest.approx(NARROWEST)
    assert first == pytest.approx(2 * second)
    # 14 % would do, were it not for the room that the last one takes.
    widths = widths_of(tiny_run, 860, 140, 1)
    np.testing.assert_allclose(widths, [1 - 2 * NARROWEST, NARROWEST, NARROWEST])
    for steps in ((1, 1, 1000), (1,) * 20, (5, *(1,) * 11)):
        widths = widths_of(tiny_run, *steps)
        assert sum(widths) == pytest.approx(1)
        assert min(widths) >= min(NARROWEST, 1 / len(steps)) - 1e-12


def test_the_curves_are_those_of_the_schedule(plan):
    rates, _ = timeline._figure(plan).axes
    lines = rates.get_lines()
    assert len(lines) == 4  # the last stage has two scales
    edges = edges_of(plan)
    scales = [(0, 1.0), (1, 1.0), (2, 1.0), (2, 0.1)]
    for line, (number, scale) in zip(lines, scales, strict=True):
        stage, (left, right) = plan.stages[number], edges[number : number + 2]
        x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
        assert x[-1] == pytest.approx(right) and x[0] > left and np.all(np.diff(x) > 0)
        count = stage.run.train.steps
        steps = np.round((x - left) / (right - left) * count).astype(int) - 1
        expected = [scale * scheduled(plan, stage, stage.first_step + int(s)) for s in steps]
        np.testing.assert_allclose(y, expected, rtol=1e-12)
        assert len(x) == min(count, 401)
    assert rates.get_yscale() == "log"  # from 1e-3 to 2e-5


def test_curves_of_like_height_have_a_linear_axis(tiny_run):
    plan = plan_of(stage_of(tiny_run, "mim", 1), stage_of(tiny_run, "captioning", 20))
    rates, _ = timeline._figure(plan).axes
    assert rates.get_yscale() == "linear" and rates.get_ylim()[0] == 0
    assert rates.get_lines()[0].get_marker() == "."  # one step makes no line


def test_layer_decay_is_a_band(plan, tiny_run):
    decayed = stage_of(tiny_run, "mim", 10, encoder_layer_decay=0.5)
    rates, _ = timeline._figure(plan_of(decayed, plan.last)).axes
    [band] = rates.collections
    y = band.get_paths()[0].vertices[:, 1]
    peak = decayed.optimizer.learning_rate
    # Two layers: what is below the first one is three factors away from the last norm.
    assert y.max() == pytest.approx(peak)
    assert y.min() == pytest.approx(decayed.optimizer.minimum_learning_rate / 8)


def test_a_bar_for_each_part_where_it_is_there_hatched_where_it_is_frozen(plan):
    _, parts = timeline._figure(plan).axes
    rows = [label.get_text() for label in parts.get_yticklabels()]
    assert rows == ["encoder", "heads", "projector", "cross attention", "decoder"]
    edges = edges_of(plan)
    bars = {
        (rows[round(bar.get_y() + bar.get_height() / 2)], edges.index(bar.get_x())): bar.get_hatch()
        for container in parts.containers
        for bar in container
    }
    language = ("projector", "cross attention", "decoder")
    assert bars.keys() == {("encoder", 0), ("heads", 0), ("encoder", 1), ("encoder", 2)} | {
        (part, number) for part in language for number in (1, 2)
    }
    assert {place for place, hatch in bars.items() if hatch} == {("encoder", 1), ("decoder", 1)}


def test_labels_stay_inside_and_apart(plan):
    """Names, lengths and numbers of neighbours, and the ticks, have room beside each other."""
    figure = timeline._figure(plan)
    figure.canvas.draw()
    rates, parts = figure.axes
    bars = [text for text in parts.texts if text.get_text()]
    for texts in (rates.texts, bars, parts.get_xticklabels()):
        boxes = [text.get_window_extent() for text in texts]
        for i, box in enumerate(boxes):
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, texts[i]
            assert not any(box.overlaps(other) for other in boxes[:i]), texts[i]


def test_the_picture_of_a_plan(plan, tmp_path):
    first, second = tmp_path / "new" / "plan.svg", tmp_path / "again.svg"
    for path in (first, second):
        draw_timeline(plan, path)
    picture = first.read_text()
    for text in ("captioning", "3,000 steps", "8,010", "x 0.1", "learning rate"):
        assert text in picture
    assert "Drawn wider than to scale: instruction" in picture
    assert picture == second.read_text() and len(picture) < 200_000
    draw_timeline(plan_of(plan.first, plan.stages[1].run), tmp_path / "plan.svg")
    assert "Drawn wider" not in (tmp_path / "plan.svg").read_text()
    with pytest.raises(ConfigError, match="must end in one of"):
        draw_timeline(plan, tmp_path / "plan.jpg")
