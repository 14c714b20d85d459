"""Full-size random checkpoints, with which the reference vectors were computed."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np
import torch

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet."""


def random_tensors(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Tensors of the given names and shapes, filled with random numbers seeded by the name."""
    return {name: torch.from_numpy(_tensor(name, shape)) for name, shape in shapes.items()}


def _tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name in ("image_mean", "image_std"):
        return np.array(MEAN if name == "image_mean" else STD, np.float32).reshape(shape)
    stream = np.random.Generator(np.random.Philox(key=zlib.crc32(name.encode())))
    values = stream.standard_normal(shape, dtype=np.float32)
    last = name.split(".")[-1]
    mean, spread = 0.0, 1 / np.sqrt(np.prod(shape[1:]))
    if last == "gamma":
        mean, spread = 0.2, 0.02
    elif last == "bias":
        spread = 0.02
    elif len(shape) == 1:
        mean, spread = 1.0, 0.05
    elif last.endswith(("token", "tokens", "embed", "emb")):
        spread = 0.02
    values *= np.float32(spread)
    values += np.float32(mean)
    return values
