"""Joining reconstructions of overlapping windows of a long video into one.

Each window is in a world of its own, and a Sim3 apart from its neighbour. What both say of the
frames they share tells that Sim3, and `blend` makes one trajectory of two across those frames.
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
"""Points of a frame that count as erring independently: a network's depth errs by patches of the
image, so more points of one frame hardly say more, and must not outvote the cameras."""

MOST_POINTS = 5000
"""Of more points, evenly as many are fitted to."""

NEAR = 0.25
"""Share of the median distance under which a point's noise is not taken to shrink any more."""

SCALE_ERROR = 0.02
"""How far off, as a share, the scale is that an overlap tells: windows are bent, so that the end of
one and the beginning of the next differ, however many points they share."""

METRIC_ERROR = 0.005
"""How far, as a share, the scales of two windows of a metric network are taken to differ."""


@dataclass(frozen=True)
class Overlap:
    """What a window says of the frames that it shares with its neighbour, in its own world.

    points: (n, 3) float, the same pixels of the same frames in both windows, in the same order;
    numbers that are not finite mark points to leave out; world_from_camera: (k, 4, 4) float, the
    poses of the shared frames, finite; confidence: (n,) float in (0, 1], how sure each point is,
    None where all are alike.
    """

    points: NDArray[np.floating]
    world_from_camera: NDArray[np.floating]
    confidence: NDArray[np.floating] | None = None


@dataclass(frozen=True)
class Join:
    """How a window joins the one before it.

    sim3: earlier_from_later; scaled: False where nothing told the scale, which is 1 then;
    residual: the median distance between the two windows' points after joining, as a share of
    their distance from the cameras (without points: between the cameras, as a share of their
    spread; 0 with nothing shared).
    """

    sim3: Sim3
    scaled: bool
    residual: float


def join(earlier: Overlap, later: Overlap, *, metric: bool = False) -> Join:
    """The Sim3 that brings a window onto the one before it, from the frames they share.

    Points, camera centres and orientations are fitted together, each with a spread of its own and
    robustly (see `fit_sim3`): a third of the points and a minority of the poses may be wrong.
    The noise of a point is taken to grow with its distance from the cameras, as that of depth
    does, which makes scale and place a quarter more exact where points lie 1 to 6 m away. Points
    weigh sqrt(c1 c2) by the confidences c1 and c2 of the two windows. With
    less to go on it uses what there is: points without poses, poses without points, one frame;
    with nothing at all it is the identity. Deterministic.

    metric: whether both windows are in metres, as far as the network knows them. Then the scale
    is held near 1 (see `metric_scale`), and the cameras alone tell the place: of points whose
    scale differs, those ahead would push the cameras back or forth.
    """
    finite = np.isfinite(earlier.points).all(axis=1) & np.isfinite(later.points).all(axis=1)
    fitted = np.flatnonzero(finite)
    fitted = fitted[:: -(-len(fitted) // MOST_POINTS) or 1]
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
    """The scale between two windows of a metric network, where their overlap tells `fitted`.

    The likeliest log of the scale, for an overlap that is `SCALE_ERROR` off and windows that
    differ by `METRIC_ERROR`. The second is robust, with the weight of Geman and McClure: a scale
    that is far from 1 is a window that the network got wrong, and is followed.
    """
    told = log(fitted)
    spread = SCALE_ERROR**2 + METRIC_ERROR**2
    prior = (1 + told**2 / (CUT**2 * spread)) ** -2 / METRIC_ERROR**2
    return exp(told / (1 + prior * SCALE_ERROR**2))


def _weights(earlier: Overlap, later: Overlap) -> NDArray[np.float64]:
    """(n,) weights of the points that two windows share."""
    if earlier.confidence is None or later.confidence is None:
        return np.ones(len(earlier.points))
    weights: NDArray[np.float64] = np.sqrt(
        earlier.confidence.astype(np.float64) * later.confidence.astype(np.float64)
    )
    return np.clip(weights, 1e-3, 1.0)


def blend(earlier: NDArray[np.floating], later: NDArray[np.floating]) -> NDArray[np.float64]:
    """One trajectory from two of the same k frames, in the same world, for the frames they share.

    (k, 4, 4) each, and the result. It leaves the earlier one and reaches the later one evenly, so
    that neither the frames before nor those after see a jump: frame i of 0..k-1 takes the share
    (i + 1) / (k + 1) of the later one, linearly in position and along the shortest arc (slerp) in
    rotation.
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
    """(n,) median distances of points from the cameras; those of a few near ones raised.

    Which camera saw which point does not matter: cameras that share a view are close together.
    """
    if not len(points) or not len(cameras):
        return np.full(len(points), _extent(points))
    distance = np.median(np.linalg.norm(points[:, None] - cameras, axis=2), axis=1)
    least = NEAR * float(np.median(distance))
    raised: NDArray[np.float64] = np.maximum(distance, least if least > 0 else 1.0)
    return raised


def _extent(places: NDArray[np.float64]) -> float:
    """Median distance of two of them, from an even sample; 1 where that is nothing."""
    apart = pdist(places[:: 1 + len(places) // 200])
    extent = float(np.median(apart)) if len(apart) else 0.0
    return extent if extent > 0 else 1.0
