"""Engines: functions that reconstruct an episode, found through entry points."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points

from occgen_hub.config import Config
from occgen_hub.episode import Episode, Reconstruction
from occgen_hub.errors import UsageError

Engine = Callable[[Episode, Config], Reconstruction]


def engine_names() -> list[str]:
    """The engines that are installed."""
    return sorted({point.name for point in entry_points(group="occgen_hub.engines")})


def load_engine(name: str) -> Engine:
    """The engine of that name; raises UsageError when none is installed."""
    for point in entry_points(group="occgen_hub.engines"):
        if point.name == name:
            engine: Engine = point.load()
            return engine
    known = ", ".join(engine_names()) or "none"
    raise UsageError(f"--engine {name}: no such engine; installed are {known}.")
