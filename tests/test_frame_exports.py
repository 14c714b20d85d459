"""Exports to OccScanNet and Occ3D, read like their loaders do and compared with the scene."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from occgen_hub.errors import UsageError
from occgen_hub.exporting import export
from occgen_hub.frame_exports import ego_grid, joined_labels
from occgen_hub.geometry.poses import stands_upright
from occgen_hub.hub import contents
from occgen_hub.loading import Trajectory, trajectories
from occgen_hub.occupancy.grid import Grid
from occgen_hub.validation import validate


@pytest.fixture(scope="module")
def scenes(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two scenes of a trajectory each; scene_17 is in the split "validation". Do not change."""
    root = tmp_path_factory.mktemp("scenes")
    for n, path in zip((16, 17), trajectories(dataset), strict=True):
        shutil.copytree(path, root / "group" / f"scene_{n}" / "run", copy_function=os.link)
    return root


@pytest.fixture(scope="module")
def scannet(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scannet") / "out"
    assert any("one class" in remark for remark in export(scenes, out, to="occscannet"))
    return out


@pytest.fixture(scope="module")
def occ3d(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("occ3d") / "out"
    export(scenes, out, to="occ3d")
    return out


class Scene:
    """The states of a scene as a dense array, from all_occ.npz by numpy alone."""

    def __init__(self, folder: Path) -> None:
        arrays = np.load(folder / "data/chunk-000/all_occ.npz")
        blocks = arrays["blocks"]
        self.low = 32 * blocks.min(axis=0) - 400
        self.labels = np.full(32 * (np.ptp(blocks, axis=0) + 1) + 800, 255, np.uint8)
        for block, occupied, free in zip(
            32 * blocks - self.low, arrays["occupied"], arrays["free"], strict=True
        ):
            here = self.labels[tuple(slice(b, b + 32) for b in block)]
            here[np.unpackbits(free).reshape(32, 32, 32) == 1] = 0
            here[np.unpackbits(occupied).reshape(32, 32, 32) == 1] = 1

    def at(self, cells: np.ndarray) -> np.ndarray:
        """The labels of (..., 3) cells of the world, 2 cm wide; 0, 1 or 255."""
        return self.labels[tuple(np.moveaxis(cells - self.low, -1, 0))]


def join_parts(parts: np.ndarray) -> np.ndarray:
    """The labels (...) of coarse cells, from the labels (..., n) of their parts."""
    known = np.where((parts == 0).any(axis=-1), 0, 255)
    return np.where((parts == 1).any(axis=-1), 1, known)


def surface_points(pose: np.ndarray, K: np.ndarray, metres: np.ndarray) -> np.ndarray:
    """(n, 3) points of a depth image, transformed by the pose."""
    v, u = np.nonzero((metres > 0.3) & (metres < 3.5))
    z = metres[v, u]
    x, y = (u + 0.5 - K[0, 2]) / K[0, 0] * z, (v + 0.5 - K[1, 2]) / K[1, 1] * z
    return np.stack([x, y, z], axis=-1) @ pose[:3, :3].T + pose[:3, 3]


def share_occupied(cells: np.ndarray, occupied: np.ndarray) -> float:
    """The share of (n, 3) cells within the grid that are occupied or next to an occupied one."""
    cells = cells[((cells >= 0) & (cells < occupied.shape)).all(axis=1)]
    assert len(cells) > 1000
    padded = np.pad(occupied, 1)
    near = np.zeros(len(cells), bool)
    for offset in np.ndindex(3, 3, 3):
        near |= padded[tuple((cells + offset).T)]
    return float(near.mean())


def test_occscannet_targets_match_the_scene_around_the_camera(scenes, scannet):
    """Reads like the loader of OccScanNet, and compares all 7 frames cell by cell."""
    lists = {n: (scannet / f"{n}_final.txt").read_text().split() for n in ("train", "test")}
    assert [len(lines) for lines in lists.values()] == [4, 3]
    for name, run in (("train", "scene_16"), ("test", "scene_17")):
        trajectory = Trajectory.open(scenes / "group" / run / "run")
        scene, poses = Scene(trajectory.path), trajectory.world_from_camera()
        for t, line in enumerate(lists[name]):
            root, folder, file = line.split("/")
            assert root == "gathered_data"
            with (scannet / line).open("rb") as stream:
                data = pickle.load(stream)
            target = data["target_1_4"].transpose(1, 0, 2)  # From [y, x, z].
            data["target_1_4"][0, 0, 0] = data["target_1_4"][0, 0, 0]  # It is writable.
            assert target.shape == (60, 60, 36)
            assert target.dtype.kind in "iu"
            origin = data["voxel_origin"]
            first = np.rint(origin / 0.02).astype(int)
            np.testing.assert_allclose(origin, first * 0.02, atol=1e-9)
            here = tuple(
                slice(a, a + n) for a, n in zip(first - scene.low, (240, 240, 144), strict=True)
            )
            parts = scene.labels[here].reshape(60, 4, 60, 4, 36, 4).transpose(0, 2, 4, 1, 3, 5)
            expected = join_parts(parts.reshape(60, 60, 36, 64))
            np.testing.assert_array_equal(target, np.where(expected == 1, 11, expected))
            assert (target == 11).sum() > 500
            # Camera, image and depth are of this frame.
            np.testing.assert_allclose(data["cam_pose"], poses[t])
            stem = f"posed_images/{folder}/{file.removesuffix('.pkl')}"
            assert (data["img"], data["depth_gt"]) == (f"{stem}.jpg", f"{stem}.png")
            with Image.open(scannet / data["img"]) as image:
                assert image.size == trajectory.image_size
            with Image.open(scannet / data["depth_gt"]) as image:
                metres = np.asarray(image).astype(float) / 1000
            np.testing.assert_allclose(metres, trajectory.depth(t), atol=6e-4)
            points = surface_points(data["cam_pose"], data["intrinsic"], metres)
            seen = np.floor((points - origin) / 0.08).astype(int)
            assert share_occupied(seen, target == 11) > 0.97
            # The target covers the whole height of the room and lies in front of the camera.
            assert origin[2] < poses[t][2, 3] < origin[2] + 2.88
            middle = origin[:2] + 2.4 - poses[t][:2, 3]
            assert middle @ poses[t][:2, 2] > 0
            coarse = data["target_1_16"]
            assert coarse.shape == (15, 15, 9)
            np.testing.assert_array_equal(coarse, joined_labels(data["target_1_4"], 4))


def test_occscannet_has_the_lists_of_iso_and_the_mini_lists(scannet):
    for ours, isos in (("train_final", "train_subscenes"), ("test_final", "val_subscenes")):
        assert (scannet / f"{ours}.txt").read_text() == (scannet / f"{isos}.txt").read_text()
    for name in ("train", "test"):
        mini = (scannet / f"{name}_mini_final.txt").read_text().split()
        assert mini == (scannet / f"{name}_final.txt").read_text().split()[::10]


def test_pickles_are_readable_by_older_numpy(scannet):
    path = next(scannet.glob("gathered_data/*/*.pkl"))
    content = path.read_bytes()
    assert b"numpy.core.multiarray" in content
    assert b"numpy._core" not in content


def test_labels_are_joined_by_the_rule_of_nyu():
    target = np.zeros((4, 4, 12), np.uint8)
    target[:2, :2, 0] = 3  # 4 of 64: more than a twentieth.
    target[0, 0, 4:7] = 5  # 3 of 64: less.
    target[:, :, 8:] = 255
    target[0, 0, 8] = 0
    assert joined_labels(target, 4).tolist() == [[[3, 0, 255]]]


def test_occ3d_labels_match_the_scene_around_the_ego(scenes, occ3d):
    """Reads `labels.npz` in the ego frame; 5 frames, cell by cell."""
    annotations = json.loads((occ3d / "annotations.json").read_text())
    assert (annotations["train_split"], annotations["val_split"]) == (
        ["scene-0000"],
        ["scene-0001"],
    )
    lower, size = np.array(annotations["grid"]["lower"]), annotations["grid"]["voxel_size"]
    compared = 0
    for name, run in (("scene-0000", "scene_16"), ("scene-0001", "scene_17")):
        trajectory = Trajectory.open(scenes / "group" / run / "run")
        scene, poses = Scene(trajectory.path), trajectory.world_from_camera()
        masks = list(trajectory.observed())
        for t, (token, info) in enumerate(annotations["scene_infos"][name].items()):
            if t not in (0, 2, 3):
                continue
            arrays = np.load(occ3d / "gts" / name / token / "labels.npz")
            semantics = arrays["semantics"]
            assert semantics.dtype == arrays["mask_lidar"].dtype == np.uint8
            w, x, y, z = info["ego_pose"]["rotation"]
            R, translation = Rotation.from_quat([x, y, z, w]).as_matrix(), info["ego_pose"]
            np.testing.assert_allclose(R[:, 2], [0, 0, 1], atol=1e-6)  # Upright.
            np.testing.assert_allclose(translation["translation"], poses[t][:3, 3])
            assert R[:, 0] @ poses[t][:3, 2] > 0.9  # x ahead
            cells = np.stack(np.indices(semantics.shape), axis=-1)[..., None, :]
            parts = np.stack(np.indices((4, 4, 4)), axis=-1).reshape(-1, 3)
            ego = lower + (cells + (parts + 0.5) / 4) * size
            expected = join_parts(
                scene.at(np.floor((ego @ R.T + poses[t][:3, 3]) / 0.02).astype(int))
            )
            known = expected != 255
            assert (arrays["mask_lidar"] == known).mean() > 0.999
            assert (semantics[known] == np.where(expected == 1, 0, 17)[known]).mean() > 0.999
            assert (semantics[arrays["mask_lidar"] == 0] == 17).all()
            # The camera's mask: the known cells that it observed.
            seen = arrays["mask_camera"] == 1
            assert (arrays["mask_lidar"][seen] == 1).all()
            inside = (ego.mean(axis=-2) @ R.T) @ poses[t][:3, :3]
            place = np.floor((inside - np.asarray(trajectory.grid.lower)) / 0.02).astype(int)
            within = ((place >= 0) & (place < trajectory.grid.shape)).all(axis=-1)
            grid = masks[t].reshape(trajectory.grid.shape)
            assert seen[within & known][grid[tuple(place[within & known].T)]].mean() > 0.99
            assert seen.sum() < 2 * grid.sum() / 64
            # With the camera's pose in the ego frame, depth falls on occupied cells.
            camera = info["camera_sensor"]["CAM_FRONT"]
            w, x, y, z = camera["extrinsic"]["rotation"]
            pose = np.eye(4)
            pose[:3, :3] = Rotation.from_quat([x, y, z, w]).as_matrix()
            pose[:3, 3] = camera["extrinsic"]["translation"]
            points = surface_points(pose, np.array(camera["intrinsics"]), trajectory.depth(t))
            places = np.floor((points - lower) / size).astype(int)
            assert share_occupied(places, semantics != 17) > 0.97
            assert (occ3d / camera["img_path"]).is_file()
            compared += 1
    assert compared == 5


def test_ego_grid_covers_the_camera_grid():
    lower, shape = ego_grid(Grid((-2.0, -1.0, 0.0), 0.02, (200, 125, 200)))
    assert (lower, shape) == ((0.0, -2.0, -1.5), (50, 50, 32))


def test_frames_without_an_occupied_cell_are_left_out(scenes, tmp_path):
    root = shutil.copytree(scenes, tmp_path / "root")
    folder = trajectories(root)[0]
    path = folder / "data/chunk-000/all_occ.npz"
    arrays = dict(np.load(path))
    arrays["occupied"][:] = 0
    np.savez_compressed(path, **arrays)
    remarks = export(root, tmp_path / "out", to="occscannet")
    assert any("4 frames without an occupied cell are left out" in remark for remark in remarks)
    assert (tmp_path / "out/train_final.txt").read_text() == ""
    assert len(list((tmp_path / "out").glob("posed_images/*/*.jpg"))) == 3
    assert "left out" in (tmp_path / "out/README.md").read_text()


def test_world_without_upward_z_axis_gives_a_remark(scenes, tmp_path, monkeypatch):
    folder = trajectories(scenes)[0]
    upright = Trajectory.open(folder).world_from_camera()
    assert stands_upright(upright)
    # As in SLAM, the world is the frame of the first camera.
    of_first = np.linalg.inv(upright[0]) @ upright
    assert not stands_upright(of_first)
    poses = Trajectory.world_from_camera
    monkeypatch.setattr(
        Trajectory,
        "world_from_camera",
        lambda self: of_first if self.path == folder else poses(self),
    )
    remarks = export(scenes, tmp_path / "out", to="occscannet")
    assert any("the cameras of 1 trajectories are not upright" in remark for remark in remarks)


def test_trajectory_without_images_and_video_is_refused(scenes, tmp_path):
    root = shutil.copytree(scenes, tmp_path / "root")
    shutil.rmtree(trajectories(root)[1] / "videos/chunk-000/observation.images.rgb")
    export(root, tmp_path / "video", to="occ3d")  # From the video.
    shutil.copytree(root / "group/scene_16", tmp_path / "train/group/scene_16")
    remarks = export(tmp_path / "train", tmp_path / "train_occ3d", to="occ3d")
    assert [r[:36] for r in remarks if "split" in r] == ["no scene is in the split validation,"]
    shutil.rmtree(trajectories(root)[1] / "videos/chunk-000/observation.video.trajectory")
    with pytest.raises(UsageError, match="has no images"):
        export(root, tmp_path / "out", to="occ3d")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["scannet", "occ3d"])
def test_exports_are_validated_and_pushed_like_others(form, request, tmp_path):
    out = shutil.copytree(request.getfixturevalue(form), tmp_path / "out")
    report = validate(out)
    assert report.valid
    assert (report.trajectories, report.frames) == (2, 7)
    card = (out / "README.md").read_text()
    assert "one class" in card
    assert "For every frame: its image, pose and intrinsics, and the states of the scene" in card
    assert "LeRobot" not in card
    assert "meta/occgen_export.json" in contents(out)
    path = next(out.glob("*/*/*.jpg" if form == "occ3d" else "gathered_data/*/*.pkl"))
    path.write_bytes(b"")
    assert [finding.file for finding in validate(out).findings] == [str(path)]
