"""The viewpoint of a scene: chosen automatically, or read from a file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from occgen_hub.atomic import atomic_file
from occgen_hub.errors import UsageError
from occgen_hub.files import dump_json, read_json
from occgen_hub.visual.heights import Heights

FIELD_OF_VIEW = 35.0
ELEVATIONS = (48.0, 60.0, 72.0)
"""Elevation in degrees: a compromise between seeing heights and avoiding occlusion."""

AZIMUTHS = 24
FARTHEST = 1e6
"""Largest coordinate in metres."""

MARGIN = 1.06
_COARSE = (96, 54)
_SAMPLE = 40_000


@dataclass(frozen=True)
class Viewpoint:
    """A viewpoint. position, target, up: world metres; field_of_view: vertical, degrees."""

    position: tuple[float, float, float]
    target: tuple[float, float, float]
    up: tuple[float, float, float]
    field_of_view: float = FIELD_OF_VIEW

    def world_from_camera(self) -> NDArray[np.float64]:
        """(4, 4) float64, OpenCV axes, metres."""
        forward = _unit(np.subtract(self.target, self.position))
        right = _unit(np.cross(forward, self.up))
        pose = np.eye(4)
        pose[:3, :3] = np.stack([right, np.cross(forward, right), forward], axis=1)
        pose[:3, 3] = self.position
        return pose

    def intrinsics(self, size: tuple[int, int]) -> NDArray[np.float64]:
        """(3, 3) float64, pixels of a picture of `size` (width, height)."""
        width, height = size
        focal = height / (2 * np.tan(np.radians(self.field_of_view / 2)))
        return np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1.0]])

    def save(self, path: Path) -> None:
        """Write it as JSON, for `load`."""
        with atomic_file(path) as partial:
            partial.write_text(dump_json(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Viewpoint:
        """Read it from a JSON file. Raises UsageError, or SourceError if the file is unreadable."""
        values = read_json(path)
        try:
            vectors = {
                name: tuple(float(v) for v in values[name]) for name in ("position", "target", "up")
            }
            view = cls(field_of_view=float(values.get("field_of_view", FIELD_OF_VIEW)), **vectors)  # type: ignore[arg-type]  # lengths are checked below
        except (KeyError, TypeError, ValueError, OverflowError):
            raise UsageError(f"{path}: {_WANTED}.") from None
        if any(len(v) != 3 for v in vectors.values()) or not view.is_valid:
            raise UsageError(f"{path}: {_WANTED}.")
        return view

    @property
    def is_valid(self) -> bool:
        """Whether the viewpoint is valid for a camera."""
        vectors = np.array((self.position, self.target, self.up))
        if not (np.abs(vectors) <= FARTHEST).all():  # Also rejects NaN.
            return False
        aside = np.cross(np.subtract(self.target, self.position), self.up)
        return bool(np.abs(aside).max() > 1e-9) and 1 <= self.field_of_view <= 150


_WANTED = (
    "is not a viewpoint; give position, target and up with three numbers each (world, metres, up "
    f"to {FARTHEST:g}, up not along the line of sight) and optionally a field_of_view of 1 to 150 "
    "degrees"
)


def _unit(vector: NDArray[np.floating]) -> NDArray[np.float64]:
    length = np.linalg.norm(vector)
    return np.asarray(vector / length if length else (0.0, 0.0, 1.0), np.float64)


def automatic(
    points: NDArray[np.floating],
    world_from_camera: NDArray[np.float64],
    size: tuple[int, int],
    heights: Heights | None = None,
) -> Viewpoint:
    """A viewpoint above and to one side of (n, 3) points, from which most of the path is visible.

    world_from_camera: (T, 4, 4), the path; size: (width, height) of the picture; heights: of the
    points, computed if None.
    """
    heights = heights or Heights(points, world_from_camera)
    up, path = heights.up, world_from_camera[:, :3, 3]
    scene = points[heights.below_ceiling(points)].astype(np.float64)
    scene = scene[:: 1 + len(scene) // _SAMPLE]
    if len(scene) > 100:  # Ignore outliers.
        low, high = np.percentile(scene, [0.5, 99.5], axis=0)
        scene = scene[((scene >= low) & (scene <= high)).all(axis=1)]
    # What must be visible: the path, and objects below it.
    lower = float((scene @ up).min()) if len(scene) else float((path @ up).min()) - 1
    drop = (path @ up)[:, None] - lower
    subject = np.concatenate([path - up * drop * part for part in (0.0, 0.5, 0.9)])
    everything = np.concatenate([scene, path])
    best: tuple[float, Viewpoint] | None = None
    for turn, elevation in product(range(AZIMUTHS), ELEVATIONS):
        direction = _direction(heights, 2 * np.pi * turn / AZIMUTHS, np.radians(elevation))
        view = _fitted(everything, direction, up, size)
        distance = float(np.linalg.norm(np.subtract(view.target, view.position)))
        # Along the cameras' viewing direction, so that left and right agree with the images.
        along = float(np.mean(world_from_camera[:, :3, 2] @ view.world_from_camera()[:3, 2]))
        score = (0.2 + _seen(subject, scene, view)) * (1 + 0.9 * along) / distance
        if best is None or score > best[0]:
            best = score, view
    assert best is not None
    return best[1]


def _direction(heights: Heights, azimuth: float, elevation: float) -> NDArray[np.float64]:
    """The unit vector from the scene to the eye; angles in radians."""
    first = np.eye(3)[(heights.axis + 1) % 3]
    first = _unit(first - heights.up * (first @ heights.up))
    second = heights.sign * np.cross(heights.up, first)
    level = np.cos(azimuth) * first + np.sin(azimuth) * second
    return np.asarray(np.sin(elevation) * heights.up + np.cos(elevation) * level, np.float64)


def _fitted(
    points: NDArray[np.float64],
    direction: NDArray[np.float64],
    up: NDArray[np.float64],
    size: tuple[int, int],
) -> Viewpoint:
    """The nearest viewpoint in a direction with all of (n, 3) points in the image."""
    slope_y = np.tan(np.radians(FIELD_OF_VIEW / 2)) / MARGIN
    slope_x = slope_y * size[0] / size[1]
    target = (points.min(axis=0) + points.max(axis=0)) / 2
    right = _unit(np.cross(-direction, up))
    above = np.cross(right, -direction)
    for _ in range(4):
        local = points - target
        x, y, z = local @ right, local @ above, local @ direction
        distance = max(
            float((z + np.abs(x) / slope_x).max()), float((z + np.abs(y) / slope_y).max())
        )
        distance = max(distance, 0.5)
        # Move the centre of the points to the centre of the image.
        u, v = x / (distance - z), y / (distance - z)
        target = target + distance * (
            (u.min() + u.max()) / 2 * right + (v.min() + v.max()) / 2 * above
        )
    position = target + direction * distance * 1.02
    return Viewpoint(_triple(position), _triple(target), _triple(up))


def _triple(vector: NDArray[np.float64]) -> tuple[float, float, float]:
    x, y, z = vector.tolist()
    return x, y, z


def _seen(subject: NDArray[np.float64], scene: NDArray[np.float64], view: Viewpoint) -> float:
    """Estimate the fraction of (n, 3) points that a scene does not occlude."""
    pose, K = view.world_from_camera(), view.intrinsics(_COARSE)

    def project(points: NDArray[np.float64]) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        x, y, z = ((points - pose[:3, 3]) @ pose[:3, :3]).T
        z = np.maximum(z, 1e-3)
        u = (K[0, 0] * x / z + K[0, 2]).astype(int).clip(0, _COARSE[0] - 1)
        v = (K[1, 1] * y / z + K[1, 2]).astype(int).clip(0, _COARSE[1] - 1)
        return v * _COARSE[0] + u, z

    nearest = np.full(_COARSE[0] * _COARSE[1], np.inf)
    place, depth = project(scene)
    np.minimum.at(nearest, place, depth)
    place, depth = project(subject)
    return float((depth < nearest[place] + 0.25).mean())
