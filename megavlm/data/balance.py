"""Which samples of a step go together, so that no rank waits for one with more images."""

import heapq
from collections.abc import Sequence


def deal(images: Sequence[int], cells: int) -> list[list[int]]:
    """Deal items into cells: equally many in each, and images as evenly as a sort can.

    images: how many each item has; their number is a multiple of `cells`. Returns the items of each
    cell, ascending. Items with most images go first, each to the cell with fewest images so far
    ("longest processing time first", Graham 1969).
    """
    room = len(images) // cells
    assert room * cells == len(images)
    dealt: list[list[int]] = [[] for _ in range(cells)]
    lightest = [(0, cell) for cell in range(cells)]
    for item in sorted(range(len(images)), key=lambda i: -images[i]):
        load, cell = heapq.heappop(lightest)
        dealt[cell].append(item)
        if len(dealt[cell]) < room:
            heapq.heappush(lightest, (load + images[item], cell))
    return [sorted(items) for items in dealt]
