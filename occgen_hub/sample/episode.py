"""A recorded walk: the camera, its mount, its poses and its instruction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from occgen_hub.sample.instructions import Task, tasks_of
from occgen_hub.sample.mesh import Floats
from occgen_hub.sample.paths import walk
from occgen_hub.sample.render import Camera, Renderer

CAMERAS = (
    Camera(480, 270, 168.05, 192.8),
    Camera(320, 240, 190.0, 190.0),
    Camera(424, 240, 212.0, 208.0),
    Camera(256, 192, 148.0, 150.0),
    Camera(300, 180, 165.0, 165.0),
)
MOUNTS = ((0.46, 0.0), (1.1, -15.0), (0.7, 0.0), (0.9, -10.0), (0.55, -4.0))  # metres, degrees
LENGTHS = (1.0, 0.75, 1.25)  # multiples of the requested length, in turn
OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])  # OpenGL camera axes to OpenCV's, and back


@dataclass(frozen=True)
class Episode:
    """A recorded walk. Poses are float64, before any rounding."""

    camera: Camera
    body_from_camera: Floats  # (4, 4): body x right, y ahead, z up from the floor; camera OpenGL
    house_from_camera: Floats  # (T, 4, 4), OpenGL axes
    world_from_camera: Floats  # (T, 4, 4), OpenGL axes
    tasks: tuple[Task, ...]

    def __len__(self) -> int:
        """The number of frames."""
        return len(self.world_from_camera)


def length_of(number: int, frames: int) -> int:
    """The number of frames of trajectory `number` if `frames` are requested."""
    return max(1, round(frames * LENGTHS[number % len(LENGTHS)]))


def plan_episode(
    renderer: Renderer, camera: Camera, number: int, frames: int, seed: list[int]
) -> Episode:
    """The walk of trajectory `number` through the renderer's scene, with its own `seed`."""
    scene = renderer.scene
    height, pitch = MOUNTS[number % len(MOUNTS)]
    height += float(np.random.default_rng([*seed, 999]).uniform(-0.03, 0.05))
    path = walk(scene, renderer, frames, height, seed)
    mount = _mounted(height, np.radians(pitch))
    house = np.stack(
        [_body(xy, a) @ mount for xy, a in zip(path.position, path.heading, strict=True)]
    )
    return Episode(camera, mount, house, scene.world_from_house @ house, tasks_of(scene, path))


def plan_cameras(
    renderer: Renderer,
    camera: Camera,
    number: int,
    frames: int,
    seed: list[int],
    mounts: Sequence[tuple[float, float]],
) -> list[Episode]:
    """One walk, recorded by cameras on several mounts: (metres above the floor, degrees upward)."""
    scene = renderer.scene
    path = walk(scene, renderer, frames, mounts[0][0], seed)
    body = [_body(xy, a) for xy, a in zip(path.position, path.heading, strict=True)]
    tasks = tasks_of(scene, path)
    found = []
    for height, pitch in mounts:
        mount = _mounted(height, np.radians(pitch))
        house = np.stack(body) @ mount
        found.append(Episode(camera, mount, house, scene.world_from_house @ house, tasks))
    return found


def _mounted(height: float, pitch: float) -> Floats:
    """The camera in the body (4, 4): `height` metres up, looking ahead and up by `pitch`."""
    c, s = np.cos(pitch), np.sin(pitch)
    out = np.eye(4)
    out[:3, :3] = [[1, 0, 0], [0, -s, -c], [0, c, -s]]
    out[2, 3] = height
    return out


def _body(xy: Floats, heading: float) -> Floats:
    """The body in the house (4, 4): on the floor at (x, y), its y axis along the heading."""
    c, s = np.cos(heading), np.sin(heading)
    out = np.eye(4)
    out[:3, :2] = [[s, c], [-c, s], [0, 0]]
    out[:2, 3] = xy
    return out
