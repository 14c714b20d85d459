"""Occupancy of all frames of a scene, several at once: a frame a thread.

So no thread waits for the slowest at a frame's end, and cores are not idle where another thread of
the process, which reconstructs or compresses, takes one of them for a while.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import numba
import numpy as np
from numpy.typing import NDArray

from occgen_hub.occupancy.grid import Grid
from occgen_hub.occupancy.point_blocks import into_blocks
from occgen_hub.occupancy.ray_packets import prepare
from occgen_hub.occupancy.states import FreeSpace
from occgen_hub.occupancy.visibility import FrameOccupancy, observe, warm_up
from occgen_hub.prefetch import prefetch

SAFE = ("omp", "tbb")
"""Of numba's threading layers, those that several threads may call at once."""


def observe_frames(
    grid: Grid,
    points: NDArray[np.float32],
    world_from_camera: NDArray[np.float64],
    intrinsics: NDArray[np.float64],
    size: tuple[int, int],
    moving: Callable[[int], NDArray[np.float32]] | None = None,
    free: FreeSpace | None = None,
) -> Iterator[FrameOccupancy]:
    """What each frame sees of a scene, in order; see `observe` for one.

    points: (n, 3) float32, world metres; world_from_camera: (T, 4, 4), OpenCV axes, metres;
    intrinsics: (T, 3, 3), pixels; size: (width, height) of the images; moving: the points of a
    frame that are there in no other, (n, 3) float32, world metres; free: what is given what each
    frame observed free.
    """
    cloud = into_blocks(points)
    prepare(grid, intrinsics, size)
    own = threading.local()
    alone = not _several_may_call()

    def frame(t: int) -> FrameOccupancy:
        if not hasattr(own, "state"):
            own.state = np.empty(grid.cells, np.uint8)
            if not alone:
                numba.set_num_threads(1)  # Of this thread's calls.
        own_points = None if moving is None else moving(t)
        seen = observe(
            grid, cloud, world_from_camera[t], intrinsics[t], size, own.state, own_points
        )
        if free is not None:
            free.add(seen, world_from_camera[t])
        return seen

    numbers = range(len(world_from_camera))
    return map(frame, numbers) if alone else prefetch(frame, numbers)


def _several_may_call() -> bool:
    warm_up()  # Which layer there is, is known from the first call on.
    return numba.threading_layer() in SAFE
