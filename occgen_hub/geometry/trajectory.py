"""Interpolation of camera poses."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import CubicHermiteSpline
from scipy.spatial.transform import Rotation, Slerp

MAX_SPEEDUP = 1.5
"""Largest interpolated speed, relative to the mean speed of the slower neighbouring step."""


def interpolate_poses(
    frames: NDArray[np.integer], poses: NDArray[np.floating], length: int
) -> NDArray[np.float64]:
    """Interpolate world_from_camera poses of some frames to all frames 0 to length - 1.

    frames: (k,) distinct frame numbers in that range, ascending, k at least 1; poses: (k, 4, 4),
    which are returned unchanged for these frames. Returns (length, 4, 4) float64.

    Rotations are interpolated by slerp, translations by a cubic spline (see `_velocities`). Before
    the first and after the last known frame, the motion of the adjacent step continues for as many
    frames as that step has, which covers frames skipped at a regular interval. Beyond that the
    camera stands still.
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
    """(k, 3) velocities at known positions, from these and the mean velocities between them.

    The velocity is that of the parabola through a position and its neighbours (Catmull and Rom
    1974, for uneven steps), limited to `MAX_SPEEDUP` times the speed of the slower of the two
    steps. So the path does not overshoot where the camera stops, or after an uneven gap.
    """
    velocity = np.gradient(t, frames, axis=0, edge_order=1 if len(frames) == 2 else 2)
    speeds = np.linalg.norm(step, axis=1)
    slower = np.minimum([speeds[0], *speeds], [*speeds, speeds[-1]])
    speed = np.maximum(np.linalg.norm(velocity, axis=1), 1e-300)
    limit = np.minimum(1.0, MAX_SPEEDUP * slower / speed)
    limited: NDArray[np.float64] = velocity * limit[:, None]
    return limited


def poses_at(
    times: NDArray[np.floating],
    known_times: NDArray[np.floating],
    poses: NDArray[np.floating],
    longest_gap: float,
    tolerance: float,
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Interpolate a trajectory to given times.

    times: (n,) seconds; known_times: (k,) distinct seconds, ascending; poses: (k, 4, 4) float64 at
    known_times. Rotations are interpolated by slerp and positions linearly.

    Returns (n, 4, 4) float64 poses and (n,) bool, whether each is known: within `tolerance` seconds
    of a given pose, or between two that are at most `longest_gap` seconds apart. The others are the
    nearest given pose.
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
