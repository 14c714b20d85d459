"""Grids of two or four times the cell size, and grids seen from another camera. Compiled.

A coarse cell is occupied if any of its cells is, observed if any of them is, and has their most
common class. The last coarse cells of an axis may extend beyond the grid.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from occgen_hub.jit import njit
from occgen_hub.occupancy.classes import most_common
from occgen_hub.occupancy.grid import Grid

STRIDES = (1, 2, 4)


def coarse_grid(grid: Grid, stride: int) -> Grid:
    """The grid with cells that are `stride` cells wide, and the same lower corner."""
    nx, ny, nz = (-(-n // stride) for n in grid.shape)
    return Grid(grid.lower, grid.voxel_size * stride, (nx, ny, nz))


def coarse_cells(
    cells: NDArray[np.int32], shape: tuple[int, int, int], stride: int
) -> NDArray[np.bool_]:
    """(n,) flat numbers of cells to a dense coarse grid, bool: which coarse cells contain one."""
    nx, ny, nz = (-(-n // stride) for n in shape)
    out = np.zeros((nx, ny, nz), np.bool_)
    _mark(cells, shape[1], shape[2], stride.bit_length() - 1, out)
    return out


def coarse_classes(
    cells: NDArray[np.int32], classes: NDArray[np.uint8], shape: tuple[int, int, int], stride: int
) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """(n,) flat numbers of cells to those of coarse cells, and the most common class in each."""
    i, j, k = (axis // stride for axis in np.unravel_index(cells, shape))
    _, ny, nz = (-(-n // stride) for n in shape)
    return most_common((i * ny + j) * nz + k, classes)


def coarse_mask(
    packed: NDArray[np.uint8], shape: tuple[int, int, int], stride: int
) -> NDArray[np.bool_]:
    """A mask packed by `np.packbits` to a dense coarse grid, bool."""
    nx, ny, nz = shape
    width = -(-nz // 8)
    if nz % 8:  # Rows along z may begin within a byte: give each row its own bytes.
        bits = np.unpackbits(packed, count=nx * ny * nz).reshape(nx, ny, nz)
        packed = np.packbits(bits, axis=-1)
    rows = packed[: nx * ny * width].reshape(nx, ny * width)
    joined = rows[::stride].copy()  # `or` of whole rows is as fast as memory.
    for n in range(1, min(stride, nx)):
        part = rows[n::stride]
        joined[: len(part)] |= part
    out = np.empty((len(joined), -(-ny // stride), width, 8 // stride), np.uint8)
    _pool(joined.reshape(len(joined), ny, width), stride, out)
    return np.ascontiguousarray(out.reshape(*out.shape[:2], -1)[..., : -(-nz // stride)]).view(
        np.bool_
    )


def resampled[Value: np.generic](
    dense: NDArray[Value], grid: Grid, source_from_target: NDArray[np.float64]
) -> NDArray[Value]:
    """Move (nx, ny, nz) bool or uint8: each cell gets the value of the cell at its centre.

    source_from_target: (4, 4), metres. Cells whose centres come from outside the grid are 0.
    """
    camera = grid.camera_in_cells
    rotation = np.ascontiguousarray(source_from_target[:3, :3])
    # In cells: source = R (target + 0.5 - camera) + t / size + camera.
    shift = source_from_target[:3, 3] / grid.voxel_size + camera - rotation @ (camera - 0.5)
    out = np.empty(grid.shape, dense.dtype)
    _resample(np.ascontiguousarray(dense), rotation, shift, out)
    return out


@njit(nogil=True)
def _mark(cells, ny, nz, shift, out):
    # Unsigned 32 bits are divided several times as fast as signed 64.
    rows, columns, bits = np.uint32(ny), np.uint32(nz), np.uint32(shift)
    for cell in cells:
        row = np.uint32(np.uint32(cell) // columns)
        k = np.uint32(np.uint32(cell) - np.uint32(row * columns))
        i = np.uint32(row // rows)
        j = np.uint32(row - np.uint32(i * rows))
        out[i >> bits, j >> bits, k >> bits] = True


@njit(nogil=True)
def _pool(rows, stride, out):
    """rows: (nx, ny, bytes); out: (nx, coarse ny, bytes, 8 / stride) 0 or 1.

    The stride divides 8, so no coarse cell is in two bytes.
    """
    keep = np.uint8((1 << stride) - 1)
    for i in range(out.shape[0]):
        for cj in range(out.shape[1]):
            first = cj * stride
            last = min(first + stride, rows.shape[1])
            for m in range(out.shape[2]):
                value = rows[i, first, m]
                for j in range(first + 1, last):
                    value |= rows[i, j, m]
                for k in range(out.shape[3]):
                    out[i, cj, m, k] = (value >> np.uint8(8 - stride * (k + 1)) & keep) != 0


@njit(nogil=True)
def _resample(dense, rotation, shift, out):
    nx, ny, nz = out.shape
    for i in range(nx):
        for j in range(ny):
            x = rotation[0, 0] * i + rotation[0, 1] * j + shift[0]
            y = rotation[1, 0] * i + rotation[1, 1] * j + shift[1]
            z = rotation[2, 0] * i + rotation[2, 1] * j + shift[2]
            for k in range(nz):
                a = np.floor(x + rotation[0, 2] * k)
                b = np.floor(y + rotation[1, 2] * k)
                c = np.floor(z + rotation[2, 2] * k)
                inside = 0 <= a < nx and 0 <= b < ny and 0 <= c < nz
                out[i, j, k] = dense[int(a), int(b), int(c)] if inside else 0
