"""Loop closure of long videos: systematic errors, the pose graph, true and false candidates."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from occgen_hub.builder import load_builder
from occgen_hub.engines.frames import network_depth
from occgen_hub.engines.loops import candidates, close_loops, plausible, views_around
from occgen_hub.engines.network import unproject
from occgen_hub.engines.store import FrameStore
from occgen_hub.engines.windows import Assembly, Window, plan
from occgen_hub.geometry.camera import scale_intrinsics
from occgen_hub.geometry.joining import METRIC_ERROR, metric_scale
from occgen_hub.geometry.pose_graph import Edge, optimise
from occgen_hub.geometry.sim3 import Sim3
from occgen_hub.job import list_episodes
from occgen_hub.sample import make_sample

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import bench_joins


def test_systematic_errors_stay_small_with_a_metric_prior():
    """All windows have the same bend, so errors add up.

    At most 0.35 % of the path with the prior, 0.15 % with loop closure as well.
    """
    ways = ((96, 8, False, False), (96, 48, True, False), (96, 48, True, True))
    plain, held, closed = (
        bench_joins.error(
            bench_joins.assembled(0, size, shared, metric=metric, loop=loop, same_sign=True),
            scaled=not metric,
        )
        for size, shared, metric, loop in ways
    )
    assert closed <= 0.0015 < held <= 0.0035 < plain


def test_metric_scale_damps_small_differences_and_keeps_large_ones():
    assert metric_scale(1.0) == 1.0
    assert abs(np.log(metric_scale(1.02))) < METRIC_ERROR / 2
    assert metric_scale(1 / 1.02) == pytest.approx(1 / metric_scale(1.02))
    assert metric_scale(1.5) == pytest.approx(1.5, rel=0.03)
    scales = [metric_scale(float(np.exp(x))) for x in np.linspace(0, 1, 200)]
    assert (np.diff(scales) > 0).all()


def noisy_chain(count: int, seed: int) -> tuple[list[Sim3], list[Sim3], list[Edge]]:
    """True window poses along a circle, the poses chained from noisy joins, and the joins."""
    rng = np.random.default_rng(seed)
    angle = np.linspace(0, 2 * np.pi, count, endpoint=False)
    true = [
        Sim3(
            1.0,
            Rotation.from_rotvec([0, -a, 0]).as_matrix(),
            3 * np.array([np.cos(a), 0, np.sin(a)]),
        )
        for a in angle
    ]
    found, edges, spread = [true[0]], [], (0.01, 0.005, 0.02)
    for first in range(count - 1):
        error = Sim3(
            float(np.exp(rng.normal(0.002, 0.005))),
            Rotation.from_rotvec(rng.normal(0, 0.004, 3)).as_matrix(),
            rng.normal(0, 0.01, 3),
        )
        sim3 = true[first].inverse() @ true[first + 1] @ error
        edges.append(Edge(first, first + 1, sim3, spread))
        found.append(found[-1] @ sim3)
    return true, found, edges


def mean_error(found: list[Sim3], true: list[Sim3]) -> float:
    return float(
        np.mean(
            [
                np.linalg.norm(a.translation - b.translation)
                for a, b in zip(found, true, strict=True)
            ]
        )
    )


def test_pose_graph_closes_a_loop_and_rejects_false_ones():
    true, start, edges = noisy_chain(40, 0)
    good = Edge(0, 39, true[0].inverse() @ true[39], (0.005, 0.01, 0.02), closure=True)
    wrong = Edge(3, 30, Sim3.identity(), (0.005, 0.01, 0.02), closure=True)
    found, kept = optimise(start, [*edges, good, wrong])
    assert kept == [True] * 40 + [False]
    assert mean_error(found, true) < 0.4 * mean_error(start, true)
    again, _ = optimise(start, [*edges, good, wrong])
    for a, b in zip(found, again, strict=True):
        np.testing.assert_array_equal(a.translation, b.translation)


@pytest.mark.long
def test_pose_graph_solves_hundreds_of_windows():
    true, start, edges = noisy_chain(300, 1)
    good = Edge(0, 299, true[0].inverse() @ true[299], (0.005, 0.01, 0.02), closure=True)
    found, kept = optimise(start, [*edges, good])
    assert kept[-1]
    assert np.linalg.norm(found[299].translation - true[299].translation) < 0.05
    assert np.linalg.norm(start[299].translation - true[299].translation) > 0.5


# Two similar rooms


def test_candidates_look_alike_and_are_far_apart():
    rng = np.random.default_rng(0)
    descriptors = np.cumsum(rng.normal(size=(200, 32)), axis=0).astype(np.float32)
    descriptors[185:] = descriptors[5:20] + 0.01
    found = candidates(descriptors, plan(200, 24, 12))
    assert found[0].second - found[0].first == 180
    assert all(c.second - c.first >= 48 for c in found)
    assert found == candidates(descriptors, plan(200, 24, 12))


FRAMES, SIZE = 160, (24, 14)


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """Poses and points of a walk through a synthetic house and back."""
    out = tmp_path_factory.mktemp("rooms") / "tree"
    make_sample(out, trajectories=1, frames=FRAMES // 2, seed=5)
    builder = load_builder("internnav", out)
    episode = builder.read(list_episodes(builder)[0])
    there = np.arange(episode.length)
    way = np.concatenate([there, there[::-1]])
    depth = np.stack([network_depth(episode.read_depth(t), SIZE) for t in there])
    depth[depth <= 0] = 5.0
    K = scale_intrinsics(episode.intrinsics[0], *np.divide(SIZE, episode.image_size))
    local = unproject(depth, np.repeat(K[None], len(depth), axis=0))
    return episode.world_from_camera[way], local[way], episode.image_size


def window_of(poses, local) -> Window:
    kept = np.ones(local.shape[:3], np.bool_)
    colors = np.zeros((*kept.shape, 3), np.uint8)
    return Window(poses, local, kept, kept.astype(np.float32), colors)


def bent_windows(folder, walk, seed) -> Assembly:
    """The walk in windows with small errors, each in a world of its own."""
    poses, local, image_size = walk
    rng = np.random.default_rng(seed)
    assembly, before = Assembly(FrameStore(folder, SIZE), image_size, metric=True), 0
    windows = plan(len(poses), 24, 12)
    for number, window in enumerate(windows):
        part = slice(window.start, window.stop)
        scale = np.exp(0.01 * rng.choice([-1, 1]) + 0.02 * np.linspace(-0.5, 0.5, len(window)))
        turn = np.radians(0.5) * np.linspace(-0.5, 0.5, len(window))[:, None] * [1, 0.5, 1]
        own = poses[part].copy()
        step = np.diff(own[:, :3, 3], axis=0) * scale[1:, None]
        own[1:, :3, 3] = own[0, :3, 3] + np.cumsum(step, axis=0)
        own[:, :3, :3] = own[:, :3, :3] @ Rotation.from_rotvec(turn).as_matrix()
        after = window.stop - windows[number + 1].start if number + 1 < len(windows) else 0
        bent = (local[part] * scale[:, None, None, None]).astype(np.float32)
        assembly.add(window_of(own, bent), before, after)
        before = after
    return assembly


def close_loops_at(
    assembly: Assembly, walk, first: int, second: int, claimed: Sim3
) -> tuple[int, int]:
    """Close loops where the frames `first` and `second` look alike; returns (tried, closed).

    claimed: the similarity that the network's prediction applies to the poses of the second end.
    """
    poses, local, _ = walk
    count = len(poses)
    descriptors = np.random.default_rng(0).normal(size=(count, 64)).astype(np.float32)
    descriptors = np.repeat(descriptors[::16], 16, axis=0) + 0.5 * descriptors
    descriptors[second] = descriptors[first]

    def predict(places):
        half = len(places) // 2
        own = poses[places].copy()
        own[half:] = claimed.poses(own[half:])
        return window_of(own, local[places])

    def stored(places):
        depth = np.stack([assembly.depth(place) for place in places])
        points = local[places] * (depth / local[places][..., 2])[..., None]
        return window_of(assembly.world_from_camera[places], points)

    return close_loops(assembly, descriptors, predict, stored)


def test_revisited_place_closes_the_loop(walk, tmp_path):
    true = walk[0][:, :3, 3]
    for seed in range(2):
        assembly = bent_windows(tmp_path / str(seed), walk, seed)

        def apart(found=assembly):
            places = found.world_from_camera[:, :3, 3]
            return np.linalg.norm(places[4] - places[-5])

        before = apart()
        tried, loops = close_loops_at(assembly, walk, 4, FRAMES - 5, Sim3.identity())
        assert tried >= 1
        assert loops >= 1
        assert np.linalg.norm(true[4] - true[-5]) < 1e-9
        assert apart() < 0.5 * before


def test_similar_rooms_do_not_close_a_loop(walk, tmp_path):
    """The network mistakes the room at the turn for the first room; all 20 loops are rejected."""
    poses, _, _ = walk
    for seed in range(20):
        if seed % 5 == 0:  # The windows are reused, since rejected loops do not move them.
            assembly = bent_windows(tmp_path / str(seed), walk, seed)
        first, second = 10 + seed, FRAMES // 2 - 10 + seed
        target, source = (
            poses[views_around(first, FRAMES, 20)[10]],
            poses[views_around(second, FRAMES, 20)[10]],
        )
        R = target[:3, :3] @ source[:3, :3].T
        claimed = Sim3(1.0, R, target[:3, 3] - R @ source[:3, 3])
        assert np.linalg.norm(target[:3, 3] - source[:3, 3]) > 1.5
        before = [node.translation.copy() for node in assembly.nodes]
        tried, loops = close_loops_at(assembly, walk, first, second, claimed)
        assert tried >= 1
        assert loops == 0
        for node, old in zip(assembly.nodes, before, strict=True):
            np.testing.assert_array_equal(node.translation, old)


def test_loop_beyond_the_expected_drift_is_rejected():
    _, start, edges = noisy_chain(10, 0)
    place = start[9].translation
    assert plausible(start, edges, 0, 9, Sim3(1.0, np.eye(3), np.array([0.1, 0, 0])), place)
    assert not plausible(start, edges, 0, 9, Sim3(1.0, np.eye(3), np.array([4.0, 0, 0])), place)
    assert not plausible(start, edges, 0, 9, Sim3(1.3, np.eye(3), -0.3 * place), place)
