"""The frames of a built trajectory in order, each with the occupancy of past frames."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from occgen_hub.errors import DatasetError
from occgen_hub.jit import njit
from occgen_hub.loading import REBUILD, Trajectory
from occgen_hub.occupancy.grid import Grid, cell_centres, cell_numbers
from occgen_hub.occupancy.history import moved, past_frames


def frame_title(number: int, count: int) -> str:
    """A title with the number of a frame, as for --frame, and the range of numbers."""
    return f"frame {number} (0 to {count - 1})"


@dataclass(frozen=True)
class FrameCells:
    """The occupied cells that a camera sees.

    world_from_camera: (4, 4) float64, OpenCV axes, metres; columns: (n,) flat numbers of the cells
    of its grid, ascending; moving: (m,) the columns with moving objects; classes: (n,) uint8 of
    the cells, None without labels.
    """

    grid: Grid
    world_from_camera: NDArray[np.float64]
    columns: NDArray[np.integer]
    moving: NDArray[np.integer]
    classes: NDArray[np.uint8] | None = None

    @cached_property
    def is_moving(self) -> NDArray[np.bool_]:
        """(n,) bool: which of the cells have moving objects."""
        return np.isin(self.columns, self.moving, assume_unique=True)

    def in_world(self) -> NDArray[np.float64]:
        """(n, 3) centres of the cells, world, metres."""
        pose = self.world_from_camera
        return self.grid.centres(self.columns).astype(np.float64) @ pose[:3, :3].T + pose[:3, 3]

    @cached_property
    def world_cells(self) -> NDArray[np.int64]:
        """(m,) ascending numbers of the cells of the world's grid that contain these cells.

        Cached, because a frame is in the past of many frames.
        """
        places = self.in_world().astype(np.float32)
        return np.unique(cell_numbers(places, self.grid.voxel_size))

    @cached_property
    def moving_world_cells(self) -> NDArray[np.int64]:
        """(m,) the `world_cells` that contain moving cells."""
        places = self.in_world()[self.is_moving].astype(np.float32)
        return np.unique(cell_numbers(places, self.grid.voxel_size))

    def contain(self, points: NDArray[np.floating]) -> NDArray[np.bool_]:
        """(n,) bool: whether (n, 3) points, world, metres, are in one of the cells."""
        taken = np.zeros(self.grid.cells, np.bool_)
        taken[self.columns] = True
        found: NDArray[np.bool_] = _held(
            points, self.world_from_camera, self.grid.voxel_size, self.grid.camera_in_cells,
            taken.reshape(self.grid.shape),
        )  # fmt: skip
        return found


@njit(nogil=True)
def _held(
    points: NDArray[np.floating],
    pose: NDArray[np.float64],
    edge: float,
    camera: NDArray[np.float64],
    taken: NDArray[np.bool_],
) -> NDArray[np.bool_]:
    """(n,) bool: whether (n, 3) points, world, are in the cells `taken`, in one pass.

    camera: (3,) its position in cells of `edge` metres from the grid's lower corner; taken:
    (nx, ny, nz) bool.
    """
    found = np.zeros(len(points), np.bool_)
    nx, ny, nz = taken.shape
    for n in range(len(points)):
        x, y, z = points[n, 0] - pose[0, 3], points[n, 1] - pose[1, 3], points[n, 2] - pose[2, 3]
        i = (x * pose[0, 0] + y * pose[1, 0] + z * pose[2, 0]) / edge + camera[0]
        j = (x * pose[0, 1] + y * pose[1, 1] + z * pose[2, 1]) / edge + camera[1]
        k = (x * pose[0, 2] + y * pose[1, 2] + z * pose[2, 2]) / edge + camera[2]
        if 0 <= i < nx and 0 <= j < ny and 0 <= k < nz:
            found[n] = taken[int(i), int(j), int(k)]
    return found


@dataclass(frozen=True)
class Frame:
    """A frame with its number. past: the past frames shown with it, nearest first."""

    number: int
    intrinsics: NDArray[np.float64]
    cells: FrameCells
    past: tuple[FrameCells, ...]

    @property
    def world_from_camera(self) -> NDArray[np.float64]:
        """(4, 4) float64, OpenCV axes, metres."""
        return self.cells.world_from_camera

    def accumulated(self) -> NDArray[np.integer]:
        """(n,) ascending columns of this frame's grid: its own cells and the past ones."""
        grid = self.cells.grid
        camera_from_world = np.linalg.inv(self.world_from_camera)
        older = [moved(p.columns, camera_from_world @ p.world_from_camera, grid) for p in self.past]
        columns: NDArray[np.integer] = np.unique(np.concatenate([self.cells.columns, *older]))
        return columns

    @cached_property
    def accumulated_world_cells(self) -> NDArray[np.int64]:
        """(n,) ascending numbers of the world's grid cells, for its own and the past cells."""
        every = [cells.world_cells for cells in (self.cells, *self.past)]
        return np.unique(np.concatenate(every))

    def accumulated_in_world(self) -> NDArray[np.float32]:
        """(n, 3) centres, metres, of `accumulated_world_cells`.

        The world's grid is that of the whole scene's occupancy, so it contains all cells.
        """
        return cell_centres(self.accumulated_world_cells, self.cells.grid.voxel_size)


def frames(trajectory: Trajectory, history_len: int = 0, history_step: int = 1) -> Iterator[Frame]:
    """The frames in order, each with `history_len` past frames, `history_step` frames apart.

    Raises DatasetError if a file of the trajectory is invalid.
    """
    poses, intrinsics, grid = (
        trajectory.world_from_camera(), trajectory.intrinsics(), trajectory.grid
    )  # fmt: skip
    kept: deque[FrameCells] = deque(maxlen=min(history_len * history_step, len(poses)) + 1)
    count = 0
    labels = repeat(None) if trajectory.taxonomy is None else trajectory.label_frames()
    rows = zip(trajectory.visible_frames(), trajectory.dynamic_frames(), labels, strict=False)
    for number, (columns, moving, classes) in enumerate(rows):
        if number == len(poses):
            count += 1
            break
        kept.append(FrameCells(grid, poses[number], columns, moving, classes))
        before = past_frames(number, history_len, history_step)
        past = tuple(kept[past - number - 1] for past in before)
        yield Frame(number, intrinsics[number], kept[-1], past)
        count += 1
    if count != len(poses):
        problem = f"does not have the {len(poses)} rows of the table"
        raise DatasetError(trajectory.file("visible"), problem, REBUILD)
