"""Engines: what reconstructs an episode, found through entry points."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal

from occgen_hub.config import Config
from occgen_hub.episode import Episode
from occgen_hub.errors import OccGenError, UsageError
from occgen_hub.views import Views

AUTO = "auto"
Progress = Callable[[int], None]
"""Called with the number of frames reconstructed since the last call."""


class Engine(ABC):
    """Reconstructs episodes, any number of them. Small, so that it is sent to other processes."""

    name: str

    def weights(self) -> dict[str, Any] | None:
        """What a dataset records of the network's weights; None for an engine without any."""
        return None

    def check(self, config: Config) -> None:
        """Raise UsageError where a configuration asks for what this engine cannot do."""
        if config.condition:
            raise UsageError(
                f"--condition: the engine {self.name} takes none; choose --engine pi3x or leave "
                "the option out."
            )

    def for_episode(self, episode: str, *, has_depth: bool) -> Engine:
        """The engine that reconstructs the episode of that id: this one."""
        return self

    def uses_device(self) -> bool:
        """Whether it runs a network, which wants a GPU."""
        return False

    def on(self, device: str | None) -> Engine:
        """The same engine on another device, as on another machine; None: a GPU if there is one.

        Raises UsageError when the device is not there.
        """
        return self

    @abstractmethod
    def reconstruct(
        self, episode: Episode, config: Config, scratch: Path, progress: Progress = lambda _: None
    ) -> Views:
        """The depth and the cameras of an episode's frames.

        scratch: a folder to make for what does not belong in memory. It stays as long as the
        views are used. Raises OccGenError when the episode cannot be reconstructed.
        """


MissingWeights = Literal["fetch", "raise", "expect"]
"""What to do about weights that are not there: fetch them, raise, or describe the published ones
without having them, which is enough for a plan."""

_MISSING: ContextVar[MissingWeights] = ContextVar("missing", default="fetch")


def missing_weights() -> MissingWeights:
    """What to do now about weights that are not there."""
    return _MISSING.get()


@contextmanager
def without_fetching(missing: MissingWeights = "raise") -> Iterator[None]:
    """Open engines in this block with the weights that are there: none are fetched."""
    token = _MISSING.set(missing)
    try:
        yield
    finally:
        _MISSING.reset(token)


Opener = Callable[[Path | None, str | None], Engine]
"""An entry point: from --weights and --device to an engine; raises UsageError where they do not
fit."""


@dataclass(frozen=True)
class Auto(Engine):
    """Sensor depth where there is any, else a network; if that is None, `missing` says why."""

    network: Engine | None = None
    missing: str = "there are no weights for a network, which would do without"
    name = AUTO

    def check(self, config: Config) -> None:
        """As the network does, if there is one."""
        if self.network is None:
            super().check(config)
        else:
            self.network.check(config)

    def for_episode(self, episode: str, *, has_depth: bool) -> Engine:
        """The engine `rgbd` for an episode with depth, else the network.

        Raises OccGenError where there is neither.
        """
        if has_depth:
            return load_engine("rgbd")
        if self.network is None:
            raise OccGenError(
                f"{episode}: has no depth images, and {self.missing}; choose a network with "
                "--engine, and fetch its weights with 'occgen-hub weights pull'."
            )
        return self.network

    def uses_device(self) -> bool:
        """As the network does, if there is one."""
        return self.network is not None

    def on(self, device: str | None) -> Engine:
        """The same with its network there."""
        return self if self.network is None else replace(self, network=self.network.on(device))

    def reconstruct(
        self, episode: Episode, config: Config, scratch: Path, progress: Progress = lambda _: None
    ) -> Views:
        """As the engine that suits the episode does."""
        engine = self.for_episode(episode.id, has_depth=episode.read_depth is not None)
        return engine.reconstruct(episode, config, scratch, progress)


def engine_names() -> list[str]:
    """The engines that are installed, and `auto`."""
    return [AUTO, *sorted({point.name for point in _points()})]


def load_engine(name: str, weights: Path | None = None, device: str | None = None) -> Engine:
    """The engine of that name; raises UsageError when it, its weights or the device is not there.

    weights: None for those that are there or can be fetched; device: None for a GPU if there is
    one.
    """
    for point in _points():
        if point.name == name:
            opener: Opener = point.load()
            return opener(weights, device)
    known = ", ".join(engine_names())
    raise UsageError(f"--engine {name}: no such engine; installed are {known}.")


def network_engine(
    weights: Path | None = None, device: str | None = None, *, commercial: bool = False
) -> Engine:
    """The network that `auto` takes: of the weights given, else pi3x, pi3 or da3, by those there.

    commercial: take only one whose published weights allow commercial use. Raises UsageError when
    there are none.
    """
    from occgen_hub.engines.weights import COMMERCIAL, NAMES, kind, present, published

    if weights is not None:
        return load_engine(kind(weights), weights, device)
    names = [name for name in NAMES if not commercial or published(name).license in COMMERCIAL]
    there = (name for name in names if present(name) is not None)
    return load_engine(next(there, names[0]), None, device)


def check_license(engine: Engine) -> None:
    """Raise UsageError where an engine's weights allow no commercial use, or do not say."""
    from occgen_hub.engines.weights import COMMERCIAL

    network = engine.network if isinstance(engine, Auto) else engine
    weights = None if network is None else network.weights()
    if network is None or weights is None or weights["license"] in COMMERCIAL:
        return
    raise UsageError(
        f"--license commercial: the weights of {network.name} are under the licence "
        f"{weights['license']}, which does not allow it; choose --engine da3, or leave the option "
        "out."
    )


@cache
def _points() -> tuple[EntryPoint, ...]:
    """Looked up once: it takes the metadata of every package that is installed."""
    return tuple(entry_points(group="occgen_hub.engines"))
