"""Walks through a house: smooth, with turns, from room to room, and clear of obstacles."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, sparse
from scipy.sparse import csgraph

from occgen_hub.sample.furnish import CELL, FloorMap
from occgen_hub.sample.mesh import Floats
from occgen_hub.sample.render import Renderer
from occgen_hub.sample.scene import Scene

CLEAR = 0.35  # metres: nothing comes nearer to the camera
PLANNED = 0.41  # metres, on the floor map, whose cells are coarse
FINE = 0.02  # metres between the points of a route
ROOMY = 0.8  # metres of clearance beyond which a route gains nothing
LOOK = np.radians(7.0)  # how far the camera looks aside of its path
ATTEMPTS = 60


@dataclass(frozen=True)
class Walk:
    """The position and direction of a camera in each frame, in the house's frame."""

    position: Floats  # (T, 2) metres
    heading: Floats  # (T,) radians, of the camera
    course: Floats  # (T,) radians, of the path, before looking aside


@dataclass(frozen=True)
class Pace:
    """The speed of a walk: in a frame, one of the two motions, or a part of each."""

    step: float  # metres
    turn: float  # radians


def walk(scene: Scene, renderer: Renderer, frames: int, height: float, seed: list[int]) -> Walk:
    """A walk of `frames` frames with the camera `height` metres above the floor.

    The best of the stretches of some long routes: one that turns, looks into the open, and
    passes a doorway if it can.
    """
    floor = scene.floor()
    planner = Planner(floor)
    for attempt in range(ATTEMPTS):
        rng = np.random.default_rng([*seed, attempt])
        pace = Pace(rng.uniform(0.05, 0.075), np.radians(rng.uniform(3.5, 5.0)))
        route = _long_route(planner, pace, frames, rng)
        if route is None:
            continue
        found = _best_stretch(route, scene, renderer, frames, height)
        if found is None:
            continue
        t = np.arange(frames)
        aside = LOOK * np.sin(2 * np.pi * t / rng.uniform(18, 30) + rng.uniform(0, 2 * np.pi))
        position, course = found
        return Walk(position, course + aside, course)
    raise RuntimeError(f"no free walk of {frames} frames in the house of seed {seed}")


class Planner:
    """Shortest paths over the floor that prefer open space."""

    def __init__(self, floor: FloorMap) -> None:
        self.floor = floor
        self.clear = floor.clearance()
        self.cells = np.argwhere(self.clear > PLANNED)
        number = np.full(self.clear.shape, -1)
        number[tuple(self.cells.T)] = np.arange(len(self.cells))
        self.graph = self._graph(number)
        _, region = csgraph.connected_components(self.graph, directed=False)
        main = np.bincount(region).argmax()
        roomy = self.clear[tuple(self.cells.T)] > 0.5
        self.goals: NDArray[np.int64] = np.flatnonzero((region == main) & roomy)

    def shortest_path(self, start: int, goal: int) -> list[int]:
        """Cell numbers from start to goal, both included."""
        _, before = csgraph.dijkstra(
            self.graph, directed=False, indices=start, return_predecessors=True
        )
        cells = [goal]
        while cells[-1] != start:
            cells.append(int(before[cells[-1]]))
        return cells[::-1]

    def clearance(self, xy: Floats) -> Floats:
        """Metres free about points (N, 2)."""
        at = (xy - self.floor.low) / CELL - 0.5
        return np.asarray(ndimage.map_coordinates(self.clear, at.T, order=1, mode="nearest"))

    def _graph(self, number: NDArray[np.int64]) -> sparse.csr_matrix:
        """Neighbouring cells, farther apart where it is narrow."""
        nx, ny = number.shape
        cost = 1 + 6 * np.clip(ROOMY - self.clear, 0, None) ** 2 / ROOMY**2
        rows, columns, lengths = [], [], []
        for dx, dy in ((1, 0), (0, 1), (1, 1), (1, -1)):
            here = slice(0, nx - dx), slice(max(0, -dy), ny - max(0, dy))
            there = slice(dx, nx), slice(max(0, dy), ny - max(0, -dy))
            both = (number[here] >= 0) & (number[there] >= 0)
            rows.append(number[here][both])
            columns.append(number[there][both])
            lengths.append(np.hypot(dx, dy) * (cost[here][both] + cost[there][both]) / 2)
        n = len(self.cells)
        i, j, d = (np.concatenate(x) for x in (rows, columns, lengths))
        return sparse.csr_matrix((d, (i, j)), (n, n))


@dataclass(frozen=True)
class Route:
    """A path over the floor, and the times at which a walk reaches its points."""

    xy: Floats  # (N, 2), FINE apart
    course: Floats  # (N,) radians, unwrapped
    frame: Floats  # (N,): the frame, a fraction, at which the walk is there


def _long_route(
    planner: Planner, pace: Pace, frames: int, rng: np.random.Generator
) -> Route | None:
    """A smooth way over goals all over the house, for at least `frames` frames."""
    at = int(rng.choice(planner.goals))
    cells = [at]
    while True:
        for _ in range(2):
            goals = rng.choice(planner.goals, 6)
            away = planner.cells[goals] - planner.cells[at]
            goal = int(goals[np.hypot(away[:, 0], away[:, 1]).argmax()])
            cells += planner.shortest_path(at, goal)[1:]
            at = goal
        route = smooth_route(planner, planner.floor.centres(planner.cells[cells]), pace)
        if route is None or route.frame[-1] > frames + 20:
            return route


def smooth_route(planner: Planner, corners: Floats, pace: Pace) -> Route | None:
    """The path along `corners` (N, 2), metres, smoothed as far as obstacles allow.

    None if it is too close to an obstacle with minimal smoothing too.
    """
    even = _resample(corners, FINE)
    for radius in (0.3, 0.2, 0.13, 0.08):
        xy = _resample(ndimage.gaussian_filter1d(even, radius / FINE, axis=0, mode="nearest"), FINE)
        if planner.clearance(xy).min() > CLEAR + 0.01:
            break
    else:
        return None
    along = np.gradient(xy, axis=0)
    course = np.unwrap(np.arctan2(along[:, 1], along[:, 0]))
    course = ndimage.gaussian_filter1d(course, 0.2 / FINE, mode="nearest")
    # A frame is a step ahead or a turn, or less of each of them.
    effort = np.hypot(np.diff(course) / pace.turn, FINE / pace.step)
    return Route(xy, course, np.concatenate([[0], np.cumsum(effort)]))


def _resample(points: Floats, spacing: float) -> Floats:
    """Points (N, 2) evenly spaced along a line through `points`."""
    length = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
    at = np.arange(0, length[-1], spacing)
    return np.stack([np.interp(at, length, points[:, a]) for a in (0, 1)], axis=1)


def _best_stretch(
    route: Route, scene: Scene, renderer: Renderer, frames: int, height: float
) -> tuple[Floats, Floats] | None:
    """Positions (T, 2) and courses (T,) of the stretch to record, if one is free throughout."""
    frame = np.arange(int(route.frame[-1]) + 1)
    xy = np.stack([np.interp(frame, route.frame, route.xy[:, a]) for a in (0, 1)], axis=1)
    course = np.interp(frame, route.frame, route.course)
    eye = np.column_stack([xy, np.full(len(xy), height)])
    ahead = np.column_stack([np.cos(course), np.sin(course), np.zeros(len(xy))])
    view = np.minimum(renderer.range(eye, ahead), 3.0)
    near = renderer.distance(eye) < CLEAR + 0.005
    room = np.array([scene.plan.room_at(x, y) for x, y in xy])
    best: tuple[float, int] | None = None
    for start in range(0, len(xy) - frames + 1, 3):
        here = slice(start, start + frames)
        if near[here].any():
            continue
        score = _score(course[here], view[here], room[here])
        if best is None or score > best[0]:
            best = score, start
    if best is None:
        return None
    chosen = slice(best[1], best[1] + frames)
    return xy[chosen], course[chosen]


def _score(course: Floats, view: NDArray[np.float32], room: NDArray[np.int64]) -> float:
    """The score of a stretch: about 2.5 degrees of turn per frame, a far view, a doorway."""
    turned = float(np.abs(np.diff(course)).sum())
    wanted = np.radians(2.5) * (len(course) - 1)
    turning = -abs(turned - wanted) / max(wanted, 1e-9)
    _, counts = np.unique(room[room >= 0], return_counts=True)
    rooms = int((counts > 0.15 * len(room)).sum())  # a glimpse of another room is not a visit
    return float(turning + 1.2 * np.mean(view) / 3.0 + 0.8 * (rooms > 1))
