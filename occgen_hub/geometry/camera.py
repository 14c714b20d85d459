"""Pinhole cameras: pixel (u, v) has its centre at (u + 0.5, v + 0.5)."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray


def intrinsics_problem(K: NDArray[np.floating]) -> str | None:
    """What keeps a (3, 3) matrix from being a pinhole camera's, or None."""
    if not np.isfinite(K).all():
        return "holds numbers that are not finite"
    if K[0, 0] <= 0 or K[1, 1] <= 0 or not np.array_equal(K[2], [0, 0, 1]):
        return f"is not that of a camera (fx {K[0, 0]:g}, fy {K[1, 1]:g}, last row {K[2].tolist()})"
    if K[0, 1] != 0 or K[1, 0] != 0:
        return f"has skew ({K[0, 1]:g}), which pinhole rays do not have"
    return None


def scale_intrinsics(K: NDArray[np.floating], x: float, y: float) -> NDArray[np.float64]:
    """(..., 3, 3) intrinsics for an image resized by factors `x` and `y`."""
    return np.diag([x, y, 1.0]) @ K.astype(np.float64)


def unproject(
    depth: NDArray[np.float64],
    K: NDArray[np.floating],
    depth_range: tuple[float, float],
    depth_edge: float = 0.0,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The points that a depth image measured, in the camera's frame.

    depth: (H, W) float64, metres along the optical axis; K: (3, 3), pixels; depth_range: only
    depths within it, ends included; depth_edge: see `continues`, 0 keeps every pixel.
    Returns (n, 3) float64 points and their (n,) flat pixel numbers, row after row.
    """
    kept = continues(depth, depth_edge) if depth_edge > 0 else np.ones(depth.shape, np.bool_)
    points, pixels = _unproject(
        depth, kept, K[0, 0], K[1, 1], K[0, 2], K[1, 2], depth_range[0], depth_range[1]
    )
    return points, pixels


@njit(cache=True, nogil=True)
def _unproject(depth, kept, fx, fy, cx, cy, near, far):
    height, width = depth.shape
    points = np.empty((height * width, 3))
    pixels = np.empty(height * width, np.int64)
    count = 0
    for v in range(height):
        for u in range(width):
            z = depth[v, u]
            if kept[v, u] and near <= z <= far:
                points[count, 0] = (u + 0.5 - cx) / fx * z
                points[count, 1] = (v + 0.5 - cy) / fy * z
                points[count, 2] = z
                pixels[count] = v * width + u
                count += 1
    return points[:count], pixels[:count]


@njit(cache=True, nogil=True)
def continues(depth, tolerance):
    """(H, W) float64 depth to (H, W) bool: where the surface goes on to both sides on some line.

    Along the row, the column and the two diagonals, the inverse depth of a plane is linear in
    pixels whatever its slant, so its second difference, relative to itself, is zero on a surface
    and large across a jump. A pixel that no line carries on floats between two surfaces. (The 3x3
    range of depth, often used for this, also rejects any floor seen at a grazing angle.)
    A corner pixel of the image has no such line and stays.
    """
    height, width = depth.shape
    kept = np.zeros((height, width), np.bool_)
    for v in range(height):
        for u in range(width):
            if depth[v, u] <= 0.0:
                continue
            here = 1.0 / depth[v, u]
            inside = False
            for dv, du in ((0, 1), (1, 0), (1, 1), (1, -1)):
                v0, u0, v1, u1 = v - dv, u - du, v + dv, u + du
                if v0 < 0 or v1 >= height or min(u0, u1) < 0 or max(u0, u1) >= width:
                    continue
                inside = True
                if depth[v0, u0] <= 0.0 or depth[v1, u1] <= 0.0:
                    continue
                bend = 1.0 / depth[v0, u0] + 1.0 / depth[v1, u1] - 2.0 * here
                if abs(bend) <= tolerance * here:
                    kept[v, u] = True
                    break
            if not inside:
                kept[v, u] = True
    return kept
