"""Work that ranks share, that is killed, and that goes on."""

import os
import signal

import pytest

from megavlm.eval import shards
from megavlm.eval.shards import in_shards, read_lines, write_lines
from tests.ranks import run_on_ranks

ITEMS = 23
SETTINGS = {"step": 1}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_ITEMS", 4)


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
    part = tmp_path / "part-00001.jsonl"
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
    shards.forget(tmp_path)
    assert run(tmp_path, 1) == (EXPECTED, ALL)


def test_other_settings_begin_anew(tmp_path, capfd):
    run(tmp_path, 1)
    rows, done = run(tmp_path, 1, settings={"step": 2}, row_of=str)
    assert done == ALL and rows[7] == {"key": 7, "value": "7"}
    assert "holds pieces of another evaluation" in capfd.readouterr().err


def test_what_could_not_be_read_is_tried_again(tmp_path):
    rows, _ = run(tmp_path, 1)
    shards.forget(tmp_path)
    shards.append(tmp_path / "part-00000.jsonl", 2, [{"unreadable": "why"}, *rows[9:12]])
    shards.append(tmp_path / "part-00000.jsonl", 1, rows[4:8])
    assert run(tmp_path, 1) == (EXPECTED, [0, 8, 12, 16, 20])


def test_lines_hold_whatever_an_answer_holds(tmp_path):
    rows = [{"answer": "a\u2028b\x85c\r\nd"}, {"answer": "猫"}]
    write_lines(tmp_path / "x.jsonl", rows)
    assert read_lines(tmp_path / "x.jsonl") == rows
