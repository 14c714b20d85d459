"""Which cells of a camera's grid are occupied, and which of all cells the camera sees.

One ray a pixel is followed through every cell that it crosses (J. Amanatides and A. Woo, "A fast
voxel traversal algorithm for ray tracing", 1987) up to its first occupied cell. Ray directions
are scaled by fx * fy, which makes them exact in float64 for intrinsics held in float32; when
two crossings are closer than rounding error can tell apart, `exact.compare_crossings` decides,
and a crossing through an edge or corner takes x first, then y, then z.

A frame is worked on in one byte a cell (bit 0: occupied, bit 1: observed). Threads may store the
same byte at once, but only ever the same value, so the result does not depend on their number.
Rays are taken by image column: those of one column stay within few x-slices of the grid, which
is what the memory order (z innermost) wants.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numba
import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from occgen_hub.occupancy.bricks import BrickedCloud, into_bricks
from occgen_hub.occupancy.exact import compare_crossings
from occgen_hub.occupancy.grid import Grid

if "NUMBA_THREADING_LAYER_PRIORITY" not in os.environ:
    # OpenMP first: a TBB that some package brought along may be too old, which numba warns of.
    numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]

OCCUPIED = np.uint8(1)
OBSERVED = np.uint8(2)
_COLUMNS_A_TASK = 4


@dataclass(frozen=True)
class FrameOccupancy:
    """What one frame sees.

    visible: (n,) int32, sorted columns of the cells that are occupied and observed;
    observed: (ceil(cells / 8),) uint8, `np.packbits` of the observed cells, free and occupied.
    """

    visible: NDArray[np.int32]
    observed: NDArray[np.uint8]


def observe(
    grid: Grid,
    cloud: BrickedCloud,
    world_from_camera: NDArray[np.float64],
    intrinsics: NDArray[np.float64],
    size: tuple[int, int],
    state: NDArray[np.uint8] | None = None,
) -> FrameOccupancy:
    """Occupancy and visibility of one frame.

    cloud: the scene, world coordinates; world_from_camera: (4, 4), OpenCV axes, metres;
    intrinsics: (3, 3), pixels; size: (width, height) of the image, a ray a pixel through its
    centre (u + 0.5, v + 0.5); state: a (grid.cells,) buffer to work in, to save allocating one.
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
    trace(grid, intrinsics, size, state)
    visible, observed = _collect(state)
    return FrameOccupancy(visible, observed)


def trace(
    grid: Grid,
    intrinsics: NDArray[np.float64],
    size: tuple[int, int],
    state: NDArray[np.uint8],
) -> None:
    """Set bit OBSERVED of each cell of `state` that a ray reaches; bit OCCUPIED stops rays.

    intrinsics: (3, 3), pixels, no skew; size: (width, height); state: (grid.cells,) uint8.
    """
    _run(grid, intrinsics, size, state, np.empty((0, 0), np.int32))


def first_occupied(
    grid: Grid,
    intrinsics: NDArray[np.float64],
    size: tuple[int, int],
    state: NDArray[np.uint8],
) -> NDArray[np.int32]:
    """(H, W) int32: the column of the first occupied cell on each pixel's ray, -1 for none.

    As `trace`, which it does as well.
    """
    ends = np.full((size[0], size[1]), -1, np.int32)
    _run(grid, intrinsics, size, state, ends)
    return np.ascontiguousarray(ends.T)


def _run(
    grid: Grid,
    intrinsics: NDArray[np.float64],
    size: tuple[int, int],
    state: NDArray[np.uint8],
    ends: NDArray[np.int32],
) -> None:
    K = np.asarray(intrinsics, np.float64)
    _trace_columns(
        K[0, 0], K[1, 1], K[0, 2], K[1, 2],
        _column_order(size[0], numba.get_num_threads()), size[1],
        grid.camera_in_cells, np.asarray(grid.shape, np.int64), state, ends,
    )  # fmt: skip


def warm_up() -> None:
    """Compile the kernels, or load them from the cache, before anything is timed."""
    grid = Grid((0.0, 0.0, 0.0), 1.0, (1, 1, 1))
    observe(grid, into_bricks(np.zeros((1, 3), np.float32)), np.eye(4), np.eye(3), (1, 1))


def _column_order(width: int, threads: int) -> NDArray[np.int64]:
    """(tasks, _COLUMNS_A_TASK) image columns, -1 for none, dealt out so that threads get like work.

    Threads take contiguous runs of tasks; dealing neighbouring tasks to different threads evens
    out a scene that is near on one side and far on the other.
    """
    tasks = -(-width // _COLUMNS_A_TASK)
    columns = np.arange(tasks * _COLUMNS_A_TASK).reshape(tasks, _COLUMNS_A_TASK)
    columns[columns >= width] = -1
    return np.concatenate([columns[start::threads] for start in range(threads)])


@njit(cache=True, parallel=True, nogil=True)
def _mark_cloud(points, starts, low, high, camera_from_world, lower, voxel_size, shape, state):
    R = camera_from_world[:3, :3]
    t = camera_from_world[:3, 3]
    nx, ny, nz = shape[0], shape[1], shape[2]
    for brick in prange(len(starts) - 1):
        # Skip a brick whose bounding box, seen from the camera, misses the grid on an axis.
        misses = False
        for row in range(3):
            centre = t[row]
            reach = 0.0
            for axis in range(3):
                centre += R[row, axis] * 0.5 * (low[brick, axis] + high[brick, axis])
                reach += abs(R[row, axis]) * 0.5 * (high[brick, axis] - low[brick, axis])
            reach += 1e-6
            upper = lower[row] + voxel_size * shape[row]
            if centre + reach < lower[row] or centre - reach > upper:
                misses = True
        if misses:
            continue
        for n in range(starts[brick], starts[brick + 1]):
            x, y, z = np.float64(points[n, 0]), np.float64(points[n, 1]), np.float64(points[n, 2])
            i = np.floor((R[0, 0] * x + R[0, 1] * y + R[0, 2] * z + t[0] - lower[0]) / voxel_size)
            j = np.floor((R[1, 0] * x + R[1, 1] * y + R[1, 2] * z + t[1] - lower[1]) / voxel_size)
            k = np.floor((R[2, 0] * x + R[2, 1] * y + R[2, 2] * z + t[2] - lower[2]) / voxel_size)
            if 0 <= i < nx and 0 <= j < ny and 0 <= k < nz:
                state[(np.int64(i) * ny + np.int64(j)) * nz + np.int64(k)] = OCCUPIED


@njit(cache=True, parallel=True, nogil=True)
def _trace_columns(fx, fy, cx, cy, columns, height, origin, shape, state, ends):
    keep = len(ends) > 0
    # As tuples: an array handed to the ray's function is counted as referenced, once a ray and by
    # all threads at one address.
    origin = (origin[0], origin[1], origin[2])
    shape = (shape[0], shape[1], shape[2])
    for task in prange(len(columns)):
        for u in columns[task]:
            if u < 0:
                continue
            dx = (u + 0.5 - cx) * fy
            for v in range(height):
                end = _trace_ray(dx, (v + 0.5 - cy) * fx, fx * fy, origin, shape, state)
                if keep:
                    ends[u, v] = end


@njit(cache=True)
def _first(plane_a, plane_b, a, b, origin, slope):
    """Whether the ray crosses plane_a of axis a before plane_b of axis b (ties: lower axis)."""
    if slope[a] == 0.0 or slope[b] == 0.0:
        return slope[a] != 0.0
    order = compare_crossings(
        np.float64(plane_a), origin[a], slope[a], np.float64(plane_b), origin[b], slope[b]
    )
    return order < 0 or (order == 0 and a < b)


@njit(cache=True)
def _enter(origin, slope, shape):
    """The cell (i, j, k) where a ray from outside enters the grid; one outside if it does not.

    The cell of entry is the one after the last crossing that brings the ray inside on some axis:
    on the other axes the ray has by then crossed the planes that come before that crossing.
    """
    outside = (np.int64(-1), np.int64(-1), np.int64(-1))
    gate, gate_plane = -1, 0
    for axis in range(3):
        if 0.0 <= origin[axis] < shape[axis]:
            continue
        below = origin[axis] < 0.0
        if (below and slope[axis] <= 0.0) or (not below and slope[axis] >= 0.0):
            return outside
        plane = 0 if below else shape[axis]
        if gate < 0 or _first(gate_plane, plane, gate, axis, origin, slope):
            gate, gate_plane = axis, plane
    return (
        _cell_at(0, gate, gate_plane, origin, slope),
        _cell_at(1, gate, gate_plane, origin, slope),
        _cell_at(2, gate, gate_plane, origin, slope),
    )


@njit(cache=True)
def _cell_at(axis, gate, gate_plane, origin, slope):
    """Which cell along `axis` the ray is in once it has crossed `gate_plane` of axis `gate`."""
    if axis == gate:
        return np.int64(gate_plane if slope[axis] > 0.0 else gate_plane - 1)
    index = np.int64(np.floor(origin[axis]))
    if slope[axis] == 0.0:
        return index
    guess = np.int64(
        np.floor(origin[axis] + (gate_plane - origin[gate]) / slope[gate] * slope[axis])
    )
    # The guess may be off by rounding; planes that are crossed before the gate decide.
    if slope[axis] > 0.0:
        index = max(index, guess - 1)
        while _first(index + 1, gate_plane, axis, gate, origin, slope):
            index += 1
    else:
        index = min(index, guess + 1)
        while _first(index, gate_plane, axis, gate, origin, slope):
            index -= 1
    return index


@njit(cache=True)
def _settle(i, j, k, origin, slope):
    """The axis that the ray leaves cell (i, j, k) by, when rounding cannot tell."""
    px = i + 1 if slope[0] > 0.0 else i
    py = j + 1 if slope[1] > 0.0 else j
    pz = k + 1 if slope[2] > 0.0 else k
    if _first(px, py, 0, 1, origin, slope):
        return 0 if _first(px, pz, 0, 2, origin, slope) else 2
    return 1 if _first(py, pz, 1, 2, origin, slope) else 2


@njit(cache=True)
def _trace_ray(dx, dy, dz, origin, shape, state):
    """Follow one ray of direction (dx, dy, dz) from `origin`, in cells; dz > 0.

    The column of its first occupied cell, or -1.
    """
    nx, ny, nz = shape[0], shape[1], shape[2]
    i = np.int64(np.floor(origin[0]))
    j = np.int64(np.floor(origin[1]))
    k = np.int64(np.floor(origin[2]))
    slope = (dx, dy, dz)
    if not (0 <= i < nx and 0 <= j < ny and 0 <= k < nz):
        i, j, k = _enter(origin, slope, shape)
        if not (0 <= i < nx and 0 <= j < ny and 0 <= k < nz):
            return -1
    step_x, step_y = (1 if dx > 0.0 else -1), (1 if dy > 0.0 else -1)
    end_x, end_y = (nx if dx > 0.0 else -1), (ny if dy > 0.0 else -1)
    # Time of the next crossing on each axis, and between crossings.
    wait_x = 1.0 / abs(dx) if dx != 0.0 else np.inf
    wait_y = 1.0 / abs(dy) if dy != 0.0 else np.inf
    wait_z = 1.0 / dz
    tx = (i + (dx > 0.0) - origin[0]) / dx if dx != 0.0 else np.inf
    ty = (j + (dy > 0.0) - origin[1]) / dy if dy != 0.0 else np.inf
    tz = (k + 1 - origin[2]) / dz
    # Rounding error of a sum of n waits is under n units in the last place of the result, and no
    # time in the grid is later than the last crossing in z.
    doubt = (nx + ny + nz + 16) * 4.44e-16 * (nz - origin[2]) * wait_z
    column = (i * ny + j) * nz + k
    stride_x, stride_y = step_x * ny * nz, step_y * nz
    while True:
        # The inner loop makes no call, so that its numbers stay in registers: with the call of
        # `_settle` in it, it took twice as long.
        while True:
            byte = state[column]
            if byte & OCCUPIED:
                state[column] = OCCUPIED | OBSERVED
                return column
            if byte == 0:
                state[column] = OBSERVED
            if tx <= ty:
                axis, gap = (0, min(ty, tz) - tx) if tx <= tz else (2, tx - tz)
            else:
                axis, gap = (1, min(tx, tz) - ty) if ty <= tz else (2, ty - tz)
            if gap <= doubt:
                break
            if axis == 2:
                k += 1
                if k == nz:
                    return -1
                tz += wait_z
                column += 1
            elif axis == 1:
                j += step_y
                if j == end_y:
                    return -1
                ty += wait_y
                column += stride_y
            else:
                i += step_x
                if i == end_x:
                    return -1
                tx += wait_x
                column += stride_x
        axis = _settle(i, j, k, origin, slope)
        if axis == 2:
            k += 1
            tz += wait_z
            column += 1
        elif axis == 1:
            j += step_y
            ty += wait_y
            column += stride_y
        else:
            i += step_x
            tx += wait_x
            column += stride_x
        if i == end_x or j == end_y or k == nz:
            return -1


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


@njit(cache=True, parallel=True, nogil=True)
def _collect_words(words, packed):
    """Eight cells at a time: a word is eight bytes of `state`, the first the lowest."""
    ones = np.uint64(0x0101010101010101)
    # Multiplied by this, the lowest bits of the eight bytes meet in the highest byte, first cell
    # first, as np.packbits has them.
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
