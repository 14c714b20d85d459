"""The class of each point of a surface, by votes of the frames that see it."""

from __future__ import annotations

import numpy as np
from numba import prange
from numpy.typing import NDArray

from occgen_hub.fusion.depth_map import DepthMap, DepthMaps
from occgen_hub.fusion.evidence import NEAREST, SLANT_SIGMA, Tolerance, allowed, in_sight, spread
from occgen_hub.jit import njit
from occgen_hub.occupancy.point_blocks import sorted_into_blocks
from occgen_hub.prefetch import prefetch
from occgen_hub.taxonomy import UNLABELLED

CANDIDATES = 4
"""Number of classes counted for each point, the first ones that frames give. A fifth class replaces
the weakest."""


def point_classes(
    points: NDArray[np.float32], maps: DepthMaps, tolerance: Tolerance
) -> NDArray[np.uint8]:
    """(n,) uint8 classes of (n, 3) points of a surface, world metres; UNLABELLED without a vote.

    A frame votes for the class of the pixel at a point's projection, if it measured the point there
    within the tolerance. The weight is that of the depth, the inverse variance. The number and the
    order of frames are those of fusion. Pixels without a class do not vote; in a tie, the smallest
    id wins. Frames are processed in sequence and points in parallel, so the result does not depend
    on the number of threads. The views must have labels.
    """
    read_labels = maps.views.read_labels
    assert read_labels is not None
    blocks, order = sorted_into_blocks(points)
    count = len(points)
    names = np.zeros((count, CANDIDATES), np.uint8)
    weights, asked = np.zeros((count, CANDIDATES), np.float32), np.zeros(count, np.uint16)

    def seen(frame: int) -> tuple[DepthMap, NDArray[np.uint8]]:
        return maps(frame), np.ascontiguousarray(read_labels(frame), np.uint8)

    for view, labels in prefetch(seen, spread(maps.frames)):
        _vote(
            blocks.points, blocks.starts, blocks.lower, blocks.upper, view.pixels, labels,
            view.camera(), tolerance.values(), tolerance.max_frames, names, weights, asked,
        )  # fmt: skip
    classes = np.empty(count, np.uint8)
    classes[order] = _winners(names, weights, UNLABELLED)
    return classes


@njit(nogil=True, parallel=True, error_model="numpy")
def _vote(
    points, starts, low, high, pixels, labels, camera, tolerance, max_frames, names, weights, asked
):  # fmt: skip
    height, width = pixels.shape[:2]
    down, across = labels.shape[0] / height, labels.shape[1] / width
    for block in prange(len(starts) - 1):
        if not in_sight(low[block], high[block], camera, width, height):
            continue
        for n in range(starts[block], starts[block + 1]):
            if asked[n] >= max_frames:
                continue
            x = points[n, 0] - camera[9]
            y = points[n, 1] - camera[10]
            z = points[n, 2] - camera[11]
            depth = camera[2] * x + camera[5] * y + camera[8] * z
            if depth <= NEAREST:
                continue
            u = camera[12] * (camera[0] * x + camera[3] * y + camera[6] * z) / depth + camera[14]
            v = camera[13] * (camera[1] * x + camera[4] * y + camera[7] * z) / depth + camera[15]
            if not (0 <= u < width and 0 <= v < height):
                continue
            i, j = int(u), int(v)
            seen = np.float64(pixels[j, i, 0])
            if seen <= 0:
                continue
            gx, gy = np.float64(pixels[j, i, 1]), np.float64(pixels[j, i, 2])
            inverse = 1 / seen + gx * (u - 0.5 - i) + gy * (v - 0.5 - j)
            behind = (1 / inverse if inverse > 0 else seen) - depth
            slope = seen * seen * (abs(gx) + abs(gy))
            if abs(behind) > allowed(depth, slope, tolerance):
                continue
            name = labels[min(int(v * down), labels.shape[0] - 1), int(u * across)]
            if name == 0:
                continue
            asked[n] += 1
            square = depth * depth
            variance = tolerance[0] + (tolerance[1] + tolerance[2] * square) * square
            weight = 1 / (variance + (SLANT_SIGMA * slope) ** 2 + 1e-8)
            place = 0
            while place < CANDIDATES - 1 and names[n, place] != name and weights[n, place] > 0:
                place += 1
            if names[n, place] != name and weights[n, place] > 0:
                for other in range(CANDIDATES):
                    if weights[n, other] < weights[n, place]:
                        place = other
                weights[n, place] = 0.0
            names[n, place] = name
            weights[n, place] += weight


@njit(nogil=True)
def _winners(names, weights, none):
    """(n,) the names with the most weight, `none` without any weight."""
    out = np.empty(len(names), np.uint8)
    for n in range(len(names)):
        best = 0
        for place in range(1, CANDIDATES):
            more = weights[n, place] - weights[n, best]
            if more > 0 or (more == 0 and names[n, place] < names[n, best]):
                best = place
        out[n] = names[n, best] if weights[n, best] > 0 else none
    return out
