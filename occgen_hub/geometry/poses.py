"""Poses: world_from_camera, OpenCV axes (x right, y down, z forward), metres, float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from occgen_hub.geometry.sim3 import nearest_rotation
from occgen_hub.jit import njit

OPENGL_FROM_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])
"""OpenGL's camera looks along -z with y up. The matrix is its own inverse."""


ROS_FROM_OPENCV = np.array([[0.0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
"""A body's axes in ROS (REP 103): x forward, y left, z up."""


RIGID = 1e-3
"""Largest accepted `rigidity_error` of a pose. Rounding to float32 gives under 1e-6."""

ROUNDED = 1e-5
"""`rigidity_error` over which a pose was written with few digits."""


def from_opengl(world_from_camera: NDArray[np.floating]) -> NDArray[np.float64]:
    """Convert (..., 4, 4) poses from OpenGL axes (x right, y up, z backward) to OpenCV axes.

    The function is its own inverse.
    """
    poses: NDArray[np.float64] = world_from_camera.astype(np.float64) @ OPENGL_FROM_OPENCV
    return poses


def rigidity_error(poses: NDArray[np.floating]) -> NDArray[np.float64]:
    """(T,) deviation of (T, 4, 4) poses from rigid transforms; 0 for rigid ones.

    It is the largest of |R R^T - I|, |det R - 1| and the last row's distance from (0, 0, 0, 1), and
    infinite for poses with numbers that are not finite.
    """
    poses = poses.astype(np.float64)
    finite = np.isfinite(poses).all(axis=(1, 2))
    safe = np.where(finite[:, None, None], poses, np.eye(4))
    R = safe[:, :3, :3]
    with np.errstate(over="ignore", invalid="ignore"):
        unit = np.abs(R @ R.transpose(0, 2, 1) - np.eye(3)).max(axis=(1, 2))
        handed = np.abs(np.linalg.det(R) - 1.0)
        row = np.abs(safe[:, 3] - [0.0, 0.0, 0.0, 1.0]).max(axis=1)
        error = np.nan_to_num(np.max([unit, handed, row], axis=0), nan=np.inf)
    return np.where(finite, error, np.inf)


def made_rigid(poses: NDArray[np.float64]) -> NDArray[np.float64]:
    """(T, 4, 4) poses, in which those that are rigid but for rounding get the nearest rotation.

    Poses whose `rigidity_error` is at most `ROUNDED` are unchanged.
    """
    rounded = rigidity_error(poses) > ROUNDED
    if not rounded.any():
        return poses
    rigid = poses.copy()
    rigid[rounded, :3, :3] = nearest_rotation(poses[rounded, :3, :3])
    rigid[rounded, 3] = (0.0, 0.0, 0.0, 1.0)
    return rigid


def upright_pose(world_from_camera: NDArray[np.float64]) -> NDArray[np.float64]:
    """(4, 4) world_from_grid with upright axes at a camera, in a world whose z points up.

    The axes are x right, y down along gravity, and z forward: the horizontal viewing direction, or
    that of the image's top for a camera that looks straight down.
    """
    ahead, down = world_from_camera[:3, 2], world_from_camera[:3, 1]
    flat = ahead[:2] if np.hypot(*ahead[:2]) > 1e-3 else down[:2] * np.sign(ahead[2])
    x, y = flat / np.hypot(*flat)
    pose = world_from_camera.copy()
    pose[:3, :3] = [[y, 0, x], [-x, 0, y], [0, -1, 0]]
    return pose


def stands_upright(world_from_camera: NDArray[np.float64]) -> bool:
    """Whether the median of (T, 4, 4) cameras is upright in a world whose z points up.

    Tilted by less than 60 degrees. A camera on a robot or in a hand is, unless it looks straight
    down; poses in the frame of the first camera are not.
    """
    return bool(np.median(world_from_camera[:, 2, 1]) < -0.5)


@njit(nogil=True)
def transform(pose: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Transform (n, 3) float64 points by a (4, 4) pose: R p + t.

    Compiled, because numpy's matrix product of so narrow an array spends its time on threads.
    """
    moved = np.empty_like(points)
    for n in range(len(points)):
        x, y, z = points[n, 0], points[n, 1], points[n, 2]
        for row in range(3):
            moved[n, row] = pose[row, 0] * x + pose[row, 1] * y + pose[row, 2] * z + pose[row, 3]
    return moved
