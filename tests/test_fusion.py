"""Fusion of small made-up scenes: agreement of several frames, and motion in each frame."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import (
    SIZE,
    Array,
    Shape,
    box,
    camera,
    depth_of,
    intrinsics,
    path,
    plane,
    room,
    views_of,
)
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from occgen_hub.config import Config
from occgen_hub.engines.store import FrameStore
from occgen_hub.fusion.depth_map import DepthMap, DepthMaps
from occgen_hub.fusion.evidence import (
    COMPARED_FRAMES,
    NEAREST,
    SIGMAS,
    SLANT,
    SLANT_SIGMA,
    Tolerance,
    gather_evidence,
    spread,
)
from occgen_hub.fusion.fuse import Fused, fuse
from occgen_hub.fusion.moving import WIDEST_SPLAT, _render
from occgen_hub.fusion.noise import NAMED, NoiseModel, compare, estimate_noise, noise_model
from occgen_hub.geometry.cloud import Cloud, voxel_downsample
from occgen_hub.occupancy.point_blocks import into_blocks

VOXEL = 0.05
CONFIG = Config(voxel_size=VOXEL)
UNION = Config(voxel_size=VOXEL, fusion="union")
WALL = plane((0, 0, 2.5), (0, 0, 1))


def exact_depths(shapes: list[Shape], poses: Array, size: tuple[int, int] = SIZE) -> list[Array]:
    """The exact depth of every frame."""
    return [depth_of(shapes, pose, size) for pose in poses]


def noisy(depths: list[Array], noise: NoiseModel, seed: int = 0) -> list[Array]:
    """Add noise that is independent for each pixel."""
    rng = np.random.default_rng(seed)
    return [
        depth + (depth > 0) * rng.normal(size=depth.shape) * noise.sigma(depth) for depth in depths
    ]


def moving(fused: Fused, frame: int) -> Array:
    """The moving points of a frame."""
    assert fused.moving is not None
    return fused.moving(frame).astype(np.float64)


def inside(points: Array, lower: Array, upper: Array, margin: float = 0.03) -> Array:
    """(n,) bool: which points lie in a box or within a margin of it."""
    return ((points > np.asarray(lower) - margin) & (points < np.asarray(upper) + margin)).all(
        axis=1
    )


# A static surface


def test_exact_plane_is_unchanged():
    poses = path(6)
    fused = fuse(views_of(exact_depths([WALL], poses), poses), CONFIG)
    assert np.abs(fused.cloud.points[:, 2] - 2.5).max() < 1e-5
    union = fuse(views_of(exact_depths([WALL], poses), poses), UNION)
    assert cKDTree(fused.cloud.points).query(union.cloud.points)[0].max() < VOXEL
    assert fused.notes == ()
    assert len(moving(fused, 0)) == 0


def test_exact_room_is_unchanged():
    """Up to one cell: pixels next to the edge of another surface are not trusted."""
    poses = path(6)
    depths = exact_depths(room(), poses)
    fused, union = (fuse(views_of(depths, poses), config) for config in (CONFIG, UNION))
    distance = cKDTree(fused.cloud.points).query(union.cloud.points)[0]
    assert np.mean(distance < VOXEL) > 0.995
    off = cKDTree(union.cloud.points).query(fused.cloud.points)[0]
    assert off.max() < VOXEL
    assert fused.quality is not None
    assert fused.quality.contradicted < 0.01
    assert max(fused.quality.sigma) < 0.003
    assert fused.quality.shift < 0.002
    assert not any(len(moving(fused, frame)) for frame in range(6))


@pytest.mark.parametrize("frames", [4, 9])
def test_averaging_brings_a_noisy_plane_closer_to_the_truth(frames):
    """The error shrinks by about the square root of the number of frames."""
    poses = path(frames, width=0.4)
    depths = noisy(exact_depths([WALL], poses), NoiseModel(0.012, 0, 0))
    off = [
        np.sqrt(np.mean((fuse(views_of(depths, poses), config).cloud.points[:, 2] - 2.5) ** 2))
        for config in (CONFIG, UNION)
    ]
    assert off[1] == pytest.approx(0.012, rel=0.1)
    assert off[0] < 1.3 * off[1] / np.sqrt(frames)
    assert abs(fuse(views_of(depths, poses), CONFIG).cloud.points[:, 2].mean() - 2.5) < 0.001


def test_floating_points_of_a_single_frame_are_removed():
    poses = path(6)
    depths = exact_depths([WALL], poses)
    depths[3][20:32, 30:42] = 1.2
    fused, union = (fuse(views_of(depths, poses), config) for config in (CONFIG, UNION))
    assert (union.cloud.points[:, 2] < 2).sum() > 50
    assert fused.cloud.points[:, 2].min() > 2.49
    assert fused.quality is not None
    share = (union.cloud.points[:, 2] < 2).mean()
    assert fused.quality.contradicted == pytest.approx(share, rel=0.2)


def test_only_frames_that_saw_through_a_place_contradict_it():
    """A patch of wall seen by two of nine frames stays: a screen hides it from the others."""
    screen = box((-0.5, -0.6, 1.2), (0.5, 0.6, 1.25))
    behind = ((-0.25, -0.3, 2.499), (0.25, 0.3, 2.501))
    straight = [camera((x, 0, 0), (x, 0, 2.5)) for x in np.linspace(-0.06, 0.06, 7)]
    aside = [camera((x, 0, 0.5), (0, 0, 2.5)) for x in (-1.6, 1.6)]
    poses = np.stack([*straight, *aside])
    fused = fuse(views_of(exact_depths([WALL, screen], poses), poses), CONFIG)
    union = fuse(views_of(exact_depths([WALL, screen], poses), poses), UNION)
    hidden = union.cloud.points[inside(union.cloud.points, *behind)]
    assert len(hidden) > 50
    assert cKDTree(fused.cloud.points).query(hidden)[0].max() < VOXEL
    # The same patch, with seven frames that see through it instead of the screen.
    depths = exact_depths([WALL, screen], poses)
    far = plane((0, 0, 4), (0, 0, 1))
    contradicted = fuse(views_of([*exact_depths([far], poses[:7]), *depths[7:]], poses), CONFIG)
    assert not inside(contradicted.cloud.points, *behind).any()


KINECT = NAMED["kinect"]


@pytest.mark.parametrize("noise", [NoiseModel(0, 0, 0), KINECT], ids=["exact", "kinect"])
def test_floor_at_a_grazing_angle_is_kept(noise):
    """The camera is 0.4 m above the floor, as on a small robot."""
    floor = plane((0, 0.4, 0), (0, 1, 0))
    back = plane((0, 0, 6), (0, 0, 1))
    poses = np.stack([camera((0.05 * t, 0, 0.2 * t), (0, 0.1, 6)) for t in range(8)])
    depths = exact_depths([floor, back], poses)
    fused = fuse(views_of(noisy(depths, noise), poses), CONFIG)
    truth = fuse(views_of(depths, poses), UNION).cloud.points
    truth = truth[(np.abs(truth[:, 1] - 0.4) < 0.01) & (truth[:, 2] < 4)]
    assert len(truth) > 1000
    assert np.mean(cKDTree(fused.cloud.points).query(truth)[0] < VOXEL) > 0.97
    on_floor = fused.cloud.points[fused.cloud.points[:, 2] < 4]
    assert np.mean(np.abs(on_floor[:, 1] - 0.4) < VOXEL) > 0.99
    assert not any(len(moving(fused, frame)) for frame in range(8))


@pytest.mark.parametrize("noise", [NoiseModel(0, 0, 0), NoiseModel(0.004, 0, 0)])
def test_pole_two_pixels_wide_is_kept(noise):
    poses = path(8, target=(0, 0, 2), width=0.6)
    pole = ((-0.03, -0.5, 2.0), (0.03, 0.5, 2.06))
    depths = noisy(exact_depths([box(*pole), plane((0, 0, 3.5), (0, 0, 1))], poses), noise)
    fused = fuse(views_of(depths, poses), CONFIG)
    along = np.arange(-0.48, 0.49, 0.02)
    front = np.stack([0 * along, along, 0 * along + 2.0], axis=1)
    assert np.mean(cKDTree(fused.cloud.points).query(front)[0] < VOXEL) > 0.9
    between = fused.cloud.points[
        (fused.cloud.points[:, 2] > 2.2) & (fused.cloud.points[:, 2] < 3.2)
    ]
    assert len(between) == 0


def test_union_contains_exactly_the_trusted_points():
    poses = path(5)
    depths = noisy(exact_depths(room(), poses), NoiseModel(0.01, 0, 0))
    depths[2][10:14, 10:30] = 0.9
    views = views_of(depths, poses)
    fused = fuse(views, UNION.model_copy(update={"depth_range": (0.5, 4.0)}))
    assert (fused.moving, fused.quality, fused.notes) == (None, None, ())
    assert fused.views is views
    points, colors = [], []
    for frame, depth in enumerate(depths):
        view = DepthMaps(views, 0.1, CONFIG.depth_edge)(frame)
        kept = view.trusted & (depth.astype(np.float32) >= 0.5) & (depth.astype(np.float32) <= 4.0)
        v, u = np.nonzero(kept)
        z = view.depth[v, u].astype(np.float64)
        K = intrinsics()
        local = np.stack([(u + 0.5 - K[0, 2]) / K[0, 0] * z, (v + 0.5 - K[1, 2]) / K[1, 1] * z, z])
        points.append((poses[frame, :3, :3] @ local).T + poses[frame, :3, 3])
        colors.append(np.full((len(z), 3), 10 + frame, np.uint8))
    expected = voxel_downsample(
        Cloud(np.concatenate(points), np.concatenate(colors)),  # type: ignore[arg-type]
        CONFIG.fusion_size,
    )
    assert len(fused.cloud) == len(expected)
    np.testing.assert_allclose(fused.cloud.points, expected.points, atol=1e-5)
    np.testing.assert_array_equal(fused.cloud.colors, expected.colors)


def test_frames_without_depth_are_ignored():
    """Only some frames have depth, and one of them has no valid pixel."""
    poses = path(7)
    depths = exact_depths([WALL], poses)
    depths[2] = np.zeros_like(depths[2])
    fused = fuse(views_of(depths, poses, frames=(0, 2, 4, 6)), CONFIG)
    assert np.abs(fused.cloud.points[:, 2] - 2.5).max() < 1e-5
    assert [len(moving(fused, frame)) for frame in range(7)] == [0] * 7


@pytest.mark.parametrize("voxel_size", [0.02, 0.1, 0.25, 0.5])
def test_nothing_moves_in_a_static_room_at_any_voxel_size(voxel_size):
    poses = path(6)
    fused = fuse(views_of(exact_depths(room(), poses), poses), Config(voxel_size=voxel_size))
    assert [len(moving(fused, frame)) for frame in range(6)] == [0] * 6


def test_single_frame_is_fused():
    fused = fuse(views_of(exact_depths(room(), path(1)), path(1)), CONFIG)
    union = fuse(views_of(exact_depths(room(), path(1)), path(1)), UNION)
    assert len(fused.cloud) > 0.98 * len(union.cloud)
    assert len(moving(fused, 0)) == 0


def test_frames_without_measurements_give_an_empty_cloud():
    poses = path(3)
    fused = fuse(views_of([np.zeros((60, 80))] * 3, poses), CONFIG)
    assert len(fused.cloud) == 0
    assert fused.moving is None


@pytest.mark.parametrize("refine", [False, True])
def test_contradicting_frames_give_a_note(refine):
    """All later frames see through the wall of each frame. Only the last wall stays."""
    poses = np.tile(np.eye(4), (6, 1, 1))
    depths = [np.full((60, 80), 0.7 * 1.5**frame) for frame in range(6)]
    fused = fuse(views_of(depths, poses), CONFIG.model_copy(update={"refine_poses": refine}))
    np.testing.assert_allclose(fused.cloud.points[:, 2], 0.7 * 1.5**5, atol=1e-3)
    union = fuse(views_of(depths, poses), UNION).cloud
    assert fused.quality is not None
    share = (union.points[:, 2] < 5).mean()
    assert fused.quality.contradicted == pytest.approx(share, abs=0.02)
    (note,) = (note for note in fused.notes if note.code == "frames disagree")
    assert f"{share:.0%} of the measured points" in note.text
    assert json.loads(json.dumps(fused.quality.record(), allow_nan=False))


# Noise


PANELS = [
    box((-4 + 0.8 * n, -3, z), (-3.2 + 0.8 * n, 3, z + 0.05))
    for n, z in enumerate((4.4, 3.4, 2.2, 1.4, 1.4, 1.8, 1.4, 2.2, 3.4, 4.4))
]
LARGE = (160, 120)


@pytest.mark.parametrize(
    "noise",
    [NoiseModel(0.01, 0, 0), NoiseModel(0, 0.005, 0), NoiseModel(0, 0, 0.0025)],
    ids=["constant", "linear", "quadratic"],
)
def test_noise_is_estimated(noise):
    poses = path(10)
    depths = noisy(exact_depths([*PANELS, plane((0, 0, 5), (0, 0, 1))], poses, LARGE), noise)
    found = estimate_noise(DepthMaps(views_of(depths, poses), 0.1, 0.03))
    assert found is not None
    z = np.array([1.4, 1.8, 2.2, 3.4, 4.4])
    np.testing.assert_allclose(found.sigma(z), noise.sigma(z), rtol=0.3)


def test_exact_depth_has_no_noise():
    poses = path(6)
    found = estimate_noise(DepthMaps(views_of(exact_depths(room(), poses), poses), 0.1, 0.03))
    assert found is not None
    assert found.sigma(3.0) < 0.001


def test_noise_defaults_to_simulated_if_it_cannot_be_estimated():
    for frames in (1, 3):  # One frame; three that look into different directions.
        turns = [camera((0, 0, 0), (np.sin(2 * t), 0, np.cos(2 * t))) for t in range(frames)]
        maps = DepthMaps(
            views_of(exact_depths(room(), np.stack(turns)), np.stack(turns)), 0.1, 0.03
        )
        assert estimate_noise(maps) is None
        assert noise_model(maps, "auto") == NAMED["simulated"]


def test_noise_can_be_named_or_given():
    maps = DepthMaps(views_of(exact_depths([WALL], path(1)), path(1)), 0.1, 0.03)
    assert noise_model(maps, "stereo") == NAMED["stereo"]
    given_model = noise_model(maps, (0.001, 0.01, 0.002))
    assert given_model.sigma(2.0) == pytest.approx(np.sqrt(0.001**2 + 0.02**2 + 0.008**2))
    assert KINECT.sigma(2.0) == pytest.approx(0.0012 + 0.0019 * 1.6**2, rel=0.1)


def test_noisier_depth_requires_more_frames():
    counts = [
        Tolerance.of(NoiseModel(s, 0, 0), 0.02).max_frames for s in (0.0, 0.002, 0.004, 0.006, 0.1)
    ]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == COMPARED_FRAMES


# Motion


BACK = plane((0, 0, 3.5), (0, 0, 1))
FLOOR = plane((0, 0.8, 0), (0, 1, 0))


def walker(places: list[float]) -> tuple[list[Array], list[tuple[Array, Array]], Array]:
    """Depth, boxes and poses for a box of 0.4 x 1.2 m at the given place of each frame."""
    poses = path(len(places), target=(0, 0.1, 3), width=0.3)
    boxes = [(np.array([x, -0.4, 2.0]), np.array([x + 0.4, 0.8, 2.2])) for x in places]
    depths = [depth_of([BACK, FLOOR, box(*b)], pose) for b, pose in zip(boxes, poses, strict=True)]
    return depths, boxes, poses


def check_walker(
    fused: Fused, boxes: list[tuple[Array, Array]], poses: Array, ghosts: int = 0
) -> None:
    """Assert that each frame's moving points are the box of that frame, and that the cloud has at
    most `ghosts` points in the air where the box was."""
    for frame, (lower, upper) in enumerate(boxes):
        points = moving(fused, frame)
        assert inside(points, lower, upper).mean() > 0.98, frame
        K, (width, height) = intrinsics(), SIZE
        facing = np.stack(
            np.meshgrid(np.arange(lower[0] + 0.03, upper[0], 0.04), np.arange(-0.37, 0.75, 0.04)),
            -1,
        ).reshape(-1, 2)
        front = np.concatenate([facing, np.full((len(facing), 1), 2.0)], axis=1)
        local = (front - poses[frame, :3, 3]) @ poses[frame, :3, :3]
        u = K[0, 0] * local[:, 0] / local[:, 2] + K[0, 2]
        v = K[1, 1] * local[:, 1] / local[:, 2] + K[1, 2]
        front = front[(u > 1) & (u < width - 1) & (v > 1) & (v < height - 1)]
        assert len(front) > 100
        assert np.mean(cKDTree(points).query(front)[0] < VOXEL) > 0.9, frame
        air = inside(fused.cloud.points, lower, [upper[0], 0.7, upper[2]])
        assert air.sum() <= ghosts, frame


def test_moving_box_is_found_in_every_frame():
    places = list(np.linspace(-0.9, 0.7, 9))
    depths, boxes, poses = walker(places)
    check_walker(fuse(views_of(depths, poses), CONFIG), boxes, poses)


def test_moving_box_is_found_despite_noise():
    depths, boxes, poses = walker(list(np.linspace(-0.9, 0.7, 9)))
    fused = fuse(views_of(noisy(depths, NoiseModel(0.003, 0, 0.001)), poses), CONFIG)
    check_walker(fused, boxes, poses)


def test_box_that_stops_moving_is_found_in_every_frame():
    places = [*np.linspace(-0.9, 0.2, 8), 0.2, 0.2, 0.2]
    depths, boxes, poses = walker(places)
    check_walker(fuse(views_of(depths, poses), CONFIG), boxes, poses)


def test_frames_without_the_box_have_no_moving_points():
    depths, _, poses = walker([*np.linspace(-1.0, 0.6, 5)])
    without = [depth_of([BACK, FLOOR], pose) for pose in poses]
    depths = [*depths[:3], *without, *depths[3:]]
    poses = np.stack([*poses[:3], *poses, *poses[3:]])
    fused = fuse(views_of(depths, poses), CONFIG)
    counts = [len(moving(fused, frame)) for frame in range(10)]
    assert counts[3:8] == [0] * 5
    assert min(counts[:3] + counts[8:]) > 100


def test_box_moving_before_a_background_without_depth_is_not_in_the_scene():
    depths, boxes, poses = walker(list(np.linspace(-0.9, 0.7, 9)))
    for depth, pose, box_ in zip(depths, poses, boxes, strict=True):
        alone = depth_of([box(*box_)], pose)
        above = np.arange(depth.shape[0])[:, None] < depth.shape[0] / 2
        depth[above & (alone == 0)] = 0
    fused = fuse(views_of(depths, poses), CONFIG)
    check_walker(fused, boxes, poses, ghosts=8)  # Over 300 if only contradicted points go.
    # The floor stays, though it touches the box.
    floor = fuse(views_of([depth_of([FLOOR], pose) for pose in poses], poses), CONFIG).cloud.points
    seen_by_some = cKDTree(fused.cloud.points).query(floor[floor[:, 2] < 1.9])[0] < VOXEL
    assert seen_by_some.mean() > 0.99


def test_small_groups_of_wrong_pixels_are_not_moving():
    poses = path(6)
    depths = exact_depths([WALL], poses)
    depths[1][5:9, 5:9] = 1.5  # A speckle: too few pixels.
    depths[2][10:16, 20:26] = 0.6  # Enough pixels, but only 5 cm wide.
    depths[4][10:50, 40:42] = 1.8  # A seam: long and thin.
    fused = fuse(views_of(depths, poses), CONFIG)
    assert [len(moving(fused, frame)) for frame in range(6)] == [0] * 6
    assert fused.cloud.points[:, 2].min() > 2.49
    assert (fuse(views_of(depths, poses), UNION).cloud.points[:, 2] < 2).any()


def test_static_box_is_not_moving():
    places = [0.1] * 8
    depths, boxes, poses = walker(places)
    fused = fuse(views_of(depths, poses), CONFIG)
    assert inside(fused.cloud.points, *boxes[0]).sum() > 100
    assert not any(len(moving(fused, frame)) for frame in range(8))


def test_moving_points_lie_within_the_depth_range():
    depths, _, poses = walker(list(np.linspace(-0.9, 0.7, 9)))
    fused = fuse(views_of(depths, poses), CONFIG.model_copy(update={"depth_range": (2.3, 6.5)}))
    assert not any(len(moving(fused, frame)) for frame in range(9))


# Poses


def errors_after_alignment(poses: Array, truth: Array) -> tuple[Array, Array]:
    """(T,) errors in metres and (T,) in degrees after the rigid motion that fits best."""
    turns = Rotation.from_matrix(truth[:, :3, :3] @ poses[:, :3, :3].transpose(0, 2, 1))
    turn = turns.mean().as_matrix()
    centres = poses[:, :3, 3] @ turn.T
    shift = (truth[:, :3, 3] - centres).mean(axis=0)
    off = np.linalg.norm(centres + shift - truth[:, :3, 3], axis=1)
    rotations = Rotation.from_matrix(turn @ poses[:, :3, :3]).inv() * Rotation.from_matrix(
        truth[:, :3, :3]
    )
    return off, np.degrees(rotations.magnitude())


def disturbed(poses: Array, metres: float, degrees: float, seed: int = 0) -> Array:
    """Add an independent error of about that size to each pose."""
    rng = np.random.default_rng(seed)
    wrong = poses.copy()
    for pose in wrong:
        turn = Rotation.from_rotvec(np.radians(degrees) * rng.normal(size=3) / np.sqrt(3))
        pose[:3, :3] = pose[:3, :3] @ turn.as_matrix()
        pose[:3, 3] += metres * rng.normal(size=3) / np.sqrt(3)
    return wrong


def test_refinement_recovers_the_true_poses():
    truth = path(10)
    wrong = disturbed(truth, 0.02, 0.4)
    views = views_of(exact_depths(room(), truth), wrong)
    plain = fuse(views, CONFIG.model_copy(update={"refine_poses": False}))
    refined = fuse(views, CONFIG.model_copy(update={"refine_poses": True}))
    by_default = fuse(views, CONFIG)
    assert by_default.quality == refined.quality
    assert plain.views is views
    before, after = (
        errors_after_alignment(v.world_from_camera, truth) for v in (plain.views, refined.views)
    )
    for wrong_by, left in zip(before, after, strict=True):
        assert np.median(left) < 0.25 * np.median(wrong_by)
    assert plain.quality is not None
    assert refined.quality is not None
    assert refined.quality.residual < 0.5 * plain.quality.residual
    assert "poses" in [note.code for note in plain.notes]
    assert "refine_poses" in plain.notes[[n.code for n in plain.notes].index("poses")].text
    assert "poses" not in [note.code for note in refined.notes]
    assert "refined poses" not in [note.code for note in plain.notes]
    (text,) = [note.text for note in refined.notes if note.code == "refined poses"]
    stated = float(re.findall(r"moved by ([\d.]+) mm", text)[0]) / 1000
    moved = refined.views.world_from_camera[:, :3, 3] - plain.views.world_from_camera[:, :3, 3]
    assert stated == pytest.approx(np.median(np.linalg.norm(moved, axis=1)), abs=1e-4)


def test_poses_are_not_refined_if_the_depth_scale_is_wrong():
    """Poses that compensate for it would make frames see through one another."""
    truth = path(10)
    scales = 1 + 0.02 * np.random.default_rng(3).normal(size=10)
    depths = [s * depth for s, depth in zip(scales, exact_depths(room(), truth), strict=True)]
    fused = fuse(views_of(depths, truth), CONFIG)
    np.testing.assert_array_equal(fused.views.world_from_camera, truth)
    assert fused.quality is not None
    assert not fused.quality.refined
    (note,) = (note for note in fused.notes if note.code == "poses")
    assert "aligning the frames did not help" in note.text


def test_refinement_corrects_a_single_wrong_pose():
    truth = path(10)
    wrong = truth.copy()
    wrong[4, :3, 3] += (0.0, 0.03, 0.01)
    config = CONFIG.model_copy(update={"refine_poses": True})
    fused = fuse(views_of(exact_depths(room(), truth), wrong), config)
    found = fused.views.world_from_camera
    moved = np.linalg.inv(found[3]) @ found[4]
    np.testing.assert_allclose(moved, np.linalg.inv(truth[3]) @ truth[4], atol=3e-3)


def test_refinement_keeps_correct_poses():
    truth = path(6)
    config = CONFIG.model_copy(update={"refine_poses": True})
    refined = fuse(views_of(exact_depths(room(), truth), truth), config)
    np.testing.assert_allclose(refined.views.world_from_camera, truth, atol=2e-3)


def test_frames_without_depth_move_with_a_neighbouring_frame():
    truth = path(9)
    wrong = disturbed(truth, 0.02, 0.4)
    config = CONFIG.model_copy(update={"refine_poses": True})
    refined = fuse(views_of(exact_depths(room(), truth), wrong, frames=(1, 3, 4, 6, 8)), config)
    found = refined.views.world_from_camera
    for frame, leader in ((0, 1), (2, 1), (5, 4), (7, 6)):
        relative = np.linalg.inv(found[leader]) @ found[frame]
        np.testing.assert_allclose(relative, np.linalg.inv(wrong[leader]) @ wrong[frame], atol=1e-9)


# Depth edges


def trusted(depth: Array, edges: str, edge: float = 0.03) -> Array:
    return DepthMaps(views_of([depth], np.eye(4)[None], edges=edges), 0.1, edge)(0).trusted


def test_network_depth_drops_ramps_between_walls_and_keeps_grazing_floors():
    walls = np.where(np.arange(80) < 38, 1.5, 3.0) * np.ones((60, 1))
    walls[:, 38:40] = (2.0, 2.5)
    found = trusted(walls, "network")
    assert not found[1:-1, 38:40].any()
    assert found[:, :36].all()
    assert found[:, 42:].all()
    floor = depth_of([plane((0, 0.4, 0), (0, 1, 0))], np.eye(4))
    rows = floor[:, 40] > 0
    # A limit on depth steps would drop this floor.
    steps = np.abs(np.diff(floor[rows, 40])) / floor[rows, 40][1:]
    assert (steps > 0.03).sum() > 5
    kept = trusted(floor, "network")[rows]
    assert kept[1:-1, 1:-1].mean() > 0.99
    assert trusted(walls, "network", 0.0).all()


def test_sensor_depth_drops_pixels_between_two_surfaces():
    walls = np.where(np.arange(80) < 40, 1.5, 3.0) * np.ones((60, 1))
    rng = np.random.default_rng(0)
    walls[:, 40] = rng.uniform(1.7, 2.8, 60)
    found = trusted(walls, "sensor")
    assert found[:, 40].mean() < 0.2
    assert np.delete(found, 40, axis=1).mean() > 0.999


# Determinism


DIGEST = """
import sys
sys.path.insert(0, "tests")
import hashlib
import numpy as np
from made_up import path, views_of
from test_fusion import CONFIG, disturbed, noisy, walker
from occgen_hub.fusion.fuse import fuse
from occgen_hub.fusion.noise import NoiseModel
depths, _, poses = walker(list(np.linspace(-0.9, 0.7, 9)))
views = views_of(noisy(depths, NoiseModel(0.004, 0, 0.001)), disturbed(poses, 0.005, 0.1))
fused = fuse(views, CONFIG.model_copy(update={"refine_poses": True}))
digest = hashlib.sha256(fused.cloud.points.tobytes() + fused.cloud.colors.tobytes())
digest.update(fused.views.world_from_camera.tobytes())
for frame in range(9):
    digest.update(fused.moving(frame).tobytes())
print(len(fused.cloud), sum(len(fused.moving(t)) for t in range(9)), fused.quality.record())
print(digest.hexdigest())
"""


def test_equal_views_give_equal_bytes_on_any_number_of_threads(pytestconfig):
    outputs = []
    for threads in ("1", "2"):
        result = subprocess.run(
            [sys.executable, "-c", DIGEST],
            cwd=pytestconfig.rootpath,
            env={**os.environ, "NUMBA_NUM_THREADS": threads},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        outputs.append(result.stdout)
    assert outputs[0] == outputs[1]
    points, own = map(int, outputs[0].split()[:2])
    assert points > 1000
    assert own > 1000


# The store of depth on disk


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 9), st.integers(1, 5))
@settings(max_examples=25)
def test_frame_store_returns_what_was_added(tmp_path_factory, seed, width, height, frames):
    rng = np.random.default_rng(seed)
    store = FrameStore(tmp_path_factory.mktemp("store"), (width, height))
    depths = rng.uniform(0, 9, (frames, height, width)).astype(np.float32)
    sure = rng.uniform(0, 1, (frames, height, width)).astype(np.float32)
    colors = rng.integers(0, 256, (frames, height, width, 3), np.uint8)
    for added in zip(depths, sure, colors, strict=True):
        store.add(*added)
    for place in rng.permutation(frames).tolist():
        np.testing.assert_array_equal(store.depth(place), depths[place])
        np.testing.assert_array_equal(store.color(place), colors[place])
        found = store.confidence(place)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, sure[place], atol=0.51 / 65_535)


# The kernels against plain Python


def random_views(rng: np.random.Generator, frames: int, size: tuple[int, int]):
    """Views of random blocky depth with gaps, from cameras that look about the same way."""
    width, height = size
    poses, depths = [], []
    for _ in range(frames):
        pose = np.eye(4)
        pose[:3, :3] = Rotation.from_rotvec(rng.normal(0, 0.15, 3)).as_matrix()
        pose[:3, 3] = rng.normal(0, 0.15, 3)
        coarse = rng.uniform(0.8, 3.0, (-(-height // 3), -(-width // 3)))
        depth = coarse.repeat(3, 0).repeat(3, 1)[:height, :width]
        depth = depth * (
            1
            + 0.02
            * rng.normal(size=2)
            @ np.indices((height, width)).reshape(2, -1).astype(float).reshape(2, height * width)
        ).reshape(height, width)
        depth = np.clip(depth + rng.normal(0, 0.002, depth.shape), 0.3, None)
        depth[rng.random(depth.shape) < 0.1] = 0
        poses.append(pose)
        depths.append(depth)
    return views_of(depths, np.stack(poses))


def projected(view: DepthMap, point: Array) -> tuple[float, float, float]:
    """Column, row and depth of a world point in a view. Column and row are NaN behind it."""
    R, t = view.world_from_camera[:3, :3], view.world_from_camera[:3, 3]
    x, y, z = R.T @ (point - t)
    if z <= NEAREST:
        return np.nan, np.nan, float(z)
    return view.K[0, 0] * x / z + view.K[0, 2], view.K[1, 1] * y / z + view.K[1, 2], float(z)


scene_seeds = st.integers(0, 2**32 - 1)
tiny = st.tuples(st.integers(2, 12), st.integers(2, 9))


@given(scene_seeds, tiny, st.integers(1, 3), st.sampled_from([0.05, 0.25, np.inf]))
@settings(max_examples=60)
def test_compare_matches_plain_python(seed, size, stride, farthest):
    maps = DepthMaps(random_views(np.random.default_rng(seed), 2, size), 0.1, 0.2)
    here, there = maps(0), maps(1)
    z, behind = compare(here, there, stride, farthest)
    expected = []
    R, t = here.world_from_camera[:3, :3], here.world_from_camera[:3, 3]
    for v in range(0, size[1], stride):
        for u in range(0, size[0], stride):
            depth = float(here.depth[v, u])
            if depth <= 0:
                continue
            K = here.K
            local = [(u + 0.5 - K[0, 2]) / K[0, 0] * depth, (v + 0.5 - K[1, 2]) / K[1, 1] * depth]
            a, b, far = projected(there, R @ [*local, depth] + t)
            if not (0 <= a < size[0] and 0 <= b < size[1]):
                continue
            i, j = int(a), int(b)
            measured, along_x, along_y, _ = there.pixels[j, i].astype(np.float64)
            if (
                measured <= 0
                or np.float32(measured) * np.float32(abs(along_x) + abs(along_y)) > 0.02
            ):
                continue
            inverse = 1 / measured + along_x * (a - i - 0.5) + along_y * (b - j - 0.5)
            if inverse > 0 and abs(1 / inverse - far) <= farthest * far:
                expected.append((far, 1 / inverse - far))
    assert len(z) == len(expected)
    np.testing.assert_allclose(
        np.stack([z, behind], axis=1).reshape(-1, 2), np.reshape(expected, (-1, 2)), atol=1e-6
    )


@given(scene_seeds, tiny)
@settings(max_examples=40)
def test_pixel_surfaces_match_plain_python(seed, size):
    view = DepthMaps(random_views(np.random.default_rng(seed), 1, size), 0.1, 0.1)(0)
    width, height = size
    for v in range(height):
        for u in range(width):
            around = view.depth[max(v - 1, 0) : v + 2, max(u - 1, 0) : u + 2]
            least = around[around > 0].min(initial=np.inf)
            assert view.pixels[v, u, 3] == (least if view.depth[v, u] > 0 else 0)
            if not view.trusted[v, u]:
                assert not view.pixels[v, u, :3].any()
                continue
            assert view.pixels[v, u, 0] == view.depth[v, u]
            for axis, (dv, du) in enumerate(((0, 1), (1, 0))):
                steps = []
                for a, b in pairwise([(v - dv, u - du), (v, u), (v + dv, u + du)]):
                    if min(*a, *b) < 0 or max(a[0], b[0]) >= height or max(a[1], b[1]) >= width:
                        continue
                    if view.trusted[a] and view.trusted[b]:
                        steps.append(1 / float(view.depth[b]) - 1 / float(view.depth[a]))
                wanted = min(steps, key=abs, default=0.0)
                assert abs(view.pixels[v, u, 1 + axis]) == pytest.approx(abs(wanted), abs=1e-6)


@given(
    scene_seeds,
    tiny,
    st.integers(1, 12),
    st.sampled_from([(0.0, 0.0, 0.0), (0.01, 0.0, 0.004)]),
    st.integers(1, 9),
)
@settings(max_examples=40)
def test_evidence_matches_plain_python(seed, size, frames, noise, looks):
    rng = np.random.default_rng(seed)
    maps = DepthMaps(random_views(rng, frames, size), 0.1, 0.1)
    tolerance = Tolerance(NoiseModel(*noise), 0.02, looks)
    points = rng.uniform([-1, -1, -0.5], [1, 1, 3.2], (60, 3))
    cloud = into_blocks(points.astype(np.float32))
    found = gather_evidence(cloud, maps, tolerance)
    for n, point in enumerate(cloud.points.astype(np.float64)):
        supports = contradictions = doubts = 0
        total, moves = 0.0, np.zeros(3)
        for frame in spread(maps.frames):
            view = maps(frame)
            if supports + contradictions >= looks:
                break
            u, v, z = projected(view, point)
            if not (0 <= u < size[0] and 0 <= v < size[1]):
                continue
            i, j = int(u), int(v)
            seen_depth, along_x, along_y, least = view.pixels[j, i].astype(np.float64)
            if seen_depth <= 0:
                doubts += least > 0
                continue
            inverse = 1 / seen_depth + along_x * (u - i - 0.5) + along_y * (v - j - 0.5)
            behind = (1 / inverse if inverse > 0 else seen_depth) - z
            slope = seen_depth**2 * (abs(along_x) + abs(along_y))
            sigma = float(tolerance.noise.sigma(z))
            allowed = SIGMAS * sigma + SLANT * slope + 0.02
            if abs(behind) <= allowed:
                supports += 1
                weight = 1 / (sigma**2 + (SLANT_SIGMA * slope) ** 2 + 1e-8)
                bound = SIGMAS * sigma + 0.02
                ray = (point - view.world_from_camera[:3, 3]) / z
                moves += weight * np.clip(behind, -bound, bound) * ray
                total += weight
            elif least > z + allowed:
                contradictions += 1
            elif behind > 0:
                doubts += 1
        assert (found.supports[n], found.contradictions[n]) == (supports, contradictions)
        assert found.doubts[n] == doubts
        assert found.moves[n, 0] == pytest.approx(total, rel=1e-4)
        if supports:
            np.testing.assert_allclose(found.displacement()[n], moves / total, atol=1e-5)
        else:
            assert not found.displacement()[n].any()


@given(scene_seeds, tiny, st.sampled_from([0.01, 0.05, 0.4]))
@settings(max_examples=40)
def test_rendered_surface_matches_plain_python(seed, size, spacing):
    rng = np.random.default_rng(seed)
    view = DepthMaps(random_views(rng, 1, size), 0.1, 0.1)(0)
    cloud = into_blocks(rng.uniform([-2, -2, -1], [2, 2, 4], (80, 3)).astype(np.float32))
    width, height = size
    found = _render(
        cloud.points,
        cloud.starts,
        cloud.lower,
        cloud.upper,
        view.camera(),
        (height, width),
        spacing,
    )
    expected = np.full((height, width), np.inf)
    for point in cloud.points.astype(np.float64):
        u, v, z = projected(view, point)
        if not np.isfinite(u):
            continue
        reach = min(int(0.6 * spacing * view.K[0, 0] / z + 0.5), WIDEST_SPLAT)
        rows = np.abs(np.arange(height) - np.floor(v)) <= reach
        columns = np.abs(np.arange(width) - np.floor(u)) <= reach
        splat = np.ix_(rows, columns)
        expected[splat] = np.minimum(expected[splat], z)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@given(st.integers(1, 300))
def test_spread_visits_each_frame_once_and_evenly(count):
    frames = np.arange(count) * 3 + 1
    order = list(spread(frames))
    assert sorted(order) == frames.tolist()
    if count >= 16:
        first = np.sort(order[:8])
        assert np.diff(first).max() <= 3 * (count // 4 + 2)
