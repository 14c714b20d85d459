"""Pose graph optimisation: the Sim3 of each world, from measured Sim3s between pairs of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares
from scipy.sparse import csr_matrix
from scipy.spatial.transform import Rotation

from occgen_hub.geometry.sim3 import Sim3

CUT = 3.0
"""Error of a closure, in spreads, at which its weight is a quarter. Closures with larger errors at
the end are rejected."""

ROUNDS = 20
STEP = 1e-6
PARTS = 7
"""Parameters of a Sim3: log of scale, rotation vector, translation."""


@dataclass(frozen=True)
class Edge:
    """A measured transform between two worlds.

    sim3: first_from_second; spread: (3,) expected standard deviations of the log of its scale, of
    its rotation (radians), and of its translation (in the first world's unit); closure: whether it
    is a loop closure, which may be wrong.
    """

    first: int
    second: int
    sim3: Sim3
    spread: tuple[float, float, float]
    closure: bool = False


def optimise(start: list[Sim3], edges: list[Edge]) -> tuple[list[Sim3], list[bool]]:
    """Estimate root_from_world of all worlds, and which edges are kept.

    start: root_from_world of each world; the first one is fixed. The method is least squares with a
    sparse Jacobian, deterministic. Closures have Geman-McClure weights, found by iterative
    reweighting. While a closure has an error above `CUT` spreads at the end, the worst one is
    removed and the problem is solved again.
    """
    kept = [True] * len(edges)
    while True:
        used = [edge for edge, keep in zip(edges, kept, strict=True) if keep]
        solution, errors = _solve(start, used)
        numbers = np.flatnonzero(kept)
        wrong = [n for n, edge in enumerate(used) if edge.closure and errors[n] > CUT]
        if not wrong:
            return solution, kept
        kept[numbers[max(wrong, key=lambda n: (errors[n], -n))]] = False


def _solve(start: list[Sim3], edges: list[Edge]) -> tuple[list[Sim3], NDArray[np.float64]]:
    """The Sim3s for these edges, and the (e,) error of each edge in spreads, RMS over its parts."""
    graph = _Graph(start, edges)
    closure = np.array([edge.closure for edge in edges])
    x: NDArray[np.float64] = np.zeros(PARTS * (len(start) - 1))
    off = np.sqrt((graph.errors(x) ** 2).mean(axis=1))
    if not closure.any() or len(start) < 2:
        return start, off
    # At first all closures have full weight; then the weight of those with large errors decreases.
    # A long chain may have drifted far, so a large initial error does not make a closure wrong
    # (graduated non-convexity, Yang et al. 2020).
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
    """Edges as arrays. x holds seven parameters for the update of each world but the first."""

    def __init__(self, start: list[Sim3], edges: list[Edge]) -> None:
        self._start = _Worlds.of(start)
        self._measured = _Worlds.of([edge.sim3 for edge in edges])
        self._first = np.array([edge.first for edge in edges], np.int64)
        self._second = np.array([edge.second for edge in edges], np.int64)
        spread = np.array([edge.spread for edge in edges]).reshape(-1, 3)
        self._spread = np.repeat(spread, (1, 3, 3), axis=1)

    def sim3s(self, x: NDArray[np.float64]) -> list[Sim3]:
        """The worlds, updated by x."""
        moved = self._start.moved(self._with_fixed_first(x))
        return [
            Sim3(float(np.exp(s)), R, t)
            for s, R, t in zip(moved.log_scale, moved.rotation, moved.translation, strict=True)
        ]

    def errors(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """(e, 7) errors of the edges, in spreads."""
        moved = self._start.moved(self._with_fixed_first(x))
        return self._residuals(moved[self._first], moved[self._second])

    def solved(self, x: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """The x with the least weighted squared errors, starting at x. weights: (e,)."""
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

    def _with_fixed_first(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.concatenate([np.zeros((1, PARTS)), x.reshape(-1, PARTS)])

    def _residuals(self, first: _Worlds, second: _Worlds) -> NDArray[np.float64]:
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
        """The Jacobian of the weighted errors, by central differences for all edges at once.

        The errors of an edge depend on its two worlds only.
        """
        whole = self._with_fixed_first(x)
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
                    change += sign * self._residuals(worlds[0], worlds[1])
                moving = ends[end] > 0
                values.append((change * weights[:, None] / (2 * STEP))[moving].ravel())
                rows.append(edge_rows[moving].ravel())
                column = (ends[end][moving] - 1) * PARTS + part
                columns.append(np.repeat(column, PARTS))
        place = (np.concatenate(rows), np.concatenate(columns))
        return csr_matrix((np.concatenate(values), place), shape=(count * PARTS, len(x)))


@dataclass(frozen=True)
class _Worlds:
    """n Sim3s as arrays: (n,) logs of scales, (n, 3, 3) rotations, (n, 3) translations."""

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
        """Update each Sim3. by: (n, 7) log of scale, rotation vector (right), translation."""
        turned = self.rotation @ Rotation.from_rotvec(by[:, 1:4]).as_matrix()
        return _Worlds(self.log_scale + by[:, 0], turned, self.translation + by[:, 4:])
