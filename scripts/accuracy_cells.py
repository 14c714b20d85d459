"""Cells of a grid that a triangle mesh crosses, exactly, and cells near set cells.

Part of scripts/accuracy. The code is compiled because a frame's grid has five million cells.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

TOUCH = 1e-9
"""Tolerance in metres: a triangle within it of a cell counts as crossing the cell."""


def crosses(
    lower: NDArray[np.float64], upper: NDArray[np.float64], triangles: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """(n,) bool: whether a closed box, (n, 3), and its triangle, (n, 3, 3), share a point."""
    return _pairs_cross(
        np.asarray(lower, np.float64),
        np.asarray(upper, np.float64),
        np.ascontiguousarray(triangles, np.float64),
    )


def crossed_cells(
    lower: NDArray[np.float64], size: float, shape: tuple[int, ...], triangles: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """(nx, ny, nz) bool: the cells of a grid that any of the (m, 3, 3) triangles crosses.

    lower: (3,) the grid's lower corner, in the triangles' frame; size: edge of a cell, metres.
    """
    out = np.zeros(shape, np.bool_)
    upper = lower + size * np.asarray(shape)
    inside = (triangles.min(axis=1) <= upper + TOUCH) & (triangles.max(axis=1) >= lower - TOUCH)
    kept = np.ascontiguousarray(triangles[inside.all(axis=1)], np.float64)
    _mark_crossed(np.asarray(lower, np.float64), size, kept, out)
    return out


def near_set_cells(
    cells: NDArray[np.bool_], columns: NDArray[np.integer], reach: int = 1
) -> NDArray[np.bool_]:
    """(n,) bool: whether `cells`, (nx, ny, nz), is set within `reach` cells of each given cell.

    columns: (n,) cell numbers as in the dataset (the last axis varies fastest). Cells that touch
    at a corner have distance one.
    """
    found: NDArray[np.bool_] = _near_set_cells(
        cells, np.ascontiguousarray(columns, np.int64), reach
    )
    return found


@njit(cache=True, nogil=True, inline="always")
def _separates(x0, y0, z0, x1, y1, z1, x2, y2, z2, ax, ay, az, half):
    """Whether an axis separates a triangle from a box with half edges (3,) around the origin."""
    reach = half[0] * abs(ax) + half[1] * abs(ay) + half[2] * abs(az) + TOUCH
    a = x0 * ax + y0 * ay + z0 * az
    b = x1 * ax + y1 * ay + z1 * az
    c = x2 * ax + y2 * ay + z2 * az
    return min(a, b, c) > reach or max(a, b, c) < -reach


@njit(cache=True, nogil=True)
def _triangle_crosses_box(triangle, cx, cy, cz, half):
    """Whether a triangle (3, 3) and the box around (cx, cy, cz) share a point.

    Separating axes: three of the box, the triangle's normal, nine cross products (T.
    Akenine-Moller, "Fast 3D triangle-box overlap testing", 2001).
    """
    x0, y0, z0 = triangle[0, 0] - cx, triangle[0, 1] - cy, triangle[0, 2] - cz
    x1, y1, z1 = triangle[1, 0] - cx, triangle[1, 1] - cy, triangle[1, 2] - cz
    x2, y2, z2 = triangle[2, 0] - cx, triangle[2, 1] - cy, triangle[2, 2] - cz
    for ex, ey, ez in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)):
        if _separates(x0, y0, z0, x1, y1, z1, x2, y2, z2, ex, ey, ez, half):
            return False
    edges = (
        (x1 - x0, y1 - y0, z1 - z0),
        (x2 - x1, y2 - y1, z2 - z1),
        (x0 - x2, y0 - y2, z0 - z2),
    )
    (ax, ay, az), (bx, by, bz) = edges[0], edges[1]
    nx, ny, nz = ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx
    if _separates(x0, y0, z0, x1, y1, z1, x2, y2, z2, nx, ny, nz, half):
        return False
    for ex, ey, ez in edges:
        if _separates(x0, y0, z0, x1, y1, z1, x2, y2, z2, 0.0, -ez, ey, half):
            return False
        if _separates(x0, y0, z0, x1, y1, z1, x2, y2, z2, ez, 0.0, -ex, half):
            return False
        if _separates(x0, y0, z0, x1, y1, z1, x2, y2, z2, -ey, ex, 0.0, half):
            return False
    return True


@njit(cache=True, nogil=True)
def _pairs_cross(lower, upper, triangles):
    out = np.zeros(len(lower), np.bool_)
    for n in range(len(lower)):
        half = (upper[n] - lower[n]) / 2
        c = (upper[n] + lower[n]) / 2
        out[n] = _triangle_crosses_box(triangles[n], c[0], c[1], c[2], half)
    return out


@njit(cache=True, nogil=True)
def _mark_crossed(lower, size, triangles, out):
    """Test only the cells near a triangle's plane, along the main axis of its normal."""
    half = np.full(3, size / 2)
    first, last = np.zeros(3, np.int64), np.zeros(3, np.int64)
    cell = np.zeros(3, np.int64)
    for n in range(len(triangles)):
        t = triangles[n]
        misses = False
        for axis in range(3):
            low = min(t[0, axis], t[1, axis], t[2, axis]) - TOUCH
            high = max(t[0, axis], t[1, axis], t[2, axis]) + TOUCH
            first[axis] = max(0, np.int64(np.floor((low - lower[axis]) / size)))
            last[axis] = min(out.shape[axis] - 1, np.int64(np.floor((high - lower[axis]) / size)))
            misses |= first[axis] > last[axis]
        if misses:
            continue
        u, v = t[1] - t[0], t[2] - t[0]
        normal = np.cross(u, v)
        along = np.int64(np.argmax(np.abs(normal)))
        i, j = (along + 1) % 3, (along + 2) % 3
        steep = abs(normal[along])
        for p in range(first[i], last[i] + 1):
            for q in range(first[j], last[j] + 1):
                low, high = first[along], last[along]
                if steep > 1e-12:
                    # The plane's position at the middle of this row of cells, and its largest
                    # offset within the row; both slopes are at most 1.
                    a = lower[i] + (p + 0.5) * size - t[0, i]
                    b = lower[j] + (q + 0.5) * size - t[0, j]
                    middle = t[0, along] - (a * normal[i] + b * normal[j]) / normal[along]
                    spread = (abs(normal[i]) + abs(normal[j])) / steep * size / 2 + 1e-6
                    low = max(low, np.int64(np.floor((middle - spread - lower[along]) / size)))
                    high = min(high, np.int64(np.floor((middle + spread - lower[along]) / size)))
                for r in range(low, high + 1):
                    cell[i], cell[j], cell[along] = p, q, r
                    if out[cell[0], cell[1], cell[2]]:
                        continue
                    x = lower[0] + (cell[0] + 0.5) * size
                    y = lower[1] + (cell[1] + 0.5) * size
                    z = lower[2] + (cell[2] + 0.5) * size
                    if _triangle_crosses_box(t, x, y, z, half):
                        out[cell[0], cell[1], cell[2]] = True


@njit(cache=True, nogil=True)
def _near_set_cells(cells, columns, reach):
    nx, ny, nz = cells.shape
    out = np.zeros(len(columns), np.bool_)
    for n in range(len(columns)):
        i, rest = divmod(columns[n], ny * nz)
        j, k = divmod(rest, nz)
        found = False
        for a in range(max(0, i - reach), min(nx, i + reach + 1)):
            for b in range(max(0, j - reach), min(ny, j + reach + 1)):
                for c in range(max(0, k - reach), min(nz, k + reach + 1)):
                    found |= cells[a, b, c]
        out[n] = found
    return out


@njit(cache=True, nogil=True)
def thin_pixels(depth: Any, fx: float, fy: float, thickness: float, step: float) -> Any:
    """(H, W) bool: pixels of objects that are narrower than `thickness`.

    An object is thin if, along the row, the column or a diagonal, it is narrower than `thickness`
    metres and ends on both sides: the next pixel is more than `step` metres farther or has no
    depth. Chair legs, cables and the edge of a table seen from the side are thin; a table's top is
    not. depth: (H, W) metres along the optical axis, infinite for none.
    """
    height, width = depth.shape
    thin = np.zeros((height, width), np.bool_)
    for v in range(height):
        for u in range(width):
            here = depth[v, u]
            if not np.isfinite(here):
                continue
            for dv, du in ((0, 1), (1, 0), (1, 1), (1, -1)):
                pixel = here * np.sqrt((du / fx) ** 2 + (dv / fy) ** 2)
                most = np.int64(thickness / pixel)
                count, ends = 1, 0
                for sign in (-1, 1):
                    z, y, x = here, v, u
                    while count <= most:
                        y, x = y + sign * dv, x + sign * du
                        if y < 0 or y >= height or x < 0 or x >= width:
                            break
                        if not depth[y, x] <= z + step:
                            ends += 1
                            break
                        if depth[y, x] < z - step:
                            break
                        z = depth[y, x]
                        count += 1
                if ends == 2 and count <= most:
                    thin[v, u] = True
                    break
    return thin
