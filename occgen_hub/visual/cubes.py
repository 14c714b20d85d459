"""Cells as solid cubes, reduced to the faces that are visible."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DENSE = 1 << 26
"""Largest bounding box, in cells, for which neighbours are looked up in a dense array."""

EDGES = 0.72
"""Brightness of the edges of cells, relative to their faces."""

CLEAR = 14
"""Size of a cell, in rendered pixels, from which its edges are drawn."""

LIFT = 2e-3
"""Fraction of its distance by which a face is moved in front of its dark edges."""

_DIRECTIONS = np.array([(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)])


def _corners() -> NDArray[np.float64]:
    """(6, 4, 3) corners of a unit cube's faces about its centre, each ordered around its face."""
    corners = np.empty((6, 4, 3))
    for face, direction in enumerate(_DIRECTIONS):
        axis = int(np.abs(direction).argmax())
        for n, (a, b) in enumerate(((-1, -1), (1, -1), (1, 1), (-1, 1))):
            corners[face, n] = np.insert((a, b), axis, direction[axis]) / 2
    return corners


_CORNERS = _corners()


@dataclass(frozen=True)
class Faces:
    """Faces of cells.

    corners: (m, 4, 3) float32, metres; owner: (m,) index of the cell; direction: (m,) 0 to 5, for
    +x, -x, +y, -y, +z, -z of the cells' axes.
    """

    corners: NDArray[np.float32]
    owner: NDArray[np.intp]
    direction: NDArray[np.intp]

    def __len__(self) -> int:
        """The number of faces."""
        return len(self.owner)

    @classmethod
    def none(cls) -> Faces:
        """No faces."""
        return cls(np.zeros((0, 4, 3), np.float32), *(np.zeros(0, np.intp),) * 2)


def cube_faces(
    centres: NDArray[np.floating], edge: float, eye: NDArray[np.floating] | None = None
) -> Faces:
    """The faces of cubes with edges of `edge` metres that are not covered by a neighbour.

    centres: (n, 3) metres, distinct, on a lattice with spacing `edge`; eye: (3,) position of the
    viewer. Faces turned away from it are left out too, unless it is None.
    """
    if not len(centres):
        return Faces.none()
    cells = np.rint((centres - centres[0]) / edge).astype(np.int64)
    cells -= cells.min(axis=0) - 1
    shape = cells.max(axis=0) + 2
    strides = np.array([shape[1] * shape[2], shape[2], 1])
    taken = _lookup(cells @ strides, int(np.prod(shape)))
    owners, directions = [], []
    for face, direction in enumerate(_DIRECTIONS):
        seen = ~taken(cells @ strides + direction @ strides)
        if eye is not None:
            seen &= (eye - centres) @ direction > edge / 2
        owners.append(np.flatnonzero(seen))
        directions.append(np.full(len(owners[-1]), face))
    owner, turned = np.concatenate(owners), np.concatenate(directions)
    corners = centres[owner, None].astype(np.float32) + (_CORNERS[turned] * edge).astype(np.float32)
    return Faces(corners, owner, turned)


class _lookup:  # noqa: N801  # a function with state
    """Looks up which of (n,) cell numbers below `size` exist."""

    def __init__(self, keys: NDArray[np.int64], size: int) -> None:
        self._dense = size <= DENSE
        if self._dense:
            self._there = np.zeros(size, np.bool_)
            self._there[keys] = True
        else:
            self._keys = np.sort(keys)

    def __call__(self, keys: NDArray[np.int64]) -> NDArray[np.bool_]:
        if self._dense:
            return self._there[keys]
        place = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        found: NDArray[np.bool_] = self._keys[place] == keys
        return found


def shaded(colors: NDArray[np.uint8], faces: Faces, up: int = 2) -> NDArray[np.uint8]:
    """(m, 3) colours of faces, from (n, 3) colours of their cells.

    Faces towards axis `up` are brightest. The other two axes differ, so that edges are visible.
    """
    light = np.full(3, 0.86)
    light[up] = 1.0
    light[(up + 1) % 3] = 0.72
    lit_up = colors[faces.owner] * light[faces.direction // 2][:, None]
    return np.asarray(lit_up, np.uint8)


def with_edges(
    faces: Faces, colors: NDArray[np.uint8], focal: float, edge: float
) -> tuple[Faces, NDArray[np.uint8]]:
    """The faces and colours, with darker edges on faces that are large enough in the picture.

    A large face becomes dark, and a smaller one in its own colour is added in front. The eye is at
    the origin, looks along z and has a focal length of `focal` pixels; edge: metres of a cell.
    Edges are 1.5 pixels wide and start at cells of CLEAR pixels.
    """
    corners = faces.corners
    depth = corners[..., 2].min(axis=1)
    large = np.flatnonzero((depth > 0) & (focal * edge > CLEAR * depth))
    if not len(large):
        return faces, colors
    chosen = corners[large]
    middle = chosen.mean(axis=1, keepdims=True)
    rim = np.minimum(1.5 * depth[large] / focal / edge, 0.25)[:, None, None]
    # A little nearer along its rays: at the same place in the picture, but in front of the face.
    inner = (middle + (chosen - middle) * (1 - 2 * rim)) * np.float32(1 - LIFT)
    dark = colors.copy()
    # They fade in, so that there is no visible line where they start.
    clear = np.clip(focal * edge / (CLEAR * depth[large]) - 1, 0, 1)[:, None]
    dark[large] = (dark[large] * (1 - (1 - EDGES) * clear)).astype(np.uint8)
    both = Faces(
        np.concatenate([corners, inner.astype(np.float32)]),
        np.concatenate([faces.owner, faces.owner[large]]),
        np.concatenate([faces.direction, faces.direction[large]]),
    )
    return both, np.concatenate([dark, colors[large]])
