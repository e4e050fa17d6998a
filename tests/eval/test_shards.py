"""Work that ranks share, that is killed, and that goes on."""

import fcntl
import os
import signal

import pytest

from megavlm.errors import DataError
from megavlm.eval import shards
from megavlm.eval.shards import in_shards, only_one, read_lines, write_lines
from tests.ranks import alone, run_on_ranks

ITEMS = 23
SETTINGS = {"step": 1}
OTHERS = {"step": 2}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_ITEMS", 4)


def part_of(folder, number):
    return folder / shards._parts(SETTINGS).replace("*", f"{number:05d}")


def run(folder, ranks, settings=SETTINGS, end=lambda rank, calls: None, row_of=lambda n: n * n):
    """Rows of the first rank, and the pieces that all ranks have worked on."""

    def on_rank(rank):
        calls = []

        def work(numbers, advance):
            end(rank, calls)
            calls.append(numbers.start)
            return [{"key": n, "value": row_of(n)} for n in numbers]

        return in_shards(folder, settings, ITEMS, work, ""), calls

    shares = run_on_ranks(ranks, on_rank)
    assert all(rows == [] for rows, _ in shares[1:])
    return shares[0][0], sorted(start for _, calls in shares for start in calls)


EXPECTED = [{"key": n, "value": n * n} for n in range(ITEMS)]
ALL = [0, 4, 8, 12, 16, 20]


@pytest.mark.parametrize("ranks", [1, 3])
def test_any_number_of_ranks_does_each_item_once(tmp_path, ranks):
    assert run(tmp_path / "new" / "folder", ranks) == (EXPECTED, ALL)


def test_a_killed_evaluation_goes_on(tmp_path, capfd):
    def kill(rank, calls):
        if rank == 1 and len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(AssertionError, match="status 9"):
        run(tmp_path, 2, end=kill)
    part = part_of(tmp_path, 1)
    assert [line["piece"] for line in read_lines(part)] == [1, 3]
    # Neither a line that a crash has filled with nothing nor one that was being written is taken.
    with part.open("a") as file:
        file.write("\0\0\0\n" + '{"piece": 5, "rows": [{"key"')
    rows, done = run(tmp_path, 1)
    assert rows == EXPECTED
    assert set(done) <= set(ALL) - {4, 12} and 20 in done
    assert "of 6 pieces of 4 are done already" in capfd.readouterr().err
    # All is kept until it is told to be forgotten.
    assert run(tmp_path, 3) == (EXPECTED, [])
    shards.forget(tmp_path, SETTINGS)
    assert run(tmp_path, 1) == (EXPECTED, ALL)


def test_other_settings_begin_anew_and_touch_nothing(tmp_path, capfd):
    run(tmp_path, 1)
    rows, done = run(tmp_path, 1, settings=OTHERS, row_of=str)
    assert done == ALL and rows[7] == {"key": 7, "value": "7"}
    assert "holds pieces of an evaluation with other settings" in capfd.readouterr().err
    shards.forget(tmp_path, OTHERS)
    assert run(tmp_path, 1) == (EXPECTED, [])


def test_two_evaluations_in_one_folder_do_not_mix(tmp_path):
    class KilledError(Exception):
        pass

    def work(settings, end, meanwhile=lambda numbers: None):
        def rows(numbers, advance):
            meanwhile(numbers)
            if numbers.start >= end:
                raise KilledError
            return [{"key": n, "step": settings["step"]} for n in numbers]

        with pytest.raises(KilledError):
            in_shards(tmp_path, settings, ITEMS, rows, "")

    def other_one(numbers):
        if numbers.start == 0:
            work(OTHERS, 8)

    with alone():
        work(SETTINGS, 16, other_one)
        fresh = []

        def rest(numbers, advance):
            fresh.append(numbers.start)
            return [{"key": n, "step": 2} for n in numbers]

        rows = in_shards(tmp_path, OTHERS, ITEMS, rest, "")
    assert [row["step"] for row in rows] == [2] * ITEMS and fresh == [8, 12, 16, 20]


def test_a_folder_is_for_one_evaluation_at_a_time(tmp_path, monkeypatch):
    with alone():
        with only_one(tmp_path):
            with pytest.raises(DataError, match=r"another evaluation is running in .*wait until"):
                with only_one(tmp_path):
                    pass
        with only_one(tmp_path):
            pass

        def no_locks(*_):
            raise OSError("no locks available")

        monkeypatch.setattr(fcntl, "flock", no_locks)
        with only_one(tmp_path):
            pass


def test_what_could_not_be_read_is_tried_again(tmp_path):
    rows, _ = run(tmp_path, 1)
    shards.forget(tmp_path, SETTINGS)
    shards.append(part_of(tmp_path, 0), 2, [{"unreadable": "why"}, *rows[9:12]])
    shards.append(part_of(tmp_path, 0), 1, rows[4:8])
    assert run(tmp_path, 1) == (EXPECTED, [0, 8, 12, 16, 20])


def test_lines_hold_whatever_an_answer_holds(tmp_path):
    rows = [{"answer": "a\u2028b\x85c\r\nd"}, {"answer": "猫"}]
    write_lines(tmp_path / "x.jsonl", rows)
    assert read_lines(tmp_path / "x.jsonl") == rows
