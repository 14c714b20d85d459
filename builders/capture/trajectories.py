"""Trajectory files: the poses of a camera, with times or one for each frame."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from occgen_hub.camera_mapping import CameraMapping
from occgen_hub.errors import SourceError
from occgen_hub.geometry.trajectory import poses_at

from .recording import LONGEST_GAP, TOLERANCE, numbers_in, valid_poses

MAX_BYTES = 1 << 28
"""Limit of a trajectory file in bytes. An hour at 200 Hz has 100 MB."""

EPOCH = 1e8
"""Names of at least this many seconds, or smaller units, are times since 1970."""

YEARS = (9.5e8, 4.1e9)
"""Seconds since 1970 of the years 2000 and 2100."""

FORMATS = (
    "lines of 'time tx ty tz qx qy qz qw' (TUM), of 12 or 16 numbers of a matrix, or Open3D's .log"
)


@dataclass(frozen=True)
class Trajectory:
    """Poses of a camera.

    times: (k,) float64 seconds, strictly ascending; None if there is one pose per frame; poses:
    (k, 4, 4) float64, world_from_camera, OpenCV axes.
    """

    times: NDArray[np.float64] | None
    poses: NDArray[np.float64]

    def at(self, times: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Poses at (n,) times, and (n,) bool: which are known (see `poses_at`)."""
        assert self.times is not None
        return poses_at(times, self.times, self.poses, LONGEST_GAP, TOLERANCE)


def read_trajectory(path: Path, mapping: CameraMapping) -> Trajectory:
    """Read a file in one of `FORMATS`, with the mapping's conventions.

    Rows with a time but without a finite, rigid pose are left out: tracking was lost there.
    """
    remedy = f"remove a header or begin it with #, and give {FORMATS}"
    rows = numbers_in(path, MAX_BYTES, remedy)
    widths = {len(row) for row in rows}
    if widths == {8}:
        return trajectory_from_rows(path, np.array(rows), mapping)
    if widths == {16} or widths == {12}:
        poses = np.array(rows).reshape(len(rows), -1, 4)
        last = np.broadcast_to([[[0.0, 0.0, 0.0, 1.0]]], (len(rows), 1, 4))
        poses = poses if poses.shape[1] == 4 else np.concatenate([poses, last], axis=1)
        return Trajectory(None, _converted(poses, mapping))
    if widths == {3, 4} and len(rows) % 5 == 0 and all(len(row) == 3 for row in rows[::5]):
        poses = np.array([row for n, row in enumerate(rows) if n % 5]).reshape(-1, 4, 4)
        return Trajectory(None, _converted(poses, mapping))
    counts = ", ".join(map(str, sorted(widths)[:5])) or "no"
    problem = f"is not a trajectory (its lines have {counts} numbers)"
    raise SourceError(path, problem, f"give one with {FORMATS}")


def trajectory_from_rows(
    path: Path, rows: NDArray[np.float64], mapping: CameraMapping
) -> Trajectory:
    """A trajectory from (k, 8) rows of time, tx, ty, tz, qx, qy, qz, qw."""
    poses = poses_of(rows[:, 1:4], rows[:, 4:])
    usable = valid_poses(poses) & np.isfinite(rows[:, 0])
    if not usable.any():
        raise SourceError(path, "has no valid poses", "leave this recording out")
    times, first = np.unique(_seconds(rows[usable, 0]), return_index=True)
    offset = mapping.time_offset or 0.0
    return Trajectory(times + offset, _converted(poses[usable][first], mapping))


def _seconds(times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Times in seconds. Times since 1970 may be in ms, us or ns; their size shows the unit."""
    for unit in (1e-3, 1e-6, 1e-9):
        if YEARS[0] < np.median(times) * unit < YEARS[1]:
            return times * unit
    return times


def poses_of(
    positions: NDArray[np.float64], quaternions: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(k, 4, 4) from (k, 3) positions and (k, 4) quaternions x, y, z, w; NaN for invalid ones."""
    norm = np.linalg.norm(quaternions, axis=1)
    usable = np.isfinite(norm) & (np.abs(norm - 1) < 0.1)
    poses = np.tile(np.eye(4), (len(positions), 1, 1))
    poses[~usable] = np.nan
    poses[usable, :3, :3] = Rotation.from_quat(quaternions[usable]).as_matrix()
    poses[:, :3, 3] = positions
    return poses


def _converted(poses: NDArray[np.float64], mapping: CameraMapping) -> NDArray[np.float64]:
    """Convert poses from the mapping's conventions. Invalid poses become NaN."""
    usable = valid_poses(poses)
    meant = np.full(poses.shape, np.nan)
    meant[usable] = mapping.world_from_camera(poses[usable])
    return meant


def named_times(names: list[str]) -> NDArray[np.float64] | None:
    """(n,) seconds of images named by times, without a trajectory that has times.

    None unless all names are ascending numbers, since 1970 or with decimals.
    """
    try:
        numbers = np.array([float(name) for name in names])
    except ValueError:
        return None
    if not (np.diff(numbers) > 0).all() or not np.isfinite(numbers).all():
        return None
    if numbers.min() >= EPOCH or all("." in name for name in names):
        return _seconds(numbers)
    return None


def matched_times(
    names: list[str], trajectory: Trajectory, path: Path
) -> tuple[NDArray[np.float64], float] | None:
    """The times of images named by times, in seconds, and their unit in seconds.

    The unit (s, ms, us, ns) is the one with most names within the trajectory's time range. None if
    names are not numbers, if hardly any is in the range, or if images are numbered: 0, 1, 2 are
    not milliseconds, even if a trajectory begins at 0.

    path: of the trajectory. Raises SourceError if the names are times outside the range.
    """
    try:
        numbers = np.array([float(name) for name in names])
    except ValueError:
        return None
    assert trajectory.times is not None
    first, last = trajectory.times[0] - TOLERANCE, trajectory.times[-1] + TOLERANCE
    step = float(np.median(np.diff(np.sort(numbers)))) if len(numbers) > 1 else np.inf
    # No camera takes an image every 0.1 ms: such a unit is too small.
    units = [1.0, *(u for u in (1e-3, 1e-6, 1e-9) if step * u > 1e-4)]
    inside = [((numbers * u >= first) & (numbers * u <= last)).mean() for u in units]
    best = int(np.argmax(inside))
    if step == 1 and (best > 0 or inside[0] < 0.5):
        return None
    if inside[best] > 0.1:
        return numbers * units[best], units[best]
    if numbers.min() >= EPOCH or any("." in name for name in names):
        problem = (
            f"has poses from {trajectory.times[0]:.6g} to {trajectory.times[-1]:.6g} s, but the "
            f"images are named by times from {min(names, key=float)} to {max(names, key=float)}"
        )
        remedy = "give --time-offset, or name the images 0, 1, 2 if there is one pose for each"
        raise SourceError(path, problem, remedy)
    return None
