"""Sim3 alignment, joining of windows, pose interpolation, intrinsics from points."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from occgen_hub.geometry.alignment import align_poses
from occgen_hub.geometry.camera import fit_intrinsics
from occgen_hub.geometry.joining import Overlap, blend, join
from occgen_hub.geometry.poses import rigidity_error
from occgen_hub.geometry.sim3 import Sim3, mean_rotation, nearest_rotation, rotation_angle
from occgen_hub.geometry.trajectory import interpolate_poses

pytestmark = pytest.mark.filterwarnings("error")
seeds = st.integers(0, 2**32 - 1)


def random_sim3(rng: np.random.Generator, scale: float | None = None) -> Sim3:
    scale = scale or float(10 ** rng.uniform(-3, 3))
    return Sim3(scale, Rotation.random(random_state=rng).as_matrix(), rng.normal(0, 5, 3))


def walk(frames: int, step: float, bend: float) -> np.ndarray:
    """A camera that looks ahead and 12 degrees down, heading `bend` radians to either side."""
    s = np.arange(frames) * step
    yaw = bend * np.sin(s / 2.5)
    ahead = np.stack([np.sin(yaw), 0 * yaw, np.cos(yaw)], axis=1) * step
    poses = np.tile(np.eye(4), (frames, 1, 1))
    poses[1:, :3, 3] = np.cumsum(ahead, axis=0)[:-1]
    poses[:, :3, :3] = Rotation.from_euler(
        "yx", np.stack([yaw, np.full(frames, -0.2)], axis=1)
    ).as_matrix()
    return poses


def straight(frames: int, length: float = 2.0) -> np.ndarray:
    return walk(frames, length / (frames - 1), 0.0)


def noisy(poses: np.ndarray, rng: np.random.Generator, metres: float, degrees: float):
    poses = poses.copy()
    turn = Rotation.from_rotvec(rng.normal(0, np.radians(degrees), (len(poses), 3)))
    poses[:, :3, 3] += rng.normal(0, metres, (len(poses), 3))
    poses[:, :3, :3] = poses[:, :3, :3] @ turn.as_matrix()
    return poses


def with_outliers(poses: np.ndarray, rng: np.random.Generator, count: int) -> np.ndarray:
    """Displace `count` frames by metres and turn them at random."""
    poses, bad = poses.copy(), rng.choice(len(poses), count, replace=False)
    poses[bad, :3, 3] += rng.normal(0, 3, (count, 3))
    poses[bad, :3, :3] = Rotation.random(count, random_state=rng).as_matrix()
    return poses


def degrees_between(a: Sim3, b: Sim3) -> float:
    return float(np.degrees(rotation_angle(a.rotation, b.rotation)))


def assert_same(a: Sim3, b: Sim3, places: np.ndarray, tolerance: float = 1e-9) -> None:
    """Assert that both move `places` alike, relative to the extent of the result."""
    size = np.abs(b.points(places)).max()
    assert abs(a.scale / b.scale - 1) < tolerance
    assert rotation_angle(a.rotation, b.rotation) < tolerance
    np.testing.assert_allclose(a.points(places), b.points(places), atol=tolerance * size)


# Sim3


@given(seeds)
def test_sim3_composition_and_inverse_are_correct(seed):
    rng = np.random.default_rng(seed)
    a, b = random_sim3(rng), random_sim3(rng)
    p = rng.normal(0, 2, (4, 5, 3))
    np.testing.assert_allclose((a @ b).points(p), a.points(b.points(p)), rtol=1e-9, atol=1e-6)
    np.testing.assert_allclose(a.inverse().points(a.points(p)), p, atol=1e-9 * (1 + 10 / a.scale))
    assert np.array_equal(Sim3.identity().points(p), p)


@given(seeds)
def test_moved_camera_sees_moved_points_at_the_same_pixel_and_scaled_depth(seed):
    rng = np.random.default_rng(seed)
    sim3, poses = random_sim3(rng), noisy(straight(4), rng, 1.0, 40.0)
    before = poses.copy()
    points = rng.normal(0, 3, (6, 3))
    moved = sim3.poses(poses)
    assert np.array_equal(poses, before)
    assert (rigidity_error(moved) < 1e-12).all()
    for old, new in zip(poses, moved, strict=True):
        seen = (points - old[:3, 3]) @ old[:3, :3]
        seen_again = (sim3.points(points) - new[:3, 3]) @ new[:3, :3]
        np.testing.assert_allclose(seen_again, sim3.scale * seen, atol=1e-9 * (10 + sim3.scale))


def test_float32_input_gives_float64():
    assert Sim3.identity().points(np.zeros((2, 3), np.float32)).dtype == np.float64
    assert Sim3.identity().poses(np.eye(4, dtype=np.float32)).dtype == np.float64


@given(seeds)
def test_nearest_rotation_is_proper_even_for_mirrored_input(seed):
    rng = np.random.default_rng(seed)
    near = nearest_rotation(rng.normal(0, 1, (5, 3, 3)))
    np.testing.assert_allclose(np.linalg.det(near), 1.0)
    np.testing.assert_allclose(nearest_rotation(near * 3), near, atol=1e-12)


def test_mean_rotation_tolerates_two_fifths_outliers():
    rng = np.random.default_rng(0)
    true = Rotation.random(random_state=rng).as_matrix()
    wrong = Rotation.random(4, random_state=rng).as_matrix()
    mean = mean_rotation(np.concatenate([wrong, np.repeat(true[None], 6, axis=0)]))
    assert np.degrees(rotation_angle(mean, true)) < 0.01
    assert np.array_equal(mean_rotation(np.zeros((0, 3, 3))), np.eye(3))


# Alignment


def positions_only(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The rotation of Umeyama's fit to camera centres."""
    p, q = source[:, :3, 3], target[:, :3, 3]
    return nearest_rotation((q - q.mean(axis=0)).T @ (p - p.mean(axis=0)))


@pytest.mark.parametrize(
    ("frames", "bad"), [(52, 0), (20, 0), (52, 10), (20, 4), (10, 2)], ids=lambda n: str(n)
)
def test_straight_path_is_aligned_within_noise(frames, bad):
    """A path of 2 m, noise of 5 mm and 0.2 degrees, any gauge, up to a fifth wrong frames."""
    # With 8 good frames, even a fit that knows them is off by up to 1 %.
    true, centres_only, few = straight(frames), [], 1.5 if frames == 10 else 1.0
    for seed in range(40):
        rng = np.random.default_rng([seed, frames])
        sim3 = random_sim3(rng)
        estimated = with_outliers(noisy(true, rng, 0.005, 0.2), rng, bad)
        source = sim3.inverse().poses(estimated)
        found = align_poses(source, true)
        assert found.scaled
        assert degrees_between(found.sim3, sim3) < 0.3 * few
        assert abs(found.sim3.scale / sim3.scale - 1) < 0.01 * few
        assert frames - bad - 3 <= found.inliers <= frames - bad
        if not bad:
            assert found.problem is None
            assert found.translation_rmse < 0.012
        turned = positions_only(source, true)
        centres_only.append(np.degrees(rotation_angle(turned, sim3.rotation)))
    assert np.median(centres_only) > 20  # centres do not fix the turn about the path


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(3, 40), st.floats(-3, 3), st.sampled_from(["any", "bent", "straight"]))
def test_alignment_recovers_a_known_sim3_up_to_rounding(seed, frames, power, kind):
    rng = np.random.default_rng(seed)
    paths = {
        "any": lambda: noisy(straight(frames), rng, 1.0, 90.0),
        "bent": lambda: walk(frames, 0.1, 1.0),
        "straight": lambda: straight(frames),
    }
    poses, sim3 = paths[kind](), random_sim3(rng, 10**power)
    found = align_poses(poses, sim3.poses(poses))
    assert_same(found.sim3, sim3, poses[:, :3, 3])
    assert found.scaled
    assert found.inliers == frames
    assert found.translation_rmse < 1e-9 * (10 + 10**power)
    assert found.problem is None


def test_outlier_frames_hardly_change_the_alignment_of_exact_data():
    rng = np.random.default_rng(0)
    true, sim3 = straight(30), random_sim3(rng)
    found = align_poses(sim3.inverse().poses(with_outliers(true, rng, 6)), true)
    assert abs(found.sim3.scale / sim3.scale - 1) < 1e-6
    assert degrees_between(found.sim3, sim3) < 1e-3
    assert found.inliers == 24
    assert "m off" in found.problem
    assert "24 of 30 frames" in found.problem


STILL = straight(30) * (np.arange(4) < 3) + np.diag([0.0, 0.0, 0.0, 1.0])


@pytest.mark.parametrize("frames", [1, 2])
def test_one_or_two_frames_give_no_scale(frames):
    poses = walk(frames, 0.3, 0.5)
    sim3 = random_sim3(np.random.default_rng(frames))
    found = align_poses(poses, sim3.poses(poses))
    assert not found.scaled
    assert found.sim3.scale == 1.0
    assert degrees_between(found.sim3, sim3) < 1e-6
    assert f"{frames} frames" in found.problem
    middle = poses[:, :3, 3].mean(axis=0)
    np.testing.assert_allclose(found.sim3.points(middle), sim3.points(middle))


def turning(rng: np.random.Generator) -> np.ndarray:
    poses = noisy(STILL, rng, 0.002, 0.2)
    poses[:, :3, :3] = Rotation.from_euler("y", np.linspace(0, 3, 30)[:, None]).as_matrix()
    return poses


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (STILL, STILL),
        (STILL, straight(30)),
        (straight(30), STILL),
        (noisy(STILL, np.random.default_rng(0), 0.002, 0.2), straight(30)),
        (straight(30), noisy(STILL, np.random.default_rng(1), 0.002, 0.2)),
        (turning(np.random.default_rng(2)), turning(np.random.default_rng(3))),
    ],
    ids=[
        "both still",
        "source still",
        "target still",
        "source jitters",
        "target jitters",
        "both turn",
    ],
)
def test_scale_is_one_without_motion(source, target):
    sim3 = random_sim3(np.random.default_rng(4))
    found = align_poses(source, sim3.poses(target))
    assert not found.scaled
    assert found.sim3.scale == 1.0
    assert degrees_between(found.sim3, sim3) < 0.5
    assert np.isfinite([found.translation_rmse, found.rotation_error]).all()
    assert "could not determine the scale" in found.problem


def test_mostly_still_robot_is_aligned_by_its_moving_part():
    rng = np.random.default_rng(0)
    true = straight(52)
    true[:35, :3, 3] = true[35, :3, 3]
    drifting = noisy(true, rng, 0.0005, 0.2)
    drifting[35:, 0, 3] += np.linspace(0, 0.06, 17)
    sim3 = random_sim3(rng)
    found = align_poses(sim3.inverse().poses(drifting), true)
    assert found.scaled
    assert abs(found.sim3.scale / sim3.scale - 1) < 0.05


def test_poor_alignment_is_reported_as_a_problem():
    rng = np.random.default_rng(0)
    nonsense = with_outliers(STILL, rng, 30)
    assert align_poses(nonsense, straight(30)).problem
    bent = walk(30, 0.07, 0.0)
    bent[:, 0, 3] += 0.15 * np.linspace(-1, 1, 30) ** 2 * 4
    assert "m off (RMSE)" in align_poses(bent, straight(30)).problem
    shaky = noisy(straight(30), rng, 0.0, 6.0)
    assert "degrees off" in align_poses(shaky, straight(30)).problem


def test_two_thousand_frames_align_with_a_fifth_outliers():
    rng = np.random.default_rng(0)
    true, sim3 = walk(2000, 0.05, 1.0), random_sim3(rng)
    found = align_poses(
        sim3.inverse().poses(with_outliers(noisy(true, rng, 0.005, 0.2), rng, 400)), true
    )
    assert degrees_between(found.sim3, sim3) < 0.02
    assert abs(found.sim3.scale / sim3.scale - 1) < 1e-3
    again = align_poses(sim3.inverse().poses(true), true)
    assert again.inliers == 2000


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(0, 5))
def test_alignment_does_not_depend_on_units_or_axes(seed, bad):
    rng = np.random.default_rng(seed)
    true = walk(30, 0.07, 0.5)
    source = with_outliers(noisy(true, rng, 0.01, 0.5), rng, bad)
    a, b = random_sim3(rng), random_sim3(rng)
    plain, moved = align_poses(source, true), align_poses(a.poses(source), b.poses(true))
    expected = b @ plain.sim3 @ a.inverse()
    assert_same(moved.sim3, expected, a.points(source[:, :3, 3]), 1e-7)
    assert moved.translation_rmse == pytest.approx(b.scale * plain.translation_rmse, rel=1e-6)
    assert moved.inliers == plain.inliers


def test_alignment_is_deterministic():
    source = noisy(straight(30), np.random.default_rng(0), 0.05, 2.0)
    a, b = align_poses(source, straight(30)).sim3, align_poses(source, straight(30)).sim3
    assert a.scale == b.scale
    assert np.array_equal(a.rotation, b.rotation)
    assert np.array_equal(a.translation, b.translation)


# Joining windows

WINDOW, SHARED, WINDOWS = 24, 8, 20
NO_POINTS, NO_POSES = np.zeros((0, 3)), np.zeros((0, 4, 4))


def views(poses: np.ndarray, rng: np.random.Generator, each: int, far: float = 6.0) -> np.ndarray:
    """(len(poses), each, 3): a made-up cloud 1 m to `far` ahead of cameras, in their frame."""
    depth = rng.uniform(1, far, (len(poses), each, 1))
    across = rng.uniform(-1, 1, (len(poses), each, 2))
    return np.concatenate([across, np.ones_like(depth)], axis=2) * depth


def measure_points(
    local: np.ndarray, poses: np.ndarray, rng: np.random.Generator, depth: float, wrong: float
) -> np.ndarray:
    """(n, 3) world points with noise along the ray, relative to depth; a share is far off."""
    local = local * (1 + rng.normal(0, depth, (*local.shape[:2], 1)))
    points = np.einsum("kij,knj->kni", poses[:, :3, :3], local) + poses[:, None, :3, 3]
    points = points.reshape(-1, 3)
    bad = rng.random(len(points)) < wrong
    points[bad] += rng.normal(0.5, 2, (bad.sum(), 3))
    return points


def join_windows(
    true: np.ndarray, seed: int, wrong: float = 0.1, bad_pose: bool = False
) -> np.ndarray:
    """Join windows of any gauge into a long trajectory, one at a time, as an engine does.

    Noise: 1 % of depth on points, 3 mm and 0.2 degrees on poses. wrong: the share of wrong points
    at every seam; bad_pose: whether one pose of each overlap is wrong. The result is in the first
    window's true gauge.
    """
    rng = np.random.default_rng(seed)
    clouds = {}  # points seen by two windows, by the first frame that they share
    for start in range(0, len(true), WINDOW - SHARED):
        clouds[start] = views(true[start : start + SHARED], rng, 100)
    whole, before = np.empty_like(true), None
    for start in range(0, len(true) - SHARED, WINDOW - SHARED):
        gauge, frames = random_sim3(rng), slice(start, start + WINDOW)
        own = gauge.poses(noisy(true[frames], rng, 0.003, 0.2))

        def overlap(first: int, wrong: float, gauge=gauge, own=own, start=start) -> Overlap:
            shared = true[first : first + SHARED]
            points = measure_points(clouds[first], shared, rng, 0.01, wrong)
            poses = own[first - start : first - start + SHARED].copy()
            return Overlap(gauge.points(points), poses)

        onto = gauge.inverse()
        if before is None:
            whole[frames] = onto.poses(own)
        else:
            head = overlap(start, wrong)
            if bad_pose:
                head.world_from_camera[3] = random_sim3(rng).poses(head.world_from_camera[3])
            onto = join(before, head).sim3
            moved, seam = onto.poses(own), slice(start, start + SHARED)
            whole[seam] = blend(whole[seam], moved[:SHARED])
            whole[start + SHARED : start + WINDOW] = moved[SHARED:]
        tail = overlap(start + WINDOW - SHARED, 0.0)
        before = Overlap(onto.points(tail.points), onto.poses(tail.world_from_camera))
    return whole


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bend", [0.9, 0.02], ids=["curved", "nearly straight"])
@pytest.mark.parametrize(
    ("wrong", "bad_pose"),
    [(0.1, False), (0.3, True)],
    ids=["10% wrong points", "30% wrong points and a wrong pose"],
)
def test_twenty_joined_windows_form_one_accurate_trajectory(bend, seed, wrong, bad_pose):
    """The RMSE after alignment by one Sim3, as for ATE, is under 0.5 % of the length.

    Without alignment, in the first window's gauge, the errors of direction and scale at all seams
    add up: under 1 %.
    """
    true = walk(WINDOWS * (WINDOW - SHARED) + SHARED, 0.04, bend)
    length = np.linalg.norm(np.diff(true[:, :3, 3], axis=0), axis=1).sum()
    whole = join_windows(true, seed, wrong, bad_pose)
    aligned = align_poses(whole, true)
    assert aligned.translation_rmse < 0.005 * length
    assert aligned.rotation_error < 0.5
    drift = whole[:, :3, 3] - true[:, :3, 3]
    assert np.sqrt((drift**2).sum(axis=1).mean()) < 0.01 * length
    jumps = np.linalg.norm(np.diff(whole[:, :3, 3], axis=0), axis=1)
    assert jumps.max() < 0.04 + 6 * np.sqrt(2) * 0.003


def make_overlap(rng: np.random.Generator, points: int, poses: int, noise: float = 0.01, wrong=0.0):
    """An overlap, the same overlap in another gauge, and that gauge."""
    true = walk(60, 0.04, 0.9)[30 : 30 + poses]
    eye = true if poses else walk(1, 0.04, 0.0)
    local = views(eye, rng, -(-points // len(eye)))
    a, b = (measure_points(local, eye, rng, noise, share)[:points] for share in (0.0, wrong))
    gauge = random_sim3(rng)
    scale = 1.0 if noise else 0.0
    cameras = noisy(true, rng, 0.003 * scale, 0.2 * scale)
    return Overlap(a, true), Overlap(gauge.points(b), gauge.poses(cameras)), gauge


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(1, 8))
@example(0, 1)
def test_join_does_not_depend_on_the_gauge_of_a_window(seed, poses):
    rng = np.random.default_rng(seed)
    earlier, later, _ = make_overlap(rng, 200, poses, wrong=0.2)
    gauge = random_sim3(rng)
    moved = Overlap(gauge.points(later.points), gauge.poses(later.world_from_camera))
    plain, other = join(earlier, later), join(earlier, moved)
    assert_same(other.sim3, plain.sim3 @ gauge.inverse(), moved.points, 1e-7)
    assert other.residual == pytest.approx(plain.residual, rel=1e-6)
    # Nor on the gauge of the earlier window. The residual does not depend on units.
    onto = Overlap(gauge.points(earlier.points), gauge.poses(earlier.world_from_camera))
    assert_same(join(onto, later).sim3, gauge @ plain.sim3, later.points, 1e-7)


@pytest.mark.parametrize(
    ("points", "poses"), [(400, 8), (400, 0), (0, 8), (0, 3), (400, 1), (1, 1), (3, 1), (20_000, 2)]
)
def test_exact_overlaps_join_exactly(points, poses):
    earlier, later, gauge = make_overlap(
        np.random.default_rng(points + poses), points, poses, noise=0.0
    )
    found = join(earlier, later)
    assert_same(
        found.sim3, gauge.inverse(), np.concatenate([later.points, gauge.points(np.eye(3))])
    )
    assert found.scaled
    assert found.residual < 1e-9


@pytest.mark.parametrize("poses", [0, 1, 2, 8])
def test_join_tolerates_a_third_wrong_points_and_a_wrong_pose(poses):
    for seed in range(10):
        rng = np.random.default_rng([seed, poses])
        earlier, later, gauge = make_overlap(rng, 2000, poses, wrong=1 / 3)
        if poses:
            turned = random_sim3(rng, 1.0).poses(later.world_from_camera[0])
            later.world_from_camera[0] = turned
        found = join(earlier, later)
        assert degrees_between(found.sim3, gauge.inverse()) < 0.25
        assert abs(found.sim3.scale * gauge.scale - 1) < 0.005
        assert found.residual < 0.05


def camera_position_error(far: float, patches: bool) -> float:
    """RMS error, in mm, of the position of an overlap's middle camera, over many joins."""
    errors = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        true, gauge = walk(8, 0.04, 0.9), random_sim3(rng)
        local = views(true, rng, 200, far)
        # 4 x 4 patches of the image, each with its own error.
        column, row = np.floor(np.moveaxis(local[..., :2] / local[..., 2:], 2, 0) * 2 + 2)
        patch = (4 * row + column).astype(int)

        def seen(rng=rng, local=local, patch=patch, true=true) -> tuple[np.ndarray, np.ndarray]:
            error = rng.normal(0, 0.01, (8, 16))[np.arange(8)[:, None], patch]
            warped = local * (1 + patches * error[..., None])
            points = measure_points(warped, true, rng, 0.002 if patches else 0.01, 0.0)
            return points, noisy(true, rng, 0.003, 0.2)

        earlier, (points, poses) = Overlap(*seen()), seen()
        onto = join(earlier, Overlap(gauge.points(points), gauge.poses(poses))).sim3 @ gauge
        errors.append(np.linalg.norm(onto.points(true[4, :3, 3]) - true[4, :3, 3]))
    return 1000 * float(np.sqrt(np.mean(np.square(errors))))


def test_correlated_point_errors_do_not_outweigh_the_cameras():
    assert camera_position_error(6.0, patches=True) < 2.9  # 3.5 if point errors were independent


def test_far_points_count_less():
    assert (
        camera_position_error(20.0, patches=False) < 2.5
    )  # 3.1 if noise did not grow with distance


def test_non_finite_points_are_ignored():
    earlier, later, gauge = make_overlap(np.random.default_rng(0), 400, 8, noise=0.0)
    earlier.points[::2], later.points[1::4] = np.nan, np.inf
    assert_same(join(earlier, later).sim3, gauge.inverse(), gauge.points(np.eye(3)))
    earlier.points[:] = np.nan
    assert_same(join(earlier, later).sim3, gauge.inverse(), gauge.points(np.eye(3)))


def test_unmatched_points_leave_the_join_to_the_poses_and_raise_the_residual():
    rng = np.random.default_rng(0)
    earlier, later, gauge = make_overlap(rng, 400, 8, noise=0.0)
    rng.shuffle(later.points)
    found = join(earlier, later)
    assert_same(found.sim3, gauge.inverse(), gauge.points(np.eye(3)), 1e-6)
    assert found.residual > 0.2


@pytest.mark.parametrize(("points", "poses"), [(0, 0), (0, 1), (1, 0)])
def test_join_without_scale_has_scale_one(points, poses):
    earlier, later, _ = make_overlap(np.random.default_rng(0), points, poses, noise=0.0)
    found = join(earlier, later)
    assert not found.scaled
    assert found.sim3.scale == 1.0
    if poses:
        np.testing.assert_allclose(
            found.sim3.poses(later.world_from_camera), earlier.world_from_camera, atol=1e-9
        )


@given(seeds, st.integers(1, 12))
def test_blend_moves_evenly_from_earlier_to_later(seed, frames):
    rng = np.random.default_rng(seed)
    earlier = noisy(walk(frames, 0.1, 1.0), rng, 0.1, 10.0)
    offset = random_sim3(rng, 1.0)
    later = noisy(earlier, rng, 0.0, 0.0)
    later[:, :3, 3] += offset.translation
    later[:, :3, :3] = later[:, :3, :3] @ offset.rotation
    mixed = blend(earlier, later)
    assert (rigidity_error(mixed) < 1e-9).all()
    share = np.arange(1, frames + 1) / (frames + 1)
    moved = mixed[:, :3, 3] - earlier[:, :3, 3]
    np.testing.assert_allclose(moved, share[:, None] * offset.translation, atol=1e-9)
    turned = rotation_angle(mixed[:, :3, :3], earlier[:, :3, :3])
    whole = rotation_angle(offset.rotation, np.eye(3))
    np.testing.assert_allclose(turned, share * whole, atol=1e-6)


def test_blend_of_equal_poses_changes_nothing():
    poses = walk(8, 0.1, 1.0)
    np.testing.assert_allclose(blend(poses, poses), poses, atol=1e-12)
    assert blend(NO_POSES, NO_POSES).shape == (0, 4, 4)


# Pose interpolation


@given(seeds, st.integers(1, 40), st.data())
def test_interpolation_keeps_known_poses_exactly_and_adds_rigid_poses(seed, length, data):
    known = data.draw(st.sets(st.integers(0, length - 1), min_size=1))
    frames = np.array(sorted(known))
    poses = noisy(walk(len(frames), 0.3, 1.0), np.random.default_rng(seed), 1.0, 50.0)
    every = interpolate_poses(frames, poses, length)
    assert every.shape == (length, 4, 4)
    assert np.array_equal(every[frames], poses)
    assert (rigidity_error(every) < 1e-9).all()
    span = np.ptp(poses[:, :3, 3], axis=0).max() if len(frames) > 1 else 0.0
    middle = poses[:, :3, 3].mean(axis=0)
    assert np.abs(every[:, :3, 3] - middle).max() <= 3 * span + 1e-9  # no large overshoot


def test_long_gap_after_a_short_one_is_not_overshot():
    poses = np.tile(np.eye(4), (3, 1, 1))
    poses[:, 0, 3] = [0.0, 1.0, 1.1]
    every = interpolate_poses(np.array([0, 1, 39]), poses, 40)[:, 0, 3]
    assert every.max() < 1.2


@given(seeds, st.sampled_from([2, 3, 5, 7]))
def test_steady_motion_is_interpolated_exactly(seed, interval):
    rng = np.random.default_rng(seed)
    t = np.arange(interval * 6 + rng.integers(interval))
    true = np.tile(np.eye(4), (len(t), 1, 1))
    true[:, :3, 3] = rng.normal(0, 1, 3) + t[:, None] * rng.normal(0, 0.1, 3)
    start, spin = Rotation.random(random_state=rng), rng.normal(0, 0.05, 3)
    true[:, :3, :3] = (start * Rotation.from_rotvec(t[:, None] * spin)).as_matrix()
    # Frames after the last known one continue the motion.
    some = interpolate_poses(t[::interval], true[::interval], len(t))
    np.testing.assert_allclose(some, true, atol=1e-9)


def test_curved_path_is_interpolated_from_every_fifth_frame():
    true = walk(101, 0.04, 0.9)
    every = interpolate_poses(np.arange(0, 101, 5), true[::5], 101)
    off = np.linalg.norm(every[:, :3, 3] - true[:, :3, 3], axis=1)
    assert off.max() < 0.0002  # straight lines between the known frames are 0.0017 m off
    assert np.degrees(rotation_angle(every[:, :3, :3], true[:, :3, :3])).max() < 0.2


def test_sudden_stop_is_not_overshot():
    true = straight(41)
    true[:, 2, 3] = np.clip(np.arange(41) - 10, 0, 20) * 0.1
    every = interpolate_poses(np.arange(0, 41, 5), true[::5], 41)[:, 2, 3]
    assert every.min() > -1e-9
    assert every.max() < 2.0 + 1e-9
    assert (np.diff(every) > -1e-9).all()


def test_extrapolation_continues_for_one_step():
    poses = straight(2, 1.0)
    every = interpolate_poses(np.array([10, 15]), poses, 40)[:, 2, 3]
    np.testing.assert_allclose(every[5:21], np.arange(-1, 2.1, 0.2), atol=1e-12)
    assert np.ptp(every[:6]) == np.ptp(every[20:]) == 0.0
    assert np.array_equal(interpolate_poses(np.array([3]), poses[1:], 5), poses[[1] * 5])


# Intrinsics

K = np.array([[168.05, 0, 251.3], [0, 192.8, 128.9], [0, 0, 1]])
SIZE = (480, 270)


def points_seen_by(K: np.ndarray, rng: np.random.Generator, shape: tuple[int, int] = (154, 280)):
    """(H, W, 3) points on the rays of an image of SIZE that was resized to `shape`."""
    v, u = np.mgrid[: shape[0], : shape[1]] + 0.5
    rays = np.stack([u * SIZE[0] / shape[1], v * SIZE[1] / shape[0], np.ones(shape)], axis=-1)
    return rays @ np.linalg.inv(K).T * rng.uniform(0.5, 6, (*shape, 1))


@given(seeds, st.floats(20, 120), st.floats(20, 120))
def test_fitted_intrinsics_are_for_the_original_image_size(seed, across, down):
    rng = np.random.default_rng(seed)
    true = np.diag([240 / np.tan(np.radians(across / 2)), 135 / np.tan(np.radians(down / 2)), 1.0])
    true[:2, 2] = SIZE * rng.uniform(0.3, 0.7, 2)
    mask = rng.random((40, 61)) < 0.5
    points = points_seen_by(true, rng, (40, 61))
    points[~mask] = rng.normal(0, 5, (int((~mask).sum()), 3))
    np.testing.assert_allclose(fit_intrinsics(points, mask, SIZE), true, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_noise_and_depth_edges_hardly_change_intrinsics(seed):
    rng = np.random.default_rng(seed)
    points = points_seen_by(K, rng)
    points += rng.normal(0, 0.01, points.shape) * points[..., 2:]
    edges = rng.random(points.shape[:2]) < 0.05
    points[edges] = rng.normal([1, 1, 3], 2, (int(edges.sum()), 3))
    points[:3] = np.nan
    found = fit_intrinsics(points.astype(np.float32), np.ones(points.shape[:2]), SIZE)
    np.testing.assert_allclose(found, K, rtol=0.005)


def test_points_of_low_weight_hardly_affect_intrinsics():
    rng = np.random.default_rng(0)
    points = points_seen_by(K, rng)
    points[:, :140] = points_seen_by(K @ np.diag([1.0, 1.5, 1.0]), rng)[:, :140]
    weights = np.ones(points.shape[:2])
    weights[:, :140] = 1e-6
    np.testing.assert_allclose(fit_intrinsics(points, weights, SIZE), K, rtol=1e-3)


def implausible_points(name: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    points, weights = points_seen_by(K, rng), np.ones((154, 280))
    if name == "noise":
        points = rng.normal(0, 1, points.shape)
    elif name == "masked":
        weights[:] = 0
    elif name == "one column":
        weights[:, 1:] = 0
    elif name == "few":
        weights.ravel()[15:] = 0
    elif name == "mirrored":
        points *= [-1, 1, 1]
    elif name == "behind":
        points *= -1
    elif name == "nan":
        points[:] = np.nan
    elif name == "zeros":
        points[:] = 0
    elif name == "flat":
        points[..., 0] = 0.5 * points[..., 2]
    elif name == "scattered":
        points[..., :2] += rng.normal(0, 1, (*points.shape[:2], 2)) * points[..., 2:]
    elif name == "narrow":
        points *= [0.01, 1, 1]
    elif name == "off axis":
        points[..., 0] += 3 * points[..., 2]
    elif name == "wide":
        points = points_seen_by(K @ np.diag([0.05, 1, 1]), rng)
    return points, weights


@pytest.mark.parametrize(
    "name",
    ["noise", "masked", "one column", "few", "mirrored", "behind", "nan", "zeros", "flat",
     "scattered", "narrow", "off axis", "wide"],
)  # fmt: skip
def test_implausible_rays_have_no_intrinsics(name):
    assert fit_intrinsics(*implausible_points("fine"), SIZE) is not None
    assert fit_intrinsics(*implausible_points(name), SIZE) is None
