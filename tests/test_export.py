"""One LeRobot v3.0 dataset of all trajectories, read by lerobot itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.spatial.transform import Rotation

from occgen_hub.builder import load_builder
from occgen_hub.config import load_config
from occgen_hub.episode_build import Settings
from occgen_hub.errors import OccGenError, UsageError
from occgen_hub.exporting import export, plan_export, update_export
from occgen_hub.job import Job, list_episodes
from occgen_hub.lerobot.export_check import RECORD
from occgen_hub.lerobot.realtime_guard import no_realtime_scheduling
from occgen_hub.lerobot.v30 import DEPTH_MAX, STATE, Fit
from occgen_hub.loading import Trajectory, trajectories
from occgen_hub.runtime.build import build_dataset
from occgen_hub.sample import make_sample
from occgen_hub.shards import shards
from occgen_hub.training import OccupancyDataset, collate
from occgen_hub.validation import validate

POSE, INTRINSICS = "observation.camera_extrinsic_occ", "observation.camera_intrinsic_occ"
RGB, DEPTH = "observation.images.rgb", "observation.images.depth"
VIEW, MASK = "observation.occ.view", "observation.occ.mask"
READ_STEP_MM = 1.8
"""Tolerance: LeRobot gives whole millimetres, in steps of at most 2.6."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of three trajectories with three image sizes. Tests must not change it."""
    place = tmp_path_factory.mktemp("built")
    make_sample(place / "tree", trajectories=3, frames=5, seed=3)
    return build(place / "tree", place / "out")


@pytest.fixture(scope="module")
def exported(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of `built`. Tests must not change it."""
    out = tmp_path_factory.mktemp("made") / "lerobot"
    (remark,) = export(built, out)
    assert "2 of 3 trajectories were scaled to 480 x 270 pixels" in remark
    return out


@pytest.fixture
def mine(exported: Path, tmp_path: Path) -> Path:
    """A copy of the export that a test may change."""
    return Path(shutil.copytree(exported, tmp_path / "mine"))


def build(tree: Path, out: Path, *settings: str, **options) -> Path:
    builder = load_builder("internnav", tree)
    how = Settings(load_config(None, settings or ("voxel_size=0.1",)))
    summary = build_dataset(Job(builder, list_episodes(builder), out, how, **options))
    assert not summary.failures
    return out


def opened(built: Path) -> list[Trajectory]:
    return [Trajectory.open(path) for path in trajectories(built)]


def lerobot(root: Path, **options):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    return LeRobotDataset("local/rooms", root=root, video_backend="pyav", **options)


def with_occupancy(root: Path, **options):
    from occgen_hub import LeRobotOccupancyDataset

    return LeRobotOccupancyDataset("local/rooms", root=root, video_backend="pyav", **options)


# What LeRobot reads


def test_lerobot_reads_lengths_tasks_poses_and_columns(built, exported):
    frames = lerobot(exported)
    found = opened(built)
    assert frames.num_episodes == len(found) == 3
    assert frames.fps == found[0].info()["fps"]
    number = 0
    for n, trajectory in enumerate(found):
        poses, tasks = trajectory.column(POSE), trajectory.tasks()
        task_index = trajectory.column("task_index")
        assert frames.meta.episodes[n]["length"] == len(poses)
        for t in range(len(poses)):
            item = frames[number]
            assert torch.equal(item[POSE].view(4, 4), torch.from_numpy(poses[t].copy()))
            assert torch.equal(item["action"], torch.tensor(trajectory.column("action")[t]).ravel())
            assert item["task"] == tasks[task_index[t]]
            assert item["episode"] == trajectory.path.relative_to(built).as_posix()
            assert (item["frame_index"], item["episode_index"], item["index"]) == (t, n, number)
            assert item["timestamp"] == pytest.approx(t / frames.fps)
            number += 1
    assert number == len(frames)


def test_lerobot_decodes_images_and_depth(built, exported):
    frames = lerobot(exported, depth_output_unit="m")
    number = 0
    for trajectory in opened(built):
        width, height = trajectory.image_size
        left, top, w, h = Fit((width, height), (480, 270)).box
        for t in range(len(trajectory.world_from_camera())):
            item = frames[number]
            rgb = Image.fromarray(trajectory.rgb(t)).resize((w, h), Image.Resampling.BILINEAR)
            shown = item[RGB].permute(1, 2, 0).numpy()
            inside = shown[top : top + h, left : left + w] * 255
            assert np.abs(inside - np.asarray(rgb, float)).mean() < 6  # AV1 at LeRobot's crf 30.
            around = shown.copy()
            around[top : top + h, left : left + w] = 0
            assert around.max() < 0.2

            depth = Image.fromarray(trajectory.depth(t).astype(np.float32))
            true = np.asarray(depth.resize((w, h), Image.Resampling.NEAREST))
            got = item[DEPTH][0].numpy()[top : top + h, left : left + w]
            assert np.abs(got - true).max() < 0.00131
            assert (got[true == 0] == 0).all()
            number += 1


def test_pixels_without_depth_stay_zero(built, tmp_path):
    mine = Path(shutil.copytree(built, tmp_path / "mine"))
    path = opened(mine)[0].file("depth", 0)
    values = np.asarray(Image.open(path)).copy()
    values[:, ::2] = 0
    values[0, 1] = 65535
    Image.fromarray(values).save(path)
    export(mine, tmp_path / "out")
    got = lerobot(tmp_path / "out")[0][DEPTH][0].numpy()
    assert (got[:, ::2] == 0).all()
    assert got[:, 1::2].min() > 0
    assert got[0, 1] == pytest.approx(DEPTH_MAX * 1000, abs=READ_STEP_MM)


def test_intrinsics_match_the_scaled_images(built, exported):
    """A world point is at the corresponding place in the exported image."""
    frames = lerobot(exported)
    number = 0
    for trajectory in opened(built):
        K, size = trajectory.intrinsics()[0], trajectory.image_size
        left, top, width, height = Fit(size, (480, 270)).box
        for name in (INTRINSICS, "observation.camera_intrinsic"):
            moved = frames[number][name].view(3, 3).numpy()
            point = np.array([0.3, -0.2, 1.7])
            u, v, _ = K @ point / point[2]
            expected = left + u * width / size[0], top + v * height / size[1]
            np.testing.assert_allclose((moved @ point / point[2])[:2], expected, atol=1e-3)
        number += len(trajectory.intrinsics())


sizes = st.tuples(st.integers(2, 400), st.integers(2, 400))


@given(sizes, sizes)
def test_image_is_fitted_into_the_frame_with_black_borders(size, into):
    into = into[0] // 2 * 2, into[1] // 2 * 2
    fit = Fit(size, into)
    left, top, width, height = fit.box
    picture = np.full((size[1], size[0], 3), 255, np.uint8)
    fitted = fit.image(picture, Image.Resampling.BILINEAR)
    assert fitted.shape == (into[1], into[0], 3)
    lit = np.zeros(fitted.shape[:2], bool)
    lit[max(top, 0) : top + height, max(left, 0) : left + width] = True
    assert (fitted[lit] == 255).all()
    assert (fitted[~lit] == 0).all()
    if fit.cut:
        assert (width, height) == size
    else:
        assert left >= 0 <= top
        assert left + width <= into[0]
        assert top + height <= into[1]
        assert width == into[0] or height == into[1]
    K = np.array([[300.0, 0, size[0] / 2], [0, 300, size[1] / 2], [0, 0, 1]])
    corners = np.array([[0, 0, 1.0], [size[0], size[1], 1.0]])
    rays = np.linalg.solve(K, corners.T)
    np.testing.assert_allclose(
        (fit.intrinsics(K) @ rays)[:2].T,
        [[left, top], [left + width, top + height]],
        atol=1e-6,
    )


def test_delta_timestamps_are_honoured(built, exported):
    frames = with_occupancy(
        exported,
        delta_timestamps={RGB: [-0.1, 0.0], POSE: [0.0, 0.1], VIEW: [-0.2, -0.1, 0.0], MASK: [0.1]},
    )
    trajectory = opened(built)[0]
    length = len(trajectory.world_from_camera())
    visible = [set(cells.tolist()) for cells in trajectory.visible_frames()]
    for t in (0, 2, length - 1):
        item = frames[t]
        assert item[RGB].shape[0] == item[POSE].shape[0] == 2
        assert item[f"{VIEW}_is_pad"].tolist() == [t < 2, t < 1, False]
        assert item[f"{MASK}_is_pad"].tolist() == [t == length - 1]
        assert item[f"{RGB}_is_pad"].tolist() == [t == 0, False]
        for d, delta in enumerate((-2, -1, 0)):
            cells = item[VIEW][d].flatten().nonzero()[:, 0].tolist()
            assert set(cells) == visible[max(0, t + delta)]
    with pytest.raises(ValueError, match="multiples"):
        with_occupancy(exported, delta_timestamps={VIEW: [-0.123]})


# Occupancy


def test_wrapper_adds_the_occupancy_of_each_frame(built, exported):
    ours, frames = OccupancyDataset(built), with_occupancy(exported)
    assert len(frames) == len(ours)
    for n in range(len(ours)):
        item, expected = frames[n], ours[n]
        assert torch.equal(item[VIEW], expected["occupancy"])
        assert torch.equal(item[MASK], expected["mask"])
        assert torch.equal(item[POSE].view(4, 4), expected["pose"])
    sparse = with_occupancy(
        exported,
        occupancy=(VIEW,),
        dense=False,
        delta_timestamps={VIEW: [-0.1, 0]},
        depth_output_unit="m",
    )
    item = sparse[1]
    expected = 1000 * item[DEPTH]
    torch.testing.assert_close(frames[1][DEPTH].float(), expected, atol=READ_STEP_MM, rtol=0)
    assert MASK not in item
    for d in (0, 1):
        cells = item[VIEW][item[VIEW][:, 0] == d][:, 1:]
        assert torch.equal(cells, ours[d]["occupancy"].nonzero().int())


def test_wrapper_reads_selected_episodes(built, exported):
    ours, frames = OccupancyDataset(built), with_occupancy(exported, episodes=[1])
    start, end = ours.starts[1:3].tolist()
    assert len(frames) == end - start
    for n in range(len(frames)):
        assert torch.equal(frames[n][VIEW], ours[start + n]["occupancy"])


def test_sparse_items_are_collated(exported):
    frames = with_occupancy(exported, occupancy=(VIEW,), dense=False)
    batch = collate([frames[0], frames[1]])
    for b in (0, 1):
        assert torch.equal(batch[VIEW][batch[VIEW][:, 0] == b][:, 1:], frames[b][VIEW])


def test_occupancy_dataset_reads_the_export(built, exported):
    keys = ("occupancy", "mask", "pose", "episode", "frame_index")
    there, here = OccupancyDataset(exported, keys=keys), OccupancyDataset(built, keys=keys)
    for n in range(len(here)):
        for key in keys:
            same = torch.equal if torch.is_tensor(here[n][key]) else (lambda a, b: a == b)
            assert same(there[n][key], here[n][key])


def test_datasets_library_reads_the_export(built, exported):
    from datasets import load_dataset

    frames = load_dataset(str(exported), split="train").with_format("numpy")
    rows = list(load_dataset(str(exported), "occupancy", split="train", streaming=True))
    assert len(frames) == len(rows) == sum(len(t.world_from_camera()) for t in opened(built))
    for n, row in enumerate(rows):
        pose = np.array(row["camera_extrinsic"], "f4")
        np.testing.assert_array_equal(frames[n][POSE].reshape(4, 4), pose)
        assert (frames[n]["episode"], frames[n]["frame_index"]) == (
            row["episode"],
            row["frame_index"],
        )


def test_state_is_the_camera_pose_unless_the_source_has_a_state(
    built, exported, sample_tree, tmp_path
):
    frames, number = lerobot(exported), 0
    for trajectory in opened(built):
        before = None
        for pose in trajectory.world_from_camera():
            state = frames[number][STATE].numpy().astype(np.float64)
            np.testing.assert_allclose(state[:3], pose[:3, 3], atol=1e-5)
            turned = Rotation.from_quat(state[3:]).as_matrix()
            np.testing.assert_allclose(turned, pose[:3, :3], atol=1e-5)
            assert state[6] >= 0 if before is None else before[3:] @ state[3:] > 0
            before, number = state, number + 1
    tree = shutil.copytree(sample_tree, tmp_path / "tree")
    for path in tree.rglob("episode_*.parquet"):
        table = pq.read_table(path)
        own = pa.array([[float(n), 2.0] for n in range(len(table))], pa.list_(pa.float32()))
        pq.write_table(table.append_column(STATE, own), path)
    for path in tree.rglob("info.json"):
        info = json.loads(path.read_text())
        info["features"][STATE] = {"dtype": "float32", "shape": [2], "names": ["a", "b"]}
        path.write_text(json.dumps(info))
    export(build(tree, tmp_path / "out"), tmp_path / "own")
    assert lerobot(tmp_path / "own")[1][STATE].tolist() == [1.0, 2.0]


@pytest.mark.long
def test_lerobot_trains_on_an_export(exported, tmp_path):
    """Ten steps of ACT. The input features omit what it does not accept, such as depth."""
    inputs = {
        RGB: {"type": "VISUAL", "shape": [3, 270, 480]},
        STATE: {"type": "STATE", "shape": [7]},
    }
    options = [
        "--dataset.repo_id=local/rooms", f"--dataset.root={exported}",
        "--dataset.video_backend=pyav",
        "--policy.type=act", f"--policy.input_features={json.dumps(inputs)}",
        "--policy.pretrained_backbone_weights=null", "--policy.push_to_hub=false",
        "--policy.device=cpu", "--policy.dim_model=64", "--policy.n_heads=2",
        "--policy.chunk_size=4", "--policy.n_action_steps=4",
        "--steps=10", "--batch_size=2", "--num_workers=0", f"--output_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    train = Path(sys.executable).with_name("lerobot-train")
    done = subprocess.run([train, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert list((tmp_path / "run").rglob("*.safetensors"))


def test_statistics_cover_all_frames(built, exported):
    stats = json.loads((exported / "meta/stats.json").read_text())
    poses = np.concatenate([t.column(POSE).reshape(-1, 16) for t in opened(built)])
    for name, value in (("min", poses.min(0)), ("max", poses.max(0)), ("mean", poses.mean(0))):
        np.testing.assert_allclose(stats[POSE][name], value, atol=1e-5)
    assert np.shape(stats[POSE]["q50"]) == (16,)
    deepest = max(trajectory.depth(0).max() for trajectory in opened(built))
    assert 0.5 * deepest < stats[DEPTH]["max"][0][0][0] <= DEPTH_MAX


def test_card_has_a_picture_and_its_examples_run(built, exported):
    text = (exported / "README.md").read_text()
    assert "](preview.png)" in text
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 4
    for code in examples:
        names: dict[str, Any] = {}
        local = f'("local/rooms", root="{exported}"'
        for kind in ("LeRobotDataset", "LeRobotOccupancyDataset"):
            code = code.replace(f'{kind}("DATASET"', kind + local)
        exec(code.replace('"DATASET"', f'"{exported}"'), names)
        if "depth = " in code:
            assert names["world_from_camera"].shape == (4, 4)
            true = opened(built)[0].depth(0).max()
            assert names["depth"].max().item() == pytest.approx(true, abs=0.01)


# Refused and omitted content


def test_different_frame_rates_require_the_option_fps(built, tmp_path):
    mine = Path(shutil.copytree(built, tmp_path / "mine"))
    for n, trajectory in enumerate(opened(mine)):
        info = trajectory.info() | {"fps": (10, 29.97, 10)[n]}
        trajectory.file("info").write_text(json.dumps(info))
    with pytest.raises(UsageError, match=r"have 2 rates \(10, 29.97 frames per second\).*--fps"):
        export(mine, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export(mine, tmp_path / "out", fps=12)
    assert lerobot(tmp_path / "out")[1]["timestamp"] == pytest.approx(1 / 12)
    for trajectory in opened(mine):
        trajectory.file("info").write_text(json.dumps(trajectory.info() | {"fps": 29.97}))
    plan = plan_export(mine)
    assert plan.layout.fps == 30
    assert any("29.97 frames a second became 30" in remark for remark in plan.remarks)


def test_data_that_some_trajectories_lack_is_left_out_with_a_remark(built, tmp_path):
    mine = Path(shutil.copytree(built, tmp_path / "mine"))
    first = opened(mine)[0]
    shutil.rmtree(first.file("depth", 0).parent)
    shutil.rmtree(mine / "occupancy")
    remarks = export(mine, tmp_path / "out")
    assert any(r.startswith("depth is left out: 1 of 3 trajectories have none") for r in remarks)
    item = with_occupancy(tmp_path / "out")[0]
    assert DEPTH not in item
    assert RGB in item
    assert VIEW in item  # The export built shards from the trajectories.
    assert not shards(mine)
    assert validate(tmp_path / "out").valid


def test_dataset_without_media_exports_tables_and_occupancy(tmp_path):
    make_sample(tmp_path / "tree", trajectories=1, frames=2)
    builder = load_builder("internnav", tmp_path / "tree")
    how = Settings(load_config(None, ("voxel_size=0.1",)), media="none")
    build_dataset(Job(builder, list_episodes(builder), tmp_path / "built", how))
    assert export(tmp_path / "built", tmp_path / "out") == [
        f"{what} is left out: the trajectories have none" for what in ("RGB", "depth")
    ]
    assert "With LeRobot (tasks, poses, intrinsics):" in (tmp_path / "out/README.md").read_text()
    item = with_occupancy(tmp_path / "out")[0]
    assert {RGB, DEPTH} & set(item) == set()
    assert item[VIEW].any()
    assert validate(tmp_path / "out").valid


def test_frames_come_from_the_video_if_images_are_missing(tmp_path):
    make_sample(tmp_path / "tree", trajectories=1, frames=2)
    built = build(tmp_path / "tree", tmp_path / "built")
    shutil.rmtree(opened(built)[0].file("rgb", 0).parent)
    export(built, tmp_path / "out")
    assert validate(tmp_path / "out").valid
    assert lerobot(tmp_path / "out")[0][RGB].mean() > 0.1


def test_columns_with_names_reserved_by_lerobot_are_left_out(sample_tree, tmp_path):
    source = Path(shutil.copytree(sample_tree, tmp_path / "source"))
    for path in source.rglob("*.parquet"):
        table = pq.read_table(path)
        for name in ("task", "size", "a/b", "speed"):
            table = table.append_column(name, [np.arange(table.num_rows, dtype=np.float32)])
        pq.write_table(table, path)
    remarks = export(build(source, tmp_path / "built"), tmp_path / "out")
    assert "columns with names that LeRobot reserves are left out: a/b, size, task" in remarks
    assert lerobot(tmp_path / "out")[1]["speed"] == 1


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("info", {"fps": "ten"}, r"info\.json: has no valid fps"),
        ("info", {"fps": 0}, r"info\.json: has no valid fps"),
        ("info", {"features": 3}, r"info\.json: does not state its features"),
        ("info", {"total_frames": 1 << 63}, r"info\.json: does not state its features and frames"),
        ("record", {"scene": {}}, r"occgen\.json: does not state the image size"),
        ("record", {"scene": {"image_size": [32, 32]}}, r"0\.jpg: is \d+ x \d+ pixels"),
    ],
)
def test_invalid_meta_files_are_named(built, tmp_path, file, change, message):
    mine = Path(shutil.copytree(built, tmp_path / "mine"))
    for trajectory in opened(mine):
        _edit(trajectory.file(file), **change)
    with pytest.raises(OccGenError, match=message):
        export(mine, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine"]


def test_images_too_small_for_the_encoder_are_enlarged(built, tmp_path):
    mine = Path(shutil.copytree(built, tmp_path / "mine"))
    for trajectory in opened(mine):
        _edit(trajectory.file("record"), scene=trajectory.record["scene"] | {"image_size": [9, 6]})
        for path in (*trajectory.path.rglob("*.jpg"), *trajectory.path.rglob("*.png")):
            with Image.open(path) as image:
                image.resize((9, 6)).save(path)
    (remark,) = export(mine, tmp_path / "out")
    assert remark.startswith("images of 3 of 3 trajectories were scaled to 64 x 64 pixels")
    assert lerobot(tmp_path / "out")[0][DEPTH].shape == (1, 64, 64)


def test_trajectories_of_one_frame_are_left_out_with_a_remark(built, tmp_path):
    make_sample(tmp_path / "tree", trajectories=1, frames=1)
    one = build(tmp_path / "tree", tmp_path / "one")
    with pytest.raises(UsageError, match="only trajectories of one frame"):
        export(one, tmp_path / "none")
    mine = Path(shutil.copytree(built, tmp_path / "mine"))
    for name in ("a", "z"):
        shutil.copytree(one / "sample_zed", mine / name)
    remarks = export(mine, tmp_path / "out")
    start = "LeRobot does not support episodes of one frame, which leaves out 2 of 5 "
    assert any(remark.startswith(start) for remark in remarks)
    ours, frames = OccupancyDataset(built), with_occupancy(tmp_path / "out")
    assert len(frames) == len(ours)
    assert torch.equal(frames[3][VIEW], ours[3]["occupancy"])


@pytest.mark.long
def test_second_concurrent_export_is_refused(built, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "occgen_hub", "export", built, out]
    first, second = (
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    )
    message = [process.communicate()[1] for process in (first, second)]
    assert sorted((first.returncode, second.returncode)) == [0, 2]
    refused = message[first.returncode == 0]
    assert "another export is writing there" in refused or "already exists" in refused
    assert validate(out).valid
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("fps", [2.5, "10", True, 0, 241])
def test_invalid_frame_rates_are_refused(built, tmp_path, fps):
    with pytest.raises(UsageError, match="fps"):
        export(built, tmp_path / "out", fps=fps)


@pytest.mark.parametrize(
    "place", ["dot", "inside", "parent", "full", "file", "export", "trajectory", "missing"]
)
def test_invalid_export_paths_are_refused(built, exported, tmp_path, place):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    root, out, message = {
        "dot": (built, Path(), "give the name of a new folder"),
        "inside": (built, built / "x", "is inside"),
        "parent": (built, built.parent, "is inside"),
        "full": (built, tmp_path / "full", "has files that no export wrote"),
        "file": (built, tmp_path / "file", "not a folder"),
        "export": (exported, tmp_path / "x", "is already an export"),
        "trajectory": (trajectories(built)[0], tmp_path / "x", "is a trajectory"),
        "missing": (tmp_path / "no", tmp_path / "x", "is not a folder"),
    }[place]
    with pytest.raises(UsageError, match=message):
        export(root, out)
    assert not (tmp_path / "x").exists()


def test_failed_export_keeps_the_earlier_one(built, mine, tmp_path):
    broken = Path(shutil.copytree(built, tmp_path / "broken"))
    opened(broken)[2].file("depth", 1).write_bytes(b"no image")
    before = {p: p.stat().st_mtime_ns for p in mine.rglob("*")}
    with pytest.raises(UsageError, match="--overwrite replaces it"):
        export(broken, mine)
    with pytest.raises(OccGenError, match=r"1\.png: is not a JPEG or PNG image"):
        export(broken, mine, overwrite=True)
    assert {p: p.stat().st_mtime_ns for p in mine.rglob("*")} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken", "mine"]
    export(built, mine, overwrite=True)
    assert validate(mine).valid


def test_export_command_prints_the_result_and_refuses_to_overwrite(built, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "occgen_hub", "export", built, out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(rf"Exported to {out}: \d+ files, [\d.]+ MB\.", done.stdout.splitlines()[0])
    (note,) = done.stderr.splitlines()
    assert note.startswith("Note: images of 2 of 3 trajectories")
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert again.stderr == f"Error: {out}: already exists; --overwrite replaces it.\n"
    assert not (out / "images").exists()
    modes = {path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_file()}
    assert modes == {0o666 & ~_umask()}


def test_export_on_a_full_disk_gives_one_sentence_and_leaves_no_files(built, tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting takes root")
    try:
        command = [sys.executable, "-m", "occgen_hub", "export", built, place / "out"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        left = list(place.iterdir())
    finally:
        subprocess.run(["umount", place], check=True)
    assert (done.returncode, left) == (1, [])
    (message,) = done.stderr.splitlines()
    assert re.match(r"Error: .*\.(png|tiff): cannot be read or written \(No space left", message)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# Validation


def test_an_export_is_valid(exported):
    report = validate(exported)
    assert report.findings == ()
    assert (report.trajectories, report.frames) == (3, len(lerobot(exported)))


def _edit(path: Path, **change) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def _swap_rows(path: Path) -> None:
    table = pq.read_table(path)
    pq.write_table(table.take([1, 0, *range(2, table.num_rows)]), path)


def _update_record(root: Path) -> None:
    """Update the record's checksums to the files as they are now."""
    from occgen_hub.files import sha256

    record = json.loads((root / RECORD).read_text())
    record["files"] = {name: sha256(root / name) for name in record["files"]}
    (root / RECORD).write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("damage", "recorded", "message"),
    [
        (lambda r: next(r.rglob("*.mp4")).unlink(), False, "is missing"),
        (lambda r: next(r.rglob("*.mp4")).write_bytes(b"x"), False, "has changed"),
        (lambda r: next(r.rglob("*.mp4")).write_bytes(b"x"), True, "not a video"),
        (lambda r: (r / "data/more.parquet").write_bytes(b"x"), False, "not a file of the export"),
        (lambda r: (r / RECORD).write_text("{}"), False, "does not list its episodes"),
        (lambda r: (r / RECORD).write_text("no"), False, "is not valid JSON"),
        (lambda r: _edit(r / "meta/info.json", total_frames=3), True, "has total_frames 3"),
        (lambda r: _edit(r / "meta/info.json", features=None), True, None),
        (lambda r: _swap_rows(shards(r)[0]), True, "does not belong to the expected frame"),
        (lambda r: shards(r)[0].write_bytes(b"PAR1"), True, "not a readable Parquet file"),
        (lambda r: _swap_rows(next((r / "data").rglob("*.parquet"))), True, "does not belong"),
    ],
)
def test_validate_finds_problems_of_an_export(mine, damage, recorded, message):
    damage(mine)
    if recorded:
        _update_record(mine)
    report = validate(mine)
    texts = [str(finding) for finding in report.findings]
    assert any(message in text for text in texts) if message else not texts, texts


# LeRobot's own tools


def edit(operation: str, root: Path | None, out: Path | None, commands: bool, **options) -> None:
    """Run lerobot-edit-dataset, in this process or as a command."""
    where = {"repo_id": None if root is None else "local/rooms", "root": root,
             "new_repo_id": None if out is None else "local/edited", "new_root": out}  # fmt: skip
    where = {key: str(value) for key, value in where.items() if value is not None}
    if commands:
        given = where | {"operation.type": operation}
        given |= {f"operation.{key}": json.dumps(value) for key, value in options.items()}
        words = [word for key, value in given.items() for word in (f"--{key}", value)]
        tool = Path(sys.executable).with_name("lerobot-edit-dataset")
        done = subprocess.run([tool, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return
    from lerobot.scripts import lerobot_edit_dataset as tool

    kind = tool.OperationConfig.get_choice_class(operation)
    with no_realtime_scheduling():
        tool.edit_dataset(tool.EditDatasetConfig(operation=kind(**options), **where))


def check_occupancy(built: Path, root: Path, numbers: list[int]) -> None:
    """Assert that an edited export holds these trajectories, each frame with its occupancy."""
    report = validate(root)
    assert report.findings == ()
    frames, found = with_occupancy(root), opened(built)
    number = 0
    for n in numbers:
        for t, expected in enumerate(found[n].visible_frames()):
            item = frames[number]
            assert item["episode"] == found[n].path.relative_to(built).as_posix()
            assert item["frame_index"] == t
            cells = torch.from_numpy(np.flatnonzero(item[VIEW].numpy()))
            assert torch.equal(cells, torch.from_numpy(np.asarray(expected, np.int64)))
            number += 1
    assert number == len(frames)


@pytest.mark.parametrize(
    "commands", [False, pytest.param(True, marks=pytest.mark.long)], ids=["in process", "commands"]
)
def test_update_export_follows_edits_by_lerobot_tools(
    commands: bool, built: Path, mine: Path, tmp_path: Path
) -> None:
    edited = tmp_path / "edited"
    edit("delete_episodes", mine, edited, commands, episode_indices=[1])
    with pytest.raises(UsageError):
        with_occupancy(edited)
    update_export(built, edited)
    check_occupancy(built, edited, [0, 2])

    edit("split", mine, tmp_path / "parts", commands, splits={"a": [0, 1], "b": [2]})
    for name, numbers in (("a", [0, 1]), ("b", [2])):
        update_export(built, tmp_path / "parts" / name)
        check_occupancy(built, tmp_path / "parts" / name, numbers)

    roots = [str(tmp_path / "parts" / name) for name in ("b", "a")]
    merged = tmp_path / "merged"
    edit("merge", None, merged, commands, repo_ids=["local/b", "local/a"], roots=roots)
    update_export(built, merged)
    check_occupancy(built, merged, [2, 0, 1])  # Not in the order of their names.

    edit("modify_tasks", mine, None, commands, new_task="look around")
    assert any("has changed since" in str(finding) for finding in validate(mine).findings)
    update_export(built, mine)
    check_occupancy(built, mine, [0, 1, 2])
    assert lerobot(mine)[3]["task"] == "look around"

    before = json.loads((mine / "meta/stats.json").read_text())
    edit("recompute_stats", mine, tmp_path / "stats", commands)
    after = json.loads((tmp_path / "stats/meta/stats.json").read_text())
    np.testing.assert_allclose(after[POSE]["mean"], before[POSE]["mean"], atol=1e-6)
    update_export(built, tmp_path / "stats")
    assert validate(tmp_path / "stats").findings == ()


def test_update_export_refuses_edits_that_it_cannot_follow(
    built: Path, exported: Path, mine: Path, tmp_path: Path
) -> None:
    twice = tmp_path / "twice"
    edit("merge", None, twice, False, repo_ids=["a", "b"], roots=[str(exported), str(exported)])
    with pytest.raises(UsageError, match=r"trajectory .* 2 times; export the dataset again"):
        update_export(built, twice)
    with pytest.raises(UsageError, match=r"is not a LeRobot v3\.0 dataset"):
        update_export(built, next(path for path in trajectories(built)))
    make_sample(tmp_path / "tree", trajectories=1, frames=2, seed=9)
    other = build(tmp_path / "tree", tmp_path / "other")
    with pytest.raises(
        UsageError, match=r"which is not in|of the 2 frames .*; export the dataset again"
    ):
        update_export(other, mine)
    place = next((mine / "data").rglob("*.parquet"))
    pq.write_table(pq.read_table(place).drop_columns(["episode"]), place)
    with pytest.raises(OccGenError, match="no longer has the column episode"):
        update_export(built, mine)


def test_slices_are_lists_of_frames_as_in_lerobot(exported: Path) -> None:
    frames, plain = with_occupancy(exported), lerobot(exported)
    found, expected = frames[-3::2], plain[-3::2]
    assert [item["index"] for item in found] == [item["index"] for item in expected]
    assert all(torch.equal(a[VIEW], frames[int(a["index"])][VIEW]) for a in found)
    assert frames[len(frames) :] == []


def test_occupancy_of_other_frames_is_refused(built, mine, tmp_path):
    make_sample(tmp_path / "tree", trajectories=1, frames=2)
    other = build(tmp_path / "tree", tmp_path / "other")
    shutil.rmtree(mine / "occupancy")
    shutil.copytree(other / "occupancy", mine / "occupancy")
    with pytest.raises(OccGenError, match="is not the occupancy of these episodes"):
        with_occupancy(mine)
    shutil.rmtree(mine / "occupancy")
    with pytest.raises(UsageError, match="no files of its episodes"):
        with_occupancy(mine)


SCHEDULING_PROBE = """
import os, sys, threading, time
from pathlib import Path
from typing import Any
from occgen_hub.exporting import export

seen, done = set(), threading.Event()

def look():
    while not done.is_set():
        for thread in os.listdir("/proc/self/task"):
            try:
                seen.add(os.sched_getscheduler(int(thread)))
            except ProcessLookupError:
                pass
        time.sleep(0.005)

looking = threading.Thread(target=look)
looking.start()
export(Path(sys.argv[1]), Path(sys.argv[2]))
done.set()
looking.join()
assert "libSvtAv1Enc" in Path("/proc/self/maps").read_text()
print(seen, os.sched_getscheduler(0))
"""


@pytest.mark.long
def test_export_keeps_normal_scheduling(built, tmp_path):
    """As root, SVT-AV1 would give itself, and all later threads, real-time scheduling."""
    done = subprocess.run(
        [sys.executable, "-c", SCHEDULING_PROBE, built, tmp_path / "out"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "{0} 0"


def test_occupancy_dataset_names_the_class_for_an_export(exported):
    with pytest.raises(UsageError, match=r"is an export; use LeRobotOccupancyDataset, which reads"):
        OccupancyDataset(exported)


@pytest.mark.parametrize("command", ["inspect", "report", "render"])
def test_trajectory_commands_refuse_an_export(exported, command):
    more = ["out.mp4"] if command == "render" else []
    done = subprocess.run(
        [sys.executable, "-m", "occgen_hub", command, exported, *more],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    (message,) = done.stderr.splitlines()
    assert message == f"Error: {exported}: is an export; give the dataset that it was made from."


def test_rerun_imports_an_export_with_its_depth(exported, tmp_path):
    experimental = pytest.importorskip("rerun.experimental")
    recording = tmp_path / "export.rrd"
    rerun = Path(sys.executable).with_name("rerun")
    done = subprocess.run(
        [rerun, exported, "--save", recording, "--bind", "127.0.0.1", "--port", "0"],
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    assert "Failed" not in done.stdout + done.stderr
    reader = experimental.RrdReader(recording)
    store = reader.store(store=reader.recordings()[0])
    entities = {chunk.entity_path for chunk in store.stream()}
    assert {"/observation.images.rgb", "/observation.images.depth", "/action"} <= entities
