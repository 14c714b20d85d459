"""Error of a long video's path, joined from windows with systematic errors.

    .venv/bin/python scripts/bench_joins.py [--seeds 20]

The path has 480 frames along 20 m and is a closed loop. In each window the scale is off by 1 %,
changes by 2 % along the window, and the cameras slowly rotate by 0.5 degrees. More points do not
average these errors out. Points also have 1 % noise, and a tenth of them are wrong. `plain` is the
former method: windows that share eight frames, joined by a Sim3. Errors are the RMSE of camera
centres after the best alignment (rigid for a metric network, else Sim3), as a share of the path.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from occgen_hub.engines.loops import closure_edge, plausible
from occgen_hub.engines.windows import join_spread, merged, plan
from occgen_hub.geometry.joining import Overlap, join
from occgen_hub.geometry.pose_graph import Edge, optimise
from occgen_hub.geometry.sim3 import Sim3

FRAMES, PATH = 480, 20.0
SCALE, BEND, TURN = 0.01, 0.02, np.radians(0.5)
POINTS = 60
"""Points per frame."""

MEDIAN_DEPTH = 3.5


@dataclass(frozen=True)
class Window:
    """A window: poses (n, 4, 4) and points (n, POINTS, 3) in its own world."""

    poses: NDArray[np.float64]
    points: NDArray[np.float64]

    def overlap(self, part: slice) -> Overlap:
        return Overlap(self.points[part].reshape(-1, 3), self.poses[part])


def truth(rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A closed path through a room, (T, 4, 4), and each camera's points, (T, POINTS, 3) local."""
    angle = np.linspace(0, 2 * np.pi, FRAMES)
    place = np.stack([np.cos(angle), 0.05 * np.sin(3 * angle), 0.7 * np.sin(angle)], axis=1)
    place *= PATH / np.linalg.norm(np.diff(place, axis=0), axis=1).sum()
    yaw = -angle + 0.4 * np.sin(4 * angle)
    poses = np.tile(np.eye(4), (FRAMES, 1, 1))
    poses[:, :3, :3] = Rotation.from_rotvec(yaw[:, None] * [0, 1, 0]).as_matrix()
    poses[:, :3, 3] = place
    depth = rng.uniform(1, 6, (FRAMES, POINTS, 1))
    slope = rng.uniform(-0.6, 0.6, (FRAMES, POINTS, 2))
    return poses, np.concatenate([slope * depth, depth], axis=2)


def simulate_window(
    poses: NDArray[np.float64],
    local: NDArray[np.float64],
    rng: np.random.Generator,
    *,
    same_sign: bool,
) -> Window:
    """Simulate a network's prediction: lengths and rotations with small systematic errors.

    same_sign: whether the errors of all windows have the same sign and add up along the path.
    """
    count = len(poses)
    along = np.linspace(-0.5, 0.5, count)
    signs = np.ones(3) if same_sign else rng.choice([-1.0, 1.0], 3)
    scale = np.exp(SCALE * rng.choice([-1.0, 1.0]) + signs[0] * BEND * along)
    axis = rng.normal(size=3) if not same_sign else np.array([0.0, 1.0, 0.0])
    turn = signs[1] * TURN * along[:, None] * axis / np.linalg.norm(axis)
    R = poses[:, :3, :3] @ Rotation.from_rotvec(turn).as_matrix()
    wrong = R @ poses[:, :3, :3].transpose(0, 2, 1)
    step = np.diff(poses[:, :3, 3], axis=0) * ((scale[1:] + scale[:-1]) / 2)[:, None]
    step = np.einsum("nij,nj->ni", wrong[1:], step)
    made = np.tile(np.eye(4), (count, 1, 1))
    made[:, :3, :3] = R
    made[1:, :3, 3] = np.cumsum(step, axis=0)
    noise = 1 + rng.normal(0, 0.01, (*local.shape[:2], 1))
    seen = local * scale[:, None, None] * noise
    points = np.einsum("nij,nkj->nki", R, seen) + made[:, None, :3, 3]
    false = rng.random(points.shape[:2]) < 0.1
    points[false] += rng.normal(0.5, 2, (int(false.sum()), 3))
    return Window(made, points)


def windows(
    seed: int, size: int, overlap: int, *, same_sign: bool
) -> Iterator[tuple[range, Window]]:
    rng = np.random.default_rng(seed)
    poses, local = truth(np.random.default_rng(0))
    for window in plan(FRAMES, size, overlap):
        part = slice(window.start, window.stop)
        gauge = Sim3(1.0, Rotation.random(random_state=seed).as_matrix(), rng.normal(size=3))
        made = simulate_window(poses[part], local[part], rng, same_sign=same_sign)
        yield window, Window(gauge.poses(made.poses), gauge.points(made.points))


def closure(seed: int, world: NDArray[np.float64], *, metric: bool, same_sign: bool) -> Sim3:
    """Simulate a prediction for both ends of a loop: the correction of the end's pose.

    It is start_from_end for the assembled path. The 20 frames of each end have errors too.
    """
    rng = np.random.default_rng(seed + 1000)
    poses, local = truth(np.random.default_rng(0))
    ends = np.r_[0:20, FRAMES - 20 : FRAMES]
    made = simulate_window(poses[ends], local[ends], rng, same_sign=same_sign)
    fits = []
    for part in (slice(0, 20), slice(20, 40)):
        old = world[ends[part]]
        points = np.einsum("nij,nkj->nki", old[:, :3, :3], local[ends[part]])
        points = (points + old[:, None, :3, 3]).reshape(-1, 3)
        fits.append(join(Overlap(points, old), made.overlap(part), metric=metric).sim3)
    return fits[0] @ fits[1].inverse()


def assembled(
    seed: int, size: int, overlap: int, *, metric: bool, loop: bool, same_sign: bool
) -> NDArray[np.float64]:
    """(T, 4, 4) the path, assembled from windows."""
    made = list(windows(seed, size, overlap, same_sign=same_sign))
    nodes, edges = [Sim3.identity()], list[Edge]()
    for number, ((before, earlier), (now, later)) in enumerate(itertools.pairwise(made)):
        shared = before.stop - now.start
        fit = join(
            earlier.overlap(slice(len(before) - shared, None)),
            later.overlap(slice(0, shared)),
            metric=metric,
        )
        nodes.append(nodes[-1] @ fit.sim3)
        steps = np.diff(later.poses[:, :3, 3], axis=0)
        reach = float(np.linalg.norm(steps, axis=1).sum()) + MEDIAN_DEPTH
        spread = join_spread(reach, metric=metric)
        edges.append(Edge(number, number + 1, fit.sim3, spread))
    poses = [(window, m.poses) for window, m in made]
    world = merged(nodes, poses)
    if loop:
        found = closure(seed, world, metric=metric, same_sign=same_sign)
        last = len(nodes) - 1
        if not plausible(nodes, edges, 0, last, found, world[-1, :3, 3]):
            raise SystemExit("the loop was rejected as implausible")
        edges.append(closure_edge(nodes, 0, last, found, MEDIAN_DEPTH))
        nodes, kept = optimise(nodes, edges)
        if not kept[-1]:
            raise SystemExit("the loop was not used")
        world = merged(nodes, poses)
    return world


def error(world: NDArray[np.float64], *, scaled: bool) -> float:
    """RMSE of camera centres after the best alignment, as a share of the path."""
    true = truth(np.random.default_rng(0))[0][:, :3, 3]
    p, q = world[:, :3, 3] - world[:, :3, 3].mean(axis=0), true - true.mean(axis=0)
    u, s, vt = np.linalg.svd(q.T @ p)
    sign = np.array([1, 1, np.linalg.det(u @ vt)])
    R = (u * sign) @ vt
    scale = (s * sign).sum() / (p**2).sum() if scaled else 1.0
    return float(np.sqrt(((q - scale * p @ R.T) ** 2).sum(axis=1).mean())) / PATH


def measure(seeds: int, *, same_sign: bool) -> dict[str, float]:
    """Median error of each method over the seeds, by name."""
    found: dict[str, list[float]] = {}
    for seed in range(seeds):
        for size, overlap, metric, loop in (
            (96, 8, False, False),
            (48, 8, False, False),
            (96, 48, False, False),
            (96, 48, False, True),
            (96, 48, True, False),
            (96, 48, True, True),
            (48, 24, True, False),
            (48, 24, True, True),
        ):
            kind = "metric prior" if metric else "plain" if overlap == 8 else "Sim3"
            name = f"{kind}, {size}/{overlap}{', loop' if loop else ''}"
            world = assembled(seed, size, overlap, metric=metric, loop=loop, same_sign=same_sign)
            found.setdefault(name, []).append(error(world, scaled=kind != "metric prior"))
    return {name: float(np.median(values)) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    seeds = parser.parse_args().seeds
    for same_sign in (False, True):
        print(f"errors of windows {'with the same sign' if same_sign else 'with random signs'}:")
        for name, value in measure(seeds, same_sign=same_sign).items():
            print(f"  {name:28} {value:.3%}")


if __name__ == "__main__":
    main()
