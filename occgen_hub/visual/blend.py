"""Blend one image into another by depth, and average it to its final size, in one pass."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from occgen_hub.jit import njit


@njit(nogil=True)
def blended(front, depth, behind, limit, factor):
    """(H, W, 3) uint8 from pictures `factor` times as wide and high.

    front, behind: (factor * H, factor * W, 3) uint8; a pixel is the front's where its depth, of
    the z-buffer, is below `limit`, else the one behind.
    """
    height, width = depth.shape[0] // factor, depth.shape[1] // factor
    picture = np.empty((height, width, 3), np.uint8)
    count = factor * factor
    for v in range(height):
        for u in range(width):
            red, green, blue = count // 2, count // 2, count // 2
            for y in range(factor * v, factor * v + factor):
                for x in range(factor * u, factor * u + factor):
                    if depth[y, x] < limit[y, x]:
                        red += front[y, x, 0]
                        green += front[y, x, 1]
                        blue += front[y, x, 2]
                    else:
                        red += behind[y, x, 0]
                        green += behind[y, x, 1]
                        blue += behind[y, x, 2]
            picture[v, u, 0] = red // count
            picture[v, u, 1] = green // count
            picture[v, u, 2] = blue // count
    return picture


def averaged(rgb: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    """(H, W, 3) from a picture `factor` times as wide and high."""
    shape = rgb.shape[:2]
    nothing = np.zeros(shape, np.float32)
    picture: NDArray[np.uint8] = blended(rgb, nothing, rgb, nothing, factor)
    return picture
