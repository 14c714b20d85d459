"""Occupancy of all frames of a scene, in parallel with one thread per frame.

So threads do not wait for one another at the end of a frame, and no core is idle while another
thread of the process reconstructs or compresses.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import numba
import numpy as np
from numpy.typing import NDArray

from occgen_hub.occupancy.classes import PointLabels
from occgen_hub.occupancy.grid import Grid
from occgen_hub.occupancy.point_blocks import sorted_into_blocks
from occgen_hub.occupancy.ray_packets import prepare
from occgen_hub.occupancy.states import FreeSpace
from occgen_hub.occupancy.visibility import FrameOccupancy, observe, warm_up
from occgen_hub.prefetch import prefetch

THREAD_SAFE_LAYERS = ("omp", "tbb")
"""The threading layers of numba that several threads may call at a time."""


def observe_frames(
    grid: Grid,
    points: NDArray[np.float32],
    world_from_camera: NDArray[np.float64],
    intrinsics: NDArray[np.float64],
    size: tuple[int, int],
    moving: Callable[[int], NDArray[np.float32]] | None = None,
    free: FreeSpace | None = None,
    labels: PointLabels | None = None,
    unmeasured: Callable[[int], NDArray[np.bool_] | None] = lambda _: None,
) -> Iterator[FrameOccupancy]:
    """Yield the occupancy of each frame of a scene, in order; see `observe` for one.

    points: (n, 3) float32, world metres; world_from_camera: (T, 4, 4), OpenCV axes, metres;
    intrinsics: (T, 3, 3), pixels; size: (width, height) of the images; moving: the points of a
    frame that exist in no other, (n, 3) float32, world metres; free: collects the free space
    observed by the frames; labels: the classes of `points`, and the moving points with theirs,
    which then replace `moving`; unmeasured: that of `observe`, by frame.
    """
    cloud, order = sorted_into_blocks(points)
    static = None if labels is None else labels.static[order]
    labelled = None if labels is None else labels.moving
    prepare(grid, intrinsics, size)
    own = threading.local()
    sequential = not _is_thread_safe()

    def frame(t: int) -> FrameOccupancy:
        if not hasattr(own, "state"):
            own.state = np.empty(grid.cells, np.uint8)
            if not sequential:
                numba.set_num_threads(1)  # For calls from this thread.
        own_points, classes = None, None
        if static is None:
            own_points = None if moving is None else moving(t)
        elif labelled is None:
            classes = static, static[:0]
        else:
            own_points, own_classes = labelled(t)
            classes = static, own_classes
        seen = observe(
            grid, cloud, world_from_camera[t], intrinsics[t], size, own.state, own_points, classes,
            unmeasured(t),
        )  # fmt: skip
        if free is not None:
            free.add(seen, world_from_camera[t])
        return seen

    numbers = range(len(world_from_camera))
    return map(frame, numbers) if sequential else prefetch(frame, numbers)


def _is_thread_safe() -> bool:
    warm_up()  # numba chooses the layer in the first call.
    return numba.threading_layer() in THREAD_SAFE_LAYERS
