"""Rays followed 64 at a time, compared with single rays and with rational arithmetic."""

from __future__ import annotations

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_visibility import brute_force, centre, focal, intrinsics, lowest

from occgen_hub.config import Config
from occgen_hub.occupancy import ray_packets
from occgen_hub.occupancy.grid import Grid
from occgen_hub.occupancy.point_blocks import into_blocks
from occgen_hub.occupancy.ray_packets import RayPackets, follow_packets, packets_if_repeated
from occgen_hub.occupancy.visibility import OBSERVED, OCCUPIED, first_occupied, observe, trace


@pytest.fixture(autouse=True)
def _clear_camera_cache():
    ray_packets._camera.cache_clear()


def by_packets(
    grid: Grid,
    K: np.ndarray,
    size: tuple[int, int],
    occupied: np.ndarray,
    unmeasured: np.ndarray | None = None,
) -> np.ndarray:
    """(cells,) uint8: the state after all rays are followed. Changes `unmeasured`."""
    state = occupied.astype(np.uint8).ravel() * OCCUPIED
    made = RayPackets.of(grid, K, size)
    assert made is not None
    follow_packets(made, state, unmeasured)
    return state


def by_single_rays(
    grid: Grid, K: np.ndarray, size: tuple[int, int], occupied: np.ndarray
) -> np.ndarray:
    state = occupied.astype(np.uint8).ravel() * OCCUPIED
    first_occupied(grid, K, size, state)
    return state


@settings(max_examples=100)
@given(
    lower=st.tuples(lowest, lowest, lowest),
    shape=st.tuples(*[st.integers(1, 7)] * 3),
    voxel_size=st.sampled_from([1.0, 0.5, 0.1, 0.3]),
    K=st.builds(intrinsics, focal, focal, centre, centre),
    size=st.tuples(st.integers(1, 11), st.integers(1, 11)),
    fill=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    holes=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_packets_equal_brute_force(lower, shape, voxel_size, K, size, fill, holes, seed):
    grid = Grid(tuple(x * voxel_size for x in lower), voxel_size, shape)
    rng = np.random.default_rng(seed)
    occupied, unmeasured = rng.random(shape) < fill, rng.random(size[::-1]) < holes
    state = by_packets(grid, K, size, occupied, unmeasured.copy())
    assert np.array_equal(state & OCCUPIED, occupied.ravel())
    seen = ((state & OBSERVED) > 0).reshape(shape)
    assert np.array_equal(seen, brute_force(grid, K, size, occupied, unmeasured))
    if not holes:
        assert np.array_equal(by_packets(grid, K, size, occupied), state)


@pytest.mark.parametrize("fill", [0.0, 0.0005, 0.01])
@pytest.mark.parametrize(
    ("config", "K", "size"),
    [
        # The camera on a grid corner and square pixels: ties on every diagonal.
        (Config(), intrinsics(120, 120, 64, 48), (128, 96)),
        # A wide camera, as in the real trajectory, and a size that is no multiple of 8.
        (Config(), intrinsics(58.3, 61.7, 79.5, 44.25), (157, 91)),
        # The camera outside the grid: rays enter the grid at many distances.
        (Config(pc_range=(-1, -1, 0.5, 2, 1, 3)), intrinsics(71, 73, 60, 50), (121, 99)),
    ],
)
def test_packets_equal_single_rays(config, K, size, fill):
    grid, rng = Grid.of(config), np.random.default_rng(3)
    occupied = rng.random(grid.shape) < fill
    assert np.array_equal(
        by_packets(grid, K, size, occupied), by_single_rays(grid, K, size, occupied)
    )
    unmeasured = rng.random(size[::-1]) < 0.2
    single, left_out = occupied.astype(np.uint8).ravel() * OCCUPIED, unmeasured.copy()
    in_single = trace(grid, K, size, single, unmeasured)  # The camera's first frame.
    assert np.array_equal(by_packets(grid, K, size, occupied, left_out), single)
    assert np.array_equal(np.flatnonzero(left_out), in_single)
    assert 0 < len(in_single) < unmeasured.sum() or not fill


def test_thread_count_does_not_change_the_result():
    grid = Grid.of(Config(voxel_size=0.05))
    occupied = np.random.default_rng(4).random(grid.shape) < 0.01
    K, size = intrinsics(60, 61, 40, 30), (80, 60)
    before = numba.get_num_threads()
    states = []
    try:
        for threads in {1, before}:
            numba.set_num_threads(threads)
            states.append(by_packets(grid, K, size, occupied))
    finally:
        numba.set_num_threads(before)
    assert all(np.array_equal(state, states[0]) for state in states)


def test_repeated_camera_uses_packets_with_equal_results():
    rng = np.random.default_rng(5)
    cloud = into_blocks(rng.uniform(-2, 3, (4000, 3)).astype(np.float32))
    grid = Grid.of(Config(voxel_size=0.05))
    K, size = intrinsics(60, 61, 40, 30), (80, 60)
    frames = [observe(grid, cloud, np.eye(4), K, size) for _ in range(7)]
    assert packets_if_repeated(grid, K, size) is not None
    for frame in frames:
        assert np.array_equal(frame.visible, frames[0].visible)
        assert np.array_equal(frame.observed, frames[0].observed)


def test_changing_cameras_use_no_packets():
    grid = Grid.of(Config(voxel_size=0.1))
    for focal_length in range(20, 40):
        assert packets_if_repeated(grid, intrinsics(focal_length, 30, 16, 16), (32, 32)) is None


def test_prepare_builds_packets_for_the_most_common_camera():
    grid, size = Grid.of(Config(voxel_size=0.1)), (32, 32)
    most, other = intrinsics(30, 31, 16, 16), intrinsics(20, 21, 16, 16)
    ray_packets.prepare(grid, np.stack([other, *[most] * 5, other]), size)
    assert packets_if_repeated(grid, most, size) is not None
    assert packets_if_repeated(grid, other, size) is None
    ray_packets.prepare(grid, np.stack([other] * 4), size)  # Too few frames for packets to pay.
    assert packets_if_repeated(grid, other, size) is None
    ray_packets.prepare(grid, np.zeros((0, 3, 3)), size)


def test_packets_above_the_cell_limit_are_not_built(monkeypatch):
    monkeypatch.setattr(ray_packets, "_MAX_CELLS", 1000)
    grid = Grid.of(Config(voxel_size=0.1))
    K, size = intrinsics(30, 30, 16, 16), (64, 32)
    assert RayPackets.of(grid, K, size) is None
    frames = [
        observe(grid, into_blocks(np.zeros((0, 3), np.float32)), np.eye(4), K, size)
        for _ in range(6)
    ]
    assert all(np.array_equal(frame.observed, frames[0].observed) for frame in frames)


def test_rays_that_miss_the_grid_see_nothing():
    grid = Grid((5.0, 5.0, 0.0), 1.0, (2, 2, 2))
    state = by_packets(grid, intrinsics(100, 100, 4, 4), (9, 9), np.ones(grid.shape, bool))
    assert not (state & OBSERVED).any()
