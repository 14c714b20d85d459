"""Sharing episodes out: disjoint, balanced by their work, the same for the same episodes."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def shares(work: Sequence[float], count: int) -> list[list[int]]:
    """The numbers of the items that each of `count` takes, so that all have about the same work.

    The largest items go first, each to whoever has the least so far (R. L. Graham, "Bounds on
    multiprocessing timing anomalies", 1969): no share is more than a third above the best possible.
    Of equal ones, the first. A share is in the order of the items; some are empty if there are
    fewer items than shares.
    """
    least = [(0.0, 0, number) for number in range(count)]
    taken: list[list[int]] = [[] for _ in range(count)]
    for item in sorted(range(len(work)), key=lambda item: (-work[item], item)):
        load, held, number = heapq.heappop(least)
        taken[number].append(item)
        heapq.heappush(least, (load + work[item], held + 1, number))
    return [sorted(items) for items in taken]
