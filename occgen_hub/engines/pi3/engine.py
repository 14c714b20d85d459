"""The engines pi3 and pi3x."""

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
from occgen_hub.engines.weights import Weights, find_weights, load_network

if TYPE_CHECKING:
    from occgen_hub.engines.pi3.network import Pi3, Pi3X

MEMORY = Memory(150_000, 300_000, HEAD_VIEWS)
"""Rounded up from measurements in float32: 84,000 bytes per token in the trunk, 255,000 in pi3x's
heads."""


@dataclass(frozen=True)
class Pi3Engine(NetworkEngine):
    """The network pi3. Its unit of length is arbitrary."""

    name = "pi3"
    memory = MEMORY

    @property
    def patch(self) -> int:  # type: ignore[override]
        """Side of a patch in pixels."""
        return self.weights_file.checkpoint.sizes.patch

    @property
    def attention(self) -> Attention:  # type: ignore[override]
        """Every second block of the decoder attends to all views."""
        sizes = self.weights_file.checkpoint.sizes
        return Attention(sizes.decoder_depth // 2, sizes.width)

    def load(self, config: Config) -> Pi3Network:
        """The loaded network, cached for further episodes."""
        return Pi3Network(_loaded(self.weights_file, self.device, config.compile), self.device)


@dataclass(frozen=True)
class Pi3XEngine(Pi3Engine):
    """The network pi3x. It works in metres and accepts conditions."""

    name = "pi3x"
    metric = True

    def check(self, config: Config) -> None:
        """Accept any configuration."""


@dataclass(frozen=True)
class Pi3Network:
    """pi3 or pi3x on a device. Their confidence is a logit."""

    network: Pi3 | Pi3X
    device: str

    def predict(self, views: list[View]) -> Prediction:
        """Return the network's prediction for views."""
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
            found["descriptors"][0].cpu().numpy(),
        )


def open_pi3(weights: Path | None, device: str | None) -> Pi3Engine:
    """The engine pi3. Raises UsageError if its weights or the device are not available."""
    chosen = choose_device(device)  # First, because finding weights may take long.
    return Pi3Engine(find_weights("pi3", weights, missing=missing_weights()), chosen)


def open_pi3x(weights: Path | None, device: str | None) -> Pi3XEngine:
    """The engine pi3x. Raises UsageError if its weights or the device are not available."""
    chosen = choose_device(device)
    return Pi3XEngine(find_weights("pi3x", weights, missing=missing_weights()), chosen)


@lru_cache(maxsize=1)
def _loaded(weights: Weights, device: str, compiled: bool) -> Pi3 | Pi3X:
    checkpoint = weights.checkpoint
    assert checkpoint.network != "da3"
    network = load_network(checkpoint.network, weights.path, sizes=checkpoint.sizes, device=device)
    if compiled:
        network.compile_blocks()
    return network
