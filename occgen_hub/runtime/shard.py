"""Shards: disjoint shares of the episodes, balanced by cost, the same on every machine."""

from __future__ import annotations

import heapq
import re
from collections.abc import Sequence
from dataclasses import dataclass

from occgen_hub.errors import UsageError

MAX_SHARDS = 100_000


@dataclass(frozen=True)
class Shard:
    """Share `index` of `count`. Shards are numbered from 0, as ranks and array tasks are."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Parse "I/N". Raises UsageError unless 0 <= I < N <= MAX_SHARDS."""
        if not (match := re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)):
            raise UsageError(f"--shard {text}: expected I/N, such as 0/16 for the first of 16.")
        index, count = int(match[1]), int(match[2])
        if not index < count <= MAX_SHARDS:
            raise UsageError(
                f"--shard {text}: shards are numbered from 0, so the last of N shards (at most "
                f"{MAX_SHARDS}) is N-1/N."
            )
        return cls(index, count)


def share_out(costs: Sequence[float], count: int) -> list[list[int]]:
    """Distribute items over `count` shards of about equal cost; returns each shard's item indices.

    Items are assigned in order of falling cost, each to the shard with the lowest cost so far (R.
    L. Graham, "Bounds on multiprocessing timing anomalies", 1969), so the largest shard is at most
    a third above the optimum. Ties go to the first shard. Indices in a shard ascend. With fewer
    items than shards, some shards are empty.
    """
    least = [(0.0, 0, number) for number in range(count)]
    shards: list[list[int]] = [[] for _ in range(count)]
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        cost, held, number = heapq.heappop(least)
        shards[number].append(item)
        heapq.heappush(least, (cost + costs[item], held + 1, number))
    return [sorted(items) for items in shards]
