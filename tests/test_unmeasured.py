"""Rays of pixels without depth beyond the grid observe nothing unless they meet a surface."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from captures import write_seven_scenes
from scipy import sparse

import occgen_hub
from occgen_hub import Config, load_episode
from occgen_hub.builder import load_builder
from occgen_hub.occupancy.grid import Grid
from occgen_hub.occupancy.visibility import OCCUPIED, first_occupied
from occgen_hub.sample import make_sample

MASKS = "videos/chunk-000/observation.occ.mask"
FRAMES, BLIND = 4, 3


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sample whose sensor measures nothing beyond 1.6 m, and nothing at all in one frame."""
    out = tmp_path_factory.mktemp("short_range") / "tree"
    make_sample(out, trajectories=1, frames=FRAMES, seed=5)
    images = sorted(out.rglob("observation.images.depth/*.png"))
    assert len(images) >= FRAMES
    for path in images:
        depth = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        depth[depth > 16_000] = 0
        if path.stem == str(BLIND):
            depth[:] = 0
        cv2.imwrite(str(path), depth)
    return out


@pytest.fixture(scope="module")
def datasets(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The dataset with `unmeasured: unknown`, and the one with `free`, internnav's default."""
    out = tmp_path_factory.mktemp("short_range_built")
    for name, config in (("unknown", Config(unmeasured="unknown")), ("free", Config())):
        assert not occgen_hub.build("internnav", tree, out / name, config=config).failures
    return out / "unknown", out / "free"


def only_trajectory(dataset: Path) -> Path:
    (record,) = dataset.rglob("meta/occgen.json")
    return record.parent.parent


def exit_depths(grid: Grid, K: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) depth at which each ray leaves the grid: the largest at which it is still inside."""
    high = np.asarray(grid.lower) + grid.voxel_size * np.asarray(grid.shape)
    v, u = np.mgrid[: size[1], : size[0]] + 0.5
    rays = np.stack([(u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1], np.ones_like(u)], axis=-1)
    with np.errstate(divide="ignore"):
        return np.maximum(grid.lower / rays, high / rays).min(axis=-1)


def test_only_free_cells_on_rays_without_depth_become_unknown(datasets):
    unknown, free = (load_episode(only_trajectory(path)) for path in datasets)
    rows = sparse.load_npz(only_trajectory(datasets[0]) / MASKS / "left_out_sequence.npz")
    assert not (only_trajectory(datasets[1]) / MASKS / "left_out_sequence.npz").exists()
    for t in range(len(unknown)):
        ours, all_rays, depth = unknown.frame(t), free.frame(t), unknown.depth(t)
        left_out = rows[[t]].toarray()[0].reshape(depth.shape).astype(bool)
        state = np.zeros(ours.grid.cells, np.uint8)
        state[ours.columns] = OCCUPIED
        size = depth.shape[::-1]
        meets_nothing = first_occupied(ours.grid, unknown.intrinsics[t], size, state) < 0
        beyond = depth >= exit_depths(ours.grid, unknown.intrinsics[t], size)
        assert np.array_equal(left_out, meets_nothing & ~beyond)
        assert (meets_nothing & beyond).any() or t == BLIND
        assert left_out.any()
        assert np.array_equal(ours.columns, all_rays.columns)
        assert not (ours.mask & ~all_rays.mask).any()
        assert ours.mask.sum() < 0.9 * all_rays.mask.sum()
        if t == BLIND:  # What other frames measured is still seen.
            assert (depth == 0).all()
            assert len(ours.columns)


def test_both_datasets_are_valid_and_altered_rays_are_found(datasets, tmp_path):
    for path in datasets:
        assert occgen_hub.validate(path).valid
    copy = tmp_path / "altered"
    shutil.copytree(datasets[0], copy)
    path = only_trajectory(copy) / MASKS / "left_out_sequence.npz"
    rows = sparse.load_npz(path).tolil()
    rows[0, rows.rows[0][0]] = 0
    episode = load_episode(only_trajectory(copy))
    state = np.zeros(episode.grid.cells, np.uint8)
    state[episode.frame(1).columns] = OCCUPIED
    size = episode.depth(1).shape[::-1]
    meets = first_occupied(episode.grid, episode.intrinsics[1], size, state) >= 0
    rows[1, np.flatnonzero(meets)[0]] = 1
    sparse.save_npz(path, rows.tocsr())
    found = " ".join(finding.problem for finding in occgen_hub.validate(copy).findings)
    assert "frame 0: differs from the cells that the camera's rays observe" in found
    wide = sparse.csr_matrix((rows.shape[0], rows.shape[1] + 1), dtype=np.uint8)
    sparse.save_npz(path, wide)
    found = " ".join(finding.problem for finding in occgen_hub.validate(copy).findings)
    assert f"is a matrix of {wide.shape}, expected {rows.shape}" in found


def test_a_ray_that_meets_a_visible_cell_cannot_be_left_out(datasets, tmp_path):
    copy = tmp_path / "altered"
    shutil.copytree(datasets[0], copy)
    path = only_trajectory(copy) / MASKS / "left_out_sequence.npz"
    rows = sparse.load_npz(path)
    every_pixel = sparse.csr_matrix(np.ones(rows.shape, np.uint8))
    sparse.save_npz(path, every_pixel)
    found = " ".join(finding.problem for finding in occgen_hub.validate(copy).findings)
    assert "frame 0: has rays that meet a visible cell or miss the grid" in found


def test_depth_missing_in_a_capture_is_unknown_by_default(tree, datasets, tmp_path):
    builder = load_builder("internnav", tree)
    (ref,) = builder.episodes()
    write_seven_scenes(builder.read(ref), tmp_path / "room")
    out = tmp_path / "out"
    assert not occgen_hub.build("capture", tmp_path / "room", out).failures
    files = [only_trajectory(path) / MASKS / "left_out_sequence.npz" for path in (out, datasets[0])]
    captured, expected = (sparse.load_npz(path) for path in files)
    assert captured.shape == expected.shape
    assert abs(captured.nnz / expected.nnz - 1) < 0.1
    assert occgen_hub.validate(out).valid
