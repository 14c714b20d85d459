"""Small synthetic scenes: exact depth of planes, boxes and spheres, seen from known cameras.

The world has the axes of an OpenCV camera: x right, y down, z forward, in metres.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation

from occgen_hub.episode import Episode, Task
from occgen_hub.views import Views

Array = NDArray[np.float64]
Shape = Callable[[Array, Array], Array]
"""Maps (3,) origin and (h, w, 3) directions to (h, w) ray lengths, infinite where a ray misses."""

SIZE = (80, 60)


def intrinsics(size: tuple[int, int] = SIZE) -> Array:
    """(3, 3) intrinsics of the camera; its horizontal field of view is 59 degrees."""
    width, height = size
    focal = 0.875 * width
    return np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])


def plane(point: Sequence[float], normal: Sequence[float]) -> Shape:
    """An infinite plane through a point."""

    def cast(origin: Array, directions: Array) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            t = ((np.array(point) - origin) @ np.array(normal)) / (directions @ np.array(normal))
        return np.where(t > 0, t, np.inf)

    return cast


def box(lower: Sequence[float], upper: Sequence[float]) -> Shape:
    """A closed box, seen from outside."""

    def cast(origin: Array, directions: Array) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            first = (np.array(lower) - origin) / directions
            second = (np.array(upper) - origin) / directions
        enter = np.nanmax(np.minimum(first, second), axis=-1)
        leave = np.nanmin(np.maximum(first, second), axis=-1)
        return np.where((enter <= leave) & (enter > 0), enter, np.inf)

    return cast


def ball(centre: Sequence[float], radius: float) -> Shape:
    """A sphere, seen from outside."""

    def cast(origin: Array, directions: Array) -> Array:
        off = np.array(centre) - origin
        square = (directions**2).sum(axis=-1)
        along = directions @ off
        root = along**2 - square * (off @ off - radius**2)
        t = (along - np.sqrt(np.maximum(root, 0))) / square
        return np.where((root > 0) & (t > 0), t, np.inf)

    return cast


def room(half: float = 2.5, back: float = 5.0) -> list[Shape]:
    """A room with floor, ceiling and four walls; a box and a ball are in it."""
    return [
        plane((0, 1.2, 0), (0, 1, 0)),
        plane((0, -1.3, 0), (0, 1, 0)),
        plane((-half, 0, 0), (1, 0, 0)),
        plane((half, 0, 0), (1, 0, 0)),
        plane((0, 0, back), (0, 0, 1)),
        plane((0, 0, -back), (0, 0, 1)),
        box((0.4, 0.3, 2.5), (1.2, 1.2, 3.3)),
        ball((-0.9, 0.6, 3.0), 0.45),
    ]


def camera(position: Sequence[float], target: Sequence[float]) -> Array:
    """(4, 4) world_from_camera of an upright camera that looks at a target."""
    forward = np.array(target, float) - position
    forward /= np.linalg.norm(forward)
    right = np.cross([0.0, 1.0, 0.0], forward)
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, :3] = np.stack([right, np.cross(forward, right), forward], axis=1)
    pose[:3, 3] = position
    return pose


def path(frames: int, target: Sequence[float] = (0.0, 0.2, 3.0), width: float = 0.8) -> Array:
    """(frames, 4, 4) poses: cameras side by side, at different heights, that look at a target."""
    across = np.linspace(-width / 2, width / 2, frames)
    return np.stack([camera((x, 0.15 * np.sin(7 * x), 0.1 * x), target) for x in across])


def depth_of(shapes: Sequence[Shape], pose: Array, size: tuple[int, int] = SIZE) -> Array:
    """(h, w) depth in metres along the optical axis, 0 where the ray hits nothing."""
    K = intrinsics(size)
    u, v = np.meshgrid(np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5)
    rays = np.stack([(u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1], np.ones_like(u)], axis=-1)
    directions = rays @ pose[:3, :3].T
    depth = np.min([shape(pose[:3, 3], directions) for shape in shapes], axis=0)
    return np.where(np.isfinite(depth), depth, 0.0)


def views_of(
    depths: Sequence[Array],
    poses: Array,
    frames: Sequence[int] | None = None,
    edges: str = "sensor",
) -> Views:
    """Views of the camera. depths: one per frame; frames: the frames whose depth is used."""
    stored = [np.asarray(depth, np.float32) for depth in depths]
    height, width = stored[0].shape
    return Views(
        engine="made up",
        world_from_camera=np.asarray(poses, np.float64),
        intrinsics=np.tile(intrinsics((width, height)), (len(poses), 1, 1)),
        image_size=(width, height),
        depth_size=(width, height),
        frames=np.arange(len(poses)) if frames is None else np.asarray(frames, np.int64),
        read_depth=lambda frame: stored[frame],
        read_color=lambda frame: np.full((height, width, 3), 10 + frame, np.uint8),
        edges=edges,  # type: ignore[arg-type]
    )


def episode_of(depths: Sequence[Array], poses: Array, name: str = "made/up/episode") -> Episode:
    """An episode of the camera with the given depth and poses."""
    height, width = np.shape(depths[0])
    return Episode(
        id=name,
        length=len(poses),
        fps=10.0,
        robot_type="unknown",
        image_size=(width, height),
        read_rgb=lambda frame: np.full((height, width, 3), 10 + frame, np.uint8),
        tasks=(Task("look around"),),
        task_index=np.zeros(len(poses), np.int64),
        columns={},
        media=(),
        fingerprint="0" * 64,
        read_depth=lambda frame: np.asarray(depths[frame], np.float64),
        world_from_camera=np.asarray(poses, np.float64),
        intrinsics=np.tile(intrinsics((width, height)), (len(poses), 1, 1)),
    )


def share_beside(cells: np.ndarray, others: np.ndarray) -> float:
    """The share of the cells that equal or touch one of the other cells."""
    lower = np.minimum(cells.min(axis=0), others.min(axis=0)) - 1
    shape = np.maximum(cells.max(axis=0), others.max(axis=0)) - lower + 2
    grid = np.zeros(shape, bool)
    grid[tuple((others - lower).T)] = True
    near = binary_dilation(grid, np.ones((3, 3, 3)))
    return float(near[tuple((cells - lower).T)].mean())
