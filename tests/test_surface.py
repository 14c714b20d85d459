"""Holes filled along a Poisson surface, compared with known surfaces."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from occgen_hub.geometry.cloud import Cloud
from occgen_hub.geometry.surface import REACH, _centroids, poisson_surface

VOXEL = 0.04


def grey(points: NDArray[np.float64]) -> Cloud:
    return Cloud(points.astype(np.float32), np.full(points.shape, 128, np.uint8))


def plate(width: float, height: float, spacing: float = VOXEL / 2) -> NDArray[np.float64]:
    """(n, 3) points of the rectangle from (0, 0, 0) to (width, height, 0)."""
    across, up = np.arange(0, width, spacing), np.arange(0, height, spacing)
    x, y = np.meshgrid(across + spacing / 2, up + spacing / 2)
    return np.stack([x.ravel(), y.ravel(), np.zeros(x.size)], axis=-1)


def room(width: float, depth: float, height: float) -> NDArray[np.float64]:
    """(n, 3) points of the six faces of a box with a corner at the origin."""
    x, y, z = np.array([width, 0, 0]), np.array([0, depth, 0]), np.array([0, 0, height])
    faces = []
    for a, b, c in ((x, y, z), (y, z, x), (z, x, y)):
        flat = plate(np.linalg.norm(a), np.linalg.norm(b))
        face = flat[:, :1] * a / np.linalg.norm(a) + flat[:, 1:2] * b / np.linalg.norm(b)
        faces += [face, face + c]
    return np.concatenate(faces)


def sphere(count: int) -> NDArray[np.float64]:
    """(count, 3) evenly spread points of the unit sphere, along a golden-angle spiral."""
    z = 1 - (2 * np.arange(count) + 1) / count
    turn = np.pi * (3 - 5**0.5) * np.arange(count)
    ring = np.sqrt(1 - z**2)
    return np.stack([ring * np.cos(turn), ring * np.sin(turn), z], axis=-1)


def added(cloud: Cloud, closed: Cloud) -> NDArray[np.float32]:
    """The added points, which follow the unchanged measured ones."""
    n = len(cloud)
    assert closed.points.dtype == np.float32
    assert closed.colors.dtype == np.uint8
    assert np.array_equal(closed.points[:n], cloud.points)
    assert np.array_equal(closed.colors[:n], cloud.colors)
    return closed.points[n:]


def test_downsampled_sphere_is_filled():
    points = sphere(40_000)
    cloud = grey(points[np.random.default_rng(0).random(len(points)) < 0.3])
    closed = poisson_surface(cloud, np.array([[0.0, 0.0, 0.5]]), VOXEL)
    new = added(cloud, closed)
    assert np.abs(np.linalg.norm(new, axis=1) - 1).max() < VOXEL / 2
    assert np.abs(closed.colors[len(cloud) :].astype(int) - 128).max() <= 1

    def hidden(c: Cloud) -> float:
        """The share of the sphere that is farther than 0.625 voxels from every point."""
        return float((cKDTree(c.points).query(points)[0] > 0.625 * VOXEL).mean())

    assert hidden(cloud) > 0.05
    assert hidden(closed) < 0.001


@pytest.fixture(scope="module")
def room_with_openings() -> tuple[Cloud, Cloud]:
    """A room with a doorway of 1 x 2 m, a window and a hole of three voxels in the wall x = 0.

    Returns the cloud before and after filling.
    """
    points = room(3.0, 4.0, 2.4)
    wall = points[:, 0] == 0
    y, z = points[:, 1], points[:, 2]
    doorway = (np.abs(y - 1) < 0.5) & (z < 2)
    window = (np.abs(y - 2.4) < 0.3) & (np.abs(z - 1.5) < 0.3)
    hole = (np.abs(y - 3.4) < 1.5 * VOXEL) & (np.abs(z - 1.5) < 1.5 * VOXEL)
    cloud = grey(points[~(wall & (doorway | window | hole))])
    return cloud, poisson_surface(cloud, np.array([[1.5, 2.0, 1.2], [2.0, 3.0, 1.2]]), VOXEL)


def test_a_hole_of_a_few_voxels_is_closed(room_with_openings):
    cloud, closed = room_with_openings
    centre = [[0.0, 3.4, 1.5]]
    assert cKDTree(cloud.points).query(centre)[0] > VOXEL
    assert cKDTree(closed.points).query(centre)[0] < VOXEL / 2
    near = np.linalg.norm(added(cloud, closed) - np.float32(centre[0]), axis=1) < 2 * VOXEL
    assert np.abs(closed.points[len(cloud) :][near, 0]).max() < VOXEL / 4


def test_a_doorway_and_a_window_stay_open(room_with_openings):
    new = added(*room_with_openings)
    y, z = new[:, 1], new[:, 2]
    margin = VOXEL
    doorway = (np.abs(y - 1) < 0.5 - margin) & (z < 2 - margin) & (z > margin)
    window = (np.abs(y - 2.4) < 0.3 - margin) & (np.abs(z - 1.5) < 0.3 - margin)
    assert not (doorway & (np.abs(new[:, 0]) < 0.5)).any()
    assert not (window & (np.abs(new[:, 0]) < 0.5)).any()


def test_nothing_is_added_off_the_walls(room_with_openings):
    """The watertight surface also closes outside the room; that part is not used."""
    new = added(*room_with_openings)
    size = np.array([3.0, 4.0, 2.4])
    assert (np.minimum(np.abs(new), np.abs(new - size)).min(axis=1) < VOXEL / 2).all()
    assert ((new > -VOXEL / 2) & (new < size + VOXEL / 2)).all()


def test_a_plate_does_not_grow_beyond_its_rim():
    cloud = grey(plate(2.0, 1.5))
    new = added(cloud, poisson_surface(cloud, np.array([[1.0, 1.0, 2.0]]), VOXEL))
    assert (new[:, :2] > -VOXEL).all()
    assert (new[:, :2] < np.array([2.0, 1.5]) + VOXEL).all()
    assert np.abs(new[:, 2]).max(initial=0) < VOXEL / 2


def test_added_points_have_the_colours_around_them():
    points = plate(2.0, 1.0)
    hole = np.linalg.norm(points[:, :2] - [1.0, 0.5], axis=1) < 1.8 * VOXEL
    points = points[~hole]
    red = np.where(points[:, 0] < 1.0, 250, 10).astype(np.uint8)
    colors = np.stack([red, np.full_like(red, 80), 255 - red], axis=-1)
    closed = poisson_surface(
        Cloud(points.astype(np.float32), colors), np.array([[1.0, 0.5, 2.0]]), VOXEL
    )
    new, tint = closed.points[len(points) :], closed.colors[len(points) :].astype(int)
    assert len(new) > 0
    assert (tint[new[:, 0] < 1 - VOXEL, 0] > 128).all()
    assert (tint[new[:, 0] > 1 + VOXEL, 0] < 128).all()
    assert np.abs(tint[:, 1] - 80).max() <= 2


def test_holes_far_from_the_origin_are_filled():
    """Within the precision of float32: half a millimetre at 5 km."""
    points = sphere(10_000)[::2]
    offset = np.array([5000.0, -3000.0, 10.0])
    here = grey(points)
    there = grey(points + offset)
    new = added(here, poisson_surface(here, np.zeros((1, 3)), VOXEL))
    moved = added(there, poisson_surface(there, offset[None], VOXEL)) - offset
    assert len(new) > 1000
    assert abs(len(moved) / len(new) - 1) < 0.1
    assert np.abs(np.linalg.norm(moved, axis=1) - 1).max() < VOXEL / 2


DIGEST = """
import sys
sys.path.insert(0, "tests")
import hashlib
import numpy as np
from test_surface import VOXEL, grey, sphere
from occgen_hub.geometry.surface import poisson_surface
cloud = poisson_surface(grey(sphere(20_000)[::3]), np.zeros((2, 3)), VOXEL)
print(hashlib.sha256(cloud.points.tobytes() + cloud.colors.tobytes()).hexdigest())
"""


def test_equal_input_gives_equal_bytes_on_any_number_of_threads(pytestconfig):
    cloud = grey(sphere(20_000)[::3])
    digests = set()
    for _ in range(2):
        closed = poisson_surface(cloud, np.zeros((2, 3)), VOXEL)
        digests.add(hashlib.sha256(closed.points.tobytes() + closed.colors.tobytes()).hexdigest())
    result = subprocess.run(
        [sys.executable, "-c", DIGEST],
        cwd=pytestconfig.rootpath,
        env={**os.environ, "OMP_NUM_THREADS": "5" if os.cpu_count() != 5 else "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    digests.add(result.stdout.strip())
    assert len(closed) > len(cloud)
    assert len(digests) == 1


@pytest.mark.parametrize(
    "points",
    [
        np.zeros((0, 3)),
        np.random.default_rng(0).random((9, 3)),
        np.ones((100, 3)),
        np.linspace(0, 1, 500)[:, None] * [1.0, 2.0, 3.0] + [10.0, 0.0, 0.0],
        np.repeat([[0.0, 0.0, 0.0], [1.0, 2.0, 0.5]], 20, axis=0),
    ],
    ids=["empty", "nine points", "identical points", "a line", "two distinct points"],
)
def test_cloud_without_area_is_unchanged(points):
    cloud = grey(points)
    assert poisson_surface(cloud, np.zeros((1, 3)), VOXEL) is cloud


@pytest.mark.parametrize(
    "points",
    [
        np.random.default_rng(0).random((10, 3)),
        np.random.default_rng(1).random((20, 3)) * 3,
        np.random.default_rng(2).random((1000, 3)) * 1e-3,
        np.linspace(0, 1, 500)[:, None] * [1.0, 2.0, 3.0]
        + np.random.default_rng(3).normal(0, 1e-3, (500, 3)),
        pytest.param(
            np.concatenate([plate(0.5, 0.5), [[1000.0, 0.0, 0.0]]]), marks=pytest.mark.long
        ),
        np.concatenate([plate(0.5, 0.5)] * 2),
    ],
    ids=[
        "ten points",
        "twenty points",
        "one millimetre wide",
        "nearly a line",
        "an outlier at 1 km",
        "duplicate points",
    ],
)
def test_unusual_cloud_is_closed_near_its_points_without_output(points, capfd):
    cloud = grey(points)
    new = added(cloud, poisson_surface(cloud, np.array([[0.0, 0.0, 5.0]]), VOXEL))
    assert np.isfinite(new).all()
    # A point is the mean of samples in half a voxel, so it may be half a voxel farther away.
    distance = cKDTree(cloud.points).query(new)[0]
    assert distance.max(initial=0) <= (REACH + 0.5) * VOXEL
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("n", [1, 2, 5])
def test_centroids_are_those_of_equal_parts(n):
    weights = _centroids(n)
    assert weights.shape == (n * n, 3)
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    assert weights.min() > 0
    np.testing.assert_allclose(weights.mean(axis=0), 1 / 3)
    # 3 n times each centroid is a vector of whole numbers, different for each part.
    whole = np.rint(3 * n * weights)
    np.testing.assert_allclose(3 * n * weights, whole)
    assert len(np.unique(whole, axis=0)) == n * n


def test_density_cut_removes_sparse_parts(room_with_openings):
    cloud, closed = room_with_openings
    cameras = np.array([[1.5, 2.0, 1.2], [2.0, 3.0, 1.2]])
    cut = poisson_surface(cloud, cameras, VOXEL, 0.3)
    assert len(added(cloud, cut)) < len(added(cloud, closed))
