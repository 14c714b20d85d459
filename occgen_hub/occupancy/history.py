"""Occupancy of past frames, brought to the present one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from occgen_hub.occupancy.grid import Grid


def past_frames(frame: int, length: int, step: int) -> list[int]:
    """Numbers of the frames at `step`, 2 * `step`, ... before `frame`, nearest first.

    There are `length` of them, or as many as the episode has.
    """
    return [frame - (h + 1) * step for h in range(min(length, frame // step))]


def moved(cells: NDArray[np.integer], motion: NDArray[np.float64], grid: Grid) -> NDArray[np.int32]:
    """The cells that the centres of (n,) others lie in once `motion` has moved them, ascending.

    motion: (4, 4) float64, metres. What leaves the grid is left out.
    """
    camera = grid.camera_in_cells
    centres = np.stack(np.unravel_index(cells, grid.shape), axis=-1) + 0.5 - camera
    there = centres @ motion[:3, :3].T + motion[:3, 3] / grid.voxel_size + camera
    return np.unique(grid.columns(there)[1])
