"""The time of each stage of a build."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Adds up the seconds of named stages. Time in a nested stage counts only for that stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._within: list[float] = []

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time a block."""
        start = time.perf_counter()
        self._within.append(0.0)
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            own = elapsed - self._within.pop()
            self.seconds[stage] = self.seconds.get(stage, 0.0) + own
            if self._within:
                self._within[-1] += elapsed

    def add(self, other: Stopwatch) -> None:
        """Add the times of another thread's stopwatch."""
        for stage, spent in other.seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent
