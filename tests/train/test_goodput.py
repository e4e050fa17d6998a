"""Where time went, from event files whose answer is known by hand."""

import json

import pytest

from megavlm.train.events import EVENTS_FILE, Events, read_events
from megavlm.train.goodput import goodput


def events_of(*lines):
    """Events of (seconds, name, fields)."""
    return [{"event": name, "unix_seconds": 1000.0 + at, **fields} for at, name, fields in lines]


def start(at, began, restart=0):
    fields = {"restart": restart, "process_started_unix_seconds": 1000.0 + began}
    return at, "start", fields


def steps(at, first, stop, seconds, data_seconds=0.0):
    fields = {"first": first, "stop": stop, "seconds": seconds, "data_seconds": data_seconds}
    return at, "steps", fields


FIRST_PROCESS = (
    start(5, 0),
    (8, "built", {"seconds": 3.0}),
    (10, "loaded", {"seconds": 2.0}),
    (14, "held_out", {"seconds": 4.0}),
    (20, "first_step_done", {"step": 0, "seconds": 5.0}),
    steps(60, 0, 10, 45.0, 1.0),
    (60, "checkpoint_begun", {"step": 10}),
    (62, "checkpoint_copied", {"step": 10, "stalled_seconds": 2.0}),
    (66, "checkpoint_committed", {"step": 10, "seconds": 6.0, "stalled_seconds": 0.5}),
)


def used(found):
    return {use: seconds for use, seconds in found.seconds.items() if seconds}


def test_nothing_is_told_before_the_first_start():
    assert goodput([]) is None
    assert goodput(events_of((0, "ended", {"how": "done"}))) is None


def test_a_run_that_has_only_begun():
    found = goodput(events_of(start(5, 0), (8, "built", {"seconds": 3.0})))
    assert used(found) == {"start-up": 8.0} and found.wall_seconds == 8.0
    assert found.fraction == 0 and found.ended is None and found.steps == 0


def test_one_process():
    found = goodput(events_of(*FIRST_PROCESS, (70, "ended", {"how": "done"})))
    # 15 s to the first step, of which 2 s load and 4 s measure.
    expected = {"productive": 45.0, "start-up": 9.0, "loading": 2.0, "evaluation": 4.0}
    assert used(found) == pytest.approx({**expected, "saving": 2.5, "other": 7.5})
    assert found.wall_seconds == 70 == pytest.approx(sum(found.seconds.values()))
    assert found.fraction == pytest.approx(45 / 70)
    assert (found.steps, found.starts, found.ended) == (10, 1, "done")
    assert found.data_wait_seconds == 1.0


def test_a_run_that_was_killed_and_goes_on():
    """Killed after step 14, it goes on from 10, half an hour later."""
    found = goodput(
        events_of(
            *FIRST_PROCESS,
            steps(86, 10, 14, 20.0),
            start(1895, 1886, restart=1),
            (1895.5, "recovered", {"step": 10, "on_disk": 0, "seconds": 0.5}),
            (1896, "resumed", {"step": 10}),
            (1900, "built", {"seconds": 3.0}),
            (1906, "loaded", {"seconds": 6.0}),
            (1910, "first_step_done", {"step": 10, "seconds": 4.0}),
            steps(1946, 10, 20, 40.0),
            (1946, "ended", {"how": "KeyboardInterrupt"}),
        )
    )
    assert found.seconds["down"] == 1800 and found.seconds["repeated steps"] == 20
    assert found.seconds["productive"] == 45 + 40
    assert found.seconds["start-up"] == 9 + 13.5 and found.seconds["loading"] == 2 + 6.5
    assert (found.steps, found.repeated_steps, found.starts) == (20, 4, 2)
    assert found.ended == "KeyboardInterrupt"
    assert sum(found.seconds.values()) == pytest.approx(found.wall_seconds == 1946 and 1946)


def test_without_a_checkpoint_all_is_done_again():
    again = (start(105, 100, 1), (110, "first_step_done", {"step": 0, "seconds": 1.0}))
    found = goodput(events_of(start(1, 0), steps(9, 0, 4, 8.0), *again, steps(111, 0, 1, 1.0)))
    assert found.seconds["repeated steps"] == 8.0 and found.steps == 1
    assert found.seconds["down"] == 91.0


def test_a_rollback_and_a_skipped_step():
    found = goodput(
        events_of(
            *FIRST_PROCESS,
            (72, "step_skipped", {"step": 10, "fault": "spike", "seconds": 5.0}),
            steps(82, 11, 13, 10.0),
            (88, "bad_step", {"step": 13, "fault": "nonfinite", "seconds": 6.0}),
            (89, "rolled_back", {"from": 13, "to": 10, "left_out": [[80, 112]]}),
            (90, "loaded", {"seconds": 1.0}),
            (96, "step_skipped", {"step": 10, "fault": "spike", "seconds": 5.0}),
            steps(102, 11, 12, 6.0),
        )
    )
    assert found.seconds["skipped steps"] == 10.0  # both times
    assert found.skipped == [10]
    assert found.seconds["repeated steps"] == 16.0 and found.repeated_steps == 3
    assert [(event["from"], event["to"]) for event in found.recoveries] == [(13, 10)]
    assert found.steps == 11 and found.seconds["productive"] == 51.0


def test_a_resume_in_the_middle_of_steps_that_were_written_together():
    found = goodput(
        events_of(start(0, 0), steps(10, 0, 10, 10.0, 5.0), (12, "resumed", {"step": 4}))
    )
    assert found.seconds["productive"] == 4.0 and found.data_wait_seconds == 2.0
    assert (found.steps, found.repeated_steps) == (4, 6)


def test_the_file_only_grows(tmp_path):
    path = tmp_path / EVENTS_FILE
    with Events(tmp_path, enabled=True) as events:
        events.start(ranks=2)
        for step in range(3):
            events.step_done(step, 1.0, 0.25)
        events.write("checkpoint_begun", step=3)
    first = path.read_bytes()
    with path.open("a") as file:
        file.write('{"event": "ste')  # a crash
    with pytest.raises(ValueError, match="x"), Events(tmp_path, enabled=True) as events:
        events.start(ranks=2)
        raise ValueError("x s3://key:secret@bucket")
    assert path.read_bytes().startswith(first)
    found = read_events(path)
    assert [event["event"] for event in found] == [
        *("start", "first_step_done", "steps", "checkpoint_begun", "ended", "start", "ended")
    ]
    assert [event.get("restart") for event in found if event["event"] == "start"] == [0, 1]
    assert (found[2]["first"], found[2]["stop"], found[2]["data_seconds"]) == (0, 3, 0.75)
    assert [event["how"] for event in found if event["event"] == "ended"] == ["done", "ValueError"]
    assert "secret" not in path.read_text()
    assert all(json.loads(line) for line in first.decode().splitlines())


def test_other_ranks_write_nothing(tmp_path):
    with Events(tmp_path, enabled=False) as events:
        events.start(ranks=2)
        events.step_done(0, 1.0, 0.0)
    assert not list(tmp_path.iterdir())
