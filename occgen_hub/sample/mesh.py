"""Triangle meshes of simple solids, and their combination."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Mesh:
    """Triangles, counter-clockwise seen from outside, in metres."""

    vertices: Floats  # (V, 3)
    triangles: Ints  # (F, 3)
    normals: Floats  # (F, 3, 3): a unit normal for each corner of each triangle

    def moved(self, yaw: float, offset: ArrayLike) -> Mesh:
        """The mesh turned by `yaw` radians about z, then shifted by `offset` (3,)."""
        R = yaw_matrix(yaw)
        return Mesh(self.vertices @ R.T + np.asarray(offset), self.triangles, self.normals @ R.T)


def yaw_matrix(yaw: float) -> Floats:
    """The rotation (3, 3) by `yaw` radians about z."""
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def flat(vertices: ArrayLike, triangles: ArrayLike) -> Mesh:
    """A mesh with flat shading."""
    v, f = np.asarray(vertices, np.float64), np.asarray(triangles, np.int64)
    n = _face_normals(v, f)
    n /= np.linalg.norm(n, axis=1, keepdims=True)
    return Mesh(v, f, np.repeat(n[:, None], 3, axis=1))


def smooth(vertices: ArrayLike, triangles: ArrayLike) -> Mesh:
    """A mesh with smooth shading."""
    v, f = np.asarray(vertices, np.float64), np.asarray(triangles, np.int64)
    n = np.zeros_like(v)
    for corner in range(3):
        np.add.at(n, f[:, corner], _face_normals(v, f))
    n /= np.linalg.norm(n, axis=1, keepdims=True)
    return Mesh(v, f, n[f])


def join(meshes: Sequence[Mesh]) -> Mesh:
    """All meshes as one, in their order."""
    starts = np.cumsum([0] + [len(m.vertices) for m in meshes[:-1]])
    return Mesh(
        np.concatenate([m.vertices for m in meshes]),
        np.concatenate([m.triangles + s for m, s in zip(meshes, starts, strict=True)]),
        np.concatenate([m.normals for m in meshes]),
    )


def box(lo: ArrayLike, hi: ArrayLike) -> Mesh:
    """The axis-aligned box between two corners."""
    corners = np.array([[x, y, z] for z in (0, 1) for y in (0, 1) for x in (0, 1)], np.float64)
    lo, hi = np.asarray(lo, np.float64), np.asarray(hi, np.float64)
    quads = [(0, 2, 3, 1), (4, 5, 7, 6), (0, 1, 5, 4), (2, 6, 7, 3), (0, 4, 6, 2), (1, 3, 7, 5)]
    return flat(lo + corners * (hi - lo), [t for q in quads for t in (q[:3], (q[0], *q[2:]))])


def turned(profile: Sequence[tuple[float, float]], centre: ArrayLike = (0, 0), n: int = 20) -> Mesh:
    """A solid of revolution about the vertical through `centre`.

    `profile` runs upwards as (radius, height) pairs; both ends are closed with flat discs.
    """
    angle = np.arange(n) * 2 * np.pi / n
    ring = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    xy = np.asarray(centre, np.float64)
    rows = [np.column_stack([xy + r * ring, np.full(n, z)]) for r, z in profile]
    # Each band is smooth about the axis, and meets the next at an edge.
    bands = [smooth(np.concatenate(pair), _strip(2, n)) for pair in pairwise(rows)]
    fan = np.array([(0, i, i + 1) for i in range(1, n - 1)])
    return join([*bands, flat(rows[0], fan[:, ::-1]), flat(rows[-1], fan)])


def cylinder(radius: float, z0: float, z1: float, centre: ArrayLike = (0, 0), n: int = 20) -> Mesh:
    """An upright cylinder."""
    return turned([(radius, z0), (radius, z1)], centre, n)


def ellipsoid(centre: ArrayLike, radii: ArrayLike, power: float = 1.0, n: int = 20) -> Mesh:
    """A closed ellipsoid. A `power` below 1 makes it more like a box, such as a cushion."""
    lat = np.linspace(-np.pi / 2, np.pi / 2, n // 2 + 1)[1:-1]
    lon = np.arange(n) * 2 * np.pi / n

    def filled(x: Floats) -> Floats:
        return np.sign(x) * np.abs(x) ** power

    c, s = filled(np.cos(lat))[:, None], filled(np.sin(lat))[:, None]
    unit = np.stack(np.broadcast_arrays(c * filled(np.cos(lon)), c * filled(np.sin(lon)), s), -1)
    rows = unit.reshape(-1, 3)
    bottom, top, last = len(rows), len(rows) + 1, (len(lat) - 1) * n
    turn = [(i, (i + 1) % n) for i in range(n)]
    caps = [(bottom, b, a) for a, b in turn] + [(top, last + a, last + b) for a, b in turn]
    vertices = np.concatenate([rows, [[0, 0, -1], [0, 0, 1]]])
    return smooth(
        np.asarray(centre) + vertices * np.asarray(radii),
        np.concatenate([_strip(len(lat), n), caps]),
    )


def _strip(rows: int, n: int) -> Ints:
    """The triangles (F, 3) between `rows` rings of `n` vertices, lowest ring first."""
    i, j = np.meshgrid(np.arange(rows - 1), np.arange(n), indexing="ij")
    a, b = (i * n + j).ravel(), (i * n + (j + 1) % n).ravel()
    return np.concatenate([np.stack([a, b, b + n], 1), np.stack([a, b + n, a + n], 1)])


def _face_normals(v: Floats, f: Ints) -> Floats:
    """Normals (F, 3), as long as twice the triangle's area."""
    return np.asarray(np.cross(v[f[:, 1]] - v[f[:, 0]], v[f[:, 2]] - v[f[:, 0]]), np.float64)
