import random
from itertools import pairwise

import pytest

from megavlm.data.balance import deal, deal_by_length, within


def random_cases(seed: int, *, rooms: tuple[int, ...], most_images: int):
    generator = random.Random(seed)
    for _ in range(100):
        cells, room = generator.randint(2, 4), generator.choice(rooms)
        yield [generator.randint(0, most_images) for _ in range(cells * room)], cells


def with_any_texts(images: list[int], cells: int) -> list[list[int]]:
    """Images are dealt alike however long the texts are."""
    generator = random.Random(sum(images))
    return deal(images, [generator.randrange(9) for _ in images], cells)


def loads(images: list[int], dealt: list[list[int]]) -> list[int]:
    return [sum(images[i] for i in cell) for cell in dealt]


def least_heaviest(images: list[int], cells: int) -> int:
    """The heaviest cell's images when the items are dealt as well as can be, by trying all ways."""
    room = len(images) // cells
    reached = {((0, 0),) * cells}
    for item in images:
        # Cells are alike, so that states are kept sorted.
        reached = {
            tuple(sorted((*state[:c], (state[c][0] + item, state[c][1] + 1), *state[c + 1 :])))
            for state in reached
            for c in range(cells)
            if state[c][1] < room
        }
    return min(max(load for load, _ in state) for state in reached)


def test_every_item_is_dealt_once_and_every_cell_has_as_many():
    for images, cells in random_cases(0, rooms=(1, 2, 5, 9), most_images=5):
        dealt = with_any_texts(images, cells)
        assert sorted(item for cell in dealt for item in cell) == list(range(len(images)))
        assert {len(cell) for cell in dealt} == {len(images) // cells}
        assert all(cell == sorted(cell) for cell in dealt)


def test_samples_with_one_image_or_none_are_dealt_perfectly():
    for images, cells in random_cases(1, rooms=(1, 3, 8), most_images=1):
        assert max(loads(images, with_any_texts(images, cells))) == -(-sum(images) // cells)
        assert min(loads(images, with_any_texts(images, cells))) == sum(images) // cells


def test_two_items_a_cell_are_dealt_as_well_as_can_be():
    for images, cells in random_cases(2, rooms=(1, 2), most_images=9):
        assert max(loads(images, with_any_texts(images, cells))) == least_heaviest(images, cells)


def test_three_items_a_cell_stay_within_the_bound_of_the_sort():
    for images, cells in random_cases(3, rooms=(3,), most_images=9):
        # 4/3 - 1/(3 cells): Kellerer and Woeginger 1993, for three items in each cell.
        bound = (4 * cells - 1) * least_heaviest(images, cells)
        assert 3 * cells * max(loads(images, with_any_texts(images, cells))) <= bound


def test_texts_are_dealt_evenly_where_images_leave_it_open():
    generator = random.Random(4)
    text_bytes = [generator.randint(10, 200) for _ in range(256)]
    dealt = deal([1] * 256, text_bytes, 8)
    sums = loads(text_bytes, dealt)
    assert max(sums) - min(sums) <= 10
    assert loads([1] * 256, dealt) == [32] * 8


def test_texts_of_like_length_go_together():
    generator = random.Random(5)
    text_bytes = [generator.randint(10, 200) for _ in range(64)]
    images = [generator.randint(0, 2) for _ in range(64)]
    cells = deal_by_length(images, text_bytes, micro_batches=4, ranks=2)
    assert sorted(item for cell in cells for item in cell) == list(range(64))
    spans = []
    for micro_batch in range(4):
        ranks = cells[2 * micro_batch : 2 * micro_batch + 2]
        lengths = [text_bytes[item] for cell in ranks for item in cell]
        spans.append((min(lengths), max(lengths)))
        counts = loads(images, ranks)
        assert max(counts) - min(counts) <= 1
    assert all(longest <= shortest for (_, longest), (shortest, _) in pairwise(spans))


@pytest.mark.parametrize(
    ("most", "kept"), [(9, [0, 1, 2, 3]), (4, [1, 2, 3]), (1, [1, 3]), (0, [3])]
)
def test_what_has_most_images_finds_no_room(most, kept):
    assert within([5, 1, 3, 0], most) == kept


@pytest.mark.parametrize("images", [0, 1, 3])
def test_items_that_are_alike_make_cells_that_are_alike(images):
    assert loads([images] * 24, with_any_texts([images] * 24, 8)) == [3 * images] * 8


def test_a_deal_by_hand():
    assert deal([0, 3, 4, 2, 1, 0], [0] * 6, 2) == [[0, 2, 4], [1, 3, 5]]


def test_what_does_not_divide_gives_the_first_cells_one_more():
    images, text_bytes = [1, 0, 2, 1, 1, 0, 3, 1, 0, 1, 2], list(range(11))
    for dealt in (deal(images, text_bytes, 4), deal_by_length(images, text_bytes, 2, 2)):
        assert [len(cell) for cell in dealt] == [3, 3, 3, 2]
        assert sorted(item for cell in dealt for item in cell) == list(range(11))
        assert max(loads(images, dealt)) <= 4
    assert [len(cell) for cell in deal([1] * 2, [0] * 2, 3)] == [1, 1, 0]
