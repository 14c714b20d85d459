"""A building cut out of boxes, whose surface has no seams, gaps or doubled faces."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from occgen_hub.sample.mesh import Floats

EMPTY = 0
Box = tuple[Sequence[float], Sequence[float], int]  # lower corner, upper corner, label of the solid


def surface(boxes: Sequence[Box]) -> tuple[Floats, NDArray[np.int8], NDArray[np.int64], Floats]:
    """The faces between solid and empty space; later boxes override earlier ones.

    Returns:
        corners (Q, 4, 3) in metres, counter-clockwise seen from the empty side; the outward
        direction (Q, 3) as integers; the label of the solid (Q,); and the centre (Q, 3) of the
        empty cell in front of the face.
    """
    edges = [_edges([c for b in boxes for c in (b[0][a], b[1][a])]) for a in range(3)]
    mid = [(e[1:] + e[:-1]) / 2 for e in edges]
    label = np.zeros([len(m) for m in mid], np.int64)
    for lo, hi, what in boxes:
        inside = [(m > low) & (m < high) for m, low, high in zip(mid, lo, hi, strict=True)]
        label[np.ix_(*inside)] = what
    parts = [_faces(label, edges, axis, sign) for axis in range(3) for sign in (-1, 1)]
    corners, outward, labels, into = (np.concatenate(p) for p in zip(*parts, strict=True))
    return corners, outward, labels, into


def _edges(values: Sequence[float]) -> Floats:
    """Distinct coordinates. Those within 2 mm are merged, so that no face is a sliver."""
    v = np.unique(np.asarray(values, np.float64))
    return np.asarray(v[np.concatenate([[True], np.diff(v) > 2e-3])])


def _faces(
    label: NDArray[np.int64], edges: Sequence[Floats], axis: int, sign: int
) -> tuple[Floats, NDArray[np.int8], NDArray[np.int64], Floats]:
    """The faces of one of the six directions."""
    beside = np.moveaxis(np.pad(label, 1), axis, 0)
    beside = beside[2:] if sign > 0 else beside[:-2]
    beside = np.moveaxis(beside[:, 1:-1, 1:-1], 0, axis)
    cell = np.argwhere((label != EMPTY) & (beside == EMPTY))
    lo = np.stack([edges[a][cell[:, a]] for a in range(3)], axis=1)
    hi = np.stack([edges[a][cell[:, a] + 1] for a in range(3)], axis=1)
    into = (lo + hi) / 2
    into[:, axis] = (hi if sign > 0 else lo)[:, axis] + sign * 1e-3
    lo[:, axis] = hi[:, axis] = (hi if sign > 0 else lo)[:, axis]
    b, c = (axis + 1) % 3, (axis + 2) % 3
    corners = np.repeat(lo[:, None], 4, axis=1)
    corners[:, 1:3, b] = hi[:, None, b]
    corners[:, 2:, c] = hi[:, None, c]
    outward = np.zeros((len(cell), 3), np.int8)
    outward[:, axis] = sign
    labels = label[tuple(cell.T)]
    return (corners if sign > 0 else corners[:, ::-1]), outward, labels, into
