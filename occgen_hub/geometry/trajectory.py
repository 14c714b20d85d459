"""Poses of all frames from those of some."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import CubicHermiteSpline
from scipy.spatial.transform import Rotation, Slerp

FASTER = 1.5
"""Between steps of even speed a camera is never that much faster than their mean velocity."""


def interpolate_poses(
    frames: NDArray[np.integer], poses: NDArray[np.floating], length: int
) -> NDArray[np.float64]:
    """World_from_camera of frames 0 to length - 1, (length, 4, 4) float64, from those of some.

    frames: (k,) numbers within that range, ascending, none twice, k at least 1; poses: (k, 4, 4),
    theirs, which come back as they are.

    Rotations are interpolated spherically (slerp), translations by a cubic spline (see
    `_velocities`). Before the first and after the last known frame the camera goes on as in the
    step next to it for as many frames as that step has, which is more than skipping frames at a
    regular interval leaves at the end; beyond that it stands still.
    """
    frames, known = frames.astype(np.int64), poses.astype(np.float64)
    if len(frames) == 1:
        return np.tile(known, (length, 1, 1))
    R, t = Rotation.from_matrix(known[:, :3, :3]), known[:, :3, 3]
    first, last = 2 * frames[0] - frames[1], 2 * frames[-1] - frames[-2]
    wanted = np.arange(length).clip(first, last)
    before, after = R[0] * R[1].inv() * R[0], R[-1] * R[-2].inv() * R[-1]
    rotations = Slerp([first, *frames, last], Rotation.concatenate([before, R, after]))

    step = np.diff(t, axis=0) / np.diff(frames)[:, None]
    spline = CubicHermiteSpline(frames, t, _velocities(frames, t, step))
    places = spline(wanted.clip(frames[0], frames[-1]))
    places += np.minimum(wanted - frames[0], 0)[:, None] * step[0]
    places += np.maximum(wanted - frames[-1], 0)[:, None] * step[-1]

    result = np.tile(np.eye(4), (length, 1, 1))
    result[:, :3, :3], result[:, :3, 3] = rotations(wanted).as_matrix(), places
    result[frames] = known
    return result


def _velocities(
    frames: NDArray[np.integer], t: NDArray[np.float64], step: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(k, 3) velocities at known places, from those places and the mean velocities between them.

    That of the parabola through a place and its neighbours (Catmull and Rom 1974, for uneven
    steps), but no faster than `FASTER` times the slower of the two steps: so the camera does not
    swing past a place where it stops, nor out of a long gap that follows a short one.
    """
    velocity = np.gradient(t, frames, axis=0, edge_order=1 if len(frames) == 2 else 2)
    speeds = np.linalg.norm(step, axis=1)
    slower = np.minimum([speeds[0], *speeds], [*speeds, speeds[-1]])
    speed = np.maximum(np.linalg.norm(velocity, axis=1), 1e-300)
    limited: NDArray[np.float64] = velocity * np.minimum(1.0, FASTER * slower / speed)[:, None]
    return limited


def poses_at(
    times: NDArray[np.floating],
    known_times: NDArray[np.floating],
    poses: NDArray[np.floating],
    longest_gap: float,
    tolerance: float,
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Poses at given times, from those of a trajectory that was tracked at times of its own.

    times: (n,) seconds; known_times: (k,) seconds, ascending, none twice; poses: (k, 4, 4) float64,
    theirs. Between two of them the camera turns about one axis at an even rate (slerp) and moves
    straight at an even speed, which is a geodesic of SE(3) with the metric of SO(3) x R^3.

    Returns (n, 4, 4) float64 poses, and (n,) bool, which of them are known: those within
    `tolerance` seconds of a pose, and those between two that are at most `longest_gap` seconds
    apart. The others are the nearest known pose.
    """
    known = poses.astype(np.float64)
    clipped = times.astype(np.float64).clip(known_times[0], known_times[-1])
    after = np.searchsorted(known_times, clipped).clip(1, max(len(known) - 1, 1))
    if len(known) == 1:
        return np.repeat(known, len(times), axis=0), np.abs(times - known_times[0]) <= tolerance
    before = after - 1
    gap = known_times[after] - known_times[before]
    share = (clipped - known_times[before]) / gap
    nearest = np.where(share < 0.5, before, after)
    near = np.abs(times - known_times[nearest]) <= tolerance
    between = (gap <= longest_gap) & (np.abs(times - clipped) <= 0)
    result = known[nearest]
    t = known[:, :3, 3]
    moved = t[before] + share[:, None] * (t[after] - t[before])
    R = Slerp(known_times, Rotation.from_matrix(known[:, :3, :3]))(clipped).as_matrix()
    result[between, :3, :3], result[between, :3, 3] = R[between], moved[between]
    return result, near | between
