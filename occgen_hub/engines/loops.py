"""Loops: places that a long video comes back to, found by looks and verified by the network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from occgen_hub.engines.windows import Assembly, Window, overlaps
from occgen_hub.geometry.joining import join
from occgen_hub.geometry.pose_graph import Edge, optimise
from occgen_hub.geometry.sim3 import Sim3, rotation_angle

LEAST_WINDOWS = 4
"""Of fewer, `loop_closure: auto` leaves loops alone: they hardly drift."""

AROUND = 20
"""Frames around each end that a candidate is verified with, at most; both ends together are no more
than a window, of which it is known that there is memory for it."""

LOOKS = 1000
"""Frames whose looks are compared, evenly chosen: more are too alike to tell anything."""

ALIKE_WITHIN = 0.125
"""Of a window's frames: what is this near to a frame shows much of the same. How alike such frames
are, in the median, is how alike the ends of a loop have to be."""

MOST_A_WINDOW = 0.5
"""Candidates verified for each window, at most."""

POOR_JOIN = 0.05
"""Median distance of points after joining an end, as a share of their distance, of a loop."""

SAME_DEPTH, SHARED_VIEW = 0.05, 0.1
"""A point of one end is seen from the other where the depth there is the same within that share;
of the points of the one, that share has to be."""

CLOSURE_SPREAD = (0.02, float(np.radians(0.5)), 0.02)
"""What a verified loop is taken to be off: log of scale, radians, share of the median depth."""

GATE = 3.0
"""Standard deviations of drift that a loop may correct."""


@dataclass(frozen=True)
class Candidate:
    """Two views that look alike, far apart in the video; likeness: in [-1, 1]."""

    first: int
    second: int
    likeness: float


def candidates(looks: NDArray[np.float32], windows: Sequence[range]) -> list[Candidate]:
    """Pairs of views that may show the same place, the most alike first.

    looks: (T, d) a descriptor of each view: the mean of its tokens. What all views have in common
    is taken out. Views of one window or of neighbours are none.
    """
    size = len(windows[0])
    chosen = np.arange(0, len(looks), 1 + (len(looks) - 1) // LOOKS)
    own = looks[chosen].astype(np.float64)
    own = own - own.mean(axis=0)
    own /= np.maximum(np.linalg.norm(own, axis=1, keepdims=True), 1e-12)
    likeness = own @ own.T
    near = max(1, round(ALIKE_WITHIN * size / (chosen[1] - chosen[0]))) if len(chosen) > 1 else 1
    threshold = float(np.median(np.diagonal(likeness, near))) if near < len(chosen) else 1.0
    first, second = np.nonzero(np.triu(likeness >= threshold, 1))
    far = chosen[second] - chosen[first] >= max(2 * size, 2 * AROUND)
    first, second = first[far], second[far]
    found: list[Candidate] = []
    most = max(1, round(MOST_A_WINDOW * len(windows)))
    for place in np.argsort(-likeness[first, second], kind="stable"):
        a, b = int(chosen[first[place]]), int(chosen[second[place]])
        if all(max(abs(a - c.first), abs(b - c.second)) >= size // 2 for c in found):
            found.append(Candidate(a, b, float(likeness[first[place], second[place]])))
        if len(found) == most:
            break
    return found


def close_loops(
    assembly: Assembly,
    looks: NDArray[np.float32],
    look: Callable[[list[int]], Window],
    remembered: Callable[[list[int]], Window],
) -> tuple[int, int]:
    """Move the windows of an assembly so that the loops of the video close.

    look: what the network makes of the views of these numbers, at once; remembered: what was made
    of them before, in the assembly's world. Gives how many candidates there were, and how many are
    loops.
    """
    edges = []
    tried = candidates(looks, assembly.windows)
    reach = min(AROUND, max(map(len, assembly.windows)) // 2)
    for candidate in tried:
        ends = [around(place, len(looks), reach) for place in (candidate.first, candidate.second)]
        known = [remembered(end) for end in ends]
        drift = verified(look([*ends[0], *ends[1]]), known, metric=assembly.metric)
        if drift is None:
            continue
        first, second = (assembly.owner(place) for place in (candidate.first, candidate.second))
        depth = _reach(remembered([candidate.first]))
        edge = closure_edge(assembly.nodes, first, second, drift, depth)
        place = assembly.world_from_camera[candidate.second, :3, 3]
        if plausible(assembly.nodes, assembly.edges, first, second, drift, place):
            edges.append(edge)
    if not edges:
        return len(tried), 0
    assembly.nodes, kept = optimise(assembly.nodes, [*assembly.edges, *edges])
    return len(tried), sum(kept) - len(assembly.edges)


def around(place: int, count: int, reach: int) -> list[int]:
    """The `reach` views around one of `count`, fewer where there are not so many."""
    start = min(max(0, place - reach // 2), max(0, count - reach))
    return list(range(start, min(start + reach, count)))


def verified(found: Window, known: list[Window], *, metric: bool = False) -> Sim3 | None:
    """How the world has drifted between two ends, world_at_first_from_world_at_second.

    found: the views of both ends as the network sees them at once; known: those of each end as
    they stand in the world; metric: see `geometry.joining.join`. None where they are
    not the same place: the ends see little of each other, or are not what they were before.
    """
    middle = len(known[0])
    parts = found[:middle], found[middle:]
    fits = []
    for before, now in zip(known, parts, strict=True):
        fit = join(*overlaps(before, now), metric=metric)
        if not fit.scaled or fit.residual > POOR_JOIN:
            return None
        fits.append(fit.sim3)
    if min(seen_from(*parts), seen_from(*parts[::-1])) < SHARED_VIEW:
        return None
    return fits[0] @ fits[1].inverse()


def seen_from(window: Window, other: Window) -> float:
    """The share of a window's points that another one, in the same world, sees where they are."""
    places = np.flatnonzero(window.kept)
    if not len(places):
        return 0.0
    places = places[:: 1 + len(places) // 2000]
    views, pixels = np.divmod(places, window.kept[0].size)
    local = window.local.reshape(len(window), -1, 3)[views, pixels].astype(np.float64)
    poses = window.world_from_camera[views]
    points = np.einsum("nij,nj->ni", poses[:, :3, :3], local) + poses[:, :3, 3]
    seen = np.zeros(len(points), np.bool_)
    for view in range(len(other)):
        seen |= _agrees(points, other, view)
    return float(seen.mean())


def _agrees(points: NDArray[np.float64], window: Window, view: int) -> NDArray[np.bool_]:
    """(n,) which points a view sees at the depth that they have."""
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
    same = np.abs(depth - local[front, 2]) <= SAME_DEPTH * local[front, 2]
    agrees[front] = same & window.kept[view][v, u]
    return agrees


def _pinhole(window: Window, view: int) -> NDArray[np.float64] | None:
    """(2, 2) focal length and centre by column and by row, of a view's points; None for none."""
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


def closure_edge(nodes: list[Sim3], first: int, second: int, drift: Sim3, reach: float) -> Edge:
    """The edge of a loop between two windows.

    drift: as `verified` gives it; reach: the median depth there, in the world's unit.
    """
    sim3 = nodes[first].inverse() @ drift @ nodes[second]
    scale, turn, share = CLOSURE_SPREAD
    return Edge(first, second, sim3, (scale, turn, share * reach / nodes[first].scale), True)


def plausible(
    nodes: list[Sim3],
    joins: list[Edge],
    first: int,
    second: int,
    drift: Sim3,
    place: NDArray[np.float64],
) -> bool:
    """Whether the joins between two windows may have drifted as far as a loop says.

    joins: edge n is that of windows n and n + 1; place: (3,) where the loop ends, in the world. The
    spreads of the joins are added up as those of independent errors; what a join is turned or
    scaled wrongly moves the end by its distance. Two like rooms far apart are no loop.
    """
    scale = turn = shift = 0.0
    for edge in joins[first:second]:
        s, r, t = edge.spread
        unit = nodes[edge.first].scale
        lever = float(np.linalg.norm(place - nodes[edge.second].translation))
        scale, turn = scale + s**2, turn + r**2
        shift += (t * unit) ** 2 + (s**2 + r**2) * lever**2
    moved = float(np.linalg.norm(drift.points(place) - place))
    angle = float(rotation_angle(drift.rotation, np.eye(3)))
    return bool(
        abs(np.log(drift.scale)) <= GATE * np.sqrt(scale + CLOSURE_SPREAD[0] ** 2)
        and angle <= GATE * np.sqrt(turn + CLOSURE_SPREAD[1] ** 2)
        and moved <= GATE * np.sqrt(shift)
    )


def _reach(window: Window) -> float:
    depth = window.local[..., 2][window.kept]
    return float(np.median(depth)) if len(depth) else 1.0
