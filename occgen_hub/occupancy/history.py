"""Occupancy of past frames in the grid of the present frame."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from occgen_hub.occupancy.classes import most_common
from occgen_hub.occupancy.grid import Grid


def past_frames(frame: int, length: int, step: int) -> list[int]:
    """The frames at `step`, 2 * `step`, ... before `frame`, nearest first, at most `length`."""
    return [frame - (h + 1) * step for h in range(min(length, frame // step))]


def moved(cells: NDArray[np.integer], motion: NDArray[np.float64], grid: Grid) -> NDArray[np.int32]:
    """The cells that contain the centres of (n,) cells after a motion, ascending int32.

    motion: (4, 4) float64, metres. Cells outside the grid are left out.
    """
    return np.unique(_places(cells, motion, grid)[1])


def moved_classes(
    cells: NDArray[np.integer],
    classes: NDArray[np.uint8],
    motion: NDArray[np.float64],
    grid: Grid,
) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Like `moved`, with the most common class of the cells that move into each."""
    inside, columns = _places(cells, motion, grid)
    numbers, found = most_common(columns, classes[inside])
    return numbers.astype(np.int32), found


def _places(
    cells: NDArray[np.integer], motion: NDArray[np.float64], grid: Grid
) -> tuple[NDArray[np.bool_], NDArray[np.int32]]:
    """(n,) whether cells are in the grid after a motion, and the columns of those that are."""
    camera = grid.camera_in_cells
    centres = np.stack(np.unravel_index(cells, grid.shape), axis=-1) + 0.5 - camera
    places = centres @ motion[:3, :3].T + motion[:3, 3] / grid.voxel_size + camera
    return grid.columns(places)
