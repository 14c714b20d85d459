"""Write a trajectory as a point cloud per frame, in numpy or PLY files for other tools."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from occgen_hub.errors import UsageError
from occgen_hub.geometry.cloud import Cloud
from occgen_hub.geometry.ply import write_ply
from occgen_hub.geometry.poses import transform
from occgen_hub.loading import Trajectory
from occgen_hub.visual import SEQUENCES
from occgen_hub.visual.colors import PATH
from occgen_hub.visual.frames import Frame, frames
from occgen_hub.visual.heights import Heights
from occgen_hub.visual.output_paths import fresh_folder

BACKGROUND, TRAJECTORY, OCCUPIED = 0, 1, 2
"""The labels of points."""


MAX_STEPS = 10_000
"""Number of points between two cameras of the path."""


@dataclass(frozen=True)
class LabelledPoints:
    """points: (n, 3) float32, metres; colors: (n, 3) uint8; labels: (n,) uint8."""

    points: NDArray[np.float32]
    colors: NDArray[np.uint8]
    labels: NDArray[np.uint8]

    @classmethod
    def of(
        cls, points: NDArray[np.floating], colors: NDArray[np.uint8], label: int
    ) -> LabelledPoints:
        """A cloud with the same label for all points."""
        return cls(points.astype(np.float32), colors, np.full(len(points), label, np.uint8))

    def moved(self, pose: NDArray[np.float64]) -> LabelledPoints:
        """The cloud transformed by a (4, 4) pose."""
        points = transform(pose, self.points.astype(np.float64))
        return LabelledPoints(points.astype(np.float32), self.colors, self.labels)

    def __add__(self, other: LabelledPoints) -> LabelledPoints:
        """The points of both clouds, these first."""
        return LabelledPoints(
            np.concatenate([self.points, other.points]),
            np.concatenate([self.colors, other.colors]),
            np.concatenate([self.labels, other.labels]),
        )

    def save(self, place: Path, *, colors: bool) -> None:
        """Write a .ply, or a .npy of float32 rows x, y, z, (r, g, b from 0 to 1,) label."""
        if place.suffix == ".ply":
            write_ply(place, Cloud(self.points, self.colors))
            return
        shades = (self.colors / np.float32(255),) if colors else ()
        parts = (self.points, *shades, self.labels[:, None])
        rows = np.concatenate([part.astype(np.float32) for part in parts], axis=1)
        np.save(place, rows, allow_pickle=False)


def write_sequences(
    trajectory: Trajectory,
    out: Path,
    *,
    only: Sequence[str] = SEQUENCES,
    history_len: int = 10,
    history_step: int = 2,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> int:
    """Write `out`/<sequence>/<frame, six digits>.npy or .ply for each frame. Returns their number.

    only: which of SEQUENCES. The occupancy is that of the frame and of `history_len` frames before
    it, `history_step` apart. `out` appears when it is complete. Raises UsageError if it exists or
    does not fit on the disk, DatasetError if a file of the trajectory is invalid.
    """
    poses, cloud = trajectory.world_from_camera(), trajectory.cloud()
    heights = Heights(cloud.points, poses)
    background = LabelledPoints.of(cloud.points, cloud.colors, BACKGROUND)
    path = _path(poses[:, :3, 3], trajectory.grid.voxel_size)
    with fresh_folder(out) as folder:
        _check_space(out, only, len(poses), len(cloud))
        for name in only:
            (folder / name).mkdir()
        for frame in frames(trajectory, history_len, history_step):
            so_far = np.concatenate(path[: frame.number + 1])
            colors = np.tile(np.array(PATH, np.uint8), (len(so_far), 1))
            scene = background + LabelledPoints.of(so_far, colors, TRAJECTORY)
            for name, points in _sequences(frame, scene, heights, only):
                ending = "npy" if "npy" in name else "ply"
                place = folder / name / f"{frame.number:06d}.{ending}"
                points.save(place, colors="world" in name)
            progress(frame.number + 1, len(poses))
    return len(only) * len(poses)


def estimate_bytes(
    trajectory: Trajectory, *, only: Sequence[str] = SEQUENCES, history_len: int = 10
) -> int:
    """Estimate the bytes that `write_sequences` writes. Each merged file has the whole cloud.

    A history has at most as many cells as the scene, because cells that several frames saw count
    once. Raises DatasetError if a file of the trajectory is invalid.
    """
    seen = np.diff(trajectory.row_ends("visible"), prepend=0)
    cells = np.minimum(seen * (1 + history_len), len(trajectory.scene_cells()))
    cloud = len(trajectory.cloud())
    return sum(
        _point_bytes(name) * int(cells.sum() + (len(seen) * cloud if "merge" in name else 0))
        for name in only
    )


def _point_bytes(name: str) -> int:
    """The size of a point in the files of a sequence, in bytes."""
    if "npy" not in name:
        return 15
    return 28 if "world" in name else 16


def _sequences(
    frame: Frame, scene: LabelledPoints, heights: Heights, only: Sequence[str]
) -> Iterator[tuple[str, LabelledPoints]]:
    """The clouds of a frame's files. The scene is complete, not only what the camera sees."""
    pose = frame.world_from_camera
    if any("world" in name for name in only):
        cells = frame.accumulated_in_world()
        world = scene + LabelledPoints.of(cells, heights.colors(cells), OCCUPIED)
        yield from ((name, world) for name in only if "world" in name)
    if any("world" not in name for name in only):
        centres = frame.cells.grid.centres(frame.accumulated())
        colors = heights.colors(transform(pose, centres.astype(np.float64)))
        occupied = LabelledPoints.of(centres, colors, OCCUPIED)
        yield from ((name, occupied) for name in only if name.startswith("occ_only"))
        if any(name.startswith("merge") and "cam" in name for name in only):
            merged = scene.moved(np.linalg.inv(pose).astype(np.float64)) + occupied
            yield from (
                (name, merged) for name in only if name.startswith("merge") and "cam" in name
            )


def _path(places: NDArray[np.float64], step: float) -> list[NDArray[np.float64]]:
    """The points that each frame adds to the path, at most `step` apart, up to its camera."""
    added = [places[:1]]
    for before, after in pairwise(places):
        count = int(min(np.ceil(np.linalg.norm(after - before) / step), MAX_STEPS)) or 1
        parts = np.arange(1, count + 1)[:, None] / count
        added.append(before + parts * (after - before))
    return added


def _check_space(out: Path, only: Sequence[str], count: int, points: int) -> None:
    """Raise UsageError if the files do not fit on the disk: each has the whole cloud."""
    need = count * points * sum(_point_bytes(name) for name in only if name.startswith("merge"))
    free = shutil.disk_usage(out.resolve().parent).free
    if need > free:
        raise UsageError(
            f"{out}: needs {need / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free; "
            "choose another path, or fewer files with --only."
        )
