"""Compare built cells with the measured depth of a real camera, for data without ground truth.

Part of scripts/accuracy. Reads a folder in the layout of 7-Scenes: frame-NNNNNN.depth.png (uint16
millimetres, 0 and 65535 for none), frame-NNNNNN.color.jpg or .png, frame-NNNNNN.pose.txt (4 x 4
world_from_camera, OpenCV axes, metres), all with the same numbers, and camera-intrinsics.txt
(3 x 3, pixels) in the same folder or its parent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from accuracy_cells import near_set_cells
from accuracy_methods import build, tsdf_surface
from numpy.typing import NDArray

from occgen_hub.builder import DatasetBuilder, EpisodeRef
from occgen_hub.config import Config
from occgen_hub.episode import Episode, Task
from occgen_hub.errors import SourceError, UsageError
from occgen_hub.geometry.camera import unproject
from occgen_hub.loading import Trajectory, trajectories
from occgen_hub.media import image_size, read_depth, read_rgb
from occgen_hub.occupancy.grid import Grid, cell_numbers
from occgen_hub.occupancy.visibility import OCCUPIED, first_occupied

FRONT = 0.04
"""A cell that is farther in front of the measured depth than this is wrong, metres."""

BEHIND = 0.1
"""A free cell that is farther behind the measured depth than this is wrong, metres."""

NONE = 65535
FPS = 30.0


class KinectFolder(DatasetBuilder):
    """A folder of frames as one episode."""

    name = "kinect"

    def episodes(self) -> Iterator[EpisodeRef]:
        """Yield the only episode."""
        yield EpisodeRef("kinect/scene/trajectory_0", self.root)

    def has_depth(self, ref: EpisodeRef) -> bool:
        """It has."""
        return True

    def sources(self, ref: EpisodeRef) -> list[Path]:
        """The intrinsics, then colour, depth and pose of each frame."""
        depth = sorted(ref.path.glob("frame-*.depth.png"))
        if not depth:
            raise SourceError(ref.path, "has no frame-*.depth.png", "give a folder with such files")
        files = [self._intrinsics(ref.path)]
        for path in depth:
            stem = path.name.removesuffix(".depth.png")
            colours = [path.with_name(f"{stem}.color.{kind}") for kind in ("jpg", "png")]
            colour = next((name for name in colours if name.is_file()), colours[0])
            for file in (colour, path, path.with_name(f"{stem}.pose.txt")):
                if not file.is_file():
                    raise SourceError(file, "is missing", "restore it, or remove the frame")
                files.append(file)
        return files

    def _intrinsics(self, folder: Path) -> Path:
        places = [parent / "camera-intrinsics.txt" for parent in (folder, folder.parent)]
        found = next((path for path in places if path.is_file()), None)
        if found is None:
            raise SourceError(places[0], "is missing", "put the camera's 3 x 3 matrix there")
        return found

    def read(self, ref: EpisodeRef) -> Episode:
        """Read the episode. Frames are decoded on access."""
        files = self.sources(ref)
        colour, depth, poses = files[1::3], files[2::3], files[3::3]
        K, size, length = _matrix(files[0], 3), image_size(depth[0]), len(depth)

        def metres(t: int) -> NDArray[np.float64]:
            units = read_depth(depth[t], size)
            return np.where(units == NONE, 0.0, units / 1000.0)

        return Episode(
            id=ref.id,
            length=length,
            fps=FPS,
            robot_type="unknown",
            image_size=size,
            read_rgb=lambda t: read_rgb(colour[t], size),
            tasks=(Task("explore the scene"),),
            task_index=np.zeros(length, np.int64),
            columns={},
            media=(),
            fingerprint=self.fingerprint(files),
            read_depth=metres,
            world_from_camera=np.stack([_matrix(path, 4) for path in poses]),
            intrinsics=np.repeat(K[None], length, axis=0),
        )


def _matrix(path: Path, n: int) -> NDArray[np.float64]:
    try:
        matrix = np.loadtxt(path)
    except (OSError, ValueError) as error:
        raise SourceError(path, f"is not a matrix ({error})", "restore it") from error
    if matrix.shape != (n, n) or not np.isfinite(matrix).all():
        raise SourceError(path, f"is not a finite {n} x {n} matrix", "restore it")
    return matrix


def in_front(
    grid: Grid, K: NDArray[np.float64], visible: NDArray[np.integer], depth: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(m,) metres by which visible cells lie in front of the measured depth.

    The distance is along the optical axis, from the cell's centre to the depth of the pixel that
    the centre projects to. visible: (n,) cell numbers; depth: (H, W), metres, 0 for none. Cells
    without a measured pixel are skipped.
    """
    away, measured = _at_pixels(grid, K, visible, depth)
    ahead: NDArray[np.float64] = (measured - away)[measured > 0]
    return ahead


def _at_pixels(
    grid: Grid, K: NDArray[np.float64], cells: NDArray[np.integer], depth: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(m,) depth of the centres of the cells in the image, and (m,) measured at their pixels."""
    height, width = depth.shape
    x, y, z = grid.centres(cells).astype(np.float64).T
    with np.errstate(divide="ignore", invalid="ignore"):
        u, v = np.floor(x / z * K[0, 0] + K[0, 2]), np.floor(y / z * K[1, 1] + K[1, 2])
    inside = (z > 0) & (u >= 0) & (u < width) & (v >= 0) & (v < height)
    return z[inside], depth[v[inside].astype(np.intp), u[inside].astype(np.intp)]


def free_counts(
    grid: Grid, K: NDArray[np.float64], free: NDArray[np.integer], depth: NDArray[np.float64]
) -> NDArray[np.int64]:
    """(3,) numbers of the free cells in the image, of those at a pixel without depth, and of those
    more than `BEHIND` behind the measured depth.
    """
    away, measured = _at_pixels(grid, K, free, depth)
    behind = (measured > 0) & (away > measured + BEHIND)
    return np.array([len(away), (measured == 0).sum(), behind.sum()])


def in_front_by_rays(
    grid: Grid, K: NDArray[np.float64], visible: NDArray[np.integer], depth: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Like `in_front`, but against the median depth of all pixels with a ray that ends in the cell.

    The distance is larger on slanted surfaces, where earlier cells stop some of the rays.
    """
    height, width = depth.shape
    state = np.zeros(grid.cells, np.uint8)
    state[visible] = OCCUPIED
    ends = first_occupied(grid, K, (width, height), state)
    used = (ends >= 0) & (depth > 0)
    cells, values = ends[used], depth[used]
    order = np.lexsort((values, cells))
    cells, values = cells[order], values[order]
    columns, first, count = np.unique(cells, return_index=True, return_counts=True)
    median = (values[first + (count - 1) // 2] + values[first + count // 2]) / 2
    ahead: NDArray[np.float64] = median - grid.centres(columns)[:, 2]
    return ahead


def measured_found(
    grid: Grid,
    K: NDArray[np.float64],
    visible: NDArray[np.integer],
    depth: NDArray[np.float64],
    depth_range: tuple[float, float],
) -> tuple[int, int]:
    """Count the cells with a measured point, and those of them near (two cells) a visible one."""
    points, _ = unproject(depth, K, depth_range)
    places = (points - np.asarray(grid.lower)) / grid.voxel_size
    measured = np.unique(grid.columns(places)[1])
    occupied = np.zeros(grid.shape, np.bool_)
    occupied.reshape(-1)[visible] = True
    return len(measured), int(near_set_cells(occupied, measured, 2).sum())


def measure_kinect(
    folder: Path, out: Path, config: Config, progress: Callable[[], object] = lambda: None
) -> dict[str, float]:
    """Build a folder into `out` and return its figures: shares, metres and numbers of cells."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: is not a folder; give one with frame-NNNNNN.depth.png files.")
    builder = KinectFolder(folder)
    build(builder, out, config)
    episode = builder.read(next(builder.episodes()))
    trajectory = Trajectory.open(trajectories(out)[0])
    grid, intrinsics = trajectory.grid, trajectory.intrinsics()
    assert episode.read_depth is not None
    ahead, by_rays, measured, found = [], [], 0, 0
    free = np.zeros(3, np.int64)
    rows = zip(trajectory.visible_frames(), trajectory.observed(), strict=True)
    for t, (visible, observed) in enumerate(rows):
        depth = episode.read_depth(t)
        observed[visible] = False
        free += free_counts(grid, intrinsics[t], np.flatnonzero(observed), depth)
        ahead.append(in_front(grid, intrinsics[t], visible, depth))
        by_rays.append(in_front_by_rays(grid, intrinsics[t], visible, depth))
        number, near = measured_found(grid, intrinsics[t], visible, depth, config.depth_range)
        measured, found = measured + number, found + near
        progress()
    metres, rays = np.concatenate(ahead), np.concatenate(by_rays)
    tsdf = len(np.unique(cell_numbers(tsdf_surface(episode, config), config.voxel_size)))
    cells = len(trajectory.scene_cells())
    return {
        "in_front": float((metres > FRONT).mean()),
        "median": float(np.median(metres)),
        "measured_found": found / max(measured, 1),
        "free_unmeasured": float(free[1] / max(free[0], 1)),
        "free_behind": float(free[2] / max(free[0], 1)),
        "in_front_by_rays": float((rays > FRONT).mean()),
        "median_by_rays": float(np.median(rays)),
        "scene_cells": float(cells),
        "tsdf_cells": float(tsdf),
        "times_tsdf": cells / max(tsdf, 1),
    }
