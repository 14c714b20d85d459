"""Options of training items: coarser grids, labels, image sizes, selection and augmentation."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import made_up
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from occgen_hub import ColorJitter, Mirror, OccupancyDataset, RotateYaw
from occgen_hub.errors import UsageError
from occgen_hub.index import read_entries, write_index
from occgen_hub.loading import trajectories
from occgen_hub.occupancy.grid import Grid
from occgen_hub.shards import write_shards
from occgen_hub.training import UNKNOWN, View
from occgen_hub.training.coarse import coarse_cells, coarse_mask, resampled

GRID = ("occupancy", "mask", "labels")


def pooled(dense: np.ndarray, stride: int) -> np.ndarray:
    """Blocks of cells, pooled with numpy."""
    whole = [-(-n // stride) * stride for n in dense.shape]
    padded = np.zeros(whole, bool)
    padded[tuple(slice(n) for n in dense.shape)] = dense
    nx, ny, nz = (n // stride for n in whole)
    return padded.reshape(nx, stride, ny, stride, nz, stride).any(axis=(1, 3, 5))


@pytest.mark.parametrize("shape", [(200, 125, 200), (7, 5, 9), (8, 3, 16), (1, 1, 1), (5, 6, 13)])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_coarse_cell_is_set_if_any_of_its_cells_is_set(shape, stride):
    dense = np.random.default_rng(0).random(shape) < 0.05
    cells = np.flatnonzero(dense).astype(np.int32)
    expected = pooled(dense, stride)
    np.testing.assert_array_equal(coarse_cells(cells, shape, stride), expected)
    np.testing.assert_array_equal(coarse_mask(np.packbits(dense), shape, stride), expected)


@pytest.mark.parametrize("stride", [2, 4])
def test_coarse_items_match_the_fine_grid(dataset, stride):
    fine = OccupancyDataset(dataset, keys=GRID)
    dense = OccupancyDataset(dataset, keys=GRID, voxel_stride=stride)
    thin = OccupancyDataset(dataset, keys=GRID, voxel_stride=stride, dense=False)
    assert dense.grid.voxel_size == stride * fine.grid.voxel_size
    for n in (0, 3, 5):
        item, rows = dense[n], thin[n]
        for key in ("occupancy", "mask"):
            np.testing.assert_array_equal(item[key], pooled(fine[n][key].numpy(), stride))
        assert item["mask"].shape == dense.grid.shape
        np.testing.assert_array_equal(item["occupancy"].nonzero(), rows["occupancy"])
        np.testing.assert_array_equal(np.packbits(item["mask"]), rows["mask"])
        for of in (item, fine[n]):
            labels = np.where(of["mask"], 0, UNKNOWN)
            labels[of["occupancy"].numpy()] = 1
            np.testing.assert_array_equal(of["labels"], labels)


def test_resized_images_can_be_batched_and_have_scaled_intrinsics(dataset):
    keys = ("image", "depth", "intrinsics", "pose")
    stored = OccupancyDataset(dataset, keys=keys)
    sizes = {tuple(stored[n]["image"].shape) for n in range(len(stored))}
    assert len(sizes) == 2
    frames = OccupancyDataset(dataset, keys=keys, image_size=(160, 90))
    (batch,) = DataLoader(frames, batch_size=len(frames))
    assert batch["image"].shape == (len(frames), 3, 90, 160)
    for n in range(len(frames)):
        before, after = stored[n], frames[n]
        height, width = before["depth"].shape
        # Each pixel of the small depth image has the value of the stored pixel on its ray.
        for v, u in ((10, 20), (60, 140)):
            row, column = int((v + 0.5) * height / 90), int((u + 0.5) * width / 160)
            assert after["depth"][v, u] == before["depth"][row, column]
        scale = torch.tensor([160 / width, 90 / height, 1])[:, None]
        torch.testing.assert_close(after["intrinsics"], before["intrinsics"] * scale)


def test_history_has_past_images_masks_and_labels(dataset):
    keys = ("mask", "labels", "image", "history", "pose")
    options = {"keys": keys, "history_len": 2, "history_step": 1, "image_size": (64, 48)}
    options |= {"history_keys": ("occupancy", "mask", "labels", "image"), "voxel_stride": 4}
    frames = OccupancyDataset(dataset, **options)
    item = frames[2]
    for h in range(2):
        for key in ("mask", "labels", "image"):
            assert torch.equal(item[f"history_{key}"][h], frames[1 - h][key])
    first = frames[0]
    assert not first["history_valid"].any()
    assert (first["history_labels"] == UNKNOWN).all()
    assert not first["history_mask"].any()
    aligned = OccupancyDataset(dataset, align_history=True, **options)[2]
    for h in range(2):
        past_from_current = np.linalg.inv(item["history_pose"][h].double().numpy())
        expected = resampled(frames[1 - h]["mask"].numpy(), frames.grid, past_from_current)
        # A centre on the border of two cells may be in either.
        assert (aligned["history_mask"][h].numpy() == expected).mean() > 0.9999
        assert not torch.equal(aligned["history_mask"][h], item["history_mask"][h])


@pytest.fixture(scope="module")
def scenes(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four scenes with one trajectory each, one of them in the split "validation".

    Tests must not change it.
    """
    root = tmp_path_factory.mktemp("scenes")
    for n in range(15, 19):  # Of these, scene_17 is in the split "validation".
        shutil.copytree(trajectories(dataset)[n % 2], root / "group" / f"scene_{n:02d}" / "run")
    write_shards(root)
    return root


def test_frames_are_selected_by_episode_scene_split_and_quality(scenes, tmp_path):
    keys = ("episode",)
    whole = OccupancyDataset(scenes, keys=keys)
    parts = [OccupancyDataset(scenes, keys=keys, split=s).episodes for s in ("train", "validation")]
    assert sorted(parts[0] + parts[1]) == list(whole.episodes)
    assert all(parts)
    one = whole.episodes[3]
    assert OccupancyDataset(scenes, keys=keys, episodes=[one]).episodes == (one,)
    scene = one.rpartition("/")[0]
    assert OccupancyDataset(scenes, keys=keys, scenes={scene}).episodes == (one,)
    root = Path(shutil.copytree(scenes, tmp_path / "marked"))
    rows = list(read_entries(root).values())
    rows[0], rows[1] = replace(rows[0], quality=0.2), replace(rows[1], quality=None)
    write_index(root, rows)
    good = OccupancyDataset(root, keys=keys, min_quality=0.5).episodes
    assert set(whole.episodes) - set(good) == {rows[0].episode, rows[1].episode}
    for options, problem in (
        ({"episodes": ["group/none/run"]}, "has no episode group/none/run"),
        ({"scenes": ["none"]}, "has no scene none"),
        ({"scenes": "group"}, "scenes: group is not a list"),
        ({"split": "test"}, "split: 'test' is not a split"),
        ({"min_quality": 2}, "min_quality: 2 is not between"),
        ({"scenes": [], "split": "train"}, "episodes is selected by"),
        ({"voxel_stride": 3}, "voxel_stride is 3"),
        ({"image_size": (0, 3)}, "image_size is"),
    ):
        with pytest.raises(UsageError, match=problem):
            OccupancyDataset(scenes, keys=keys, **options)


def test_transform_is_applied_last(dataset):
    def transform(item):
        return item["labels"].shape, item["image"].shape

    keys = ("labels", "image")
    frames = OccupancyDataset(
        dataset, keys=keys, voxel_stride=4, image_size=(32, 24), transform=transform
    )
    assert frames[0] == (frames.grid.shape, (3, 24, 32))


# Augmented observations, compared with observations of an augmented scene or camera


SMALL = Grid((-2.0, -1.5, 0.0), 0.1, (40, 30, 40))
SIZE = made_up.SIZE


def observed(shapes, pose, K) -> dict[str, torch.Tensor]:
    """An item of a synthetic camera: cells are occupied or free by the depth of their centre."""
    depth = made_up.depth_of(shapes, pose)
    x, y, z = np.moveaxis(SMALL.centres(np.arange(SMALL.cells)).astype(float), 1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        u = np.floor(K[0, 0] * x / z + K[0, 2])
        v = np.floor(K[1, 1] * y / z + K[1, 2])
    inside = (z > 0) & (u >= 0) & (u < SIZE[0]) & (v >= 0) & (v < SIZE[1])
    row, column = (np.where(inside, place, 0).astype(int) for place in (v, u))
    there = np.where(inside, depth[row, column], 0)
    occupied = inside & (np.abs(z - there) < 0.08)
    mask = inside & (z < there + 0.08)
    image = np.clip(255 - 40 * depth, 0, 255).astype(np.uint8)
    return {
        "occupancy": torch.from_numpy(occupied.reshape(SMALL.shape)),
        "mask": torch.from_numpy(mask.reshape(SMALL.shape)),
        "labels": torch.from_numpy(
            np.where(occupied, 1, np.where(mask, 0, UNKNOWN)).astype(np.uint8).reshape(SMALL.shape)
        ),
        "depth": torch.from_numpy(depth.astype(np.float32)),
        "image": torch.from_numpy(np.repeat(image[None], 3, axis=0)),
        "pose": torch.from_numpy(pose.astype(np.float32)),
        "intrinsics": torch.from_numpy(K.astype(np.float32)),
    }


def mirrored_shape(shape):
    flip = np.array([-1.0, 1.0, 1.0])
    return lambda origin, directions: shape(origin * flip, directions * flip)


@pytest.mark.parametrize("seed", range(4))
def test_mirrored_frame_matches_a_frame_of_the_mirrored_world(seed):
    rng = np.random.default_rng(seed)
    pose = made_up.camera(rng.uniform(-0.5, 0.5, 3), (0.5, 0.3, 3.0))
    K = made_up.intrinsics()
    item = observed(made_up.room(), pose, K)
    view = View(SMALL, pose, K, SIZE)
    Mirror().check(SMALL)
    view = Mirror(probability=1)(item, view, rng)
    assert not torch.signbit(item["intrinsics"]).any()
    expected = observed([mirrored_shape(s) for s in made_up.room()], view.pose, view.intrinsics)
    for key in ("pose", "intrinsics", "depth", "image"):
        torch.testing.assert_close(item[key].float(), expected[key].float(), atol=1e-3, rtol=1e-4)
    for key in GRID:
        assert (item[key] == expected[key]).float().mean() > 0.9999, key


@pytest.mark.parametrize("seed", range(4))
def test_rotated_frame_matches_a_frame_of_the_rotated_camera(seed):
    """Cells move by up to half a cell, so occupied cells are compared with their neighbours."""
    rng = np.random.default_rng(seed)
    pose = made_up.camera(rng.uniform(-0.5, 0.5, 3), (0.5, 0.3, 3.0))
    K = made_up.intrinsics()
    before = observed(made_up.room(), pose, K)
    item = dict(before)
    turn = RotateYaw(15, up=(0.0, -1.0, 0.0))
    view = turn(item, View(SMALL, pose, K, SIZE), rng)
    assert not torch.equal(item["pose"], before["pose"])
    torch.testing.assert_close(item["pose"], torch.from_numpy(view.pose).float())
    np.testing.assert_allclose(view.pose[1, :3], pose[1, :3])  # Heights stay.
    expected = observed(made_up.room(), view.pose, K)
    seen = item["depth"] > 0
    assert seen.float().mean() > 0.6
    error = ((item["depth"] - expected["depth"]).abs() / expected["depth"])[seen]
    assert error.median() < 0.01
    assert (error < 0.05).float().mean() > 0.95
    both = item["mask"] & expected["mask"]
    assert both.float().mean() > 0.1
    near = torch.nn.functional.max_pool3d(expected["occupancy"][None].float(), 3, 1, 1)[0] > 0
    agree = near[item["occupancy"] & both].float().mean()
    assert agree > 0.93
    assert agree > near[before["occupancy"] & both].float().mean()
    unknown = item["labels"] == UNKNOWN
    assert torch.equal(unknown, ~item["mask"])
    np.testing.assert_array_equal(item["labels"] == 1, item["occupancy"] & item["mask"])


def test_sparse_items_are_augmented_like_dense_ones(dataset):
    keys = ("occupancy", "mask", "history", "pose", "intrinsics", "image")
    for augmentation in (Mirror(1.0), RotateYaw(20)):
        options = {"keys": keys, "voxel_stride": 4, "augment": (augmentation,)}
        options |= {"history_len": 2, "history_step": 1, "history_keys": ("occupancy", "mask")}
        items = []
        for dense in (True, False):
            torch.manual_seed(3)
            items.append(OccupancyDataset(dataset, dense=dense, **options)[2])
        full, rows = items
        np.testing.assert_array_equal(full["occupancy"].nonzero(), rows["occupancy"])
        np.testing.assert_array_equal(full["history"].nonzero(), rows["history"])
        np.testing.assert_array_equal(np.packbits(full["mask"]), rows["mask"])
        for key in ("pose", "history_pose", "image"):
            assert torch.equal(full[key], rows[key])
        plain = OccupancyDataset(dataset, **options | {"augment": ()})[2]
        assert not torch.equal(plain["image"], full["image"])


def test_color_jitter_changes_current_and_past_images(dataset):
    options = {"keys": ("image", "history"), "history_len": 1, "history_step": 1}
    options |= {"history_keys": ("image",), "image_size": (32, 24)}
    plain = OccupancyDataset(dataset, **options)[1]
    item = OccupancyDataset(dataset, augment=(ColorJitter(),), **options)[1]
    assert item["image"].dtype == torch.uint8
    assert not torch.equal(item["image"], plain["image"])
    assert not torch.equal(item["history_image"], plain["history_image"])


def test_mirror_refuses_an_asymmetric_grid():
    with pytest.raises(UsageError, match="leave Mirror out"):
        Mirror().check(Grid((-1.0, -1.0, 0.0), 0.1, (30, 20, 20)))
