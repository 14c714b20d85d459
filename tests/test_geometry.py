"""Poses, cameras and clouds, compared with plain formulas and with Open3D."""

from __future__ import annotations

import numpy as np
import open3d as o3d
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from occgen_hub.errors import SourceError
from occgen_hub.geometry.camera import (
    continues,
    intrinsics_problem,
    scale_intrinsics,
    unproject,
)
from occgen_hub.geometry.cloud import Cloud, VoxelDownsample, voxel_downsample
from occgen_hub.geometry.ply import read_ply, write_ply
from occgen_hub.geometry.poses import from_opengl, made_rigid, rigidity_error, transform

seeds = st.integers(0, 2**32 - 1)


def pose(rng: np.random.Generator) -> np.ndarray:
    result = np.eye(4)
    result[:3, :3] = Rotation.random(random_state=rng).as_matrix()
    result[:3, 3] = rng.normal(0, 5, 3)
    return result


@given(seeds)
def test_opengl_conversion_is_its_own_inverse(seed):
    poses = np.stack([pose(np.random.default_rng([seed, n])) for n in range(3)])
    assert np.array_equal(from_opengl(from_opengl(poses)), poses)
    assert (rigidity_error(from_opengl(poses)) < 1e-12).all()


def test_an_opengl_camera_looks_along_minus_z():
    looking = from_opengl(np.eye(4)[None])[0]
    assert np.array_equal(looking[:3, 2], [0, 0, -1])  # forward
    assert np.array_equal(looking[:3, 1], [0, -1, 0])  # down
    assert np.array_equal(looking[:3, 0], [1, 0, 0])  # right


@pytest.mark.parametrize(
    ("spoil", "least"),
    [
        (lambda T: T * [[1, 1, 1, np.nan]], np.inf),
        (lambda T: T * np.inf, np.inf),
        (lambda T: np.diag([1.0, 1.0, -1.0, 1.0]) @ T, 1.9),
        (lambda T: np.diag([1.01, 1.01, 1.01, 1.0]) @ T, 0.02),
        (lambda T: T + np.eye(4)[[3, 0, 1, 2]], 0.5),
        (lambda T: T * 1e200, 1e3),
    ],
    ids=["nan", "inf", "mirrored", "scaled", "last row", "huge"],
)
def test_rigidity_error_finds_poses_that_are_not_rigid(spoil, least):
    good = pose(np.random.default_rng(0))
    with np.errstate(invalid="ignore"):
        bad = spoil(good)
    error = rigidity_error(np.stack([good, bad]))
    assert error[0] < 1e-12
    assert error[1] >= least


@given(seeds, st.integers(2, 4))
def test_poses_with_few_digits_are_made_rigid(seed, digits):
    rng = np.random.default_rng(seed)
    exact = np.stack([pose(rng) for _ in range(3)])
    single = exact.astype(np.float32).astype(np.float64)
    assert np.array_equal(made_rigid(single), single)
    rounded = np.round(exact, digits)
    found = made_rigid(rounded)
    changed = rigidity_error(rounded) > 1e-5
    assert (rigidity_error(found[changed]) < 1e-12).all()
    assert np.array_equal(found[~changed], rounded[~changed])
    assert np.array_equal(found[:, :3, 3], rounded[:, :3, 3])
    assert np.abs(found - exact).max() < 3 * 10.0**-digits


@settings(max_examples=50)
@given(seeds)
def test_unprojected_points_project_onto_their_pixel_centres(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(2, 20, 2)
    K = np.array(
        [[rng.uniform(5, 300), 0, width / 2], [0, rng.uniform(5, 300), height / 2], [0, 0, 1]]
    )
    depth = rng.uniform(0, 8, (height, width))
    points, pixels = unproject(depth, K, (0.5, 6.0))
    assert np.array_equal(np.sort(pixels), np.flatnonzero((depth >= 0.5) & (depth <= 6.0)))
    projected = points @ K.T
    v, u = np.divmod(pixels, width)
    np.testing.assert_allclose(projected[:, 0] / projected[:, 2], u + 0.5, atol=1e-9)
    np.testing.assert_allclose(projected[:, 1] / projected[:, 2], v + 0.5, atol=1e-9)
    np.testing.assert_array_equal(points[:, 2], depth.ravel()[pixels])


def test_scaled_intrinsics_see_the_same_ray():
    K = np.array([[168.05, 0, 240], [0, 192.8, 135], [0, 0, 1]])
    scaled = scale_intrinsics(K, 1.0, 272 / 270)
    ray = np.linalg.inv(K) @ [100.0, 50.0, 1.0]
    np.testing.assert_allclose(scaled @ ray, [100.0, 50.0 * 272 / 270, 1.0])


@pytest.mark.parametrize(
    ("place", "value", "word"),
    [
        ((0, 0), 0.0, "fx 0"),
        ((1, 1), -5.0, "fy -5"),
        ((0, 2), np.nan, "finite"),
        ((0, 1), 2.0, "skew"),
        ((2, 2), 0.0, "last row"),
    ],
)
def test_problem_of_invalid_intrinsics_is_named(place, value, word):
    K = np.array([[168.05, 0, 240], [0, 192.8, 135], [0, 0, 1]])
    assert intrinsics_problem(K) is None
    K[place] = value
    assert word in intrinsics_problem(K)


def plane_depth(
    normal: list[float], distance: float, K: np.ndarray, size: tuple[int, int]
) -> np.ndarray:
    v, u = np.mgrid[: size[1], : size[0]] + 0.5
    rays = np.stack([(u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1], np.ones_like(u)], axis=-1)
    return distance / (rays @ np.asarray(normal, float))


def test_slanted_plane_has_no_depth_edges():
    K = np.array([[168.05, 0, 240], [0, 192.8, 135], [0, 0, 1]])
    floor = plane_depth([0, 1, 0.02], 0.44, K, (480, 270))[150:]
    assert floor.max() > 4
    assert continues(floor, 0.03).all()
    windows = np.lib.stride_tricks.sliding_window_view(floor, (3, 3))
    spread = (windows.max((2, 3)) - windows.min((2, 3))) / floor[1:-1, 1:-1]
    assert (spread > 0.03).mean() > 0.3  # the usual rule would lose much of this floor


def test_pixel_between_two_surfaces_is_dropped():
    depth = np.full((20, 20), 1.0)
    depth[:, 10:] = 3.0
    # A clean jump: each side continues along the edge, except at the border of the image.
    assert continues(depth, 0.03)[1:-1].all()
    depth[7, 10] = 2.0
    kept = continues(depth, 0.03)[1:-1]
    assert not kept[6, 10]
    assert kept.sum() == kept.size - 3  # its two neighbours on the edge have no continuation either


def test_pixels_without_depth_are_not_kept():
    depth = np.full((5, 5), 2.0)
    depth[2, 2] = 0.0
    assert not continues(depth, 0.03)[2, 2]


@settings(max_examples=30)
@given(seeds, st.sampled_from([0.05, 0.2, 1.0]), st.integers(1, 5))
def test_downsampling_equals_open3d(seed, size, batches):
    rng = np.random.default_rng(seed)
    points = rng.normal(0, 2, (3000, 3))
    # Open3D's voxels start half a voxel below the lowest point: add one that aligns them to ours.
    lowest = np.floor(points.min(axis=0) / size - 1) * size + size / 2
    points = np.concatenate([lowest[None], points])
    colors = rng.integers(0, 256, (len(points), 3)).astype(np.uint8)
    thinned = VoxelDownsample(size)
    for part in np.array_split(np.arange(len(points)), batches):
        thinned.add(points[part], colors[part])
    ours = thinned.cloud()

    cloud = o3d.geometry.PointCloud(o3d.utility.Vector3dVector(points))
    cloud.colors = o3d.utility.Vector3dVector(colors / 255.0)
    theirs = cloud.voxel_down_sample(size)
    expected = np.concatenate([np.asarray(theirs.points), np.asarray(theirs.colors) * 255], axis=1)
    assert len(ours) == len(expected)
    distance, match = cKDTree(ours.points).query(expected[:, :3])
    assert distance.max() < 2e-5
    assert len(np.unique(match)) == len(expected)
    np.testing.assert_allclose(ours.colors[match], expected[:, 3:], atol=0.51)


def test_downsampling_tables_grow_as_needed():
    rng = np.random.default_rng(0)
    points = rng.uniform(-40, 40, (200_000, 3))
    colors = np.zeros((len(points), 3), np.uint8)
    thinned = VoxelDownsample(0.01)
    thinned.add(points, colors)
    thinned.add(points, colors)
    expected = len(np.unique(np.floor(points / 0.01).astype(int), axis=0))
    assert len(thinned.cloud()) == expected


def test_empty_cloud_is_downsampled():
    empty = Cloud(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.uint8))
    assert len(voxel_downsample(empty, 0.1)) == 0


def test_transform_is_rotation_then_translation():
    rng = np.random.default_rng(1)
    T, points = pose(rng), rng.normal(0, 1, (5, 3))
    expected = (T @ np.c_[points, np.ones(5)].T).T[:, :3]
    np.testing.assert_allclose(transform(T, points), expected)


def test_open3d_reads_our_ply(tmp_path):
    rng = np.random.default_rng(2)
    cloud = Cloud(
        rng.normal(0, 1, (100, 3)).astype(np.float32),
        rng.integers(0, 256, (100, 3)).astype(np.uint8),
    )
    write_ply(tmp_path / "a.ply", cloud)
    theirs = o3d.io.read_point_cloud(str(tmp_path / "a.ply"))
    assert np.array_equal(np.asarray(theirs.points, np.float32), cloud.points)
    np.testing.assert_allclose(np.asarray(theirs.colors) * 255, cloud.colors, atol=1e-6)
    ours = read_ply(tmp_path / "a.ply")
    assert np.array_equal(ours.points, cloud.points)
    assert np.array_equal(ours.colors, cloud.colors)


def test_read_ply_reads_files_of_open3d(tmp_path):
    points = np.random.default_rng(3).normal(0, 1, (50, 3))
    cloud = o3d.geometry.PointCloud(o3d.utility.Vector3dVector(points))
    o3d.io.write_point_cloud(str(tmp_path / "a.ply"), cloud)
    assert np.array_equal(read_ply(tmp_path / "a.ply").points, points.astype(np.float32))


BINARY = "ply\nformat binary_little_endian 1.0\n"
XYZ = "property float x\nproperty float y\nproperty float z\nend_header\n"


@pytest.mark.parametrize(
    "header",
    [
        "plywood",
        f"ply\nformat ascii 1.0\nelement vertex 1\n{XYZ}",
        f"{BINARY}element vertex 999999999999\n{XYZ}",
        f"{BINARY}element vertex 1\nproperty list uchar int x\nend_header\n",
        f"{BINARY}element face 1\nelement vertex 1\nend_header\n",
        f"{BINARY}element vertex 0\nproperty float x\n{XYZ}",
        f"{BINARY}element vertex 1\n{XYZ}",
    ],
    ids=["no ply", "ascii", "terabytes", "lists", "faces first", "x twice", "cut short"],
)
def test_invalid_ply_is_refused_quickly(tmp_path, header):
    (tmp_path / "bad.ply").write_text(header)
    with pytest.raises(SourceError, match=r"bad\.ply"):
        read_ply(tmp_path / "bad.ply")


def test_voxel_mean_of_many_points_is_exact():
    """Sums in float32 lose small additions above 2^24: white became black."""
    fused, rng = VoxelDownsample(0.1), np.random.default_rng(0)
    white = np.full((40_000, 3), 255, np.uint8)
    for _ in range(10):
        fused.add(0.3 + 0.1 * rng.random((40_000, 3)), white)
    cloud = fused.cloud()
    assert len(cloud) == 1
    np.testing.assert_array_equal(cloud.colors, white[:1])
    np.testing.assert_allclose(cloud.points, 0.35, atol=1e-3)


def test_block_table_grows_no_faster_than_the_blocks():
    """Points far apart have a block each, as when a network sees across a street."""
    fused = VoxelDownsample(0.01)
    points = np.arange(40_000.0)[:, None] * [1.0, 0.5, 0.25] * 0.2
    fused.add(points, np.zeros((len(points), 3), np.uint8))
    assert len(fused.cloud()) == len(points)
    assert len(fused._table) <= 16 * len(points)
