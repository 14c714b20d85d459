"""Errors of the poses that a recording states: noise of each frame, and drift."""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

from occgen_hub.sample.mesh import Floats

Size = tuple[float, float]  # metres, degrees
WAVES = 3  # waves that are summed: a quarter, three and five quarters of one


def with_noise(poses: Floats, size: Size, rng: np.random.Generator) -> Floats:
    """Poses (T, 4, 4), world_from_camera, each with an independent error.

    size: standard deviation per axis of the position, metres, and of the rotation, degrees.
    """
    shift, turn = rng.standard_normal((2, len(poses), 3))
    return _moved(poses, size[0] * shift, np.radians(size[1]) * turn)


def with_drift(poses: Floats, size: Size, rng: np.random.Generator) -> Floats:
    """Poses (T, 4, 4), world_from_camera, with an error that changes smoothly.

    size: largest error per axis of the position, metres, and of the rotation, degrees. The error of
        the first pose is zero.
    """
    shift, turn = _curves(len(poses), rng), _curves(len(poses), rng)
    return _moved(poses, size[0] * shift, np.radians(size[1]) * turn)


def _curves(count: int, rng: np.random.Generator) -> Floats:
    """Three smooth random curves (count, 3) that start at 0 and have a largest magnitude of 1."""
    t = np.linspace(0, 1, count)[:, None]
    waves = np.arange(1, WAVES + 1)
    basis = np.sin(np.pi * (waves - 0.5) * t)  # None of them returns to 0 at the end.
    curves = basis @ rng.standard_normal((WAVES, 3))
    peak = np.abs(curves).max(axis=0)
    return np.asarray(curves / np.where(peak > 0, peak, 1))


def _moved(poses: Floats, shift: Floats, turn: Floats) -> Floats:
    """Poses with shifted positions, (T, 3) metres, rotated about their positions, radians."""
    out = poses.copy()
    out[:, :3, :3] = Rotation.from_rotvec(turn).as_matrix() @ poses[:, :3, :3]
    out[:, :3, 3] += shift
    return out
