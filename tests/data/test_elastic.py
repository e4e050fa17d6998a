"""Ranks that are killed at random, and go on in other numbers: each epoch shows each sample once.

The data state is one number. Steps go on from the last one that a checkpoint would know of.
"""

import os
import random
import signal
import struct
import time
from contextlib import suppress
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from megavlm.config.data import SourceSettings
from megavlm.data.collate import texts_alone
from megavlm.data.loader import MicroBatches, Share, load
from megavlm.data.samples import Sample, text
from megavlm.data.shards import write_shards
from megavlm.data.sources import id_of, training_sources
from megavlm.data.tokenizer import Tokenizer
from tests.conftest import COLOURS, picture

STEP_SAMPLES = 840  # every number of ranks up to 8 divides it
STEPS = 3
SAMPLES = STEP_SAMPLES * STEPS
RECORD = struct.Struct("<II")


def sample(number):
    """Few with a picture, as pictures take the time."""
    pictures = (picture(COLOURS[number % 8], side=8),) if number % 30 == 0 else ()
    shown = tuple(range(len(pictures)))
    of_colour = text("Say it.", COLOURS[number % 8], "caption", pictures=shown)
    return Sample(key=f"{number:05}", pictures=pictures, texts=(of_colour,))


@pytest.fixture
def epoch_run(tiny_run, tmp_path):
    """Settings of a run of one epoch, over shards of different sizes."""
    folder = tmp_path / "shards"
    folder.mkdir()
    write_shards(folder, (sample(n) for n in range(SAMPLES)), 97)
    return replace(
        tiny_run,
        data=replace(tiny_run.data, train=(SourceSettings(folder=folder),), shuffle_shards=5),
        train=replace(tiny_run.train, steps=STEPS, samples_per_step=STEP_SAMPLES, micro_batches=1),
    )


def micro_batches(run, rank, ranks):
    tokenizer = Tokenizer(run.data.tokenizer)
    share = Share(rank, ranks)
    return MicroBatches(training_sources(run), tokenizer, run, share, texts_alone, training=True)


def load_steps(run, rank, ranks, workers, first_step, path):
    """As a rank does; each step's samples are written down once they are here."""
    data = micro_batches(run, rank, ranks)
    with path.open("ab", buffering=0) as file:
        for step, batch in enumerate(load(data, range(first_step, STEPS), workers), first_step):
            ids = np.array(batch.sample_ids, np.int64)
            file.write(RECORD.pack(step, len(ids)) + ids.tobytes())


def fork(function, *arguments):
    child = os.fork()
    if child:
        with suppress(OSError):
            os.setpgid(child, child)  # its workers die with it, as those of a host do
        return child
    try:
        function(*arguments)
        os._exit(0)
    finally:
        os._exit(1)


def steps_in(path):
    content, steps = path.read_bytes(), {}
    while len(content) >= RECORD.size:
        step, count = RECORD.unpack(content[: RECORD.size])
        end = RECORD.size + 8 * count
        if len(content) >= end:
            steps[step] = np.frombuffer(content[RECORD.size : end], np.int64).tolist()
        content = content[end:]
    return steps


def run_for_a_while(run, ranks, workers, first_step, folder, seconds):
    """Start ranks and kill one, or all, if they are not done by then; what each of them loaded."""
    paths = [folder / f"{first_step}-{rank}-{time.monotonic_ns()}" for rank in range(ranks)]
    arguments = [(run, rank, ranks, workers, first_step, paths[rank]) for rank in range(ranks)]
    children = [fork(load_steps, *of_rank) for of_rank in arguments]
    deadline, killed = time.monotonic() + seconds, False
    while children:
        for child in [*children]:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                children.remove(child)
                assert killed or status == 0, "a rank failed that nobody killed"
        if time.monotonic() > deadline and not killed:
            killed = True
            for child in children:
                os.killpg(child, signal.SIGKILL)
        time.sleep(0.002)
    return [steps_in(path) if path.exists() else {} for path in paths]


def unbroken(run):
    """What each step has on each of so many ranks, in order, without workers or kills."""

    @cache
    def of_ranks(ranks):
        data = [micro_batches(run, rank, ranks) for rank in range(ranks)]
        return [[list(part[step].sample_ids) for part in data] for step in range(STEPS)]

    return of_ranks


def trial(run, generator, expected, folder):
    """One epoch, with kills; returns how many there were."""
    step, kills, seen = 0, 0, []
    while step < STEPS:
        ranks, workers = generator.randint(1, 8), generator.randint(0, 4)
        seconds = generator.uniform(0.05, 1.5) if generator.random() < 0.7 else 60.0
        loaded = run_for_a_while(run, ranks, workers, step, folder, seconds)
        done = step
        while all(done in of_rank for of_rank in loaded):
            for of_rank, same in zip(loaded, expected(ranks)[done], strict=True):
                assert of_rank[done] == same, f"step {done} on {ranks} ranks, {workers} workers"
                seen += same
            done += 1
        kills += done < STEPS
        # The last checkpoint may be older than the last step.
        step = done if done == STEPS or done == step else generator.randint(step, done)
        del seen[step * STEP_SAMPLES :]
    assert sorted(seen) == list(range(SAMPLES))
    return kills


def trials(run, count, folder, seed):
    generator, expected = random.Random(seed), unbroken(run)
    sources = training_sources(run)
    for step in range(STEPS):
        positions = np.arange(step * STEP_SAMPLES, (step + 1) * STEP_SAMPLES)
        planned = sorted(id_of(place) for place in sources.shuffled(positions))
        for ranks in range(1, 9):
            assert sorted(i for part in expected(ranks)[step] for i in part) == planned
    return sum(trial(run, generator, expected, folder) for _ in range(count))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_epoch_shows_every_sample_once_whatever_dies(epoch_run, tmp_path):
    kills = trials(epoch_run, 200, tmp_path, seed=1)
    print(f"{kills} kills in 200 epochs")
    assert kills > 100
