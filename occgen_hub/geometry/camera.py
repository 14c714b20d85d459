"""Pinhole cameras: pixel (u, v) has its centre at (u + 0.5, v + 0.5)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from occgen_hub.jit import njit

LEAST_RAYS, SAMPLED_RAYS = 16, 20_000
"""Intrinsics are fitted to no fewer rays, and to about so many of a view that has more."""

FIELD_OF_VIEW = (2.0, 170.0)
"""Degrees from edge to edge that a pinhole camera may plausibly have."""

EXPLAINED = 0.8
"""Share of the variance of a view's rays that their pixels have to explain."""


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


def fit_intrinsics(
    points: NDArray[np.floating], weights: NDArray[Any], size: tuple[int, int]
) -> NDArray[np.float64] | None:
    """(3, 3) float64 intrinsics, in pixels of an image, from what its pixels see.

    points: (H, W, 3) of a view of the image, resized to (H, W), in the camera's frame and any
    unit; weights: (H, W), 0 or False where a point does not count; size: (width, height) of the
    image, whose pixels the result is in. A point that is not finite or not in front is left out.

    Each axis by least squares of u = fx x/z + cx, robustly: depth edges have points beside their
    rays. None where no plausible camera fits: too few rays, those of an axis all in one column or
    row, rays that pixels do not explain, a field of view outside `FIELD_OF_VIEW`, a principal
    point outside the image.
    """
    height, width = weights.shape
    near = np.tan(np.radians(FIELD_OF_VIEW[1] / 2)) * points[..., 2]
    with np.errstate(invalid="ignore"):
        kept = np.isfinite(points).all(axis=2) & (weights > 0) & (points[..., 2] > 0)
        kept &= (np.abs(points[..., :2]) < near[..., None]).all(axis=2)
    pixels = np.flatnonzero(kept)
    pixels = pixels[:: 1 + len(pixels) // SAMPLED_RAYS]
    if len(pixels) < LEAST_RAYS:
        return None
    v, u = np.divmod(pixels, width)
    x, y, z = points.reshape(-1, 3)[pixels].astype(np.float64).T
    w = weights.ravel()[pixels].astype(np.float64)
    horizontal = _fit_axis((u + 0.5) * (size[0] / width), x / z, w, size[0])
    vertical = _fit_axis((v + 0.5) * (size[1] / height), y / z, w, size[1])
    if horizontal is None or vertical is None:
        return None
    (fx, cx), (fy, cy) = horizontal, vertical
    return np.array([[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]])


def _fit_axis(
    pixel: NDArray[np.float64], slope: NDArray[np.float64], weights: NDArray[np.float64], size: int
) -> tuple[float, float] | None:
    """Focal length and principal point of pixel = f slope + c, or None where it is no camera's.

    The slopes are fitted to the pixels, the other way round: pixels are exact, and noise in what
    is fitted from makes f too small.
    """
    trust = weights
    for _ in range(10):
        # Elementwise: a dot product of so few numbers spends its time on threads.
        share = trust / trust.sum()
        u, s = (share * pixel).sum(), (share * slope).sum()
        du, ds = pixel - u, slope - s
        uu, us, ss = (share * du * du).sum(), (share * du * ds).sum(), (share * ds * ds).sum()
        if uu <= 1e-6 * size**2 or us <= 0:
            return None
        error = ds - us / uu * du
        spread = 1.4826 * np.median(np.abs(error)) + 1e-9
        trust = weights / (1 + (error / (4 * spread)) ** 2) ** 2
    focal = uu / us
    principal = u - focal * s
    field = np.degrees(2 * np.arctan(size / (2 * focal)))
    plausible = FIELD_OF_VIEW[0] < field < FIELD_OF_VIEW[1] and 0 < principal < size
    explained = us**2 > EXPLAINED * uu * ss
    return (float(focal), float(principal)) if plausible and explained else None


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
    return unproject_trusted(depth, kept, K, depth_range)


def unproject_trusted(
    depth: NDArray[np.floating],
    trusted: NDArray[np.bool_],
    K: NDArray[np.floating],
    depth_range: tuple[float, float],
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """As `unproject`, of the pixels that (H, W) `trusted` names."""
    near, far = np.asarray(depth_range).astype(depth.dtype)
    points, pixels = _unproject(depth, trusted, K[0, 0], K[1, 1], K[0, 2], K[1, 2], near, far)
    return points, pixels


@njit(nogil=True)
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


@njit(nogil=True)
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
