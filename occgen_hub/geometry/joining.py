"""Join the reconstructions of overlapping windows of a long video.

Each window has a world of its own. The Sim3 between neighbours is estimated from the frames that
they share, and `blend` merges their trajectories across these frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import pdist
from scipy.spatial.transform import Rotation

from occgen_hub.geometry.sim3 import CUT, Positions, Sim3, fit_sim3, mean_position

INDEPENDENT = 16
"""Number of points of a frame whose errors count as independent. Errors of a network's depth are
correlated within patches, so more points must not outweigh the cameras."""

MAX_POINTS = 5000
"""Number of points used for a fit; of more, an even sample."""

NEAR = 0.25
"""Distance, as a share of the median distance, below which a point's noise stops decreasing."""

SCALE_ERROR = 0.02
"""Assumed relative error of the scale between two windows. Windows are distorted, so this error
does not decrease with the number of shared points."""

METRIC_ERROR = 0.005
"""Assumed relative difference between the scales of two windows of a metric network."""


@dataclass(frozen=True)
class Overlap:
    """A window's points and poses of the frames that it shares with its neighbour.

    points: (n, 3) float in the window's world, for the same pixels of the same frames in both
    windows, in the same order; points that are not finite are ignored; world_from_camera:
    (k, 4, 4) float, the poses of the shared frames, finite; confidence: (n,) float in (0, 1], None
    for equal confidence.
    """

    points: NDArray[np.floating]
    world_from_camera: NDArray[np.floating]
    confidence: NDArray[np.floating] | None = None


@dataclass(frozen=True)
class Join:
    """The transform between a window and the one before it.

    sim3: earlier_from_later; scaled: False if the scale could not be determined, which is then 1;
    residual: the median distance between the two windows' points after joining, as a share of
    their distance from the cameras (without points, that of the cameras, as a share of their
    spread; 0 if nothing is shared).
    """

    sim3: Sim3
    scaled: bool
    residual: float


def join(earlier: Overlap, later: Overlap, *, metric: bool = False) -> Join:
    """Estimate the Sim3 from a window to the one before it, from the frames that they share.

    Points, camera centres and orientations are fitted together and robustly, each with its own
    spread (see `fit_sim3`): a third of the points and a minority of the poses may be wrong. The
    noise of a point is assumed to grow with its distance from the cameras, like that of depth,
    which makes scale and translation a quarter more accurate for points at 1 to 6 m. Points are
    weighted by sqrt(c1 c2) with the confidences c1 and c2 of the two windows. Points without poses,
    poses without points and a single frame are accepted; if nothing is shared, the result is the
    identity. Deterministic.

    metric: whether both windows are in metres, by the network's estimate. The scale is then kept
    near 1 (see `metric_scale`), and the translation is taken from the cameras only: points with
    another scale would shift the cameras along the viewing direction.
    """
    finite = np.isfinite(earlier.points).all(axis=1) & np.isfinite(later.points).all(axis=1)
    fitted = np.flatnonzero(finite)
    fitted = fitted[:: -(-len(fitted) // MAX_POINTS) or 1]
    p, q = later.points[fitted].astype(np.float64), earlier.points[fitted].astype(np.float64)
    cameras = later.world_from_camera.astype(np.float64)
    onto = earlier.world_from_camera.astype(np.float64)

    distance = _distances(q, onto[:, :3, 3])
    typical = float(np.median(distance)) if len(q) else _extent(onto[:, :3, 3])
    centres = Positions(cameras[:, :3, 3], onto[:, :3, 3], np.full(len(onto), typical))
    noise = distance / np.sqrt(_weights(earlier, later)[fitted])
    points = Positions(p, q, noise, float(INDEPENDENT * max(1, len(onto))))
    rotations = onto[:, :3, :3] @ cameras[:, :3, :3].transpose(0, 2, 1)

    fit = fit_sim3([points, centres], rotations)
    if len(onto) and not fit.scaled:  # points that have nothing in common
        fit = fit_sim3([centres], rotations)
    sim3 = fit.sim3
    if metric and fit.scaled and len(onto):
        scale = metric_scale(sim3.scale)
        shift = mean_position(centres, scale, sim3.rotation)
        sim3 = Sim3(scale, sim3.rotation, shift)
    target, source, unit = (
        (q, p, distance) if len(p) else (onto[:, :3, 3], cameras[:, :3, 3], typical)
    )
    errors = np.linalg.norm(target - sim3.points(source), axis=1) / unit
    return Join(sim3, fit.scaled, float(np.median(errors)) if len(errors) else 0.0)


def metric_scale(fitted: float) -> float:
    """The scale between two windows of a metric network, given the `fitted` scale of their overlap.

    The maximum likelihood estimate of the log of the scale, with an error of `SCALE_ERROR` for the
    overlap and a difference of `METRIC_ERROR` between windows. The latter has the robust weight of
    Geman and McClure, so a scale far from 1, from a window with the wrong unit, is kept.
    """
    measured = log(fitted)
    spread = SCALE_ERROR**2 + METRIC_ERROR**2
    prior = (1 + measured**2 / (CUT**2 * spread)) ** -2 / METRIC_ERROR**2
    return exp(measured / (1 + prior * SCALE_ERROR**2))


def _weights(earlier: Overlap, later: Overlap) -> NDArray[np.float64]:
    """(n,) weights of the points that two windows share."""
    if earlier.confidence is None or later.confidence is None:
        return np.ones(len(earlier.points))
    weights: NDArray[np.float64] = np.sqrt(
        earlier.confidence.astype(np.float64) * later.confidence.astype(np.float64)
    )
    return np.clip(weights, 1e-3, 1.0)


def blend(earlier: NDArray[np.floating], later: NDArray[np.floating]) -> NDArray[np.float64]:
    """Blend two trajectories of the same k frames in the same world into one, without jumps.

    Both and the result are (k, 4, 4). Frame i of 0 to k - 1 takes the share (i + 1) / (k + 1) of
    the later trajectory, linearly in position and by slerp in rotation.
    """
    share = np.arange(1, len(later) + 1)[:, None] / (len(later) + 1)
    blended = earlier.astype(np.float64)
    blended[:, :3, 3] += share * (later[:, :3, 3] - blended[:, :3, 3])
    if len(later):
        start = Rotation.from_matrix(blended[:, :3, :3])
        turn = (start.inv() * Rotation.from_matrix(later[:, :3, :3])).as_rotvec()
        blended[:, :3, :3] = (start * Rotation.from_rotvec(share * turn)).as_matrix()
    return blended


def _distances(points: NDArray[np.float64], cameras: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,) median distance of each point from all cameras, at least a share of the overall median.

    All cameras are used for each point, since cameras of shared frames are close together.
    """
    if not len(points) or not len(cameras):
        return np.full(len(points), _extent(points))
    distance = np.median(np.linalg.norm(points[:, None] - cameras, axis=2), axis=1)
    least = NEAR * float(np.median(distance))
    raised: NDArray[np.float64] = np.maximum(distance, least if least > 0 else 1.0)
    return raised


def _extent(places: NDArray[np.float64]) -> float:
    """The median distance between two positions, from an even sample; 1 if it is 0."""
    apart = pdist(places[:: 1 + len(places) // 200])
    extent = float(np.median(apart)) if len(apart) else 0.0
    return extent if extent > 0 else 1.0
