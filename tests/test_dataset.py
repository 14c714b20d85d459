"""The files of a built trajectory, read with the libraries that its users have."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import open3d as o3d
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import occgen_hub
from PIL import Image
from scipy import sparse

from occgen_hub import loading
from occgen_hub.files import read_parquet
from occgen_hub.loading import NpzArray, Trajectory, trajectories
from occgen_hub.media import video_facts, video_frames
from occgen_hub.schema import load_schema
from occgen_hub.shards import write_shards
from occgen_hub.validation import validate

SCHEMA = load_schema("trajectory")


@pytest.fixture(scope="module")
def trajectory(dataset: Path) -> Path:
    return trajectories(dataset)[0]


@pytest.fixture(scope="module")
def source(trajectory: Path, dataset: Path, sample_tree: Path) -> Path:
    return sample_tree / trajectory.relative_to(dataset)


def test_visible_cells_are_checked_frame_by_frame(dataset, monkeypatch):
    """The visible cells of half an hour are too many to load at once."""
    loaded, load = [], NpzArray.load
    monkeypatch.setattr(NpzArray, "load", lambda array: (loaded.append(array.name), load(array))[1])
    assert validate(dataset).findings == ()
    assert "indptr" in loaded
    assert "indices" not in loaded


def test_each_table_and_meta_file_is_parsed_once(dataset, monkeypatch):
    """`validate` reads a trajectory through one object, which caches parsed files."""
    parsed: Counter[Path] = Counter()
    for name in ("read_parquet", "read_jsonl", "read_json"):
        read = getattr(loading, name)
        monkeypatch.setattr(loading, name, partial(_counted, parsed, read))
    monkeypatch.setattr("occgen_hub.validation.check_shards", lambda root: ())
    assert validate(dataset).findings == ()
    tables = {path: n for path, n in parsed.items() if path.suffix == ".parquet"}
    meta = {path: n for path, n in parsed.items() if path.suffix != ".parquet"}
    assert list(tables.values()) == [1, 1]
    assert set(meta.values()) == {1}
    assert {path.name for path in meta} >= {"info.json", "tasks.jsonl", "episodes_stats.jsonl"}


def _counted(parsed, read, path, *limit):
    parsed[path] += 1
    return read(path, *limit)


def test_columns_are_cached_and_read_only(trajectory):
    opened = Trajectory.open(trajectory)
    poses = opened.column(SCHEMA.poses)
    assert opened.column(SCHEMA.poses) is poses
    with pytest.raises(ValueError, match="read-only"):
        poses[0] = 0


def test_built_dataset_is_valid(dataset):
    report = validate(dataset)
    assert report.findings == ()
    assert report.trajectories == 2


def test_trajectory_has_exactly_the_files_of_the_layout(trajectory):
    frames = pq.read_metadata(trajectory / "data/chunk-000/episode_000000.parquet").num_rows
    expected = {
        "data/chunk-000/all_occ.npz",
        "data/chunk-000/origin_pcd.ply",
        "data/chunk-000/path.ply",
        "data/chunk-000/episode_000000.parquet",
        "meta/info.json",
        "meta/episodes.jsonl",
        "meta/episodes_stats.jsonl",
        "meta/tasks.jsonl",
        "meta/occgen.json",
        "videos/chunk-000/observation.occ.mask/mask_sequence.npz",
        "videos/chunk-000/observation.occ.view/occ_sequence.npz",
        "videos/chunk-000/observation.video.trajectory/reference.mp4",
        *(f"videos/chunk-000/observation.images.rgb/{t}.jpg" for t in range(frames)),
        *(f"videos/chunk-000/observation.images.depth/{t}.png" for t in range(frames)),
    }
    found = {p.relative_to(trajectory).as_posix() for p in trajectory.rglob("*") if p.is_file()}
    assert found == expected


def test_datasets_library_reads_arrays_of_the_declared_shape(trajectory, source):
    import datasets

    path = str(trajectory / "data/chunk-000/episode_000000.parquet")
    loaded = datasets.load_dataset("parquet", data_files=path, split="train", cache_dir=None)
    info = json.loads((trajectory / "meta/info.json").read_text())
    assert set(loaded.features) == set(info["features"])
    assert loaded.features["action"] == datasets.Array2D(shape=(4, 4), dtype="float32")
    assert loaded.features["observation.camera_intrinsic_occ"] == datasets.Array2D(
        shape=(3, 3), dtype="float32"
    )
    assert loaded.features["timestamp"] == datasets.Value("float32")
    rows = loaded.with_format("numpy")[:]
    for name, feature in info["features"].items():
        shape = () if feature["shape"] == [1] else tuple(feature["shape"])
        assert rows[name].shape == (len(loaded), *shape), name
        if feature["dtype"] == "string":
            assert rows[name].dtype.kind == "U", name
        else:
            assert rows[name].dtype == np.dtype(feature["dtype"]), name
    original = pd.read_parquet(source / "data/chunk-000/episode_000000.parquet")
    action = np.stack([np.stack(row) for row in original["action"]])
    np.testing.assert_array_equal(rows["action"], action)
    opencv = action.astype(np.float64) @ np.diag([1.0, -1.0, -1.0, 1.0])
    np.testing.assert_array_equal(
        rows["observation.camera_extrinsic_occ"], opencv.astype(np.float32)
    )
    np.testing.assert_array_equal(
        rows["observation.camera_intrinsic_occ"], rows["observation.camera_intrinsic"]
    )


def test_info_declares_the_parquet_columns(trajectory):
    info = json.loads((trajectory / "meta/info.json").read_text())
    table = read_parquet(trajectory / "data/chunk-000/episode_000000.parquet")
    assert set(info["features"]) == set(table.column_names)
    assert info["total_frames"] == table.num_rows
    names = info["features"]["observation.camera_extrinsic_occ"]["names"]
    assert names[:2] == ["extrinsic_0_0", "extrinsic_0_1"]
    assert len(names) == 16
    for name, feature in info["features"].items():
        assert table.schema.field(name).type == SCHEMA.features[name].arrow_type()
        assert feature == SCHEMA.features[name].info()


def test_each_row_names_its_episode_and_scene(trajectory, dataset, tmp_path):
    table = read_parquet(trajectory / "data/chunk-000/episode_000000.parquet")
    episode = trajectory.relative_to(dataset).as_posix()
    assert set(table["episode"].to_pylist()) == {episode}
    assert set(table["scene"].to_pylist()) == {episode.rpartition("/")[0]}

    copy = tmp_path / episode
    shutil.copytree(trajectory, copy)
    other = pa.array([episode, *["x"] * (len(table) - 1)])
    index = table.column_names.index("episode")
    pq.write_table(
        table.set_column(index, "episode", other), copy / "data/chunk-000/episode_000000.parquet"
    )
    problems = [finding.problem for finding in validate(tmp_path).findings]
    assert f"column episode is not {episode}, as in the record" in problems


def test_lerobot_reads_the_meta_files(trajectory):
    """LeRobot's own v2.1 readers, which its converter to v3.0 uses."""
    legacy = pytest.importorskip("lerobot.scripts.convert_dataset_v21_to_v30")
    episodes = legacy.legacy_load_episodes(trajectory)
    tasks, index = legacy.legacy_load_tasks(trajectory)
    stats = legacy.legacy_load_episodes_stats(trajectory)
    assert (
        episodes[0]["length"]
        == json.loads((trajectory / "meta/info.json").read_text())["total_frames"]
    )
    assert tasks[0] in episodes[0]["tasks"]
    assert index[tasks[0]] == 0
    assert stats[0]["action"]["min"].shape == (4, 4)


V21_READER = """
import json, sys
import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset

POSE = "observation.camera_extrinsic_occ"
expected = json.load(sys.stdin)
frames = LeRobotDataset(
    "local/rooms", root=sys.argv[1], episodes=[0], delta_timestamps={POSE: [-0.1, 0.0]}
)
assert frames.num_episodes == 1 and len(frames) == len(expected["poses"])
for t, pose in enumerate(expected["poses"]):
    item = frames[t]
    assert np.array_equal(item[POSE][1].numpy(), np.array(pose, np.float32))
    assert item["task"] == expected["tasks"][int(item["task_index"])]
    assert item[f"{POSE}_is_pad"].tolist() == [t == 0, False]
"""


@pytest.mark.skipif(
    "OCCGEN_LEROBOT_V21" not in os.environ,
    reason="OCCGEN_LEROBOT_V21 names no Python that has lerobot 0.3: see docs/development.md",
)
def test_lerobots_own_v21_reader_loads_a_trajectory(trajectory):
    opened = Trajectory.open(trajectory)
    expected = {"poses": opened.world_from_camera().tolist(), "tasks": opened.tasks()}
    done = subprocess.run(
        [os.environ["OCCGEN_LEROBOT_V21"], "-c", V21_READER, str(trajectory)],
        input=json.dumps(expected), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_statistics_match_those_of_lerobot(trajectory):
    from lerobot.datasets.compute_stats import get_feature_stats

    opened = Trajectory.open(trajectory)
    stats = json.loads(opened.file("stats").read_text())["stats"]
    for name in ("action", "timestamp", "observation.camera_intrinsic_occ"):
        values = opened.column(name)
        rows = values.reshape(len(values), -1)  # LeRobot 0.6 reduces matrices to their columns
        theirs = get_feature_stats(rows, axis=0, keepdims=False)
        for key in ("min", "max", "mean", "std"):
            exact = getattr(np, key)(rows.astype(np.float64), axis=0)
            np.testing.assert_allclose(np.ravel(stats[name][key]), exact, atol=1e-6)
            # LeRobot computes its own in float32, from squares.
            np.testing.assert_allclose(np.ravel(stats[name][key]), theirs[key], atol=1e-2)
        assert stats[name]["count"] == theirs["count"].tolist()


def test_scipy_and_numpy_read_the_occupancy(trajectory):
    """Only scipy.sparse.load_npz and numpy are used, with the default grid."""
    visible = sparse.load_npz(trajectory / "videos/chunk-000/observation.occ.view/occ_sequence.npz")
    frames = len(list((trajectory / "videos/chunk-000/observation.images.rgb").iterdir()))
    assert visible.shape == (frames, 200 * 125 * 200)
    assert visible.dtype == np.uint8
    mask = np.load(trajectory / "videos/chunk-000/observation.occ.mask/mask_sequence.npz")
    observed = np.unpackbits(mask["data"][0])[: visible.shape[1]].reshape(mask["shape"])
    occupied = visible[0].toarray().reshape(mask["shape"]).astype(bool)
    assert observed[occupied].all()
    assert 10_000 < observed.sum() < visible.shape[1]
    assert occupied.sum() > 1000


def test_visible_cells_stop_rays_at_the_measured_depth(trajectory):
    """The visible cells of a frame stop its rays at the measured depth, or slightly before it.

    Before it by at most the cell in which the ray meets the staircase of cells; never behind it.
    """
    opened = Trajectory.open(trajectory)
    grid, K, size = opened.grid, opened.intrinsics()[0], opened.image_size
    from occgen_hub.occupancy.visibility import OCCUPIED, first_occupied

    state = np.zeros(grid.cells, np.uint8)
    state[next(opened.visible_frames())] = OCCUPIED
    hit = first_occupied(grid, K, size, state)
    depth = opened.depth(0)
    z = grid.centres(hit[hit >= 0])[:, 2]
    later = z - depth[hit >= 0] > 2 * grid.voxel_size
    assert later.mean() < 2e-3
    inside = (depth > 0.2) & (depth < 3.3)
    v, u = np.mgrid[: size[1], : size[0]] + 0.5
    for value, low, high in (
        ((u - K[0, 2]) / K[0, 0], -1.9, 1.9),
        ((v - K[1, 2]) / K[1, 1], -1.4, 0.9),
    ):
        inside &= (value * depth > low) & (value * depth < high)
    assert (hit[inside] >= 0).mean() > 0.998


def test_scene_is_in_world_coordinates(trajectory, sample_tree):
    scene = np.load(trajectory / "data/chunk-000/all_occ.npz", allow_pickle=False)
    assert scene["data"].dtype == np.float32
    assert scene["voxel_size"] == 0.02
    index = (scene["data"] - scene["origin"]) / scene["voxel_size"] - 0.5
    np.testing.assert_allclose(index, np.rint(index), atol=1e-3)
    assert (index.max(axis=0).round() < scene["shape"]).all()
    mesh = o3d.t.io.read_triangle_mesh(str(sample_tree / "ground_truth" / "mesh.ply"))
    centre = mesh.vertex.positions.numpy().mean(axis=0)
    mesh.vertex.positions = mesh.vertex.positions - o3d.core.Tensor(centre)
    mesh.vertex.positions = mesh.vertex.positions.to(o3d.core.float32)
    truth = o3d.t.geometry.RaycastingScene()
    truth.add_triangles(mesh)
    for points in (
        scene["data"],
        np.asarray(
            o3d.io.read_point_cloud(str(trajectory / "data/chunk-000/origin_pcd.ply")).points
        ),
    ):
        distance = truth.compute_distance((points - centre).astype(np.float32)).numpy()
        assert np.median(distance) < 0.012
        assert np.quantile(distance, 0.99) < 0.02


def test_cloud_has_the_colours_of_the_images(trajectory):
    opened = Trajectory.open(trajectory)
    cloud, pose, K = opened.cloud(), opened.world_from_camera()[0], opened.intrinsics()[0]
    local = (cloud.points - pose[:3, 3]) @ pose[:3, :3]
    depth, rgb = opened.depth(0), opened.rgb(0)
    front = local[:, 2] > 0.3
    u = np.floor(K[0, 0] * local[front, 0] / local[front, 2] + K[0, 2]).astype(int)
    v = np.floor(K[1, 1] * local[front, 1] / local[front, 2] + K[1, 2]).astype(int)
    seen = (u >= 0) & (u < rgb.shape[1]) & (v >= 0) & (v < rgb.shape[0])
    seen[seen] = np.abs(depth[v[seen], u[seen]] - local[front, 2][seen]) < 0.02
    assert seen.sum() > 1000
    difference = cloud.colors[front][seen].astype(int) - rgb[v[seen], u[seen]]
    assert np.median(np.abs(difference)) < 16


def test_media_are_copied_from_the_source(trajectory, source):
    for name in ("observation.images.rgb/0.jpg", "observation.images.depth/1.png"):
        ours, theirs = (root / "videos/chunk-000" / name for root in (trajectory, source))
        assert ours.read_bytes() == theirs.read_bytes()
    video = trajectory / "videos/chunk-000/observation.video.trajectory/reference.mp4"
    assert video_facts(video).frames == Trajectory.open(trajectory).table().num_rows
    first = next(video_frames(video))
    image = Image.open(trajectory / "videos/chunk-000/observation.images.rgb/0.jpg")
    resized = np.asarray(image.resize(first.shape[1::-1]), int)
    assert np.abs(resized - first).mean() < 12


def test_record_names_every_file_with_its_digest(trajectory):
    record = json.loads((trajectory / "meta/occgen.json").read_text())
    held = {p.relative_to(trajectory).as_posix() for p in trajectory.rglob("*") if p.is_file()}
    assert set(record["files"]) == held - {"meta/occgen.json"}
    for name, digest in record["files"].items():
        assert hashlib.sha256((trajectory / name).read_bytes()).hexdigest() == digest
    assert record["config"]["voxel_size"] == 0.02
    assert record["grid"]["shape"] == [200, 125, 200]
    assert record["engine"] == "rgbd"


def test_voxel_size_scale_thins_the_cloud(sample_tree, tmp_path):
    from occgen_hub.builder import load_builder
    from occgen_hub.config import Config
    from occgen_hub.episode_build import Settings, build_episode

    builder = load_builder("internnav", sample_tree)
    ref = next(builder.episodes())
    sizes = {}
    for scale in (None, 100.0, 20.0):
        config = Config(voxel_size=0.05, voxel_size_scale=scale, interval=2)
        out = tmp_path / str(scale)
        build_episode(builder, ref, out, Settings(config, media="none"))
        assert validate(out).valid
        sizes[scale] = len(Trajectory.open(out / ref.id).cloud())
    assert (
        sizes[None] == sizes[100.0] > sizes[20.0] > 0
    )  # a hundredth of the room is finer than the base size
    scene = np.load(tmp_path / "20.0" / ref.id / "data/chunk-000/all_occ.npz")
    volume = np.prod(scene["shape"]) * 0.05**3
    points = Trajectory.open(tmp_path / "20.0" / ref.id).cloud().points
    voxels = np.floor(points.astype(float) / (np.cbrt(volume) / 20)).astype(int)
    # Rounding may move a mean into the next voxel: nearly one point per voxel.
    assert len(np.unique(voxels, axis=0)) > 0.99 * len(points)


def test_surface_below_the_grid_gives_a_note(sample_tree, tmp_path):
    """Cameras of the sample are less than a metre above the floor."""
    for y_max, expected in (("1.0", 0), ("0.3", 1)):
        out = tmp_path / y_max
        settings = ["--set", "voxel_size=0.1", "--set", f"pc_range=[-2,-1.5,-0.5,2,{y_max},3.5]"]
        done = occgen_hub(
            "build", "--input", sample_tree, "--output", out, "--limit", "1", *settings
        )
        assert done.returncode == 0, done.stderr
        assert (
            done.stderr.count("% of the surface ahead of the camera is below the grid") == expected
        )


def test_interval_uses_every_nth_frame_and_still_writes_every_frame(sample_tree, tmp_path):
    from occgen_hub.builder import load_builder
    from occgen_hub.config import Config
    from occgen_hub.episode_build import Settings, build_episode

    builder = load_builder("internnav", sample_tree)
    ref = next(builder.episodes())
    points = []
    for interval in (1, 3):
        out = tmp_path / str(interval)
        config = Config(voxel_size=0.05, interval=interval)
        result = build_episode(builder, ref, out, Settings(config, media="none"))
        assert result.frames == 4
        points.append(
            json.loads((out / ref.id / "meta/occgen.json").read_text())["scene"]["points"]
        )
    assert points[1] < points[0]


def test_pandas_reads_matrices_as_lists_without_datasets(trajectory):
    """In a process that never imports `datasets`, only pandas or polars."""
    code = (
        "import os, sys, pandas as pd, numpy as np; "
        "table = pd.read_parquet(sys.argv[1]); "
        "poses = np.array([[*map(list, pose)] for pose in table['action']]); "
        # Exit at once: pandas gives Python files to Arrow (see files.parquet_file).
        "os._exit('datasets' in sys.modules or poses.shape[1:] != (4, 4))"
    )
    path = trajectory / "data/chunk-000/episode_000000.parquet"
    subprocess.run([sys.executable, "-c", code, path], check=True)


def test_validate_refuses_trajectories_of_different_grids(sample_tree, dataset, tmp_path):
    from occgen_hub.builder import load_builder
    from occgen_hub.config import Config
    from occgen_hub.episode_build import Settings, build_episode, why_outdated

    shutil.copytree(dataset, tmp_path / "mixed")
    builder = load_builder("internnav", sample_tree)
    ref = list(builder.episodes())[1]
    settings = Settings(Config(voxel_size=0.1), media="none")
    reason = why_outdated(builder, ref, tmp_path / "mixed", settings)
    assert "another config (voxel_size 0.02, now 0.1)" in reason
    built = build_episode(builder, ref, tmp_path / "mixed", settings)
    assert built.notes[0].code == "built again"
    record = json.loads((tmp_path / "mixed" / ref.id / "meta/occgen.json").read_text())
    assert not any("built again" in note for note in record["notes"])
    write_shards(tmp_path / "mixed")
    report = validate(tmp_path / "mixed")
    assert len(report.findings) == 1
    assert "one configuration" in report.findings[0].remedy
    # Rebuilding with the original settings restores the dataset.
    build_episode(builder, ref, tmp_path / "mixed", Settings())
    problems = [finding.problem for finding in validate(tmp_path / "mixed").findings]
    assert any("occupied differs from" in problem for problem in problems)
    write_shards(tmp_path / "mixed")
    assert validate(tmp_path / "mixed").valid
