"""Classes of cells: the most common class of the points or finer cells in them. Compiled.

In a tie, the smallest id counts. UNLABELLED is used only if a cell has no class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from occgen_hub.jit import njit
from occgen_hub.taxonomy import UNLABELLED


@dataclass(frozen=True)
class PointLabels:
    """The classes of a scene's points.

    static: (n,) uint8, of the points of its cloud; moving: frame number to the (m, 3) float32
    moving points of that frame, world metres, and their (m,) uint8 classes; None if nothing moves.
    """

    static: NDArray[np.uint8]
    moving: Callable[[int], tuple[NDArray[np.float32], NDArray[np.uint8]]] | None = None


def most_common(
    cells: NDArray[np.integer], classes: NDArray[np.uint8]
) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """The distinct ones of (n,) cells, ascending, and the most common class of each.

    Cells are numbered from 0 to less than 2^54.
    """
    keys = cells.astype(np.int64) << 8 | classes
    keys.sort()
    numbers: NDArray[np.int64] = np.empty(len(keys), np.int64)
    found: NDArray[np.uint8] = np.empty(len(keys), np.uint8)
    count = _most_common(keys, UNLABELLED, numbers, found)
    return numbers[:count], found[:count]


def classes_of_cells(
    cells: NDArray[np.integer], numbers: NDArray[np.integer], classes: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """(n,) uint8 classes of cells, ascending, from points in cells `numbers`, of `classes`.

    Points in other cells are ignored. A cell without a point is UNLABELLED.
    """
    out = np.full(len(cells), UNLABELLED, np.uint8)
    if not len(cells):
        return out
    inside, found = most_common(numbers, classes)
    place = np.searchsorted(cells, inside).clip(0, len(cells) - 1)
    known = cells[place] == inside
    out[place[known]] = found[known]
    return out


def joined_classes(labels: NDArray[np.uint8], stride: int) -> NDArray[np.uint8]:
    """Dense labels, (nx, ny, nz) uint8, of cells `stride` times as wide.

    A wide cell has the most common class of its occupied cells. Without any, it is free (0) if a
    cell is free, else unknown (255). The last cells of an axis may extend beyond the grid.
    """
    out: NDArray[np.uint8] = np.empty([-(-n // stride) for n in labels.shape], np.uint8)
    _join(np.ascontiguousarray(labels), stride, UNLABELLED, out)
    return out


def nearest_classes(
    points: NDArray[np.float32], classes: NDArray[np.uint8], others: NDArray[np.float32]
) -> NDArray[np.uint8]:
    """(m,) uint8: the class of the nearest of (n, 3) points for each of (m, 3) others."""
    from scipy.spatial import cKDTree

    if not len(points):
        return np.full(len(others), UNLABELLED, np.uint8)
    found: NDArray[np.uint8] = classes[cKDTree(points).query(others, workers=-1)[1]]
    return found


@njit(nogil=True)
def _most_common(keys, none, numbers, found):
    """keys: sorted, each a cell and a class. Returns the number of cells."""
    count, start = 0, 0
    while start < len(keys):
        cell = keys[start] >> 8
        most, best = 0, none
        while start < len(keys) and keys[start] >> 8 == cell:
            stop = start + 1
            while stop < len(keys) and keys[stop] == keys[start]:
                stop += 1
            name = keys[start] & 255
            if name != none and stop - start > most:
                most, best = stop - start, name
            start = stop
        numbers[count], found[count] = cell, best
        count += 1
    return count


@njit(nogil=True)
def _join(labels, stride, none, out):
    counts = np.zeros(256, np.int64)
    nx, ny, nz = labels.shape
    for a in range(out.shape[0]):
        for b in range(out.shape[1]):
            for c in range(out.shape[2]):
                free, most, best = False, 0, 255
                for i in range(a * stride, min((a + 1) * stride, nx)):
                    for j in range(b * stride, min((b + 1) * stride, ny)):
                        for k in range(c * stride, min((c + 1) * stride, nz)):
                            name = labels[i, j, k]
                            if name == 255:
                                continue
                            if name == 0:
                                free = True
                                continue
                            if best == 255:
                                best = none
                            if name == none:
                                continue
                            counts[name] += 1
                            if counts[name] > most or (counts[name] == most and name < best):
                                most, best = counts[name], name
                if most > 0:
                    for i in range(a * stride, min((a + 1) * stride, nx)):
                        for j in range(b * stride, min((b + 1) * stride, ny)):
                            for k in range(c * stride, min((c + 1) * stride, nz)):
                                counts[labels[i, j, k]] = 0
                out[a, b, c] = 0 if best == 255 and free else best
