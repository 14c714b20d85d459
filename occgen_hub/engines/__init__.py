"""Engines: they reconstruct an episode. Installed ones are found through entry points."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from occgen_hub.config import Config
from occgen_hub.episode import Episode
from occgen_hub.errors import OccGenError, UsageError
from occgen_hub.plugins import open_plugin, plugin_names
from occgen_hub.views import Views

AUTO = "auto"
Progress = Callable[[int], None]
"""Called with the number of frames reconstructed since the last call."""


class Engine(ABC):
    """Reconstructs episodes. An engine holds no weights, so it can be sent to other processes."""

    name: str

    def weights(self) -> dict[str, Any] | None:
        """The record of the network's weights in a dataset; None for an engine without a network.

        Keys: network, sha256, license, repo_id.
        """
        return None

    def check(self, config: Config) -> None:
        """Raise UsageError if this engine does not support the configuration."""
        if config.condition:
            raise UsageError(
                f"--condition: the engine {self.name} accepts no conditions; choose --engine pi3x "
                "or leave the option out."
            )

    def for_episode(self, episode: str, *, has_depth: bool) -> Engine:
        """The engine that reconstructs the episode with that id, by default this one."""
        return self

    def uses_device(self) -> bool:
        """Whether the engine runs a network, which needs a GPU to be fast."""
        return False

    def on(self, device: str | None) -> Engine:
        """The same engine on another device; None for a GPU if there is one.

        Raises UsageError if there is no such device.
        """
        return self

    @abstractmethod
    def reconstruct(
        self, episode: Episode, config: Config, scratch: Path, progress: Progress = lambda _: None
    ) -> Views:
        """Return depth and cameras of an episode's frames.

        scratch: a folder that the engine may create for data too large for memory. It is kept as
        long as the views are used. Raises OccGenError if the episode cannot be reconstructed.
        """


MissingWeights = Literal["fetch", "raise", "expect"]
"""What to do if weights are missing: download them, raise, or describe the published ones without
a file, which is enough to plan a build."""

_MISSING: ContextVar[MissingWeights] = ContextVar("missing", default="fetch")


def missing_weights() -> MissingWeights:
    """What to do if weights are missing, in the present context."""
    return _MISSING.get()


@contextmanager
def without_downloads(missing: MissingWeights = "raise") -> Iterator[None]:
    """Download no weights for engines opened in this block."""
    token = _MISSING.set(missing)
    try:
        yield
    finally:
        _MISSING.reset(token)


@dataclass(frozen=True)
class Auto(Engine):
    """Sensor depth for episodes that have it, else a network.

    network: None if there is none; missing: the reason for that, used in errors.
    """

    network: Engine | None = None
    missing: str = "there are no weights for a network, which needs no depth"
    name = AUTO

    def check(self, config: Config) -> None:
        """Check with the network if there is one, else as an engine without conditions."""
        if self.network is None:
            super().check(config)
        else:
            self.network.check(config)

    def for_episode(self, episode: str, *, has_depth: bool) -> Engine:
        """The engine `rgbd` for an episode with depth, else the network.

        Raises OccGenError if the episode has no depth and there is no network.
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
        """Whether there is a network."""
        return self.network is not None

    def on(self, device: str | None) -> Engine:
        """The same engine with its network on another device."""
        return self if self.network is None else replace(self, network=self.network.on(device))

    def reconstruct(
        self, episode: Episode, config: Config, scratch: Path, progress: Progress = lambda _: None
    ) -> Views:
        """Reconstruct with sensor depth or with the network, as `for_episode` chooses."""
        engine = self.for_episode(episode.id, has_depth=episode.read_depth is not None)
        return engine.reconstruct(episode, config, scratch, progress)


def engine_names() -> list[str]:
    """The names of the installed engines, and `auto`."""
    return [AUTO, *plugin_names("engine")]


def load_engine(name: str, weights: Path | None = None, device: str | None = None) -> Engine:
    """Open the engine of that name.

    weights: a file or folder; None for local or published ones; device: None takes a GPU if there
    is one. Raises UsageError if the engine, its weights or the device does not exist.
    """
    engine: Engine = open_plugin("engine", name, Engine, weights, device)
    return engine


def network_engine(
    weights: Path | None = None, device: str | None = None, *, commercial: bool = False
) -> Engine:
    """The network for `auto`: that of `weights`, else the first with weights of pi3x, pi3, da3.

    commercial: only consider networks whose published weights allow commercial use. Raises
    UsageError if there are no weights.
    """
    from occgen_hub.engines.weights import (
        COMMERCIAL,
        NAMES,
        identify_network,
        local_weights,
        published,
    )

    if weights is not None:
        return load_engine(identify_network(weights), weights, device)
    names = [name for name in NAMES if not commercial or published(name).license in COMMERCIAL]
    there = (name for name in names if local_weights(name) is not None)
    return load_engine(next(there, names[0]), None, device)


def check_license(engine: Engine) -> None:
    """Raise UsageError unless an engine's weights have a licence that allows commercial use."""
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
