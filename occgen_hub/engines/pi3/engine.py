"""The engines pi3 and pi3x: the networks of this folder, as any network."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from occgen_hub.config import Config
from occgen_hub.engines import missing_weights
from occgen_hub.engines.network import (
    Attention,
    Memory,
    NetworkEngine,
    Prediction,
    View,
    choose_device,
)
from occgen_hub.engines.pi3.sizes import HEAD_VIEWS
from occgen_hub.engines.weights import Weights, find, load_network

if TYPE_CHECKING:
    from occgen_hub.engines.pi3.network import Pi3, Pi3X

MEMORY = Memory(150_000, 300_000, HEAD_VIEWS)
"""Measured in float32: 84,000 of a token in the trunk, 255,000 in pi3x's heads."""


@dataclass(frozen=True)
class Pi3Engine(NetworkEngine):
    """The network pi3. Its unit of length is its own."""

    name = "pi3"
    memory = MEMORY

    @property
    def patch(self) -> int:  # type: ignore[override]
        """Pixels."""
        return self.found.checkpoint.sizes.patch

    @property
    def attention(self) -> Attention:  # type: ignore[override]
        """Every second block of the decoder looks over all views."""
        sizes = self.found.checkpoint.sizes
        return Attention(sizes.decoder_depth // 2, sizes.width)

    def load(self, config: Config) -> Pi3Network:
        """The network, kept for the episodes to come."""
        return Pi3Network(_loaded(self.found, self.device, config.compile), self.device)


@dataclass(frozen=True)
class Pi3XEngine(Pi3Engine):
    """The network pi3x, in metres, which may be told what is known besides the images."""

    name = "pi3x"
    metric = True

    def check(self, config: Config) -> None:
        """Any configuration will do."""


@dataclass(frozen=True)
class Pi3Network:
    """Either network, on a device. Its confidence is a logit."""

    network: Pi3 | Pi3X
    device: str

    def predict(self, views: list[View]) -> Prediction:
        """What it makes of views."""
        import torch

        images = torch.from_numpy(np.stack([view.image for view in views])).to(self.device)
        known = {"depths": "depth", "intrinsics": "intrinsics", "poses": "pose"}
        conditions = {}
        for name, attribute in known.items():
            values = [getattr(view, attribute) for view in views]
            if values[0] is not None:
                conditions[name] = torch.from_numpy(np.stack(values)).to(self.device).float()[None]
        found = self.network(images.permute(0, 3, 1, 2).float()[None] / 255, **conditions)
        logit = found["conf"][0, ..., 0].cpu().numpy()
        with np.errstate(over="ignore", invalid="ignore"):
            confidence = (1 / (1 + np.exp(-logit))).astype(np.float32)
        return Prediction(
            found["camera_poses"][0].cpu().numpy().astype(np.float64),
            found["local_points"][0].cpu().numpy(),
            confidence,
            found["looks"][0].cpu().numpy(),
        )


def open_pi3(weights: Path | None, device: str | None) -> Pi3Engine:
    """The engine pi3; raises UsageError where its weights or the device cannot be had."""
    chosen = choose_device(device)  # First, because looking for weights may take long.
    return Pi3Engine(find("pi3", weights, missing=missing_weights()), chosen)


def open_pi3x(weights: Path | None, device: str | None) -> Pi3XEngine:
    """The engine pi3x; raises UsageError where its weights or the device cannot be had."""
    chosen = choose_device(device)
    return Pi3XEngine(find("pi3x", weights, missing=missing_weights()), chosen)


@lru_cache(maxsize=1)
def _loaded(weights: Weights, device: str, compiled: bool) -> Pi3 | Pi3X:
    checkpoint = weights.checkpoint
    assert checkpoint.network != "da3"
    network = load_network(checkpoint.network, weights.path, sizes=checkpoint.sizes, device=device)
    if compiled:
        network.compile_blocks()
    return network
