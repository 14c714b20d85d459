"""Heights in a scene: colours by height, and hiding ceilings in views from above."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from occgen_hub.visual.colors import OCCUPANCY, ramp

HEADROOM = 0.4
"""Height above the highest camera, in metres, above which a scene is hidden."""


def up_axis(world_from_camera: NDArray[np.float64]) -> tuple[int, float]:
    """The world axis closest to the cameras' mean up direction (minus their y), and its sign.

    world_from_camera: (T, 4, 4).
    """
    mean_up = -world_from_camera[:, :3, 1].mean(axis=0)
    axis = int(np.abs(mean_up).argmax())
    return axis, 1.0 if mean_up[axis] >= 0 else -1.0


class Heights:
    """Heights of points in a world, metres along its up axis.

    axis, sign: the world axis closest to the cameras' up (minus their y), and its direction;
    ceiling: the height above which points would hide the room from above; low, high: the range of
    the colours, from the floor to a little above the cameras.
    """

    def __init__(
        self, points: NDArray[np.floating], world_from_camera: NDArray[np.float64]
    ) -> None:
        self.axis, self.sign = up_axis(world_from_camera)
        height = self.of(points)
        head = float(self.of(world_from_camera[:, :3, 3]).max())
        self.ceiling = _ceiling(height, head)
        self.low = float(np.percentile(height, 2)) if len(height) else head - 1.5
        self.high = max(head + 0.3, self.low + 0.5)

    @property
    def up(self) -> NDArray[np.float64]:
        """The (3,) up vector of the world."""
        return np.asarray(np.eye(3)[self.axis] * self.sign, np.float64)

    def of(self, points: NDArray[np.floating]) -> NDArray[np.float64]:
        """(n,) heights of (n, 3) points."""
        return np.asarray(points[:, self.axis], np.float64) * self.sign

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
