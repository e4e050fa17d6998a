import itertools
import math
import random

import pytest
import torch

from megavlm.checkpoint.shards import boxes_of_range, shards_of_range
from megavlm.model.params import Parameter

SHAPES = [(), (1,), (7,), (3, 4), (1, 5), (5, 1), (2, 3, 4), (3, 3, 2, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_range_is_exactly_its_boxes(shape):
    numbers = torch.arange(math.prod(shape)).view(shape)
    for first, stop in itertools.combinations_with_replacement(range(numbers.numel() + 1), 2):
        covered = []
        for origin, size in boxes_of_range(shape, first, stop):
            box = numbers[tuple(slice(o, o + s) for o, s in zip(origin, size, strict=True))]
            assert box.shape == torch.Size(size) and box.numel()
            covered += box.flatten().tolist()
        assert covered == list(range(first, stop))


def test_whole_rows_are_one_box():
    assert list(boxes_of_range((8, 6), 12, 36)) == [((2, 0), (4, 6))]
    assert list(boxes_of_range((8, 6), 10, 37)) == [
        ((1, 4), (1, 2)),
        ((2, 0), (4, 6)),
        ((6, 0), (1, 1)),
    ]


@pytest.mark.parametrize("tensor_ranks", [1, 2, 4])
@pytest.mark.parametrize(
    ("shape", "axis", "blocks"),
    [
        ((16, 6), 0, 1),
        ((16, 6), 0, 2),
        ((6, 8), 1, 1),
        ((8,), 0, 1),
        ((8,), 0, 2),
        ((5, 3), None, 1),
    ],
)
def test_ranges_of_tensor_parallel_shards_make_up_the_whole(shape, axis, blocks, tensor_ranks):
    entry = Parameter("name", shape, axis, blocks)
    whole = torch.randn(shape)
    pick = random.Random(1)
    for _ in range(20):
        rebuilt = torch.full(shape, float("nan"))
        for rank in range(tensor_ranks):
            flat = entry.shard(whole, tensor_ranks, rank).flatten()
            cuts = sorted({0, flat.numel(), *(pick.randrange(flat.numel()) for _ in range(3))})
            for first, stop in itertools.pairwise(cuts):
                # As ZeRO-3 pads its last part.
                padded = torch.cat([flat[first:stop], torch.full((3,), 9.0)])
                part = padded if stop == flat.numel() else flat[first:stop]
                shards = shards_of_range(entry, part, first, tensor_ranks, rank)
                assert shards.shape == shape
                for origin, box in shards.boxes.items():
                    place = tuple(slice(o, o + s) for o, s in zip(origin, box.shape, strict=True))
                    if axis is not None:
                        assert rebuilt[place].isnan().all()
                    rebuilt[place] = box
        assert torch.equal(rebuilt, whole)


def test_boxes_share_the_memory_of_the_range():
    flat = torch.zeros(10)
    shards = shards_of_range(Parameter("name", (4, 4)), flat, 3)
    for box in shards.boxes.values():
        box.fill_(1)
    assert flat.sum() == 10
    assert not shards_of_range(Parameter("name", (4, 4)), flat, 16).boxes  # only padding
