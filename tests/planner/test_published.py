"""The planner's step times against published runs."""

from statistics import mean

import pytest

from tests.planner.published import FURTHER, ROWS


def errors(rows):
    return {row.name: row.predicted() / row.tokens_per_second - 1 for row in rows}


@pytest.mark.parametrize("held_back", [False, True])
def test_step_times_of_published_runs(held_back):
    """Measured: chosen by, worst 6.2 %, mean 3.1 %; held back, worst 10.4 %, mean 3.5 %."""
    found = errors(row for row in ROWS if row.held_back == held_back)
    assert len(found) == (26 if held_back else 8)
    assert all(abs(error) < 0.15 for error in found.values()), found
    assert mean(map(abs, found.values())) < (0.05 if held_back else 0.08)


def test_the_rest_of_a_table():
    """Measured: mean 9.7 %, 35 of 43 below 15 %; worst 44.4 %, 70B on 64 A100 of 40 GB."""
    found = [abs(error) for error in errors(FURTHER).values()]
    assert len(found) == 43
    assert mean(found) < 0.1 and max(found) < 0.45
    assert sum(error < 0.15 for error in found) >= 35
