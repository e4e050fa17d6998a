"""Which samples of a step go together, so that no rank waits for one with more to do."""

import heapq
from collections.abc import Sequence
from itertools import islice


def deal(images: Sequence[int], text_bytes: Sequence[int], cells: int) -> list[list[int]]:
    """Deal items into cells: equally many in each, and images as evenly as a sort can.

    Where the items do not divide, the first cells have one more. images: how many each item has.
    text_bytes: likewise; texts are dealt evenly as far as the images leave it open. Returns the
    items of each cell, ascending. Items with most images go first, each to the cell with fewest
    images so far ("longest processing time first", Graham 1969).
    """
    room = _shares(len(images), cells)
    dealt: list[list[int]] = [[] for _ in range(cells)]
    lightest = [(0, 0, cell) for cell in range(cells) if room[cell]]
    for item in sorted(range(len(images)), key=lambda i: (-images[i], -text_bytes[i])):
        image_load, text_load, cell = heapq.heappop(lightest)
        dealt[cell].append(item)
        if len(dealt[cell]) < room[cell]:
            loads = (image_load + images[item], text_load + text_bytes[item], cell)
            heapq.heappush(lightest, loads)
    return [sorted(items) for items in dealt]


def deal_by_length(
    images: Sequence[int], text_bytes: Sequence[int], micro_batches: int, ranks: int
) -> list[list[int]]:
    """As `deal` to micro-batches of all ranks, but those with texts of like length go together."""
    ascending = iter(sorted(range(len(images)), key=lambda i: text_bytes[i]))
    shares = _shares(len(images), micro_batches * ranks)
    cells: list[list[int]] = []
    for first in range(0, len(shares), ranks):
        items = list(islice(ascending, sum(shares[first : first + ranks])))
        dealt = deal([images[i] for i in items], [text_bytes[i] for i in items], ranks)
        cells += [sorted(items[i] for i in cell) for cell in dealt]
    return cells


def _shares(items: int, cells: int) -> list[int]:
    """How many items each cell has. The larger come first, so that ranks have them together."""
    return [items // cells + (cell < items % cells) for cell in range(cells)]


def within(images: Sequence[int], most: int) -> list[int]:
    """Items of a cell, ascending, that have no more images than `most` together; fewest first."""
    kept: list[int] = []
    for item in sorted(range(len(images)), key=lambda i: images[i]):
        most -= images[item]
        if most >= 0:
            kept.append(item)
    return sorted(kept)
