"""A pose graph: worlds that are Sim3s apart, and the Sim3s that all measured ones agree on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares
from scipy.sparse import csr_matrix
from scipy.spatial.transform import Rotation

from occgen_hub.geometry.sim3 import Sim3

CUT = 3.0
"""Spreads at which a closure counts a quarter; one that is farther off in the end is false."""

ROUNDS = 20
STEP = 1e-6
PARTS = 7
"""Of a Sim3: log of scale, rotation vector, translation."""


@dataclass(frozen=True)
class Edge:
    """What was measured of two of the worlds.

    sim3: first_from_second; spread: (3,) the standard deviations expected of the log of its scale,
    of its rotation (radians), and of its translation (in the first one's unit); closure: True for
    what may be false altogether.
    """

    first: int
    second: int
    sim3: Sim3
    spread: tuple[float, float, float]
    closure: bool = False


def optimise(start: list[Sim3], edges: list[Edge]) -> tuple[list[Sim3], list[bool]]:
    """The Sim3s root_from_world that the edges agree on, and for each edge whether it is kept.

    start: root_from_world of each world, the first of which stays. Least squares with a sparse
    Jacobian, deterministic. Closures weigh by how far off they are (Geman and McClure), found by
    reweighting; those that are more than `CUT` spreads off in the end are left out, the worst
    first, and the others solved for again.
    """
    kept = [True] * len(edges)
    while True:
        used = [edge for edge, keep in zip(edges, kept, strict=True) if keep]
        found, off = _solve(start, used)
        places = np.flatnonzero(kept)
        false = [n for n, edge in enumerate(used) if edge.closure and off[n] > CUT]
        if not false:
            return found, kept
        kept[places[max(false, key=lambda n: (off[n], -n))]] = False


def _solve(start: list[Sim3], edges: list[Edge]) -> tuple[list[Sim3], NDArray[np.float64]]:
    """Sim3s for these edges, and how many spreads each edge is off, (e,) RMS over its parts."""
    graph = _Graph(start, edges)
    closure = np.array([edge.closure for edge in edges])
    x: NDArray[np.float64] = np.zeros(PARTS * (len(start) - 1))
    off = np.sqrt((graph.errors(x) ** 2).mean(axis=1))
    if not closure.any() or len(start) < 2:
        return start, off
    # All closures are trusted at first, then less and less those that are off: a long chain may
    # have drifted far, which says nothing against a closure yet (Yang et al. 2020).
    cut = max(CUT, float(off[closure].max()))
    for _ in range(ROUNDS):
        weights = np.where(closure, (1 + off**2 / cut**2) ** -2, 1.0)
        previous, x = x, graph.solved(x, np.sqrt(weights))
        off = np.sqrt((graph.errors(x) ** 2).mean(axis=1))
        if cut == CUT and np.abs(x - previous).max() < 1e-7:
            break
        cut = max(CUT, min(cut / 2, float(off[closure].max())))
    return graph.sim3s(x), off


class _Graph:
    """Edges as arrays; x is what the worlds after the first move by, seven numbers each."""

    def __init__(self, start: list[Sim3], edges: list[Edge]) -> None:
        self._start = _Worlds.of(start)
        self._measured = _Worlds.of([edge.sim3 for edge in edges])
        self._first = np.array([edge.first for edge in edges], np.int64)
        self._second = np.array([edge.second for edge in edges], np.int64)
        spread = np.array([edge.spread for edge in edges]).reshape(-1, 3)
        self._spread = np.repeat(spread, (1, 3, 3), axis=1)

    def sim3s(self, x: NDArray[np.float64]) -> list[Sim3]:
        """The worlds, moved by x."""
        moved = self._start.moved(self._whole(x))
        return [
            Sim3(float(np.exp(s)), R, t)
            for s, R, t in zip(moved.log_scale, moved.rotation, moved.translation, strict=True)
        ]

    def errors(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """(e, 7) of each edge, in spreads."""
        moved = self._start.moved(self._whole(x))
        return self._apart(moved[self._first], moved[self._second])

    def solved(self, x: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """The x of least weighted squares, from x on. weights: (e,), of errors."""
        result = least_squares(
            lambda x: (self.errors(x) * weights[:, None]).ravel(),
            x,
            jac=lambda x: self._jacobian(x, weights),
            method="trf",
            tr_solver="lsmr",
            tr_options={"atol": 1e-12, "btol": 1e-12, "maxiter": 20 * len(x)},
            xtol=1e-10,
            ftol=1e-12,
            gtol=1e-12,
        )
        solution: NDArray[np.float64] = result.x
        return solution

    def _whole(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.concatenate([np.zeros((1, PARTS)), x.reshape(-1, PARTS)])

    def _apart(self, first: _Worlds, second: _Worlds) -> NDArray[np.float64]:
        measured = self._measured
        back = first.rotation.transpose(0, 2, 1)
        shift = np.einsum("nij,nj->ni", back, second.translation - first.translation)
        shift *= np.exp(-first.log_scale)[:, None]
        turn = measured.rotation.transpose(0, 2, 1) @ back @ second.rotation
        scale = second.log_scale - first.log_scale - measured.log_scale
        turned = Rotation.from_matrix(turn).as_rotvec()
        parts = [scale[:, None], turned, shift - measured.translation]
        errors: NDArray[np.float64] = np.concatenate(parts, axis=1) / self._spread
        return errors

    def _jacobian(self, x: NDArray[np.float64], weights: NDArray[np.float64]) -> csr_matrix:
        """Of the weighted errors: each edge's depend on its two worlds alone.

        By central differences, all edges at once.
        """
        whole = self._whole(x)
        ends = (self._first, self._second)
        count = len(self._first)
        rows, columns, values = [], [], []
        edge_rows = np.arange(count)[:, None] * PARTS + np.arange(PARTS)
        for end in (0, 1):
            for part in range(PARTS):
                step = np.zeros((count, PARTS))
                step[:, part] = STEP
                change = np.zeros((count, PARTS))
                for sign in (1, -1):
                    worlds = [
                        self._start[place].moved(whole[place] + (sign * step if n == end else 0))
                        for n, place in enumerate(ends)
                    ]
                    change += sign * self._apart(worlds[0], worlds[1])
                moving = ends[end] > 0
                values.append((change * weights[:, None] / (2 * STEP))[moving].ravel())
                rows.append(edge_rows[moving].ravel())
                column = (ends[end][moving] - 1) * PARTS + part
                columns.append(np.repeat(column, PARTS))
        place = (np.concatenate(rows), np.concatenate(columns))
        return csr_matrix((np.concatenate(values), place), shape=(count * PARTS, len(x)))


@dataclass(frozen=True)
class _Worlds:
    """Many Sim3s: (n,) logs of scales, (n, 3, 3) rotations, (n, 3) translations."""

    log_scale: NDArray[np.float64]
    rotation: NDArray[np.float64]
    translation: NDArray[np.float64]

    @classmethod
    def of(cls, sim3s: list[Sim3]) -> _Worlds:
        return cls(
            np.log([x.scale for x in sim3s]),
            np.array([x.rotation for x in sim3s]),
            np.array([x.translation for x in sim3s]),
        )

    def __getitem__(self, places: NDArray[np.int64]) -> _Worlds:
        return _Worlds(self.log_scale[places], self.rotation[places], self.translation[places])

    def moved(self, by: NDArray[np.float64]) -> _Worlds:
        """by: (n, 7) log of scale, rotation vector on the right, translation, of each."""
        turned = self.rotation @ Rotation.from_rotvec(by[:, 1:4]).as_matrix()
        return _Worlds(self.log_scale + by[:, 0], turned, self.translation + by[:, 4:])
