"""Similarity transforms (Sim3), and their robust fit to points and rotations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TYPICAL_POSITION, TYPICAL_ROTATION = 0.005, np.radians(0.5)
"""Prior noise of a position, in its unit, and of a rotation, in radians."""

PRIOR = 3
"""Weight of the prior noise, in measurements. It keeps the estimated spread above zero for few or
perfect measurements."""

CUT = 4.0
"""Error, in spreads, at which a measurement's weight is a quarter. Larger errors are outliers."""

CORRELATION = 0.9
"""Smallest correlation of two aligned sets of positions that determines the scale. Below it, a
fifth or more of the motion in one of them is not in the other."""

HYPOTHESES, SAMPLE = 128, 1000
"""Number of start values tried, and of positions used to compare them. If half of the points are
outliers, one of 128 triples is free of them with probability 1 - 4e-8."""

ROUNDS = 100
MEDIAN_OF_NORM = 1.5382
"""The median length of a vector of three standard normal numbers."""


@dataclass(frozen=True)
class Sim3:
    """A similarity transform target_from_source: p becomes scale * rotation @ p + translation.

    rotation: (3, 3) float64; translation: (3,) float64, in the target's unit.
    """

    scale: float
    rotation: NDArray[np.float64]
    translation: NDArray[np.float64]

    @classmethod
    def identity(cls) -> Sim3:
        """The identity."""
        return cls(1.0, np.eye(3), np.zeros(3))

    def points(self, points: NDArray[np.floating]) -> NDArray[np.float64]:
        """Transform (..., 3) points; float64."""
        moved: NDArray[np.float64] = points @ (self.scale * self.rotation.T) + self.translation
        return moved

    def poses(self, world_from_camera: NDArray[np.floating]) -> NDArray[np.float64]:
        """Transform (..., 4, 4) camera poses to the target's world; float64, still rigid."""
        moved = world_from_camera.astype(np.float64)
        moved[..., :3, :3] = self.rotation @ moved[..., :3, :3]
        moved[..., :3, 3] = self.points(moved[..., :3, 3])
        return moved

    def __matmul__(self, other: Sim3) -> Sim3:
        """The composition that applies `other` first."""
        return Sim3(
            self.scale * other.scale,
            self.rotation @ other.rotation,
            self.points(other.translation),
        )

    def inverse(self) -> Sim3:
        """source_from_target."""
        back = self.rotation.T / self.scale
        return Sim3(1.0 / self.scale, self.rotation.T, -back @ self.translation)


@dataclass(frozen=True)
class Positions:
    """The same n positions in two worlds.

    source, target: (n, 3) float64; unit: (n,) float64 above 0, to which the noise of each position
    is proportional, in the target's unit; independent: largest number of positions whose errors
    count as independent.
    """

    source: NDArray[np.float64]
    target: NDArray[np.float64]
    unit: NDArray[np.float64]
    independent: float = np.inf

    def errors(self, sim3: Sim3) -> NDArray[np.float64]:
        """(n,) distances between the target and the transformed source, each in its unit."""
        distance: NDArray[np.float64] = np.linalg.norm(
            self.target - sim3.points(self.source), axis=1
        )
        return distance / self.unit


@dataclass(frozen=True)
class Fit:
    """A fitted Sim3, target_from_source.

    scaled: False if the positions do not determine the scale, which is then 1; positions: for each
    set (n,) bool, and rotations: (k,) bool, which of them are inliers.
    """

    sim3: Sim3
    scaled: bool
    positions: list[NDArray[np.bool_]]
    rotations: NDArray[np.bool_]


def fit_sim3(sets: list[Positions], rotations: NDArray[np.float64]) -> Fit:
    """Fit a Sim3 robustly to corresponding positions and rotations.

    sets: positions in both worlds, one set for each kind of noise; rotations: (k, 3, 3) float64,
    estimates of target_from_source's rotation, for example from a camera's pose in both worlds.
    Any number of each, including none; all finite.

    This is a maximum likelihood estimate for normal noise of unknown spread, made robust: spreads
    come from the median error, and weights are those of Geman and McClure (1987), found by
    iterative reweighting from the best of many deterministic start values. For given weights the
    solution has a closed form: Horn's (1987) symmetric scale, which is not biased by noise in one
    of the worlds, and the rotation by SVD (Umeyama 1991) of the sum of the terms of positions and
    rotations. If positions lie on a line, the rotation about it comes from the rotations only.

    If the positions do not determine the scale, the result is that of `fit_unscaled`.
    """
    moving = [positions for positions in sets if len(positions.source)]
    if (
        moving
        and _are_distinct([x.source for x in moving])
        and _are_distinct([x.target for x in moving])
    ):
        sim3 = _start(moving, rotations)
        for _ in range(ROUNDS):
            previous, (sim3, correlation) = sim3, _solve(moving, rotations, sim3)
            if _are_equal(previous, sim3, moving):
                break
        if correlation >= CORRELATION:
            return _with_inliers(sim3, True, sets, rotations)
    return fit_unscaled(sets, rotations)


def fit_unscaled(sets: list[Positions], rotations: NDArray[np.float64]) -> Fit:
    """Like `fit_sim3`, with a scale of 1.

    The rotation is the mean of `rotations`, the translation the median over the positions.
    """
    R = mean_rotation(rotations)
    shifts = np.concatenate([np.zeros((0, 3)), *(x.target - x.source @ R.T for x in sets)])
    t = np.median(shifts, axis=0) if len(shifts) else np.zeros(3)
    return _with_inliers(Sim3(1.0, R, t), False, sets, rotations)


def mean_position(
    positions: Positions, scale: float, rotation: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Fit the (3,) translation of a Sim3 with known scale and rotation, weighted as `fit_sim3`."""
    shifts = positions.target - scale * positions.source @ rotation.T
    t: NDArray[np.float64] = np.median(shifts, axis=0)
    for _ in range(ROUNDS):
        errors = np.linalg.norm(shifts - t, axis=1) / positions.unit
        weights = _weights(errors, TYPICAL_POSITION) / positions.unit**2
        previous, t = t, weights @ shifts / weights.sum()
        if np.abs(t - previous).max() <= 1e-12 * np.abs(shifts).max():
            break
    return t


def nearest_rotation(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """The (..., 3, 3) rotations R with the largest tr(R^T matrix) (Umeyama 1991)."""
    u, _, vt = np.linalg.svd(matrix)
    u[..., 2] *= np.linalg.det(u @ vt)[..., None]
    rotation: NDArray[np.float64] = u @ vt
    return rotation


def rotation_angle(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """The angle in radians between (..., 3, 3) rotations, accurate for small angles too."""
    chord = np.linalg.norm(a - b, axis=(-2, -1)) / np.sqrt(8)
    angle: NDArray[np.float64] = 2 * np.arcsin(np.minimum(chord, 1.0))
    return angle


def mean_rotation(rotations: NDArray[np.float64]) -> NDArray[np.float64]:
    """The (3, 3) rotation with the least sum of distances to (k, 3, 3) ones; identity if k is 0.

    Weiszfeld's algorithm (Hartley, Aftab and Trumpf 2011), with chordal distances: nearly half of
    the rotations may be wrong.
    """
    if not len(rotations):
        return np.eye(3)
    mean = nearest_rotation(rotations.sum(axis=0))
    for _ in range(ROUNDS):
        distance = np.linalg.norm(rotations - mean, axis=(1, 2))
        weights = 1.0 / np.maximum(distance, 1e-9)
        mean = nearest_rotation(np.tensordot(weights, rotations, 1))
    return mean


def _are_distinct(places: list[NDArray[np.float64]]) -> bool:
    """Whether positions differ by more than rounding."""
    together = np.concatenate(places)
    return bool(np.ptp(together, axis=0).max() > 1e-9 * np.abs(together).max())


def _start(sets: list[Positions], rotations: NDArray[np.float64]) -> Sim3:
    """The most likely Sim3 through random pairs and triples of positions, with a fixed seed.

    The likelihood assumes Cauchy distributed errors, which tolerates many outliers.
    """
    rng = np.random.default_rng(0)
    source = np.concatenate([positions.source for positions in sets])
    target = np.concatenate([positions.target for positions in sets])
    unit = np.concatenate([positions.unit for positions in sets])

    triples = rng.integers(len(source), size=(HYPOTHESES, 3))
    R, s, t = _fit_through(source[triples], target[triples], None)
    if len(rotations):
        pairs = rng.integers(len(source), size=(HYPOTHESES, 2))
        turned = _fit_through(source[pairs], target[pairs], mean_rotation(rotations))
        R, s, t = (np.concatenate(both) for both in zip((R, s, t), turned, strict=True))

    judges = np.linspace(0, len(source) - 1, min(len(source), SAMPLE)).astype(np.int64)
    moved = s[:, None, None] * (source[judges] @ R.transpose(0, 2, 1)) + t[:, None]
    error = np.linalg.norm(target[judges] - moved, axis=2) / unit[judges]
    independent = min(sum(min(x.independent, len(x.source)) for x in sets), float(SAMPLE))
    # Not the median error, which does not depend on the scale if a robot mostly stands still.
    cost = independent * np.log1p((error / TYPICAL_POSITION) ** 2).mean(axis=1)
    if len(rotations):
        angle = rotation_angle(R[:, None], rotations)
        cost += np.log1p((angle / TYPICAL_ROTATION) ** 2).sum(axis=1)
    best = int(np.argmin(cost))
    return Sim3(float(s[best]), R[best], t[best])


def _fit_through(
    source: NDArray[np.float64], target: NDArray[np.float64], R: NDArray[np.float64] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """The rotations (m, 3, 3), scales (m,) and translations (m, 3) through m draws (m, j, 3)."""
    p, q = source.mean(axis=1, keepdims=True), target.mean(axis=1, keepdims=True)
    dp, dq = source - p, target - q
    rotation = nearest_rotation(dq.transpose(0, 2, 1) @ dp)
    if R is not None:
        rotation = np.broadcast_to(R, rotation.shape)
    pp, qq = (dp**2).sum(axis=(1, 2)), (dq**2).sum(axis=(1, 2))
    drawn_twice = (pp == 0) | (qq == 0)
    scale = np.sqrt(np.where(drawn_twice, 1.0, qq) / np.where(drawn_twice, 1.0, pp))
    shift = q[:, 0] - scale[:, None] * (p @ rotation.transpose(0, 2, 1))[:, 0]
    return rotation, scale, shift


def _solve(sets: list[Positions], rotations: NDArray[np.float64], sim3: Sim3) -> tuple[Sim3, float]:
    """The Sim3 for the weights of the errors of `sim3`, and the correlation of the positions."""
    source = np.concatenate([positions.source for positions in sets])
    target = np.concatenate([positions.target for positions in sets])
    weights = np.concatenate(
        [
            _weights(positions.errors(sim3), TYPICAL_POSITION)
            * min(1.0, positions.independent / len(positions.unit))
            / positions.unit**2
            for positions in sets
        ]
    )
    turned = _weights(rotation_angle(sim3.rotation, rotations), TYPICAL_ROTATION)

    total = weights.sum()
    p, q = weights @ source / total, weights @ target / total
    dp, dq = source - p, target - q
    pp, qq = weights @ (dp**2).sum(axis=1), weights @ (dq**2).sum(axis=1)
    scale = np.sqrt(qq / pp)
    cross = (weights[:, None] * dq).T @ dp
    R = nearest_rotation(scale * cross + np.tensordot(turned, rotations, 1) / 2)
    return Sim3(float(scale), R, q - scale * R @ p), float(np.sum(R * cross) / np.sqrt(pp * qq))


def _variance(errors: NDArray[np.float64], typical: float) -> float:
    """The variance of one component of 3D errors, from their (n,) lengths, n at least 1."""
    seen = float(np.median(errors)) / MEDIAN_OF_NORM
    return (len(errors) * seen**2 + PRIOR * typical**2) / (len(errors) + PRIOR)


def _weights(errors: NDArray[np.float64], typical: float) -> NDArray[np.float64]:
    """(n,) weights of errors with (n,) lengths: inverse variance times the robust weight."""
    if not len(errors):
        return errors
    variance = _variance(errors, typical)
    weights: NDArray[np.float64] = (1 + errors**2 / (CUT**2 * variance)) ** -2 / variance
    return weights


def _are_equal(a: Sim3, b: Sim3, sets: list[Positions]) -> bool:
    """Whether two Sim3s transform the positions equally, up to rounding."""
    first = np.concatenate([x.source[:: max(1, len(x.source) // SAMPLE)] for x in sets])
    moved = b.points(first)
    change = np.abs(a.points(first) - moved).max()
    return bool(change <= 1e-12 * np.abs(moved).max())


def _with_inliers(
    sim3: Sim3, scaled: bool, sets: list[Positions], rotations: NDArray[np.float64]
) -> Fit:
    """The fit for a Sim3, with its inliers."""

    def trusted(errors: NDArray[np.float64], typical: float) -> NDArray[np.bool_]:
        if not len(errors):
            return np.zeros(0, np.bool_)
        kept: NDArray[np.bool_] = errors**2 <= CUT**2 * _variance(errors, typical)
        return kept

    positions = [trusted(x.errors(sim3), TYPICAL_POSITION) for x in sets]
    angles = rotation_angle(sim3.rotation, rotations)
    return Fit(sim3, scaled, positions, trusted(angles, TYPICAL_ROTATION))
