import itertools
import random

import pytest
import torch

from megavlm.checkpoint.listing import latest_checkpoint
from megavlm.checkpoint.planners import check_boxes
from megavlm.checkpoint.shards import Shards, boxes_of_range
from megavlm.errors import CheckpointError
from megavlm.files.folder import Folder
from tests.checkpoint.written import SYNCHRONOUS
from tests.ranks import run_on_ranks
from tests.states import save_checkpoint


def is_made_up(shape, boxes):
    try:
        check_boxes("they hold", "a", shape, boxes)
    except CheckpointError as error:
        assert str(error).startswith("they hold ") and " a" in str(error)
        return False
    return True


@pytest.mark.parametrize("shape", [(), (0,), (6,), (4, 3), (2, 0, 3), (3, 2, 2)], ids=str)
def test_boxes_are_checked_as_a_count_of_every_element_does(shape):
    pick = random.Random(1)
    elements = torch.Size(shape).numel()
    outcomes = set()
    for _ in range(300):
        cuts = sorted({0, elements, *(pick.randrange(elements + 1) for _ in range(2))})
        boxes = [
            b for low, high in itertools.pairwise(cuts) for b in boxes_of_range(shape, low, high)
        ]
        if boxes and pick.random() < 0.7:  # one of them somewhere else, or of another size
            origin, size = boxes.pop(pick.randrange(len(boxes)))
            origin = tuple(o + pick.choice((0, 0, -1, 1)) for o in origin)
            boxes.append((origin, tuple(n + pick.choice((0, 0, 0, 1)) for n in size)))
        found = torch.zeros([n + 4 for n in shape], dtype=torch.int)
        wanted = torch.zeros_like(found)
        wanted[tuple(slice(2, 2 + n) for n in shape)] = 1
        for origin, size in boxes:
            found[tuple(slice(2 + o, 2 + o + n) for o, n in zip(origin, size, strict=True))] += 1
        expected = torch.equal(found, wanted)
        assert is_made_up(shape, boxes) == expected, boxes
        outcomes.add(expected)
    assert outcomes == ({True, False} if elements > 1 else {True})


def test_an_overlap_as_large_as_the_gap_is_found():
    assert is_made_up((4,), [((0,), (2,)), ((2,), (2,))])
    assert not is_made_up((4,), [((0,), (2,)), ((1,), (2,))])
    assert not is_made_up((4,), [((0,), (2,)), ((0,), (2,))])
    assert not is_made_up((2, 2), [((0, 0), (1, 2)), ((0, 0), (2, 1))])
    assert not is_made_up((), [((), ()), ((), ())])


@pytest.mark.parametrize(
    ("boxes", "told"),
    [
        (({0: 2}, {1: 2}), "hold boxes of weights/a that overlap"),
        (({0: 3}, {0: 1}), "hold boxes of weights/a that overlap"),
        (({0: 4}, {0: 2}), "hold 6 elements of weights/a, which has 4"),
        (({0: 2}, {3: 1}), "hold 3 elements of weights/a, which has 4"),
    ],
)
def test_what_does_not_make_up_a_tensor_is_not_saved(tmp_path, boxes, told):
    def on_rank(rank):
        held = {(first,): torch.zeros(n) for first, n in boxes[rank].items()}
        with pytest.raises(CheckpointError, match=told):
            save_checkpoint(Folder(tmp_path), 1, {"weights/a": Shards((4,), held)}, {}, SYNCHRONOUS)

    run_on_ranks(2, on_rank)
    assert latest_checkpoint(Folder(tmp_path)) is None


def test_ranks_that_hold_other_types_are_told(tmp_path):
    def on_rank(rank):
        held = {(2 * rank,): torch.zeros(2, dtype=(torch.float32, torch.bfloat16)[rank])}
        with pytest.raises(CheckpointError, match="hold weights/a in several shapes or types"):
            save_checkpoint(Folder(tmp_path), 1, {"weights/a": Shards((4,), held)}, {}, SYNCHRONOUS)

    run_on_ranks(2, on_rank)
