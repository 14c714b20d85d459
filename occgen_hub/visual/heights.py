"""Heights in a scene: colours by height, and hiding ceilings in views from above."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from occgen_hub.occupancy.grid import cell_numbers
from occgen_hub.visual.colors import OCCUPANCY, ramp

HEADROOM = 0.4
"""Height above the highest camera, in metres, above which a scene is hidden."""

MAX_TILT = 45.0
"""Largest angle in degrees between the cameras' mean up and the world's."""

ALIKE = 6.0
"""Largest angle in degrees between normals that count as the same."""

MIN_LEVEL, MIN_NORMALS = 0.05, 40
"""Smallest share of the surface that shows the world's up, and smallest number of normals."""

FARTHEST = 50_000.0
"""Largest coordinate of points for normals, metres; cells of 5 cm have no numbers beyond 52 km."""

SPACING, NEIGHBOURS, FLAT, MAX_PLACES = 0.05, 16, 0.15, 2500
"""For normals: distance of the points in metres, points for each normal, largest spread along a
normal relative to that across it, largest number of normals."""


def up_axis(world_from_camera: NDArray[np.float64]) -> tuple[int, float]:
    """The world axis closest to the cameras' mean up direction (minus their y), and its sign.

    world_from_camera: (T, 4, 4).
    """
    mean_up = -world_from_camera[:, :3, 1].mean(axis=0)
    axis = int(np.abs(mean_up).argmax())
    return axis, 1.0 if mean_up[axis] >= 0 else -1.0


def world_up(
    points: NDArray[np.floating], world_from_camera: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(3,) the world's up vector: an axis, unless floors and tables show that the world is tilted.

    SLAM often uses the first camera as the world, which may look down. The normal that most of the
    surface has, among those near the cameras' mean up, replaces the axis nearest to it if far more
    of the surface is perpendicular to the normal than to the axis.

    points: (n, 3) of the surface, world metres; world_from_camera: (T, 4, 4).
    """
    axis, sign = up_axis(world_from_camera)
    upright = np.asarray(np.eye(3)[axis] * sign, np.float64)
    normals = _normals(points)
    mean_up = -world_from_camera[:, :3, 1].mean(axis=0)
    normals *= np.where(normals @ mean_up < 0, -1.0, 1.0)[:, None]
    near = normals[normals @ mean_up > np.cos(np.radians(MAX_TILT)) * np.linalg.norm(mean_up)]
    if len(near) < max(MIN_NORMALS, MIN_LEVEL * len(normals)):
        return upright
    alike = np.cos(np.radians(ALIKE))
    up = near[(near @ near.T > alike).sum(axis=0).argmax()]
    for _ in range(3):
        up = near[near @ up > alike].mean(axis=0)
        up /= np.linalg.norm(up)
    level, along_axis = ((np.abs(normals @ each) > alike).sum() for each in (up, upright))
    enough = max(MIN_NORMALS, MIN_LEVEL * len(normals), 3 * along_axis)
    return up if level > enough else upright


def _normals(points: NDArray[np.floating]) -> NDArray[np.float64]:
    """(m, 3) unit normals at places spread over the surface, of any sign."""
    from scipy.spatial import cKDTree

    points = points[(np.abs(points) < FARTHEST).all(axis=1)]  # Files may have any numbers.
    _, first = np.unique(cell_numbers(points, SPACING), return_index=True)
    surface = points[first].astype(np.float64)
    if len(surface) < 10 * NEIGHBOURS:
        return np.zeros((0, 3))
    places = surface[:: 1 + len(surface) // MAX_PLACES]
    _, found = cKDTree(surface).query(places, NEIGHBOURS)
    around = surface[found] - surface[found].mean(axis=1, keepdims=True)
    spread, directions = np.linalg.eigh(np.einsum("nki,nkj->nij", around, around))
    flat = spread[:, 0] < FLAT * spread[:, 1]
    normals: NDArray[np.float64] = directions[flat, :, 0]
    return normals


class Heights:
    """Heights of points in a world, metres along its up vector.

    up: (3,), see `world_up`; axis, sign: the world axis closest to the cameras' up (minus their y),
    and its direction; ceiling: the height above which points would hide the room from above; low,
    high: the range of the colours, from the floor to a little above the cameras.
    """

    def __init__(
        self, points: NDArray[np.floating], world_from_camera: NDArray[np.float64]
    ) -> None:
        self.axis, self.sign = up_axis(world_from_camera)
        self.up = world_up(points, world_from_camera)
        height = self.of(points)
        head = float(self.of(world_from_camera[:, :3, 3]).max())
        self.ceiling = _ceiling(height, head)
        self.low = float(np.percentile(height, 2)) if len(height) else head - 1.5
        self.high = max(head + 0.3, self.low + 0.5)

    def of(self, points: NDArray[np.floating]) -> NDArray[np.float64]:
        """(n,) heights of (n, 3) points."""
        return np.asarray(points.astype(np.float64) @ self.up)

    def below_ceiling(self, points: NDArray[np.floating]) -> NDArray[np.bool_]:
        """(n,) bool: which of (n, 3) points to show."""
        return np.asarray(self.of(points) < self.ceiling)

    def colors(self, points: NDArray[np.floating]) -> NDArray[np.uint8]:
        """(n, 3) uint8 colours of (n, 3) points: blue at the floor, yellow above the cameras."""
        return self.shade(self.of(points) - self.low)

    def shade(self, heights: NDArray[np.floating]) -> NDArray[np.uint8]:
        """(n, 3) uint8 colours of (n,) heights above `low`."""
        return ramp(heights / (self.high - self.low), OCCUPANCY)


def _ceiling(height: NDArray[np.float64], head: float) -> float:
    """The end of the headroom, or a height below a lower ceiling.

    A layer with far more points than the usual one above the cameras is a ceiling.
    """
    edges = head + np.linspace(0.1, HEADROOM, 7)
    counts, _ = np.histogram(height, edges)
    flat = np.flatnonzero(counts > max(4 * np.median(counts), 0.02 * len(height)))
    return float(edges[flat[0]] - 0.05 if len(flat) else edges[-1])
