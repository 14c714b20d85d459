"""Resizing frames for the networks, and finding edges in their depth."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def network_size(size: tuple[int, int], max_pixels: int, patch: int) -> tuple[int, int]:
    """(width, height) in pixels to which an image of `size` is resized, smaller or larger.

    Both are multiples of `patch`, with about the image's aspect ratio, and their product is close
    to `max_pixels` and not above it, as in pi3's own loader.
    """
    scale = math.sqrt(max_pixels / (size[0] * size[1]))
    width, height = size[0] * scale, size[1] * scale
    columns, rows = round(width / patch), round(height / patch)
    while columns * rows * patch * patch > max_pixels and columns > 1 and rows > 1:
        if columns / rows > width / height:
            columns -= 1
        else:
            rows -= 1
    most = max(1, max_pixels // (patch * patch))
    return patch * max(1, min(columns, most)), patch * max(1, min(rows, most))


def network_image(rgb: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize an (H, W, 3) uint8 image to `size` (width, height) with a Lanczos filter."""
    return np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.LANCZOS))


def network_depth(depth: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.float32]:
    """Resize (H, W) depth to `size` (width, height), taking the nearest pixel; float32."""
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(np.int64)
        for new, old in zip(size[::-1], depth.shape, strict=True)
    )
    return depth[np.ix_(rows, columns)].astype(np.float32)


def depth_edges(depth: NDArray[np.floating], tolerance: float) -> NDArray[np.bool_]:
    """(N, H, W) bool: where the range of depth in 3 x 3 pixels exceeds `tolerance` times the depth.

    At such edges networks connect surfaces that are apart. With a tolerance of 0 there are no
    edges.
    """
    if tolerance <= 0:
        return np.zeros(depth.shape, np.bool_)
    high, low = depth, depth
    for axis in (1, 2):
        width = [(1, 1) if n == axis else (0, 0) for n in range(3)]
        padded = np.pad(high, width, "edge"), np.pad(low, width, "edge")
        high, low = (
            extreme.reduce([np.take(p, range(s, s + depth.shape[axis]), axis) for s in range(3)])
            for extreme, p in zip((np.maximum, np.minimum), padded, strict=True)
        )
    edges: NDArray[np.bool_] = high - low > tolerance * depth
    return edges
