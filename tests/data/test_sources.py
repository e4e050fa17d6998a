from dataclasses import replace

import numpy as np
import pytest

from megavlm.config.data import SourceSettings
from megavlm.data.cursor import Shuffle
from megavlm.data.sources import Place, Sources
from megavlm.errors import ConfigError, DataError


def sources(folder, *settings):
    return Sources([SourceSettings(folder=folder / name, **more) for name, more in settings], 7)


def test_one_source_keeps_the_order_of_its_folder(coloured_squares):
    alone = sources(coloured_squares, ("train", {}))
    places = alone.shuffled(np.arange(100))
    expected = Shuffle([10] * 4, 1, 7).numbers(np.arange(100))
    assert [place.number for place in places] == expected.tolist()


def test_a_mixture_goes_through_each_source_before_it_begins_again(coloured_squares):
    mixed = sources(coloured_squares, ("train", {"parts": 3}), ("heldout", {}))
    assert len(mixed) == 50
    places = mixed.shuffled(np.arange(160))
    by_source = [[p.number for p in places if p.source == source] for source in range(2)]
    assert sorted(by_source[0]) == sorted([*range(40)] * 3)
    assert sorted(by_source[1]) == sorted([*range(10)] * 4)
    assert [mixed.in_order(n) for n in (0, 39, 40, 49)] == [(0, 0), (0, 39), (1, 0), (1, 9)]
    assert mixed.locate(mixed.in_order(40)) == "000000.tar:000000"


def test_two_sources_of_one_folder_have_orders_of_their_own(coloured_squares):
    both = sources(coloured_squares, ("train", {"tasks": ("caption",)}), ("train", {}))
    numbers = [place.number for place in both.shuffled(np.arange(80))]
    twice = sum(a == b for a, b in zip(numbers[::2], numbers[1::2], strict=True))
    assert twice < 5, "a step would show samples twice"


def test_only_the_named_tasks_are_taken(coloured_squares):
    captions = sources(coloured_squares, ("train", {"tasks": ("caption",)}))
    assert {t.task for n in range(40) for t in captions.read(Place(0, n)).texts} == {"caption"}
    assert captions.read(captions.in_order(4)).texts == ()  # a text of another task


def test_tasks_that_no_sample_has_are_refused(coloured_squares):
    rare = sources(coloured_squares, ("train", {"tasks": ("caption", "rare")}), ("heldout", {}))
    rare.check_tasks()
    mistyped = sources(coloured_squares, ("heldout", {}), ("train", {"tasks": ("captoin",)}))
    with pytest.raises(DataError, match=r"none of 40 samples of .*train has a text of tasks"):
        mistyped.check_tasks()


def test_what_decides_the_samples_is_in_the_fingerprint(coloured_squares):
    mixed = (("train", {"parts": 3}), ("heldout", {}))
    prints = {
        sources(coloured_squares, *settings).fingerprint
        for settings in (
            mixed,
            mixed[::-1],
            (("train", {"parts": 2}), ("heldout", {})),
            (("train", {"parts": 3}), ("heldout", {"tasks": ("caption",)})),
            mixed[:1],
        )
    }
    assert len(prints) == 5


def test_a_source_has_at_least_one_part(coloured_squares):
    with pytest.raises(ConfigError, match=r"parts=0 of .*train must be at least 1"):
        sources(coloured_squares, ("train", {"parts": 0}))


def test_no_source_is_refused(tiny_run):
    with pytest.raises(ConfigError, match=r"data\.train names no source"):
        replace(tiny_run.data, train=())
