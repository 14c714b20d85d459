"""The visibility kernel compared cell by cell with a traversal in rational arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import numba
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from occgen_hub.config import Config
from occgen_hub.occupancy.grid import Grid
from occgen_hub.occupancy.point_blocks import into_blocks
from occgen_hub.occupancy.visibility import OBSERVED, OCCUPIED, observe, trace


def crossed_cells(grid: Grid, direction: list[Fraction]) -> list[tuple[int, int, int]]:
    """Every cell inside the grid that the ray from the camera crosses, in order.

    Walks the unbounded lattice one crossing at a time in exact arithmetic, starting at the camera.
    Cells outside the grid are walked as well, but not returned.
    """
    origin = [Fraction(float(o)) for o in grid.camera_in_cells]
    cell = [math.floor(o) for o in origin]
    ahead = [1 if d > 0 else 0 for d in direction]
    cells = []
    for _ in range(20_000):
        if all(0 <= c < n for c, n in zip(cell, grid.shape, strict=True)):
            cells.append((cell[0], cell[1], cell[2]))
        elif cells or any(
            (d >= 0 and c >= n) or (d <= 0 and c < 0)
            for c, n, d in zip(cell, grid.shape, direction, strict=True)
        ):
            break
        times = [
            (Fraction(c + a) - o) / d if d else None
            for c, a, o, d in zip(cell, ahead, origin, direction, strict=True)
        ]
        axis = min((t, n) for n, t in enumerate(times) if t is not None)[1]
        cell[axis] += 1 if direction[axis] > 0 else -1
    else:
        raise AssertionError("the walk did not end")
    return cells


def brute_force(
    grid: Grid,
    K: np.ndarray,
    size: tuple[int, int],
    occupied: np.ndarray,
    unmeasured: np.ndarray | None = None,
) -> np.ndarray:
    """(nx, ny, nz) bool: the cells that a ray reaches before or at its first occupied cell.

    Without rays of unmeasured pixels, (H, W) bool, that meet no occupied cell.
    """
    fx, fy, cx, cy = (Fraction(float(x)) for x in (K[0, 0], K[1, 1], K[0, 2], K[1, 2]))
    observed = np.zeros(grid.shape, bool)
    half = Fraction(1, 2)
    for v in range(size[1]):
        for u in range(size[0]):
            direction = [(u + half - cx) / fx, (v + half - cy) / fy, Fraction(1)]
            cells = list(crossed_cells(grid, direction))
            if unmeasured is not None and unmeasured[v, u] and not any(map(occupied.item, cells)):
                continue
            for cell in cells:
                observed[cell] = True
                if occupied[cell]:
                    break
    return observed


def kernel(
    grid: Grid,
    K: np.ndarray,
    size: tuple[int, int],
    occupied: np.ndarray,
    unmeasured: np.ndarray | None = None,
) -> np.ndarray:
    state = occupied.astype(np.uint8).ravel() * OCCUPIED
    trace(grid, K, size, state, unmeasured)
    assert np.array_equal(state & OCCUPIED, occupied.ravel())
    return ((state & OBSERVED) > 0).reshape(grid.shape)


def intrinsics(fx: float, fy: float, cx: float, cy: float) -> np.ndarray:
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], np.float32).astype(np.float64)


# Whole and half numbers give rays along axes and through edges and corners; others do not.
def fine(low: int, high: int) -> st.SearchStrategy[float]:
    """Numbers in steps of 2^-16, the precision of pixel coordinates in float32."""
    return st.integers(low << 16, high << 16).map(lambda n: n / 65536)


focal = st.sampled_from([0.5, 1.0, 2.0, 3.0, 4.0]) | st.floats(0.375, 9.0, width=32)
centre = st.sampled_from([0.0, 0.5, 1.0, 2.0, 2.5, 3.0]) | fine(-3, 8)
lowest = st.sampled_from([-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, -0.5, 0.5]) | fine(-4, 4)


@settings(max_examples=400)
@given(
    lower=st.tuples(lowest, lowest, lowest),
    shape=st.tuples(*[st.integers(1, 7)] * 3),
    voxel_size=st.sampled_from([1.0, 0.5, 0.1, 0.3]),
    K=st.builds(intrinsics, focal, focal, centre, centre),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    fill=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    holes=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**16),
)
# The camera on a grid corner and square pixels: every diagonal ray meets edges.
@example((-2.0, -2.0, 0.0), (4, 4, 4), 1.0, intrinsics(2, 2, 2, 2), (4, 4), 0.0, 0.0, 0)
@example((-2.0, -2.0, 1.0), (4, 4, 4), 1.0, intrinsics(1, 1, 2, 2), (4, 4), 0.0, 0.0, 0)
# A ray straight along z on the boundary between cells.
@example((-2.0, -2.0, -1.0), (4, 4, 4), 1.0, intrinsics(1, 1, 0.5, 0.5), (1, 1), 0.0, 0.0, 0)
# Steps of a third of a cell: thirds have no exact binary form.
@example((-1.0, -1.0, 0.0), (6, 6, 7), 0.3, intrinsics(3, 3, 0, 0), (6, 6), 0.0, 0.0, 0)
def test_kernel_equals_brute_force(lower, shape, voxel_size, K, size, fill, holes, seed):
    grid = Grid(tuple(x * voxel_size for x in lower), voxel_size, shape)
    rng = np.random.default_rng(seed)
    occupied, unmeasured = rng.random(shape) < fill, rng.random(size[::-1]) < holes
    expected = brute_force(grid, K, size, occupied, unmeasured)
    assert np.array_equal(kernel(grid, K, size, occupied, unmeasured), expected)
    if not holes:
        assert np.array_equal(kernel(grid, K, size, occupied), expected)


def test_rays_without_depth_are_left_out_unless_they_meet_a_surface():
    """A wall in the left half of the view; the camera has no depth in two rows of pixels."""
    grid = Grid((-2.0, -2.0, 0.0), 1.0, (4, 4, 4))
    K, size = intrinsics(8, 8, 4, 4), (8, 8)
    state = np.zeros(grid.shape, np.uint8)
    state[:2, :, 3] = OCCUPIED
    unmeasured = np.zeros((8, 8), bool)
    unmeasured[1:3] = True
    for _ in range(6):  # First ray by ray, then in packets.
        marked = state.ravel().copy()
        left_out = trace(grid, K, size, marked, unmeasured)
        assert left_out.tolist() == [8 * v + u for v in (1, 2) for u in range(4, 8)]
        assert (marked[state.ravel() > 0] & OBSERVED).all()
        assert unmeasured[1:3].all()  # The argument is unchanged.


@pytest.mark.parametrize("fill", [0.0, 0.0005, 0.01])
def test_kernel_equals_brute_force_on_the_default_grid(fill):
    grid = Grid.of(Config())
    assert grid.shape == (200, 125, 200)
    assert grid.camera_in_cells.tolist() == [100.0, 75.0, 25.0]
    K = intrinsics(7.1, 6.3, 6.0, 4.0)
    occupied = np.random.default_rng(1).random(grid.shape) < fill
    assert np.array_equal(
        kernel(grid, K, (12, 8), occupied), brute_force(grid, K, (12, 8), occupied)
    )


def test_kernel_equals_brute_force_for_rays_through_corners():
    """fx = fy and the camera on a grid corner: ties on every diagonal, resolved x, y, z."""
    grid = Grid.of(Config())
    K = intrinsics(12.0, 12.0, 8.0, 6.0)
    occupied = np.zeros(grid.shape, bool)
    assert np.array_equal(
        kernel(grid, K, (16, 12), occupied), brute_force(grid, K, (16, 12), occupied)
    )


def test_a_corner_is_crossed_x_first_then_y_then_z():
    grid = Grid((0.0, 0.0, 0.0), 1.0, (2, 2, 2))
    seen = kernel(grid, intrinsics(1, 1, -0.5, -0.5), (1, 1), np.zeros(grid.shape, bool))
    assert np.argwhere(seen).tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_nothing_behind_a_wall_is_observed():
    grid = Grid((-1.0, -1.0, 0.0), 0.1, (20, 20, 30))
    occupied = np.zeros(grid.shape, bool)
    occupied[:, :, 12] = True
    seen = kernel(grid, intrinsics(20, 20, 20, 20), (40, 40), occupied)
    assert seen[:, :, :13].any()
    assert seen[10, 10, 12]
    assert not seen[:, :, 13:].any()


def test_thread_count_does_not_change_the_result():
    rng = np.random.default_rng(5)
    points = rng.uniform(-2, 3, (4000, 3)).astype(np.float32)
    grid = Grid.of(Config(voxel_size=0.05))
    K = intrinsics(60, 61, 40, 30)
    results = []
    before = numba.get_num_threads()
    try:
        for threads in {1, before}:
            numba.set_num_threads(threads)
            results.append(observe(grid, into_blocks(points), np.eye(4), K, (80, 60)))
    finally:
        numba.set_num_threads(before)
    for result in results[1:]:
        assert np.array_equal(result.visible, results[0].visible)
        assert np.array_equal(result.observed, results[0].observed)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**16), scale=st.sampled_from([0.3, 1.0, 4.0]))
def test_occupied_cells_are_those_that_hold_a_point(seed, scale):
    """Point blocks only leave out points outside the grid."""
    rng = np.random.default_rng(seed)
    points = rng.normal(0, scale, (500, 3)).astype(np.float32)
    angle = rng.uniform(0, 6)
    pose = np.eye(4)
    pose[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    pose[:3, 3] = rng.normal(0, 1, 3)
    grid = Grid.of(Config(voxel_size=0.25))
    local = (np.c_[points.astype(np.float64), np.ones(len(points))] @ np.linalg.inv(pose).T)[:, :3]
    index = np.floor((local - np.asarray(grid.lower)) / grid.voxel_size).astype(int)
    inside = ((index >= 0) & (index < np.asarray(grid.shape))).all(axis=1)
    expected = np.zeros(grid.shape, bool)
    expected[tuple(index[inside].T)] = True

    state = np.empty(grid.cells, np.uint8)
    frame = observe(
        grid, into_blocks(points), pose, intrinsics(40, 40, 32, 24), (64, 48), state=state
    )
    found = (state & OCCUPIED).reshape(grid.shape) > 0
    assert np.array_equal(found, expected)
    observed = np.unpackbits(frame.observed)[: grid.cells].astype(bool)
    assert np.array_equal(np.flatnonzero(observed & expected.ravel()), frame.visible)


def test_padding_bits_are_not_observed():
    grid = Grid((-0.5, -0.5, 0.0), 1.0, (1, 1, 3))
    frame = observe(
        grid,
        into_blocks(np.zeros((0, 3), np.float32)),
        np.eye(4),
        intrinsics(1, 1, 0.5, 0.5),
        (1, 1),
    )
    assert frame.observed.tolist() == [0b11100000]
    assert frame.visible.tolist() == []
