"""Occupancy and visibility: the occupied cells of a camera's grid, and the cells that it observes.

For each pixel, a ray is followed through all cells up to the first occupied one. The cells on a ray
are the same in all frames of a camera. For a camera with several frames they are found once and
then processed 64 rays at a time (`ray_packets`), ten to twenty times as fast; other cameras are
traced ray by ray (`rays`). Both give exactly the same cells.

A ray that meets no occupied cell observes free space up to the end of the grid. If its pixel has
no depth beyond the grid, it may have passed through a surface that was not measured, so it is left
out.

A frame uses one byte per cell (bit 0: occupied, bit 1: observed). Threads may write the same byte
at the same time, but always the same value, so the result does not depend on their number. Rays are
processed by image column, because the rays of one column cross few x-slices of the grid, which fits
the memory order (z innermost).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import numba
import numpy as np
from numba import prange
from numpy.typing import NDArray

from occgen_hub.geometry.poses import transform
from occgen_hub.jit import njit
from occgen_hub.occupancy.classes import classes_of_cells
from occgen_hub.occupancy.grid import Grid
from occgen_hub.occupancy.point_blocks import PointBlocks, into_blocks
from occgen_hub.occupancy.ray_packets import RayPackets, follow_packets, packets_if_repeated
from occgen_hub.occupancy.rays import OBSERVED, OCCUPIED, follow

__all__ = [
    "OBSERVED",
    "OCCUPIED",
    "FrameOccupancy",
    "first_occupied",
    "observe",
    "trace",
    "warm_up",
]

if "NUMBA_THREADING_LAYER_PRIORITY" not in os.environ:
    # OpenMP first, because an installed TBB may be too old, about which numba warns.
    numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]

# Makes waiting threads sleep instead of spin, because a build's other threads need the core. A
# build then took 2.5 s of CPU time instead of 3.2 to 5.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

_COLUMNS_PER_TASK = 4


@dataclass(frozen=True)
class FrameOccupancy:
    """The occupancy of one frame.

    visible: (n,) int32, sorted columns of the cells that are occupied and observed;
    observed: (ceil(cells / 8),) uint8, `np.packbits` of the observed cells, free and occupied;
    dynamic: (n,) int32, sorted columns of the visible cells with moving objects; labels: (n,) uint8
    classes of the visible cells, None without labels; left_out: (n,) int32, sorted pixels
    `v * width + u` whose rays were left out, see `trace`.
    """

    visible: NDArray[np.int32]
    observed: NDArray[np.uint8]
    dynamic: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    labels: NDArray[np.uint8] | None = None
    left_out: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))


def observe(
    grid: Grid,
    cloud: PointBlocks,
    world_from_camera: NDArray[np.float64],
    intrinsics: NDArray[np.float64],
    size: tuple[int, int],
    state: NDArray[np.uint8] | None = None,
    moving: NDArray[np.float32] | None = None,
    classes: tuple[NDArray[np.uint8], NDArray[np.uint8]] | None = None,
    unmeasured: NDArray[np.bool_] | None = None,
) -> FrameOccupancy:
    """Compute occupancy and visibility of one frame.

    cloud: the scene, world metres; world_from_camera: (4, 4), OpenCV axes, metres; intrinsics:
    (3, 3), pixels; size: (width, height) of the image, with a ray through each pixel's centre
    (u + 0.5, v + 0.5); state: a (grid.cells,) uint8 buffer, to save allocating one; moving: (n, 3)
    points that exist in this frame only, world metres; classes: uint8, of the points of the cloud
    and of the moving ones. A cell has the most common class of its moving points, or without any,
    of its points of the cloud; unmeasured: see `trace`.
    """
    if state is None:
        state = np.empty(grid.cells, np.uint8)
    state[:] = 0
    lower = np.asarray(grid.lower, np.float64)
    shape = np.asarray(grid.shape, np.int64)
    camera_from_world = np.linalg.inv(world_from_camera)
    _mark_cloud(
        cloud.points, cloud.starts, cloud.lower, cloud.upper,
        camera_from_world, lower, grid.voxel_size, shape, state,
    )  # fmt: skip
    inside: NDArray[np.bool_] = np.zeros(0, np.bool_)
    moving_cells: NDArray[np.int32] = np.zeros(0, np.int32)
    if moving is not None and len(moving):
        in_camera = transform(camera_from_world, moving.astype(np.float64))
        inside, moving_cells = grid.columns(np.floor((in_camera - lower) / grid.voxel_size))
        state[moving_cells] = OCCUPIED
    left_out = trace(grid, intrinsics, size, state, unmeasured)
    visible, observed = _collect(state)
    dynamic, labels = np.intersect1d(visible, moving_cells), None
    if classes is not None:
        columns, points = _visible_points(
            cloud.points, cloud.starts, cloud.lower, cloud.upper,
            camera_from_world, lower, grid.voxel_size, shape, state,
        )  # fmt: skip
        labels = classes_of_cells(visible, columns, classes[0][points])
        own = classes_of_cells(dynamic, moving_cells, classes[1][inside])
        labels[np.searchsorted(visible, dynamic)] = own
    return FrameOccupancy(visible, observed, dynamic, labels, left_out)


def trace(
    grid: Grid,
    intrinsics: NDArray[np.float64],
    size: tuple[int, int],
    state: NDArray[np.uint8],
    unmeasured: NDArray[np.bool_] | None = None,
) -> NDArray[np.int32]:
    """Set bit OBSERVED of each cell of `state` that a ray reaches; bit OCCUPIED stops rays.

    intrinsics: (3, 3), pixels, no skew; size: (width, height); state: (grid.cells,) uint8;
    unmeasured: (H, W) bool, the pixels that measured nothing beyond the grid; None to follow all
    rays. The ray of such a pixel is left out if it meets no occupied cell.

    Returns the pixels `v * width + u` whose rays were left out, (n,) int32, ascending.
    """
    left_out = None if unmeasured is None else unmeasured.copy()
    packets = packets_if_repeated(grid, intrinsics, size)
    if packets is None:
        _run(grid, intrinsics, size, state, np.empty((0, 0), np.int32), left_out)
    else:
        follow_packets(packets, state, left_out)
    if left_out is None:
        return np.zeros(0, np.int32)
    return np.flatnonzero(left_out).astype(np.int32)


def first_occupied(
    grid: Grid,
    intrinsics: NDArray[np.float64],
    size: tuple[int, int],
    state: NDArray[np.uint8],
) -> NDArray[np.int32]:
    """(H, W) int32: the column of the first occupied cell on each pixel's ray, -1 for none.

    Also sets the bits of `state` as `trace` does.
    """
    ends = np.full((size[0], size[1]), -1, np.int32)
    _run(grid, intrinsics, size, state, ends, None)
    return np.ascontiguousarray(ends.T)


def _run(
    grid: Grid,
    intrinsics: NDArray[np.float64],
    size: tuple[int, int],
    state: NDArray[np.uint8],
    ends: NDArray[np.int32],
    unmeasured: NDArray[np.bool_] | None,
) -> None:
    K = np.asarray(intrinsics, np.float64)
    _trace_columns(
        K[0, 0], K[1, 1], K[0, 2], K[1, 2],
        _column_order(size[0], numba.get_num_threads()), size[1],
        grid.camera_in_cells, np.asarray(grid.shape, np.int64), state, ends,
        np.empty((0, 0), np.bool_) if unmeasured is None else unmeasured,
    )  # fmt: skip


def warm_up() -> None:
    """Compile the kernels, or load them from the cache, before anything is timed."""
    grid = Grid((0.0, 0.0, 0.0), 1.0, (1, 1, 1))
    observe(grid, into_blocks(np.zeros((1, 3), np.float32)), np.eye(4), np.eye(3), (1, 1))
    packets = RayPackets.of(grid, np.eye(3), (1, 1))
    assert packets is not None
    follow_packets(packets, np.zeros(1, np.uint8))


def _column_order(width: int, threads: int) -> NDArray[np.int64]:
    """(tasks, _COLUMNS_PER_TASK) image columns, -1 for none, in an order that balances threads.

    Threads process contiguous runs of tasks. Assigning neighbouring tasks to different threads
    balances a scene that is near on one side and far on the other.
    """
    tasks = -(-width // _COLUMNS_PER_TASK)
    columns = np.arange(tasks * _COLUMNS_PER_TASK).reshape(tasks, _COLUMNS_PER_TASK)
    columns[columns >= width] = -1
    return np.concatenate([columns[start::threads] for start in range(threads)])


@njit(nogil=True)
def _misses(low, high, R, t, lower, voxel_size, shape):
    """Whether a bounding box, seen from the camera, misses the grid on an axis."""
    for row in range(3):
        centre = t[row]
        reach = 0.0
        for axis in range(3):
            first, last = np.float64(low[axis]), np.float64(high[axis])
            centre += R[row, axis] * 0.5 * (first + last)
            reach += abs(R[row, axis]) * 0.5 * (last - first)
        reach += 1e-6
        upper = lower[row] + voxel_size * shape[row]
        if centre + reach < lower[row] or centre - reach > upper:
            return True
    return False


@njit(nogil=True, inline="always")
def _column(point, R, t, lower, voxel_size, shape):
    """The column of the cell that contains a point, -1 for none."""
    nx, ny, nz = shape[0], shape[1], shape[2]
    x, y, z = np.float64(point[0]), np.float64(point[1]), np.float64(point[2])
    i = np.floor((R[0, 0] * x + R[0, 1] * y + R[0, 2] * z + t[0] - lower[0]) / voxel_size)
    j = np.floor((R[1, 0] * x + R[1, 1] * y + R[1, 2] * z + t[1] - lower[1]) / voxel_size)
    k = np.floor((R[2, 0] * x + R[2, 1] * y + R[2, 2] * z + t[2] - lower[2]) / voxel_size)
    if 0 <= i < nx and 0 <= j < ny and 0 <= k < nz:
        return (np.int64(i) * ny + np.int64(j)) * nz + np.int64(k)
    return np.int64(-1)


@njit(parallel=True, nogil=True)
def _mark_cloud(points, starts, low, high, camera_from_world, lower, voxel_size, shape, state):
    R = camera_from_world[:3, :3]
    t = camera_from_world[:3, 3]
    for block in prange(len(starts) - 1):
        if _misses(low[block], high[block], R, t, lower, voxel_size, shape):
            continue
        for n in range(starts[block], starts[block + 1]):
            column = _column(points[n], R, t, lower, voxel_size, shape)
            if column >= 0:
                state[np.uint64(column)] = OCCUPIED  # Unsigned: see `ray_packets._follow`.


@njit(nogil=True)
def _visible_points(points, starts, low, high, camera_from_world, lower, voxel_size, shape, state):
    """Columns (n,) of the points in visible cells, and (n,) the numbers of the points."""
    R = camera_from_world[:3, :3]
    t = camera_from_world[:3, 3]
    columns: NDArray[np.int64] = np.empty(1 << 16, np.int64)
    numbers: NDArray[np.int64] = np.empty(1 << 16, np.int64)
    count = 0
    for block in range(len(starts) - 1):
        if _misses(low[block], high[block], R, t, lower, voxel_size, shape):
            continue
        for n in range(starts[block], starts[block + 1]):
            column = _column(points[n], R, t, lower, voxel_size, shape)
            if column < 0 or state[np.uint64(column)] != OCCUPIED | OBSERVED:
                continue
            if count == len(columns):
                columns = np.append(columns, columns)
                numbers = np.append(numbers, numbers)
            columns[count], numbers[count] = column, n
            count += 1
    return columns[:count], numbers[:count]


@njit(parallel=True, nogil=True)
def _trace_columns(fx, fy, cx, cy, columns, height, origin, shape, state, ends, unmeasured):
    keep, all_measured = len(ends) > 0, len(unmeasured) == 0
    # Tuples, because passing an array changes its reference count, for each ray and in all threads
    # at one address.
    origin = (origin[0], origin[1], origin[2])
    shape = (shape[0], shape[1], shape[2])
    for task in prange(len(columns)):
        path = np.empty(0 if all_measured else shape[0] + shape[1] + shape[2], np.uint32)
        for u in columns[task]:
            if u < 0:
                continue
            dx = (u + 0.5 - cx) * fy
            for v in range(height):
                dy = (v + 0.5 - cy) * fx
                if not all_measured and unmeasured[v, u]:
                    length = follow(dx, dy, fx * fy, origin, shape, None, path)
                    if not _meets_occupied(path, length, state):
                        unmeasured[v, u] = length > 0
                        continue
                    unmeasured[v, u] = False
                end = follow(dx, dy, fx * fy, origin, shape, state, None)
                if keep:
                    ends[u, v] = end


@njit(nogil=True)
def _meets_occupied(path, length, state):
    """Whether one of the first cells of a path is occupied."""
    for n in range(length):  # noqa: SIM110  # compiled
        if state[path[n]] & OCCUPIED:
            return True
    return False


def _collect(state: NDArray[np.uint8]) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """The visible columns and the packed observed cells of a finished frame."""
    whole = len(state) // 8 * 8
    words = state[:whole].view("<u8")
    packed = np.zeros(-(-len(state) // 8), np.uint8)
    visible = _collect_words(words, packed)
    if whole < len(state):
        rest = state[whole:]
        packed[-1:] = np.packbits(rest >> 1)
        late = whole + np.flatnonzero(rest == OCCUPIED | OBSERVED)
        visible = np.concatenate([visible, late.astype(np.int32)])
    return visible, packed


@njit(parallel=True, nogil=True)
def _collect_words(words, packed):
    """Process eight cells at a time. A word is eight bytes of `state`, the first one lowest."""
    ones = np.uint64(0x0101010101010101)
    # A product with this collects the lowest bits of the eight bytes in the highest byte, in the
    # order of np.packbits.
    gather = np.uint64(0x8040201008040201)
    tasks = 64
    share = (len(words) + tasks - 1) // tasks
    counts = np.zeros(tasks + 1, np.int64)
    for task in prange(tasks):
        count = np.uint64(0)
        for n in range(task * share, min((task + 1) * share, len(words))):
            word = words[n]
            if word != 0:
                observed = (word >> np.uint64(1)) & ones
                packed[n] = (observed * gather) >> np.uint64(56)
                count += ((observed & word) * ones) >> np.uint64(56)
        counts[task + 1] = np.int64(count)
    starts = np.cumsum(counts)
    visible = np.empty(starts[-1], np.int32)
    for task in prange(tasks):
        place = starts[task]
        for n in range(task * share, min((task + 1) * share, len(words))):
            both = (words[n] >> np.uint64(1)) & words[n] & ones
            if both != 0:
                for byte in range(8):
                    if (both >> np.uint64(8 * byte)) & np.uint64(1):
                        visible[place] = 8 * n + byte
                        place += 1
    return visible
