"""Exact traversal of the cells of a grid by one ray.

The algorithm is that of J. Amanatides and A. Woo, "A fast voxel traversal algorithm for ray
tracing", 1987. Ray directions are scaled by fx * fy, which makes them exact in float64 for float32
intrinsics. If two crossings are closer than the rounding error, `exact.compare_crossings` decides.
A ray through an edge or a corner crosses x first, then y, then z.

A cell is a byte of `state` (bit 0: occupied, bit 1: observed), in the order of the grid's columns.
"""

from __future__ import annotations

import numpy as np

from occgen_hub.jit import njit
from occgen_hub.occupancy.exact import compare_crossings

OCCUPIED = np.uint8(1)
OBSERVED = np.uint8(2)


@njit()
def _first(plane_a, plane_b, a, b, origin, slope):
    """Whether the ray crosses plane_a of axis a before plane_b of axis b (ties: lower axis)."""
    if slope[a] == 0.0 or slope[b] == 0.0:
        return slope[a] != 0.0
    order = compare_crossings(
        np.float64(plane_a), origin[a], slope[a], np.float64(plane_b), origin[b], slope[b]
    )
    return order < 0 or (order == 0 and a < b)


@njit()
def _enter(origin, slope, shape):
    """The cell (i, j, k) where a ray from outside enters the grid, or one outside the grid.

    It is the cell after the last crossing of a plane at which the ray enters the grid's range on an
    axis. On the other axes, the ray has then crossed all planes that come before that crossing.
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


@njit()
def _cell_at(axis, gate, gate_plane, origin, slope):
    """The index along `axis` of the ray's cell after it has crossed `gate_plane` of axis `gate`."""
    if axis == gate:
        return np.int64(gate_plane if slope[axis] > 0.0 else gate_plane - 1)
    index = np.int64(np.floor(origin[axis]))
    if slope[axis] == 0.0:
        return index
    guess = np.int64(
        np.floor(origin[axis] + (gate_plane - origin[gate]) / slope[gate] * slope[axis])
    )
    # The guess may be wrong by rounding. The planes crossed before the gate decide.
    if slope[axis] > 0.0:
        index = max(index, guess - 1)
        while _first(index + 1, gate_plane, axis, gate, origin, slope):
            index += 1
    else:
        index = min(index, guess + 1)
        while _first(index, gate_plane, axis, gate, origin, slope):
            index -= 1
    return index


@njit()
def _exit_axis(i, j, k, origin, slope):
    """The axis by which the ray leaves cell (i, j, k), decided exactly."""
    px = i + 1 if slope[0] > 0.0 else i
    py = j + 1 if slope[1] > 0.0 else j
    pz = k + 1 if slope[2] > 0.0 else k
    if _first(px, py, 0, 1, origin, slope):
        return 0 if _first(px, pz, 0, 2, origin, slope) else 2
    return 1 if _first(py, pz, 1, 2, origin, slope) else 2


@njit()
def follow(dx, dy, dz, origin, shape, state, path):
    """Follow one ray of direction (dx, dy, dz) from `origin`, in cells; dz > 0.

    With `state`, marks the cells up to the first occupied one as observed, and returns that one's
    column or -1. With `path`, an array for nx + ny + nz columns, writes the columns of all crossed
    cells and returns their number. An argument of None is removed at compile time.
    """
    nx, ny, nz = shape[0], shape[1], shape[2]
    i = np.int64(np.floor(origin[0]))
    j = np.int64(np.floor(origin[1]))
    k = np.int64(np.floor(origin[2]))
    slope = (dx, dy, dz)
    if not (0 <= i < nx and 0 <= j < ny and 0 <= k < nz):
        i, j, k = _enter(origin, slope, shape)
        if not (0 <= i < nx and 0 <= j < ny and 0 <= k < nz):
            return -1 if path is None else 0
    step_x, step_y = (1 if dx > 0.0 else -1), (1 if dy > 0.0 else -1)
    end_x, end_y = (nx if dx > 0.0 else -1), (ny if dy > 0.0 else -1)
    # The time between crossings on each axis, and of the next one.
    wait_x = 1.0 / abs(dx) if dx != 0.0 else np.inf
    wait_y = 1.0 / abs(dy) if dy != 0.0 else np.inf
    wait_z = 1.0 / dz
    tx = (i + (dx > 0.0) - origin[0]) / dx if dx != 0.0 else np.inf
    ty = (j + (dy > 0.0) - origin[1]) / dy if dy != 0.0 else np.inf
    tz = (k + 1 - origin[2]) / dz
    # The rounding error of a sum of n waits is below n units in the last place, and all times in
    # the grid are before the last crossing in z.
    tolerance = (nx + ny + nz + 16) * 4.44e-16 * (nz - origin[2]) * wait_z
    column = (i * ny + j) * nz + k
    stride_x, stride_y = step_x * ny * nz, step_y * nz
    count = 0
    while True:
        # The inner loop makes no calls, so that its variables stay in registers: with the call of
        # `_exit_axis` it took twice as long.
        while True:
            if state is not None:
                byte = state[column]
                if byte & OCCUPIED:
                    state[column] = OCCUPIED | OBSERVED
                    return column
                if byte == 0:
                    state[column] = OBSERVED
            if path is not None:
                path[count] = column
                count += 1
            if tx <= ty:
                axis, gap = (0, min(ty, tz) - tx) if tx <= tz else (2, tx - tz)
            else:
                axis, gap = (1, min(tx, tz) - ty) if ty <= tz else (2, ty - tz)
            if gap <= tolerance:
                break
            if axis == 2:
                k += 1
                if k == nz:
                    return -1 if path is None else count
                tz += wait_z
                column += 1
            elif axis == 1:
                j += step_y
                if j == end_y:
                    return -1 if path is None else count
                ty += wait_y
                column += stride_y
            else:
                i += step_x
                if i == end_x:
                    return -1 if path is None else count
                tx += wait_x
                column += stride_x
        axis = _exit_axis(i, j, k, origin, slope)
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
            return -1 if path is None else count
