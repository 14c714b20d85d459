"""The grid in a camera's frame, and the grid of a whole scene."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from occgen_hub.config import Config, decimal
from occgen_hub.geometry.cloud import REACH


@dataclass(frozen=True)
class Grid:
    """Cubic cells in a camera's frame (OpenCV axes, metres).

    Cell (i, j, k) is the half-open box that starts at `lower + voxel_size * (i, j, k)`; its
    column in stored matrices is `i * (ny * nz) + j * nz + k`.
    """

    lower: tuple[float, float, float]
    voxel_size: float
    shape: tuple[int, int, int]

    @classmethod
    def of(cls, config: Config) -> Grid:
        """The grid of a configuration."""
        x, y, z = config.pc_range[:3]
        return cls((x, y, z), config.voxel_size, config.grid_shape)

    @property
    def cells(self) -> int:
        """The number of cells."""
        return prod(self.shape)

    @property
    def camera_in_cells(self) -> NDArray[np.float64]:
        """(3,) the camera centre in cells from the grid's lower corner.

        Computed with the decimal numbers of the configuration, so that 2 / 0.02 is exactly 100.
        """
        size = decimal(self.voxel_size)
        return np.array([float(-decimal(low) / size) for low in self.lower])

    def centres(self, columns: NDArray[np.integer]) -> NDArray[np.float32]:
        """(n, 3) float32 centres of the cells with (n,) columns, metres, camera frame."""
        index = np.stack(np.unravel_index(columns, self.shape), axis=-1)
        centres: NDArray[np.float32] = (
            np.asarray(self.lower) + (index + 0.5) * self.voxel_size
        ).astype(np.float32)
        return centres

    def exit_depths(
        self, intrinsics: NDArray[np.float64], size: tuple[int, int]
    ) -> NDArray[np.float64]:
        """(H, W) depth in metres at which the ray of each pixel's centre leaves the grid's range.

        intrinsics: (3, 3), pixels, no skew; size: (width, height) of the image.
        """
        low = np.asarray(self.lower)
        high = low + self.voxel_size * np.asarray(self.shape)
        exits = []
        for axis, pixels in enumerate(size):
            slope = (np.arange(pixels) + 0.5 - intrinsics[axis, 2]) / intrinsics[axis, axis]
            with np.errstate(divide="ignore", invalid="ignore"):
                exits.append(np.fmax(low[axis] / slope, high[axis] / slope))
        depths: NDArray[np.float64] = np.minimum(np.minimum.outer(exits[1], exits[0]), high[2])
        return depths

    def share_below(
        self, points: NDArray[np.floating], world_from_camera: NDArray[np.float64]
    ) -> float:
        """The share of the surface ahead of the cameras that is below their grids, 0 to 1.

        Of the points within the grid's range to the sides and ahead, those below it. points:
        (n, 3) world metres; world_from_camera: (T, 4, 4). Only some points and frames are used.
        """
        points = points[:: max(1, len(points) // 20_000)].astype(np.float64)
        frames = np.unique(np.linspace(0, len(world_from_camera) - 1, 16).astype(np.intp))
        high = np.asarray(self.lower) + self.voxel_size * np.asarray(self.shape)
        within = below = 0
        for pose in world_from_camera[frames]:
            x, y, z = ((points - pose[:3, 3]) @ pose[:3, :3]).T
            ahead = (x >= self.lower[0]) & (x < high[0]) & (z > 0) & (z < high[2])
            below += np.count_nonzero(ahead & (y >= high[1]))
            within += np.count_nonzero(ahead & (y >= self.lower[1]) & (y < high[1]))
        return below / max(below + within, 1)

    def columns(self, places: NDArray[np.floating]) -> tuple[NDArray[np.bool_], NDArray[np.int32]]:
        """(n,) bool: whether places lie in the grid, and (m,) int32 columns of those that do.

        places: (n, 3), in cells from the lower corner.
        """
        inside = np.asarray(((places >= 0) & (places < self.shape)).all(axis=1))
        i, j, k = places[inside].astype(np.int32).T
        _, ny, nz = self.shape
        return inside, (i * ny + j) * nz + k


@dataclass(frozen=True)
class SceneGrid:
    """The occupied cells of a scene in world coordinates, aligned to multiples of voxel_size.

    centres: (M, 3) float32, metres, in the order of their cells; origin: (3,) float64, the lower
    corner of cell (0, 0, 0); shape: cells along x, y, z.
    """

    centres: NDArray[np.float32]
    origin: NDArray[np.float64]
    shape: tuple[int, int, int]
    voxel_size: float


def scene_grid(points: NDArray[np.float32], voxel_size: float) -> SceneGrid:
    """The cells of edge `voxel_size` that contain one of (n, 3) points, world metres.

    It sorts cell numbers and needs no dense array, so a building of any size fits. The points must
    be finite and within 2^20 cells of the world's origin.
    """
    cells = np.floor(points.astype(np.float64) / voxel_size).astype(np.int64)
    if not len(cells):
        return SceneGrid(np.zeros((0, 3), np.float32), np.zeros(3), (0, 0, 0), voxel_size)
    low = cells.min(axis=0)
    nx, ny, nz = (cells.max(axis=0) - low + 1).tolist()
    i, j, k = (cells - low).T
    columns = np.unique((i * ny + j) * nz + k)
    index = np.stack([columns // (ny * nz), columns // nz % ny, columns % nz], axis=-1)
    origin = low * voxel_size
    centres = (origin + (index + 0.5) * voxel_size).astype(np.float32)
    return SceneGrid(centres, origin, (nx, ny, nz), voxel_size)


def cell_numbers(points: NDArray[np.floating], voxel_size: float) -> NDArray[np.int64]:
    """(n,) int64 numbers of the cells of the world's grid that contain (n, 3) points, metres.

    They sort in the order of the cells (i, j, k). The points must be finite and within 2^20 cells
    of the world's origin.
    """
    cells = np.floor(points.astype(np.float64) / voxel_size).astype(np.int64) + REACH
    return (cells[:, 0] << 42) | (cells[:, 1] << 21) | cells[:, 2]


def cell_centres(numbers: NDArray[np.int64], voxel_size: float) -> NDArray[np.float32]:
    """(n, 3) float32 centres, world metres, of the cells with (n,) numbers."""
    cells = np.stack([numbers >> 42, numbers >> 21 & 0x1FFFFF, numbers & 0x1FFFFF], axis=-1)
    centres: NDArray[np.float32] = ((cells - REACH + 0.5) * voxel_size).astype(np.float32)
    return centres
