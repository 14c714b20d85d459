"""Loop closure: places that a video returns to, found by descriptors, verified by the network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from occgen_hub.engines.windows import Assembly, Window, overlaps
from occgen_hub.geometry.joining import join
from occgen_hub.geometry.pose_graph import Edge, optimise
from occgen_hub.geometry.sim3 import Sim3, rotation_angle

MIN_WINDOWS = 4
"""Number of windows from which `loop_closure: auto` closes loops. Fewer windows hardly drift."""

END_FRAMES = 20
"""Largest number of frames around each end of a loop used to verify it. Both ends together have at
most a window's frames, which are known to fit into memory."""

MAX_DESCRIPTORS = 1000
"""Largest number of frames whose descriptors are compared, evenly chosen."""

NEAR_FRAMES = 0.125
"""Distance of near frames, as a share of a window's frames. Near frames show much of the same
scene: the median likeness of such pairs is the threshold for the ends of a loop."""

CANDIDATES_PER_WINDOW = 0.5
"""Largest number of candidates verified, per window."""

MAX_RESIDUAL = 0.05
"""Largest median distance of points after joining an end of a loop, as a share of their depth."""

DEPTH_TOLERANCE, MIN_SHARED = 0.05, 0.1
"""A view sees a point of the other end if its depth there is equal within this tolerance; and the
smallest share of points that must be seen."""

CLOSURE_SPREAD = (0.02, float(np.radians(0.5)), 0.02)
"""Assumed error of a verified loop: log of scale, radians, share of the median depth."""

GATE = 3.0
"""Largest drift that a loop may correct, in standard deviations."""


@dataclass(frozen=True)
class Candidate:
    """Two views that look similar and are far apart in the video. likeness: in [-1, 1]."""

    first: int
    second: int
    likeness: float


def candidates(descriptors: NDArray[np.float32], windows: Sequence[range]) -> list[Candidate]:
    """Pairs of views that may show the same place, in order of falling likeness.

    descriptors: (T, d), the mean token of each view; their common mean is subtracted. Views of the
    same or of neighbouring windows are not paired.
    """
    size = len(windows[0])
    chosen = np.arange(0, len(descriptors), 1 + (len(descriptors) - 1) // MAX_DESCRIPTORS)
    own = descriptors[chosen].astype(np.float64)
    own = own - own.mean(axis=0)
    own /= np.maximum(np.linalg.norm(own, axis=1, keepdims=True), 1e-12)
    likeness = own @ own.T
    near = max(1, round(NEAR_FRAMES * size / (chosen[1] - chosen[0]))) if len(chosen) > 1 else 1
    threshold = float(np.median(np.diagonal(likeness, near))) if near < len(chosen) else 1.0
    first, second = np.nonzero(np.triu(likeness >= threshold, 1))
    far = chosen[second] - chosen[first] >= max(2 * size, 2 * END_FRAMES)
    first, second = first[far], second[far]
    found: list[Candidate] = []
    limit = max(1, round(CANDIDATES_PER_WINDOW * len(windows)))
    for pair in np.argsort(-likeness[first, second], kind="stable"):
        a, b = int(chosen[first[pair]]), int(chosen[second[pair]])
        if all(max(abs(a - c.first), abs(b - c.second)) >= size // 2 for c in found):
            found.append(Candidate(a, b, float(likeness[first[pair], second[pair]])))
        if len(found) == limit:
            break
    return found


def close_loops(
    assembly: Assembly,
    descriptors: NDArray[np.float32],
    predict: Callable[[list[int]], Window],
    stored: Callable[[list[int]], Window],
) -> tuple[int, int]:
    """Move the windows of an assembly so that the loops of the video close.

    descriptors: (T, d); predict: runs the network on the views with these numbers; stored: the
    earlier result for them, in the assembly's world. Returns the numbers of candidates and of
    closed loops.
    """
    edges = []
    tried = candidates(descriptors, assembly.windows)
    count = min(END_FRAMES, max(map(len, assembly.windows)) // 2)
    for candidate in tried:
        views = (candidate.first, candidate.second)
        ends = [views_around(view, len(descriptors), count) for view in views]
        known = [stored(end) for end in ends]
        drift = measure_drift(predict([*ends[0], *ends[1]]), known, metric=assembly.metric)
        if drift is None:
            continue
        first, second = (assembly.owner(view) for view in views)
        depth = _median_depth(stored([candidate.first]))
        edge = closure_edge(assembly.nodes, first, second, drift, depth)
        position = assembly.world_from_camera[candidate.second, :3, 3]
        if plausible(assembly.nodes, assembly.edges, first, second, drift, position):
            edges.append(edge)
    if not edges:
        return len(tried), 0
    assembly.nodes, kept = optimise(assembly.nodes, [*assembly.edges, *edges])
    return len(tried), sum(kept) - len(assembly.edges)


def views_around(view: int, total: int, count: int) -> list[int]:
    """The numbers of up to `count` consecutive views around one of `total`."""
    start = min(max(0, view - count // 2), max(0, total - count))
    return list(range(start, min(start + count, total)))


def measure_drift(found: Window, known: list[Window], *, metric: bool = False) -> Sim3 | None:
    """The drift between two ends of a loop, as world_at_first_from_world_at_second.

    found: the views of both ends, predicted together; known: the views of each end as stored in
    the world; metric: see `geometry.joining.join`. None if the ends do not show the same place:
    they share few points, or the prediction differs from the stored views.
    """
    middle = len(known[0])
    parts = found[:middle], found[middle:]
    fits = []
    for before, now in zip(known, parts, strict=True):
        fit = join(*overlaps(before, now), metric=metric)
        if not fit.scaled or fit.residual > MAX_RESIDUAL:
            return None
        fits.append(fit.sim3)
    if min(visible_share(*parts), visible_share(*parts[::-1])) < MIN_SHARED:
        return None
    return fits[0] @ fits[1].inverse()


def visible_share(window: Window, other: Window) -> float:
    """The share of a window's points that the views of `other`, in the same world, see."""
    chosen = np.flatnonzero(window.kept)
    if not len(chosen):
        return 0.0
    chosen = chosen[:: 1 + len(chosen) // 2000]
    views, pixels = np.divmod(chosen, window.kept[0].size)
    local = window.local.reshape(len(window), -1, 3)[views, pixels].astype(np.float64)
    poses = window.world_from_camera[views]
    points = np.einsum("nij,nj->ni", poses[:, :3, :3], local) + poses[:, :3, 3]
    seen = np.zeros(len(points), np.bool_)
    for view in range(len(other)):
        seen |= _agrees(points, other, view)
    return float(seen.mean())


def _agrees(points: NDArray[np.float64], window: Window, view: int) -> NDArray[np.bool_]:
    """(n,) bool: which of (n, 3) world points a view sees at their depth."""
    height, width = window.kept[view].shape
    pose = window.world_from_camera[view]
    local = (points - pose[:3, 3]) @ pose[:3, :3]
    K = _pinhole(window, view)
    agrees = np.zeros(len(points), np.bool_)
    if K is None:
        return agrees
    front = np.flatnonzero(local[:, 2] > 0)
    u, v = (K[:, 0] * local[front, :2] / local[front, 2:] + K[:, 1]).T
    inside = (u >= 0) & (u < width) & (v >= 0) & (v < height)
    front, u, v = front[inside], u[inside].astype(np.int64), v[inside].astype(np.int64)
    depth = window.local[view][v, u, 2]
    same = np.abs(depth - local[front, 2]) <= DEPTH_TOLERANCE * local[front, 2]
    agrees[front] = same & window.kept[view][v, u]
    return agrees


def _pinhole(window: Window, view: int) -> NDArray[np.float64] | None:
    """(2, 2) focal length and centre, by column and by row, fitted to a view's points, in pixels.

    None with fewer than 8 points.
    """
    kept = np.flatnonzero(window.kept[view])
    if len(kept) < 8:
        return None
    kept = kept[:: 1 + len(kept) // 500]
    width = window.kept[view].shape[1]
    rows, columns = np.divmod(kept, width)
    points = window.local[view].reshape(-1, 3)[kept].astype(np.float64)
    lines = []
    for axis, pixel in ((0, columns), (1, rows)):
        slope = points[:, axis] / points[:, 2]
        A = np.stack([slope, np.ones_like(slope)], axis=1)
        lines.append(np.linalg.lstsq(A, pixel + 0.5, rcond=None)[0])
    return np.array(lines)


def closure_edge(nodes: list[Sim3], first: int, second: int, drift: Sim3, depth: float) -> Edge:
    """The edge of a loop between two windows in the pose graph.

    drift: from `measure_drift`; depth: the median depth at the first end, in the world's unit.
    """
    sim3 = nodes[first].inverse() @ drift @ nodes[second]
    scale, angle, share = CLOSURE_SPREAD
    return Edge(first, second, sim3, (scale, angle, share * depth / nodes[first].scale), True)


def plausible(
    nodes: list[Sim3],
    joins: list[Edge],
    first: int,
    second: int,
    drift: Sim3,
    position: NDArray[np.float64],
) -> bool:
    """Whether the joins between two windows may have drifted by as much as a loop requires.

    This rejects loops between similar rooms that are far apart. joins: edge n connects windows n
    and n + 1; position: (3,) the end of the loop, in the world. The variances of the joins are
    added up; errors of rotation and scale move the end in proportion to its distance.
    """
    scale = turn = shift = 0.0
    for edge in joins[first:second]:
        s, r, t = edge.spread
        unit = nodes[edge.first].scale
        lever = float(np.linalg.norm(position - nodes[edge.second].translation))
        scale, turn = scale + s**2, turn + r**2
        shift += (t * unit) ** 2 + (s**2 + r**2) * lever**2
    moved = float(np.linalg.norm(drift.points(position) - position))
    angle = float(rotation_angle(drift.rotation, np.eye(3)))
    return bool(
        abs(np.log(drift.scale)) <= GATE * np.sqrt(scale + CLOSURE_SPREAD[0] ** 2)
        and angle <= GATE * np.sqrt(turn + CLOSURE_SPREAD[1] ** 2)
        and moved <= GATE * np.sqrt(shift)
    )


def _median_depth(window: Window) -> float:
    depth = window.local[..., 2][window.kept]
    return float(np.median(depth)) if len(depth) else 1.0
