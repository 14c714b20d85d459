"""The three states of a scene: compared with the mesh, in files, and in training items."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from made_up import camera
from torch.utils.data import DataLoader

from occgen_hub import Mirror, OccupancyDataset, OccupancyStream, RotateYaw
from occgen_hub.errors import UsageError
from occgen_hub.geometry.poses import upright_pose
from occgen_hub.loading import Trajectory, trajectories
from occgen_hub.occupancy.grid import Grid
from occgen_hub.occupancy.states import FREE, OCCUPIED, UNKNOWN, FreeSpace
from occgen_hub.occupancy.visibility import FrameOccupancy
from occgen_hub.scene_states import states_file, states_files, write_states
from occgen_hub.validation import validate

sys.path.append(str(Path(__file__).parent.parent / "scripts"))

from accuracy_cells import crossed_cells

KEYS = ("occupancy", "mask", "labels", "visible", "pose", "grid_pose")


def triangles(tree: Path) -> np.ndarray:
    """(F, 3, 3) triangles of the sample's mesh in world metres."""
    import open3d

    mesh = open3d.io.read_triangle_mesh(str(tree / "ground_truth/mesh.ply"))
    return np.asarray(mesh.vertices)[np.asarray(mesh.triangles)]


def test_free_and_occupied_cells_agree_with_the_mesh(sample_tree, dataset):
    mesh = triangles(sample_tree)
    for path in trajectories(dataset):
        states = Trajectory.open(path).states()
        occupied, free = states.cells(OCCUPIED), states.cells(FREE)
        assert len(occupied) > 10_000
        assert len(free) > 100_000
        low = np.minimum(occupied.min(axis=0), free.min(axis=0))
        shape = np.maximum(occupied.max(axis=0), free.max(axis=0)) - low + 1
        size = states.voxel_size
        crossed = crossed_cells(low * size, size, tuple(shape), mesh)
        assert crossed[tuple((occupied - low).T)].mean() >= 0.98
        assert 1 - crossed[tuple((free - low).T)].mean() >= 0.98


def seen_free(cells: np.ndarray, size: float, grid: Grid, pose: np.ndarray, free: np.ndarray):
    """(n,) bool: whether the centres of (n, 3) world cells lie in cells that a frame saw free."""
    inside = ((cells + 0.5) * size - pose[:3, 3]) @ pose[:3, :3]
    place = np.floor((inside - np.asarray(grid.lower)) / size).astype(int)
    found = ((place >= 0) & (place < grid.shape)).all(axis=1)
    found[found] = free.reshape(grid.shape)[tuple(place[found].T)]
    return found


def cell_numbers(cells: np.ndarray) -> np.ndarray:
    """(n,) unique numbers for (n, 3) cells."""
    return ((cells + 5000) * [1 << 30, 1 << 15, 1]).sum(axis=1)


def test_free_cells_are_those_that_frames_observed(dataset):
    trajectory = Trajectory.open(trajectories(dataset)[1])
    states = trajectory.states()
    free, occupied = states.cells(FREE), states.cells(OCCUPIED)
    low, high = free.min(axis=0) - 5, free.max(axis=0) + 6
    cells = np.random.default_rng(0).integers(low, high, (300_000, 3))
    expected = np.zeros(len(cells), bool)
    poses = trajectory.world_from_camera()
    rows = zip(poses, trajectory.visible_frames(), trajectory.observed(), strict=True)
    for pose, visible, observed in rows:
        observed[visible] = False
        expected |= seen_free(cells, states.voxel_size, trajectory.grid, pose, observed)
    expected &= ~np.isin(cell_numbers(cells), cell_numbers(occupied))
    assert expected.sum() > 10_000
    np.testing.assert_array_equal(np.isin(cell_numbers(cells), cell_numbers(free)), expected)
    centres = np.floor(trajectory.scene_cells() / states.voxel_size).astype(int)
    np.testing.assert_array_equal(
        np.unique(cell_numbers(centres)), np.unique(cell_numbers(occupied))
    )


@pytest.mark.parametrize("shape", [(20, 13, 17), (9, 5, 30)])
def test_order_of_frames_does_not_change_the_states(shape):
    rng = np.random.default_rng(0)
    grid = Grid((-0.5, -0.3, -0.1), 0.05, shape)
    frames = []
    for _ in range(5):
        observed = np.packbits(rng.random(grid.cells) < 0.3)
        visible = np.flatnonzero(rng.random(grid.cells) < 0.1).astype(np.int32)
        pose = camera(rng.uniform(-3, 3, 3), rng.uniform(-3, 3, 3))
        frames.append((FrameOccupancy(visible, observed), pose))
    points = rng.uniform(-1, 1, (500, 3)).astype(np.float32)
    found = []
    for order in (frames, frames[::-1]):
        free = FreeSpace(grid)
        for frame, pose in order:
            free.add(frame, pose)
        found.append(free.states(points))
    assert found[0].equals(found[1])
    # Each frame alone, cell by cell.
    free, occupied = (cell_numbers(found[0].cells(state)) for state in (FREE, OCCUPIED))
    np.testing.assert_array_equal(
        np.unique(occupied), np.unique(cell_numbers(np.floor(points / 0.05).astype(int)))
    )
    expected = []
    for frame, pose in frames:
        seen = np.unpackbits(frame.observed, count=grid.cells).astype(bool)
        seen[frame.visible] = False
        pose = pose.astype(np.float32).astype(float)
        reach = np.arange(-35, 36)
        cells = np.stack(np.meshgrid(reach, reach, reach, indexing="ij"), -1).reshape(-1, 3)
        cells += np.floor(pose[:3, 3] / 0.05).astype(int)
        expected.append(cell_numbers(cells[seen_free(cells, 0.05, grid, pose, seen)]))
    expected = np.setdiff1d(np.concatenate(expected), occupied)
    np.testing.assert_array_equal(np.sort(free), expected)


def looked_up_labels(trajectory: Trajectory, grid: Grid, pose: np.ndarray) -> np.ndarray:
    """Labels of every 37th cell of a grid, looked up in the scene's cells; 254 elsewhere."""
    states = trajectory.states()
    known = {tuple(cell): 0 for cell in states.cells(FREE).tolist()}
    known |= {tuple(cell): 1 for cell in states.cells(OCCUPIED).tolist()}
    labels = np.full(grid.cells, 254, np.uint8)
    columns = np.arange(0, grid.cells, 37)
    centres = grid.centres(columns).astype(float) @ pose[:3, :3].T + pose[:3, 3]
    cells = np.floor(centres / states.voxel_size).astype(int)
    labels[columns] = [known.get(cell, 255) for cell in map(tuple, cells.tolist())]
    return labels.reshape(grid.shape)


@pytest.mark.parametrize("upright", [False, True])
def test_scene_target_keeps_visible_cells_and_fills_hidden_ones(dataset, upright):
    visible = OccupancyDataset(dataset, keys=KEYS, upright=upright)
    scene = OccupancyDataset(dataset, keys=KEYS, upright=upright, target="scene")
    number = 5
    trajectory = Trajectory.open(dataset / scene.episodes[1])
    seen, item = visible[number], scene[number]
    labels = item["labels"].numpy()
    mask = seen["mask"].numpy()
    np.testing.assert_array_equal(item["visible"], mask)
    np.testing.assert_array_equal(seen["visible"], mask)
    np.testing.assert_array_equal(labels[mask], seen["labels"].numpy()[mask])
    expected = looked_up_labels(trajectory, scene.grid, item["grid_pose"].double().numpy())
    asked = (expected != 254) & ~mask & (seen["labels"].numpy() == UNKNOWN)
    # Poses of single precision and centres on a border differ in a few cells.
    assert (labels[asked] == expected[asked]).mean() > 0.999
    hidden = labels[~mask]
    assert (hidden != UNKNOWN).mean() > 0.01
    assert (hidden == 1).sum() > 1000
    np.testing.assert_array_equal(item["occupancy"], labels == 1)
    np.testing.assert_array_equal(item["mask"], labels != UNKNOWN)
    if upright:
        axes = item["grid_pose"].numpy()[:3, :3]
        np.testing.assert_allclose(axes[:, 1], [0, 0, -1], atol=1e-6)
        assert np.linalg.det(axes) == pytest.approx(1)
        assert axes[:, 2] @ item["pose"].numpy()[:3, 2] > 0.8
    else:
        assert torch.equal(item["pose"], item["grid_pose"])


def test_coarse_sparse_and_streamed_items_agree(dataset):
    options = {"keys": KEYS, "target": "scene", "upright": True}
    fine = OccupancyDataset(dataset, **options)
    coarse = OccupancyDataset(dataset, voxel_stride=4, **options)
    thin = OccupancyDataset(dataset, voxel_stride=4, dense=False, **options)
    stream = OccupancyStream(dataset, shuffle=False, voxel_stride=4, **options)
    for number, (item, rows, streamed) in enumerate(zip(coarse, thin, stream, strict=True)):
        for key, value in item.items():
            assert torch.equal(value, streamed[key])
        np.testing.assert_array_equal(item["occupancy"].nonzero(), rows["occupancy"])
        for key in ("mask", "visible"):
            np.testing.assert_array_equal(np.packbits(item[key]), rows[key])
        if number in (0, 6):
            whole = fine[number]["labels"].numpy()
            nx, ny, nz = whole.shape
            whole = np.pad(whole, ((0, -nx % 4), (0, -ny % 4), (0, -nz % 4)), constant_values=255)
            parts = whole.reshape(coarse.grid.shape[0], 4, -1, 4, coarse.grid.shape[2], 4)
            occupied = (parts == 1).any(axis=(1, 3, 5))
            same = (item["labels"].numpy() == 1) == occupied
            assert same.mean() > 0.999  # Visible cells are moved before they are pooled.


def test_scene_target_history_has_only_visible_cells(dataset):
    options = {"keys": ("occupancy", "history", "grid_pose"), "history_len": 1, "history_step": 1}
    for upright in (False, True):
        visible = OccupancyDataset(dataset, upright=upright, **options)
        scene = OccupancyDataset(dataset, upright=upright, target="scene", **options)
        assert torch.equal(scene[2]["history"], visible[2]["history"])
        assert torch.equal(visible[2]["history"][0], visible[1]["occupancy"])
        # In the grid of the current camera, the same walls are in nearly the same cells.
        aligned = OccupancyDataset(dataset, upright=upright, align_history=True, **options)[2]
        grown = torch.nn.functional.max_pool3d(aligned["occupancy"][None].float(), 3, 1, 1)[0] > 0
        assert (grown & aligned["history"][0]).sum() > 0.5 * aligned["history"][0].sum()


def test_upright_grids_accept_mirror_and_refuse_rotate_yaw(dataset):
    options = {"keys": KEYS, "target": "scene", "upright": True, "voxel_stride": 4}
    plain = OccupancyDataset(dataset, **options)[1]
    mirrored = OccupancyDataset(dataset, augment=[Mirror(1.0)], **options)[1]
    assert torch.equal(mirrored["labels"], plain["labels"].flip(0))
    with pytest.raises(UsageError, match="RotateYaw"):
        OccupancyDataset(dataset, augment=[RotateYaw()], **options)


def test_upright_pose_of_a_camera_that_looks_down_or_up():
    down = np.diag([1.0, -1.0, -1.0, 1.0])  # Looks along -z; the top of its image is along +y.
    np.testing.assert_allclose(upright_pose(down)[:3, 2], [0, 1, 0])
    up = np.eye(4)  # Looks along +z; the bottom of its image is along +y, ahead.
    np.testing.assert_allclose(upright_pose(up)[:3, 2], [0, 1, 0])


def test_states_files_have_the_states_and_are_updated(dataset, tmp_path):
    root = shutil.copytree(dataset, tmp_path / "out")
    (path,) = states_files(root)
    table = pq.read_table(path)
    for folder in trajectories(root):
        states, episode = Trajectory.open(folder).states(), folder.relative_to(root).as_posix()
        rows = [row for row in table.to_pylist() if row["episode"] == episode]
        assert [row["block"] for row in rows] == states.blocks.tolist()
        occupied, free = states.packed()
        assert b"".join(row["occupied"] for row in rows) == occupied.tobytes()
        assert b"".join(row["free"] for row in rows) == free.tobytes()
    content = path.read_bytes()
    scene = path.parent.parent.parent / trajectories(root)[0].parent.relative_to(root)
    name = scene.relative_to(root).as_posix()
    assert path == root / states_file(name)
    found = {name: [(p.relative_to(root).as_posix(), p) for p in trajectories(root)]}
    assert write_states(root, found, ()) == 0
    path.unlink()
    findings = [f.file for f in validate(root).findings]
    assert findings == [str(path)]
    with pytest.raises(UsageError, match=r"scene_states.*target='scene'"):
        OccupancyDataset(root, target="scene")
    assert write_states(root, found, ()) == 1
    assert path.read_bytes() == content
    pq.write_table(table.slice(0, 1).cast(table.schema), path)
    assert [f.file for f in validate(root).findings] == [str(path)]


def test_validate_finds_wrong_free_cells(dataset, tmp_path):
    root = shutil.copytree(dataset, tmp_path / "out")
    path = trajectories(root)[0] / "data/chunk-000/all_occ.npz"
    arrays = dict(np.load(path))
    at = np.argwhere(arrays["free"])[100]
    arrays["free"][tuple(at)] = 0
    np.savez_compressed(path, **arrays)
    problems = [f.problem for f in validate(root).findings if f.file == str(path)]
    assert any("free cells do not match" in problem for problem in problems)


def test_loader_processes_give_the_same_items(dataset):
    options = {"keys": ("labels",), "target": "scene", "voxel_stride": 4}
    frames = OccupancyDataset(dataset, **options)
    loader = DataLoader(OccupancyDataset(dataset, **options), batch_size=3, num_workers=2)
    found = torch.cat([batch["labels"] for batch in loader])
    assert torch.equal(found, torch.stack([frames[n]["labels"] for n in range(len(frames))]))
