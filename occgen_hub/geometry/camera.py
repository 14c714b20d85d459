"""Pinhole cameras. Pixel (u, v) has its centre at (u + 0.5, v + 0.5)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occgen_hub.jit import njit

MIN_RAYS, SAMPLED_RAYS = 16, 20_000
"""Fewest rays to which intrinsics are fitted, and about how many are used of a view with more."""

FIELD_OF_VIEW = (2.0, 170.0)
"""Plausible fields of view of a pinhole camera, in degrees from edge to edge."""

MAX_FIELD_OF_VIEW = 175.0
"""A larger field of view means that intrinsics are not in pixels, for example normalised. Degrees
from edge to edge."""

MIN_EXPLAINED = 0.8
"""Smallest share of the variance of a view's rays that a pinhole camera must explain."""


def intrinsics_problem(K: NDArray[np.floating], size: tuple[int, int] | None = None) -> str | None:
    """Why a (3, 3) matrix is not of a pinhole camera. None if it is.

    size: (width, height) of its images in pixels, None if unknown.
    """
    if not np.isfinite(K).all():
        return "has numbers that are not finite"
    if K[0, 0] <= 0 or K[1, 1] <= 0 or not np.array_equal(K[2], [0, 0, 1]):
        return f"is not of a camera (fx {K[0, 0]:g}, fy {K[1, 1]:g}, last row {K[2].tolist()})"
    if K[0, 1] != 0 or K[1, 0] != 0:
        return f"has skew ({K[0, 1]:g}), which pinhole rays do not have"
    if size is not None:
        for name, focal, pixels in zip(("fx", "fy"), (K[0, 0], K[1, 1]), size, strict=True):
            field = math.degrees(2 * math.atan2(pixels, 2 * float(focal)))
            if field > MAX_FIELD_OF_VIEW:
                return (
                    f"has a field of view of {field:.1f} degrees ({name} {focal:g} for {pixels} "
                    "pixels), which no pinhole camera has, and must be in pixels"
                )
    return None


def scale_intrinsics(K: NDArray[np.floating], x: float, y: float) -> NDArray[np.float64]:
    """(..., 3, 3) intrinsics for an image resized by factors `x` and `y`."""
    return np.diag([x, y, 1.0]) @ K.astype(np.float64)


def fit_intrinsics(
    points: NDArray[np.floating], weights: NDArray[Any], size: tuple[int, int]
) -> NDArray[np.float64] | None:
    """Fit (3, 3) float64 intrinsics, in pixels of an image, to the points that its pixels show.

    points: (H, W, 3), the points of the image reduced to (H, W) pixels, in the camera's frame and
    any unit; weights: (H, W), 0 or False for points to ignore; size: (width, height) of the image
    in pixels. Points that are not finite or not in front of the camera are ignored.

    Each axis is fitted by robust least squares of u = fx x/z + cx, since points at depth edges are
    off their rays. Returns None if no plausible camera fits: too few rays, rays in one column or
    row only, rays that are not a function of the pixels, a field of view outside `FIELD_OF_VIEW`,
    or a principal point outside the image.
    """
    height, width = weights.shape
    near = np.tan(np.radians(FIELD_OF_VIEW[1] / 2)) * points[..., 2]
    with np.errstate(invalid="ignore"):
        kept = np.isfinite(points).all(axis=2) & (weights > 0) & (points[..., 2] > 0)
        kept &= (np.abs(points[..., :2]) < near[..., None]).all(axis=2)
    pixels = np.flatnonzero(kept)
    pixels = pixels[:: 1 + len(pixels) // SAMPLED_RAYS]
    if len(pixels) < MIN_RAYS:
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
    """Focal length and principal point of pixel = f slope + c, or None if not plausible.

    The slopes are fitted as a function of the pixels, not the reverse: pixels are exact, and noise
    in the independent variable would make f too small.
    """
    trust = weights
    for _ in range(10):
        # Elementwise, because a dot product of few numbers spends its time on threads.
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
    explained = us**2 > MIN_EXPLAINED * uu * ss
    return (float(focal), float(principal)) if plausible and explained else None


def unproject(
    depth: NDArray[np.float64],
    K: NDArray[np.floating],
    depth_range: tuple[float, float],
    depth_edge: float = 0.0,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The points of a depth image in the camera's frame.

    depth: (H, W) float64, metres along the optical axis; K: (3, 3), pixels; depth_range: the range
    of depths to use, inclusive; depth_edge: see `continues`, 0 uses every pixel. Returns (n, 3)
    float64 points and their (n,) flat pixel indices, row by row.
    """
    kept = continues(depth, depth_edge) if depth_edge > 0 else np.ones(depth.shape, np.bool_)
    return unproject_trusted(depth, kept, K, depth_range)


def unproject_trusted(
    depth: NDArray[np.floating],
    trusted: NDArray[np.bool_],
    K: NDArray[np.floating],
    depth_range: tuple[float, float],
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Like `unproject`, for the pixels in the (H, W) mask `trusted`."""
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
    """(H, W) bool: whether the surface continues to both sides of a pixel along some line.

    depth: (H, W) float64; tolerance: largest second difference of inverse depth, relative to it.
    Along a row, a column or a diagonal, the inverse depth of a plane at any slant is linear in
    pixels, so its second difference is zero on a surface and large across a jump. A pixel where it
    is large on all four lines lies between two surfaces. The range of depth in 3 x 3 pixels, a
    common criterion, also rejects floors seen at a grazing angle. The corner pixels of the image
    have no such line and are kept.
    """
    height, width = depth.shape
    kept = np.zeros((height, width), np.bool_)
    for v in range(height):
        for u in range(width):
            if depth[v, u] <= 0.0:
                continue
            inverse = 1.0 / depth[v, u]
            inside = False
            for dv, du in ((0, 1), (1, 0), (1, 1), (1, -1)):
                v0, u0, v1, u1 = v - dv, u - du, v + dv, u + du
                if v0 < 0 or v1 >= height or min(u0, u1) < 0 or max(u0, u1) >= width:
                    continue
                inside = True
                if depth[v0, u0] <= 0.0 or depth[v1, u1] <= 0.0:
                    continue
                bend = 1.0 / depth[v0, u0] + 1.0 / depth[v1, u1] - 2.0 * inverse
                if abs(bend) <= tolerance * inverse:
                    kept[v, u] = True
                    break
            if not inside:
                kept[v, u] = True
    return kept
