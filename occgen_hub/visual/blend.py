"""Blend one image into another by depth, and average it to its final size, in one pass."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from occgen_hub.jit import njit


@njit(nogil=True)
def blended(front, depth, behind, limit, face, tint, factor):
    """(H, W, 3) uint8 from pictures `factor` times as wide and high.

    front, behind: (factor * H, factor * W, 3) uint8. A pixel is taken from `front` where its
    z-buffer `depth` is below `limit`, else from `behind`. face: (factor * H, factor * W) int32, the
    face shown by a pixel of `behind`, -1 for none; tint: (n, 4) uint8, for each face a colour to
    mix into its pixels, and its weight from 0 to 255.
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
                        continue
                    one, two, three = (
                        np.int64(behind[y, x, 0]), np.int64(behind[y, x, 1]),
                        np.int64(behind[y, x, 2]),
                    )  # fmt: skip
                    number = face[y, x]
                    if number >= 0 and tint[number, 3]:
                        share = np.int64(tint[number, 3])
                        one += (np.int64(tint[number, 0]) - one) * share // 255
                        two += (np.int64(tint[number, 1]) - two) * share // 255
                        three += (np.int64(tint[number, 2]) - three) * share // 255
                    red += one
                    green += two
                    blue += three
            picture[v, u, 0] = red // count
            picture[v, u, 1] = green // count
            picture[v, u, 2] = blue // count
    return picture


@njit(nogil=True)
def average_compiled(rgb, factor):
    """`averaged`, compiled."""
    height, width = rgb.shape[0] // factor, rgb.shape[1] // factor
    picture = np.empty((height, width, 3), np.uint8)
    count = factor * factor
    for v in range(height):
        for u in range(width):
            for channel in range(3):
                total = count // 2
                for y in range(factor * v, factor * v + factor):
                    for x in range(factor * u, factor * u + factor):
                        total += rgb[y, x, channel]
                picture[v, u, channel] = total // count
    return picture


def averaged(rgb: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    """(H, W, 3) from a picture `factor` times as wide and high."""
    picture: NDArray[np.uint8] = average_compiled(rgb, factor)
    return picture
