"""A depth map for fusion: the surface through each pixel, and which pixels to trust."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from occgen_hub.geometry.camera import continues
from occgen_hub.jit import njit
from occgen_hub.views import Views

TURN = 5.0
"""Smallest change of the surface normal at an edge between two objects, degrees."""


_AROUND = np.array([(-1, 0), (0, 1), (1, 0), (0, -1)])
"""Rows and columns to the four neighbours of a pixel, clockwise."""


@dataclass(frozen=True)
class DepthMap:
    """One frame's depth, with its camera.

    Near the centre of pixel (u, v) the inverse depth is assumed to be
    `1 / depth + along_x * du + along_y * dv`, which is exact for a plane at any slant.

    Attributes:
        depth: (h, w) float32, metres along the optical axis, 0 for none.
        trusted: (h, w) bool, pixels that lie on a surface, and not between two.
        pixels: (h, w, 4) float32: the depth, 0 if it is not trusted; `along_x` and `along_y`, the
            change of the inverse depth per pixel (the smaller of the differences to the two
            neighbours, so that a pixel beside an edge stays on its own surface); and the smallest
            depth in the 3 x 3 pixels around it, trusted or not, 0 if there is none.
        K: (3, 3) float64, intrinsics in pixels of this map.
        world_from_camera: (4, 4) float64, OpenCV axes, metres.
    """

    depth: NDArray[np.float32]
    trusted: NDArray[np.bool_]
    pixels: NDArray[np.float32]
    K: NDArray[np.float64]
    world_from_camera: NDArray[np.float64]

    def camera(self) -> NDArray[np.float64]:
        """See `camera_values`."""
        return camera_values(self.world_from_camera, self.K)


@dataclass(frozen=True)
class DepthMaps:
    """The depth maps of views, made on demand. Thread-safe.

    confidence: depth with at most this confidence is ignored; edge: relative tolerance of the rules
    that find pixels between two surfaces, 0 trusts every pixel with depth.
    """

    views: Views
    confidence: float
    edge: float

    def __call__(self, frame: int) -> DepthMap:
        """The depth map of a frame."""
        views = self.views
        depth, K = views.depth(frame, self.confidence), views.depth_intrinsics(frame)
        if self.edge <= 0:
            trusted = depth > 0
        elif views.edges == "network":
            trusted = _not_on_ramps(depth, K, self.edge, float(np.cos(np.radians(TURN))))
        else:
            trusted = continues(depth, self.edge)
        pose = np.ascontiguousarray(views.world_from_camera[frame])
        return DepthMap(depth, trusted, _surface(depth, trusted), K, pose)

    @property
    def frames(self) -> NDArray[np.int64]:
        """(n,) int64, the numbers of the frames that have depth, ascending."""
        return self.views.frames


def camera_values(
    world_from_camera: NDArray[np.float64], K: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(16,) float64 for compiled code: rotation (9, row after row), position, fx, fy, cx, cy."""
    R, t = world_from_camera[:3, :3], world_from_camera[:3, 3]
    return np.concatenate([R.ravel(), t, [K[0, 0], K[1, 1], K[0, 2], K[1, 2]]])


@njit(nogil=True, error_model="numpy")
def _fill_row(depth, trusted, row, inverse, least):
    """Inverse depth of a row, infinite if not trusted, and the smallest depth of three pixels."""
    width = depth.shape[1]
    none = np.float32(np.inf)
    for u in range(width):
        inverse[u] = np.float32(1) / depth[row, u] if trusted[row, u] else none
    for u in range(width):
        least[u] = depth[row, u] if depth[row, u] > 0 else none
        if u > 0 and depth[row, u - 1] > 0:
            least[u] = min(least[u], depth[row, u - 1])
        if u + 1 < width and depth[row, u + 1] > 0:
            least[u] = min(least[u], depth[row, u + 1])


@njit(nogil=True, error_model="numpy")
def _surface(depth, trusted):
    """(h, w, 4) float32 `pixels` of a `DepthMap`."""
    height, width = depth.shape
    none = np.float32(np.inf)
    pixels = np.zeros((height, width, 4), np.float32)
    # Three rows at a time, because images may be large.
    inverse, least = np.empty((3, width), np.float32), np.empty((3, width), np.float32)
    _fill_row(depth, trusted, 0, inverse[0], least[0])
    for v in range(height):
        if v + 1 < height:
            _fill_row(depth, trusted, v + 1, inverse[(v + 1) % 3], least[(v + 1) % 3])
        row, above, below = v % 3, max(v - 1, 0) % 3, min(v + 1, height - 1) % 3
        for u in range(width):
            if depth[v, u] > 0:
                pixels[v, u, 3] = min(least[above, u], least[row, u], least[below, u])
            here = inverse[row, u]
            if here == none:
                continue
            left, right = max(u - 1, 0), min(u + 1, width - 1)
            pixels[v, u, 0] = depth[v, u]
            before, after = inverse[row, left], inverse[row, right]
            pixels[v, u, 1] = _smaller(before, here, after, u > left, right > u)
            before, after = inverse[above, u], inverse[below, u]
            pixels[v, u, 2] = _smaller(before, here, after, v > 0, v + 1 < height)
    return pixels


@njit(nogil=True, inline="always", error_model="numpy")
def _smaller(before, here, after, has_before, has_after):
    """The smaller of two differences of inverse depth, infinite without depth."""
    first = here - before if has_before else np.float32(np.inf)
    second = after - here if has_after else np.float32(np.inf)
    smaller = first if abs(first) < abs(second) else second
    return smaller if np.isfinite(smaller) else np.float32(0)


@njit(nogil=True, error_model="numpy")
def _not_on_ramps(depth, K, tolerance, cosine):
    """(h, w) bool: pixels that are not on a ramp by which a network connects two objects.

    A pixel is on a ramp if the range of depth in the 3 x 3 pixels around it exceeds `tolerance`
    times its depth, and one of their normals differs from its own by more than the angle of
    `cosine`. The first condition alone would reject floors seen at a grazing angle.
    """
    height, width = depth.shape
    kept = np.zeros((height, width), np.bool_)
    normals = _normals(depth, K)
    for v in range(height):
        for u in range(width):
            here = depth[v, u]
            if here <= 0:
                continue
            low, high = here, here
            same = normals[v, u, 2] != 0
            for j in range(max(v - 1, 0), min(v + 2, height)):
                for i in range(max(u - 1, 0), min(u + 2, width)):
                    if depth[j, i] <= 0:
                        continue
                    low, high = min(low, depth[j, i]), max(high, depth[j, i])
                    turn = (normals[v, u] * normals[j, i]).sum()
                    same = same and (turn >= cosine or normals[j, i, 2] == 0)
            kept[v, u] = same or high - low <= tolerance * here
    return kept


@njit(nogil=True, error_model="numpy")
def _normals(depth, K):
    """(h, w, 3) float32: the mean normal of the triangles of a pixel and its neighbours.

    Normals have length 1, or 0 without a triangle.
    """
    height, width = depth.shape
    normals = np.zeros((height, width, 3), np.float32)
    points, there = np.empty((4, 3)), np.empty(4, np.bool_)
    for v in range(height):
        for u in range(width):
            here = depth[v, u]
            if here <= 0:
                continue
            for n in range(4):
                j, i = v + _AROUND[n, 0], u + _AROUND[n, 1]
                there[n] = 0 <= j < height and 0 <= i < width and depth[j, i] > 0
                if there[n]:
                    z = depth[j, i]
                    points[n, 0] = ((i + 0.5 - K[0, 2]) * z - (u + 0.5 - K[0, 2]) * here) / K[0, 0]
                    points[n, 1] = ((j + 0.5 - K[1, 2]) * z - (v + 0.5 - K[1, 2]) * here) / K[1, 1]
                    points[n, 2] = z - here
            x, y, z = 0.0, 0.0, 0.0
            for n in range(4):
                if there[n] and there[(n + 1) % 4]:
                    a, b = points[n], points[(n + 1) % 4]
                    across = a[1] * b[2] - a[2] * b[1]
                    down = a[2] * b[0] - a[0] * b[2]
                    along = a[0] * b[1] - a[1] * b[0]
                    length = np.sqrt(across**2 + down**2 + along**2) + 1e-30
                    x += across / length
                    y += down / length
                    z += along / length
            length = np.sqrt(x * x + y * y + z * z)
            if length > 0:
                normals[v, u, 0], normals[v, u, 1] = x / length, y / length
                normals[v, u, 2] = z / length
    return normals
