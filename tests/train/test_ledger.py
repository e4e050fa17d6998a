"""A run's own record of its samples."""

from dataclasses import replace

import numpy as np
import pytest

from megavlm.checkpoint.storage import folder_name
from megavlm.data.sources import NUMBER_BITS, id_of, training_sources
from megavlm.errors import DataError
from megavlm.train.events import Events
from megavlm.train.ledger import FILE, HEADER, Ledger, check_ledger, read_ledger
from megavlm.train.loop import train
from tests.ranks import run_on_ranks
from tests.runs import plan_of


def with_ledger(run):
    return replace(run, data=replace(run.data, ledger=True))


def test_a_ledger_proves_that_a_resumed_run_skips_and_repeats_nothing(tiny_run):
    run = replace(with_ledger(tiny_run), engine="fsdp2")
    run_on_ranks(2, lambda _: train(plan_of(run)), groups=False)
    [(before), *_] = [*read_ledger(run.run_folder)][2:]
    (run.run_folder / "checkpoints" / folder_name(6) / "state.json").unlink()
    run_on_ranks(1, lambda _: train(plan_of(run)), groups=False)
    again = [*read_ledger(run.run_folder)]
    assert [step for step, _ in again] == [*range(6)]
    assert np.array_equal(again[2][1], before[1])
    assert check_ledger(plan_of(run)) == [
        "steps 0 to 5: each loaded exactly its samples",
        f"{run.data.train[0].folder}: 48 samples loaded out of 40, each of them 1 to 2 times",
    ]
    skipping = replace(run, data=replace(run.data, skip_samples=((8, 16),)))
    with pytest.raises(DataError, match="5 steps with other samples than planned: "):
        check_ledger(plan_of(skipping))


def test_ids_come_back_and_a_torn_record_does_not(tiny_run):
    run = with_ledger(tiny_run)
    run.run_folder.mkdir()
    ids = [np.array([2**50 + 7, 3, 3, 2**33]), np.array([5, 4]), np.array([9])]
    ledger = Ledger(run, 0, enabled=True)
    for step, of_step in enumerate(ids):
        ledger.write(step, of_step)
    found = [*read_ledger(run.run_folder)]
    assert [(step, n.tolist()) for step, n in found] == [(s, sorted(n)) for s, n in enumerate(ids)]
    path = run.run_folder / FILE
    path.write_bytes(path.read_bytes()[:-1])
    assert [step for step, _ in read_ledger(run.run_folder)] == [0, 1]
    Ledger(run, 1, enabled=True).write(1, np.array([8]))
    assert [(s, n.tolist()) for s, n in read_ledger(run.run_folder)] == [
        (0, [3, 3, 2**33, 2**50 + 7]),
        (1, [8]),
    ]


def test_a_sample_takes_few_bytes(tiny_run):
    run = with_ledger(tiny_run)
    run.run_folder.mkdir()
    ids = np.random.default_rng(0).integers(0, 640_000, 2048) + 10**9
    Ledger(run, 0, enabled=True).write(0, ids)
    assert (run.run_folder / FILE).stat().st_size < HEADER.size + 2 * 2048


@pytest.fixture
def written(tiny_run):
    """A run, and writes the record that a step should have into its ledger."""
    run = with_ledger(tiny_run)
    run.run_folder.mkdir()
    stage, sources = plan_of(run).stages[0], training_sources(run)
    ledger = Ledger(run, 0, enabled=True)

    def write(step, sources=sources):
        positions = np.arange(stage.sample_at(step), stage.sample_at(step + 1))
        ledger.write(step, np.array([id_of(place) for place in sources.shuffled(positions)]))

    return run, write


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ([0, 1, 3, 5], "in samples.ledger, 2 steps missing: 2, 4"),
        ([0, 1, 1, 2], "in samples.ledger, 1 step more than once: 1"),
        ([4, 5, 6, 7], "in samples.ledger, 2 steps with other samples than planned: 6, 7"),
    ],
)
def test_steps_that_are_not_as_planned_are_told(written, steps, says):
    run, write = written
    for step in steps:
        write(step)
    with pytest.raises(DataError, match=says):
        check_ledger(plan_of(run))


def test_what_a_rollback_leaves_out_counts_until_the_run_starts_again(written):
    """No checkpoint has been written since, which would tell."""
    run, write = written
    with Events(run.run_folder, enabled=True) as events:
        events.start(ranks=1, engine=run.engine)
        write(0)
        events.write("rolled_back", **{"from": 1, "to": 1}, left_out=[[8, 16]])
        write(1, training_sources(run, [(8, 16)]))
        check_ledger(plan_of(run))
        events.start(ranks=1, engine=run.engine)
        check_ledger(plan_of(run))  # the start has failed, say
        events.write("built", seconds=1.0)
        with pytest.raises(DataError, match="1 step with other samples than planned: 1"):
            check_ledger(plan_of(run))


def test_a_ledger_of_more_samples_than_there_are(written):
    run, write = written
    write(0)
    Ledger(run, 1, enabled=True).write(1, np.array([10**6, 5 << NUMBER_BITS]))
    with pytest.raises(DataError, match="1 step with other samples than planned"):
        check_ledger(plan_of(run))


def test_a_damaged_or_missing_ledger_is_told(written):
    run, write = written
    write(0)
    path = run.run_folder / FILE
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(DataError, match=r"samples\.ledger is damaged at step 0"):
        check_ledger(plan_of(run))
    path.unlink()
    with pytest.raises(DataError, match=r"train with data\.ledger=true to keep one"):
        check_ledger(plan_of(run))
