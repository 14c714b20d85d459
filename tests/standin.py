"""Weights for tiny networks that are fitted to one recording.

All layers are random except the last ones, which are fitted by least squares. For the frames of
the recording, the network then predicts approximate depth and exact poses in a world of its own.
So tests can run the whole pipeline from images to a dataset with a known result.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from occgen_hub.config import Config
from occgen_hub.engines.frames import network_depth, network_image, network_size
from occgen_hub.engines.pi3.network import Pi3, Pi3X
from occgen_hub.engines.pi3.sizes import Sizes
from occgen_hub.engines.weights import load_network
from occgen_hub.episode import Episode
from occgen_hub.geometry.sim3 import Sim3

TINY = Sizes(
    width=64, heads=4, encoder_depth=1, encoder_registers=1, position_grid=5, decoder_depth=2,
    registers=2, head_depth=1, camera_width=64, upsampling=(16, 8, 8), metric_width=32,
    metric_heads=2, pose_blocks=(1,),
)  # fmt: skip
NETWORKS = {"pi3": Pi3, "pi3x": Pi3X}


def random_weights(name: str, sizes: Sizes = TINY, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every tensor of a network, with random values of usual magnitude, seeded by its name."""
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in NETWORKS[name](sizes).state_dict().items()}
    tensors = {}
    for key, shape in shapes.items():
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()) + seed)
        noise = torch.randn(shape, generator=generator)
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 1
        one_axis = len(shape) == 1 and not key.endswith("bias")
        tensors[key] = 1 + 0.05 * noise if one_axis else noise / math.sqrt(fan_in)
        if key.endswith("bias"):
            tensors[key] = 0.02 * noise
    tensors["image_mean"] = torch.full((1, 3, 1, 1), 0.45)
    tensors["image_std"] = torch.full((1, 3, 1, 1), 0.25)
    for key in tensors:
        if key.endswith("pos_embed"):
            tensors[key] = _smooth_positions(sizes, tensors[key])
    return tensors


def _smooth_positions(sizes: Sizes, noise: torch.Tensor) -> torch.Tensor:
    """Position embeddings from which a linear layer can compute row and column."""
    axis = torch.linspace(-1, 1, sizes.position_grid)
    row, column = torch.meshgrid(axis, axis, indexing="ij")
    one = torch.ones_like(row)
    basis = torch.stack((one, row, column, row * column, row**2, column**2)).flatten(1)
    smooth = basis.T @ noise[0, :6] * math.sqrt(sizes.width)
    return torch.cat((noise[:, :1], smooth[None]), dim=1)


def fit_weights(
    images: np.ndarray,
    local: np.ndarray,
    poses: np.ndarray,
    *,
    independent_views: bool = False,
    sizes: Sizes = TINY,
) -> dict[str, torch.Tensor]:
    """Weights of a pi3 that predicts `poses` exactly and `local` approximately for these images.

    images: (N, H, W, 3) uint8; local: (N, H, W, 3) points, z over 0; poses: (N, 4, 4). The network
    needs all images in one window; with `independent_views`, any subset works.
    """
    weights = random_weights("pi3", sizes)
    weights["conf_head.proj.bias"] += 3.0
    if independent_views:
        for part in ("ls1", "ls2"):
            weights[f"decoder.1.{part}.gamma"] *= 0
    network = load_network("pi3", weights, sizes=sizes)
    points: list[torch.Tensor] = []
    cameras: list[torch.Tensor] = []
    for layer, seen in (
        (network.point_head.proj, points),
        (network.camera_head.fc_t, cameras),
    ):
        layer.register_forward_hook(lambda _, given, __, seen=seen: seen.append(given[0].clone()))
    frames = torch.from_numpy(images).permute(0, 3, 1, 2).float()[None] / 255
    network(frames)
    x, y, z = torch.from_numpy(local).float().unbind(-1)
    maps = torch.stack((x / z, y / z, z.log()), dim=1)
    targets = torch.nn.functional.pixel_unshuffle(maps, sizes.patch).flatten(2).transpose(1, 2)
    pose = torch.from_numpy(poses).float()
    for name, given, wanted in (
        ("point_head.proj", torch.cat(points).flatten(0, 1), targets.flatten(0, 1)),
        ("camera_head.fc_t", torch.cat(cameras), pose[:, :3, 3]),
        ("camera_head.fc_rot", torch.cat(cameras), pose[:, :3, :3].flatten(1)),
    ):
        weights[f"{name}.weight"], weights[f"{name}.bias"] = _least_squares(given, wanted)
    return weights


def _least_squares(given: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the linear layer, by least squares."""
    ones = torch.ones(len(given), 1)
    solution = torch.linalg.lstsq(
        torch.cat((given, ones), dim=1).double(), wanted.double(), driver="gelsd"
    ).solution.float()
    return solution[:-1].T.contiguous(), solution[-1].contiguous()


def weights_fitted_to(
    episode: Episode, gauge: Sim3, config: Config, *, independent_views: bool = False
) -> dict[str, torch.Tensor]:
    """Weights of a pi3 that is fitted to an episode with depth, in a world of its own.

    gauge: network world from episode world.
    """
    size = network_size(episode.image_size, config.max_pixels, 14)
    frames = range(episode.length)
    images = np.stack([network_image(episode.read_rgb(t), size) for t in frames])
    depth = np.stack([network_depth(episode.read_depth(t), size) for t in frames])
    depth[depth <= 0] = 5.0
    K, factors = episode.intrinsics[0], np.divide(episode.image_size, size)
    u, v = ((np.arange(n) + 0.5) * f for n, f in zip(size, factors, strict=True))
    x = (u[None, None] - K[0, 2]) / K[0, 0] * depth
    y = (v[None, :, None] - K[1, 2]) / K[1, 1] * depth
    local = np.stack((x, y, depth), axis=-1) * gauge.scale
    return fit_weights(
        images, local, gauge.poses(episode.world_from_camera), independent_views=independent_views
    )


def save(folder: Path, name: str, weights: dict[str, torch.Tensor], sizes: Sizes = TINY) -> Path:
    """Write a checkpoint, model.safetensors and config.json, to a folder and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors")
    config = {"network": name, "license": "cc0-1.0", "sizes": sizes.model_dump(mode="json")}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
