"""Errors of the poses that a recording states: noise of each frame, and drift."""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

from occgen_hub.sample.mesh import Floats

Size = tuple[float, float]  # metres, degrees
BEND = 0.3  # of the drift's size, aside of the straight line to where it ends


def with_noise(poses: Floats, size: Size, rng: np.random.Generator) -> Floats:
    """Poses (T, 4, 4), world_from_camera, each with an error of its own.

    size: the deviation of the position, metres, and of the rotation, degrees, for each axis.
    """
    shift, turn = rng.standard_normal((2, len(poses), 3))
    return _moved(poses, size[0] * shift, np.radians(size[1]) * turn)


def with_drift(poses: Floats, size: Size, rng: np.random.Generator) -> Floats:
    """Poses (T, 4, 4), world_from_camera, whose error grows smoothly along the trajectory.

    size: the error of the last pose, metres and degrees; the first has none.
    """
    shift, turn = _curve(len(poses), rng), _curve(len(poses), rng)
    return _moved(poses, size[0] * shift, np.radians(size[1]) * turn)


def _curve(count: int, rng: np.random.Generator) -> Floats:
    """A bent line (count, 3) from 0 to a random point at distance 1."""
    along, aside = rng.standard_normal((2, 3))
    along /= np.linalg.norm(along)
    aside -= (aside @ along) * along
    aside /= np.linalg.norm(aside)
    t = np.linspace(0, 1, count)[:, None]
    return np.asarray(along * t + aside * BEND * np.sin(np.pi * t))


def _moved(poses: Floats, shift: Floats, turn: Floats) -> Floats:
    """Poses with their positions shifted, (T, 3) metres, and turned about themselves, radians."""
    out = poses.copy()
    out[:, :3, :3] = Rotation.from_rotvec(turn).as_matrix() @ poses[:, :3, :3]
    out[:, :3, 3] += shift
    return out
