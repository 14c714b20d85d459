"""The engine da3: Depth Anything 3, run by its own package.

See "Depth Anything 3: Recovering the Visual Space from Any Views" (arXiv 2511.10647). The package
is optional (`scripts/setup.sh --with-da3`).
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from occgen_hub.config import Config
from occgen_hub.engines import missing_weights
from occgen_hub.engines.frames import network_size
from occgen_hub.engines.network import (
    Attention,
    Memory,
    NetworkEngine,
    Prediction,
    View,
    choose_device,
    unproject,
)
from occgen_hub.engines.weights import Weights, find_weights, tensors_of
from occgen_hub.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

MAX_SIDE = 504
"""Longer side of the images that the network was trained with, pixels."""

DESCRIPTOR_LAYER = 3
"""The last block that processes each view on its own."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PREFIX = "model."
"""Prefix of the tensors' names in a published file."""


@dataclass(frozen=True)
class Da3Engine(NetworkEngine):
    """Depth Anything 3. Its unit of length is arbitrary."""

    name = "da3"
    memory = Memory(150_000)
    attention = Attention(4, 768)

    def input_size(self, image_size: tuple[int, int], config: Config) -> tuple[int, int]:
        """(width, height) in pixels, the longer at most `MAX_SIDE`."""
        shorter = min(image_size) / max(image_size) * MAX_SIDE
        max_pixels = min(config.max_pixels, int(MAX_SIDE * max(shorter, self.patch)))
        return network_size(image_size, max_pixels, self.patch)

    def load(self, config: Config) -> Da3Network:
        """The loaded network, cached for further episodes. It is not compiled."""
        return Da3Network(_loaded(self.weights_file, self.device), self.device)


@dataclass(frozen=True)
class Da3Network:
    """The package's network on a device."""

    network: nn.Module
    device: str

    def predict(self, views: list[View]) -> Prediction:
        """Return the network's prediction for views.

        The network gives camera_from_world poses, and a confidence of 1 + exp(x), of which
        1 - 1 / confidence is the logistic function of x.
        """
        import torch

        images = torch.from_numpy(np.stack([view.image for view in views])).to(self.device)
        mean, std = (torch.tensor(values, device=self.device) for values in (MEAN, STD))
        x = ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)[None]
        half = self.device != "cpu" and torch.cuda.is_bf16_supported()
        with (
            torch.inference_mode(),
            torch.autocast(self.device.partition(":")[0], torch.bfloat16, enabled=half),
        ):
            found = self.network(
                x, export_feat_layers=[DESCRIPTOR_LAYER], ref_view_strategy="saddle_balanced"
            )

        def array(values: Tensor) -> NDArray[np.float32]:
            return values[0].float().cpu().numpy()

        camera_from_world = array(found["extrinsics"]).astype(np.float64)
        world_from_camera = np.tile(np.eye(4), (len(views), 1, 1))
        R = camera_from_world[:, :3, :3].transpose(0, 2, 1)
        world_from_camera[:, :3, :3] = R
        world_from_camera[:, :3, 3] = -np.einsum("nij,nj->ni", R, camera_from_world[:, :3, 3])
        descriptors = array(found["aux"][f"feat_layer_{DESCRIPTOR_LAYER}"]).mean(axis=(1, 2))
        return Prediction(
            world_from_camera,
            unproject(array(found["depth"]), array(found["intrinsics"])),
            (1 - 1 / np.maximum(array(found["depth_conf"]), 1)).astype(np.float32),
            descriptors.astype(np.float32),
        )


def open_da3(weights: Path | None, device: str | None) -> Da3Engine:
    """The engine da3. Raises UsageError if its package, its weights or the device is missing."""
    check_installed()
    chosen = choose_device(device)
    return Da3Engine(find_weights("da3", weights, missing=missing_weights()), chosen)


def check_installed() -> None:
    """Raise UsageError if the package of Depth Anything 3 is not installed."""
    needed = ("depth_anything_3", "einops", "omegaconf", "addict", "antlr4")
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"--engine da3: its package is not installed ({', '.join(missing)} cannot be "
            "imported); run 'scripts/setup.sh --with-da3', or 'pip install --no-deps -r "
            "requirements-da3.lock' in a checkout."
        )


def tensor_shapes(preset: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in the weights file of a model such as da3-base."""
    tensors = build_network(preset).state_dict()
    return {PREFIX + name: tuple(tensor.shape) for name, tensor in tensors.items()}


def build_network(preset: str) -> nn.Module:
    """A model of the package, such as da3-base, with tensors that have no memory."""
    check_installed()
    from accelerate import init_empty_weights

    os.environ.setdefault("DA3_LOG_LEVEL", "WARN")  # By default it logs every pass.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import depth_anything_3
        from depth_anything_3.cfg import create_object, load_config

    folder = Path(depth_anything_3.__path__[0]) / "configs"
    with init_empty_weights(include_buffers=False):
        network: nn.Module = create_object(load_config(str(folder / f"{preset}.yaml")))
    return network


@lru_cache(maxsize=1)
def _loaded(weights: Weights, device: str) -> nn.Module:
    network = build_network(weights.checkpoint.preset)
    tensors = {
        name.removeprefix(PREFIX): tensor
        for name, tensor in tensors_of(weights.path, device).items()
    }
    network.load_state_dict(tensors, strict=True, assign=True)
    return network.to(device).requires_grad_(False).eval()
