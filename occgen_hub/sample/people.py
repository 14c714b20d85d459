"""Where people walk: over the free floor, in sight of the camera, and clear of it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from occgen_hub.errors import UsageError
from occgen_hub.sample.episode import OPENCV, Episode
from occgen_hub.sample.figure import STRIDE, Figure, People, Stroll
from occgen_hub.sample.mesh import Floats
from occgen_hub.sample.paths import Pace, Planner, smooth_route
from occgen_hub.sample.render import Renderer

ATTEMPTS = 60
APART = 0.9  # metres between a person's middle and the camera, or another person
HEIGHTS = (0.3, 0.9, 1.4)  # metres: where a person is looked for
REACH = 5.5  # metres: how far away people are
ENOUGH = 0.8  # the share of a person, over all frames, beyond which nothing better is sought
SLOWING = 3.0  # frames from walking to standing


def plan_people(renderer: Renderer, episode: Episode, count: int, seed: list[int]) -> People:
    """People for an episode. Every second one walks and then stands still.

    Raises UsageError if the house has no room for this many people.
    """
    strolls: list[Stroll] = []
    if count:
        stage = _Surroundings(renderer, episode)
        for number in range(count):
            rng = np.random.default_rng([*seed, number])
            found = stage.stroll(strolls, number % 2 == 1, rng)
            if found is None:
                raise UsageError(
                    f"people is {count}; a house has room for {number} in addition to the camera: "
                    "give fewer or another seed."
                )
            strolls.append(found)
    return People(tuple(strolls))


class _Surroundings:
    """The floor and the camera's view of it."""

    def __init__(self, renderer: Renderer, episode: Episode) -> None:
        self.renderer, self.episode = renderer, episode
        self.planner = Planner(renderer.scene.floor())
        self.camera = episode.house_from_camera @ OPENCV
        cells = self.planner.goals
        self.places = self.planner.floor.centres(self.planner.cells[cells])
        frames = np.unique(np.linspace(0, len(episode) - 1, 5).round().astype(int))
        seen = [self._sight(np.full(len(cells), t), self.places)[:, 1] for t in frames]
        self.visible = [cells[s] for s in seen if s.any()] or [cells]

    def stroll(self, others: list[Stroll], stops: bool, rng: np.random.Generator) -> Stroll | None:
        """The best visible of some strolls. None if all are too near the camera or other people."""
        best: tuple[float, Stroll] | None = None
        for _ in range(ATTEMPTS):
            found = self._candidate(stops, rng)
            if found is None or not self._is_clear(found, others):
                continue
            share = float(self._sight(np.arange(len(found.xy)), found.xy).mean())
            if best is None or share > best[0]:
                best = share, found
            if share > ENOUGH:
                break
        return best[1] if best else None

    def _candidate(self, stops: bool, rng: np.random.Generator) -> Stroll | None:
        """A stroll to and fro between two places that the camera sees."""
        n = len(self.episode)
        pace = Pace(rng.uniform(0.09, 0.13), np.radians(20.0))
        here, there = (
            int(rng.choice(self.visible[rng.integers(len(self.visible))])) for _ in range(2)
        )
        if np.linalg.norm(np.subtract(*self.planner.cells[[here, there]])) * 0.05 < 1.0:
            return None
        way = self.planner.shortest_path(here, there)
        cells = way + way[-2::-1] + way[1:]
        while True:
            route = smooth_route(
                self.planner, self.planner.floor.centres(self.planner.cells[cells]), pace
            )
            if route is None:
                return None
            if route.frame[-1] >= n:
                break
            cells += way[-2::-1] + way[1:]
        time = np.arange(n, dtype=np.float64)
        if stops:
            speed = np.clip((n * rng.uniform(0.3, 0.55) - time) / SLOWING + 0.5, 0, 1)
            time = np.cumsum(speed) - speed[0]
        xy = np.stack([np.interp(time, route.frame, route.xy[:, a]) for a in (0, 1)], axis=1)
        along = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(xy, axis=0), axis=1))])
        speed = np.gradient(along) if n > 1 else np.full(1, pace.step)
        return Stroll(
            Figure(rng),
            xy,
            np.interp(time, route.frame, route.course),
            2 * np.pi * along / STRIDE + rng.uniform(0, 2 * np.pi),
            np.clip(ndimage.gaussian_filter1d(speed / pace.step, 1.0, truncate=2), 0, 1),
        )

    def _is_clear(self, stroll: Stroll, others: list[Stroll]) -> bool:
        middles = [self.camera[:, :2, 3], *(other.xy for other in others)]
        return all(np.linalg.norm(stroll.xy - xy, axis=1).min() > APART for xy in middles)

    def _sight(self, frames: NDArray[np.integer], xy: Floats) -> NDArray[np.bool_]:
        """(N, heights) bool: whether the camera in frames (N,) sees (N, 2) at each height."""
        poses = self.camera[frames]
        K, camera = self.episode.camera.K, self.episode.camera
        out = []
        for height in HEIGHTS:
            point = np.column_stack([xy, np.full(len(xy), height)])
            away = point - poses[:, :3, 3]
            x, y, z = np.einsum("nji,nj->in", poses[:, :3, :3], away)
            u, v = K[0, 0] * x / np.maximum(z, 1e-6), K[1, 1] * y / np.maximum(z, 1e-6)
            inside = (z > APART) & (z < REACH)
            inside &= (np.abs(u) < camera.width / 2) & (np.abs(v) < camera.height / 2)
            inside[inside] = self.renderer.range(poses[inside, :3, 3], away[inside]) > 1
            out.append(inside)
        return np.stack(out, axis=1)
