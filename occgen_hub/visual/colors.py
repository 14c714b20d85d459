"""Colours shared by all images."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

INK = (235, 235, 235)
PAPER = (24, 26, 30)
FAINT = (150, 154, 162)
PATH = (255, 92, 74)
AHEAD = (120, 62, 56)
"""Colour of the future part of a path."""
SCENE = (139, 118, 99)
"""Stands in legends for the cloud, which has the colours of the images."""
MOVING = (255, 74, 216)
"""Colour of cells with moving objects: pink, which no ramp or path uses."""
# A ramp for depth or height that works in grey too: dark blue, teal, yellow.
RAMP = np.array([(48, 25, 95), (45, 90, 150), (35, 150, 140), (120, 200, 90), (250, 230, 60)])
# A ramp that contrasts with wood, plaster and cloth: blue, teal, yellow.
OCCUPANCY = np.array(
    [(40, 86, 204), (28, 152, 216), (44, 198, 164), (154, 216, 76), (252, 228, 62)]
)

PAST = (104, 108, 126)
"""Grey to mix into the colours of cells of past frames."""

PAST_SHARE = 0.62


def faded(colors: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(n, 3) colours of cells of past frames, from their (n, 3) colours in the current frame."""
    mixed = colors + PAST_SHARE * (np.array(PAST) - colors)
    return np.asarray(mixed, np.uint8)


def ramp(values: NDArray[np.floating], stops: NDArray[np.int64] = RAMP) -> NDArray[np.uint8]:
    """Map (...) values from 0 to 1 to (..., 3) colours, between evenly spaced (n, 3) `stops`."""
    place = np.clip(values, 0, 1) * (len(stops) - 1)
    low = np.minimum(place.astype(int), len(stops) - 2)
    part = (place - low)[..., None]
    colors: NDArray[np.uint8] = np.rint(stops[low] * (1 - part) + stops[low + 1] * part).astype(
        np.uint8
    )
    return colors


def limits(values: NDArray[np.floating]) -> tuple[float, float]:
    """The ends of a colour scale for (n,) values, n > 0: their 1st and 99th percentiles."""
    low, high = np.percentile(values, [1, 99])
    return float(low), float(high)


def by_height(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """(n, 3) colours of (n,) heights on a scale between `limits`."""
    if not len(values):
        return np.zeros((0, 3), np.uint8)
    low, high = limits(values)
    return ramp((values - low) / max(high - low, 1e-6))


def shade_depth(depth: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Colours of depth, linear in inverse depth: near is bright, 0 (none) is black."""
    some = depth > 0
    if not some.any():
        return np.zeros((*depth.shape, 3), np.uint8)
    inverse = np.divide(1.0, depth, out=np.zeros_like(depth), where=some)
    low, high = limits(inverse[some])
    picture = ramp((inverse - low) / max(high - low, 1e-9))
    picture[~some] = 0
    return picture
