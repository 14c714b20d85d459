"""The internnav source: both layouts, and the faults of the real files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from occgen_hub.builder import load_builder
from occgen_hub.config import load_config
from occgen_hub.engines import load_engine
from occgen_hub.episode import Episode
from occgen_hub.episode_build import Settings
from occgen_hub.errors import OccGenError, SourceError
from occgen_hub.job import Job, list_episodes
from occgen_hub.loading import Trajectory
from occgen_hub.media import write_video
from occgen_hub.runtime.build import build_dataset
from occgen_hub.runtime.results import Summary
from occgen_hub.sample import make_sample
from occgen_hub.validation import validate

RGB, DEPTH = "videos/chunk-000/observation.images.rgb", "videos/chunk-000/observation.images.depth"
VIDEO = "videos/chunk-000/observation.video.trajectory/episode_000000.mp4"
PARQUET = "data/chunk-000/episode_000000.parquet"
TRAJECTORY = "sample_zed/house_000/trajectory_0"
FRAMES = 11


@pytest.fixture(scope="module")
def trajectory_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The older layout: one folder per trajectory."""
    out = tmp_path_factory.mktemp("alone") / "tree"
    make_sample(out, trajectories=1, frames=FRAMES, seed=5)
    return out


@pytest.fixture(scope="module")
def scene_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The newer layout: one folder per scene, with two episodes."""
    out = tmp_path_factory.mktemp("together") / "tree"
    make_sample(out, trajectories=2, frames=FRAMES, seed=5, layout="scenes")
    return out


@pytest.fixture
def source(trajectory_tree: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trajectory_tree, tmp_path / "tree"))


@pytest.fixture
def scenes(scene_tree: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(scene_tree, tmp_path / "scenes"))


def read(root: Path, number: int = 0) -> Episode:
    builder = load_builder("internnav", root)
    return builder.read(list_episodes(builder)[number])


def ids(root: Path) -> list[str]:
    return [ref.id for ref in list_episodes(load_builder("internnav", root))]


def build(root: Path, out: Path, **options: Any) -> Summary:
    builder = load_builder("internnav", root)
    settings = Settings(load_config(None, ("voxel_size=0.25",)), **options)
    return build_dataset(Job(builder, list_episodes(builder), out, settings))


def notes(episode: Episode) -> dict[str, str]:
    codes = [note.code for note in episode.notes]
    assert len(set(codes)) == len(codes), f"one line of each kind: {codes}"
    assert all("\n" not in note.text for note in episode.notes)
    return {note.code: note.text for note in episode.notes}


def test_statistics_of_thousands_of_episodes_are_read_line_by_line(scenes: Path) -> None:
    """Ten thousand episodes have more values in this file than a whole file may have."""
    (path,) = scenes.rglob("episodes_stats.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    plain = [item.path for item in read(scenes, 1).media]
    path.write_text("\n".join(json.dumps({**row, "other": [0] * 1_200_000}) for row in rows))
    assert len(rows) > 1
    assert [item.path for item in read(scenes, 1).media] == plain
    path.write_text(json.dumps({**rows[0], "other": [0] * 2_200_000}))
    with pytest.raises(SourceError, match="has more values than any file of its kind"):
        read(scenes, 0)
    path.write_text("{}\n" * 2_200_000)
    with pytest.raises(SourceError, match="has more values than any file of its kind"):
        read(scenes, 0)


# Both layouts


def test_both_layouts_give_equal_episodes(trajectory_tree: Path, scene_tree: Path) -> None:
    one, other = read(trajectory_tree), read(scene_tree)
    assert one.length == other.length == FRAMES
    assert (one.fps, one.image_size, one.tasks) == (other.fps, other.image_size, other.tasks)
    for name in ("world_from_camera", "intrinsics", "task_index"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert one.read_depth is not None
    assert other.read_depth is not None
    for t in range(FRAMES):
        np.testing.assert_array_equal(one.read_rgb(t), other.read_rgb(t))
        np.testing.assert_array_equal(one.read_depth(t), other.read_depth(t))


def test_poses_are_in_opencv_axes(trajectory_tree: Path) -> None:
    action = np.array(pq.read_table(trajectory_tree / TRAJECTORY / PARQUET)["action"].to_pylist())
    poses = read(trajectory_tree).world_from_camera
    np.testing.assert_allclose(poses, action @ np.diag([1.0, -1, -1, 1]), atol=1e-7)


def test_depth_is_in_metres(trajectory_tree: Path) -> None:
    read_depth = read(trajectory_tree).read_depth
    assert read_depth is not None
    units = np.asarray(Image.open(trajectory_tree / TRAJECTORY / DEPTH / "10.png"))
    np.testing.assert_array_equal(read_depth(10), units / 10_000)


def test_frames_are_sorted_by_number(trajectory_tree: Path) -> None:
    paths = [item.path.name for item in read(trajectory_tree).media if item.file == "rgb"]
    assert paths == [f"{n}.jpg" for n in range(FRAMES)]


def test_episodes_of_a_scene_have_their_own_frames(scene_tree: Path) -> None:
    second = read(scene_tree, 1)
    names = [int(item.path.stem) for item in second.media if item.file == "depth"]
    assert names == list(range(FRAMES, FRAMES + second.length))
    assert [item.frame for item in second.media if item.file == "depth"] == list(
        range(second.length)
    )


def without_image_index(root: Path) -> None:
    path = root / "sample_zed/house_000/meta/episodes_stats.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({"episode_index": r["episode_index"]}) + "\n" for r in rows))


def test_images_are_assigned_by_episode_length_without_image_index(
    scenes: Path, scene_tree: Path
) -> None:
    without_image_index(scenes)
    for number in range(2):
        one, other = read(scenes, number), read(scene_tree, number)
        assert [i.path.name for i in one.media] == [i.path.name for i in other.media]


def test_error_names_a_missing_image_of_a_scene(scenes: Path) -> None:
    (scenes / "sample_zed/house_000" / RGB / f"{FRAMES}.jpg").unlink()
    read(scenes, 0)
    with pytest.raises(SourceError, match=rf"rgb/{FRAMES}\.jpg: is missing"):
        read(scenes, 1)


def test_invalid_image_index_is_refused(scenes: Path) -> None:
    path = scenes / "sample_zed/house_000/meta/episodes_stats.jsonl"
    for value in ({"min": 5, "max": 2}, {"min": 0}, [0, 1], "all", {"min": 0, "max": 1e300}):
        path.write_text(json.dumps({"episode_index": 0, "image_index": value}) + "\n")
        with pytest.raises(SourceError, match="no valid image_index for episode 0"):
            read(scenes)


def test_dataset_built_from_scenes_is_valid(scene_tree: Path, tmp_path: Path) -> None:
    summary = build(scene_tree, tmp_path / "out")
    assert not summary.failures
    assert validate(tmp_path / "out").findings == ()
    for number in range(2):
        place = tmp_path / "out/sample_zed/house_000" / f"episode_{number:06d}"
        assert (place / "data/chunk-000/path.ply").read_bytes() == (
            scene_tree / "sample_zed/house_000/meta/pointcloud.ply"
        ).read_bytes()


# Names


def test_ids_do_not_depend_on_the_input_folder(source: Path) -> None:
    tree = source.rename(source.with_name("sample_zed")) / "sample_zed"
    assert ids(tree.parent.parent) == [TRAJECTORY]
    assert ids(tree.parent) == [TRAJECTORY]
    assert ids(tree) == [TRAJECTORY]
    assert ids(tree / "house_000") == [TRAJECTORY]
    assert ids(tree / "house_000/trajectory_0") == [TRAJECTORY]


def test_ids_of_scenes_do_not_depend_on_the_input_folder(scenes: Path) -> None:
    expected = [f"sample_zed/house_000/episode_{n:06d}" for n in range(2)]
    for root in (scenes.parent, scenes, scenes / "sample_zed", scenes / "sample_zed/house_000"):
        assert ids(root) == expected


def test_hidden_folders_and_other_files_are_ignored(source: Path) -> None:
    shutil.copytree(source / TRAJECTORY, source / "sample_zed/house_000/trajectory_10")
    shutil.copytree(source / TRAJECTORY, source / "sample_zed/house_000/.hidden")
    (source / "sample_zed/README.md").write_text("x")
    assert ids(source) == [TRAJECTORY, "sample_zed/house_000/trajectory_10"]


# Faults of the real files


def test_each_fault_of_the_real_files_gives_one_note(tmp_path: Path) -> None:
    make_sample(tmp_path / "faulty", trajectories=1, frames=3, seed=5, faults=True)
    make_sample(tmp_path / "right", trajectories=1, frames=3, seed=5)
    faulty, right = read(tmp_path / "faulty"), read(tmp_path / "right")

    texts = notes(faulty)
    assert texts["frame count"] == (
        "info.json says 6 frames and episodes.jsonl says length 6, the parquet has 3 frames: "
        "these are used"
    )
    assert texts["declared columns"] == (
        "info.json declares timestamp, frame_index, episode_index, task_index, which the parquet "
        "lacks: computed instead"
    )
    assert texts["fps"] == "info.json says 30 fps, the video has 10, which is used"
    assert "480 x 272, the images 480 x 270: the images count" in texts["video size"]
    assert "JSON inside strings" in texts["task json"]
    assert len(texts) == 5

    assert (faulty.length, faulty.fps, faulty.image_size) == (3, 10.0, (480, 270))
    assert faulty.tasks == right.tasks
    np.testing.assert_array_equal(faulty.world_from_camera, right.world_from_camera)
    np.testing.assert_array_equal(faulty.intrinsics, right.intrinsics)

    assert not build(tmp_path / "faulty", tmp_path / "out").failures
    assert validate(tmp_path / "out").findings == ()
    info = Trajectory.open(tmp_path / "out" / TRAJECTORY).info()
    table = pq.read_table(tmp_path / "out" / TRAJECTORY / PARQUET)
    assert list(info["features"]) == table.column_names
    assert (info["total_frames"], info["fps"]) == (3, 10)
    np.testing.assert_allclose(table["timestamp"].to_numpy(), [0, 0.1, 0.2], atol=1e-6)


def test_instructions_are_extracted_from_json(source: Path) -> None:
    tasks = [
        {"sum_instruction": "Go to the door.", "sum_indexes": [4, FRAMES - 1]},
        {"sub_instruction": "Go.", "revised_sub_instruction": "Please go.", "sub_indexes": [0, 3]},
        {"revised_sub_instruction": "Only revised.", "sub_indexes": [0, 99]},
        {"words": "no instruction"},
    ]
    texts = [*(json.dumps(task) for task in tasks), "plain words", '{"broken']
    meta = source / TRAJECTORY / "meta"
    (meta / "episodes.jsonl").write_text(json.dumps({"episode_index": 0, "tasks": texts}))
    table = pq.read_table(source / TRAJECTORY / PARQUET).drop_columns(["task_index"])
    pq.write_table(table, source / TRAJECTORY / PARQUET)

    episode = read(source)
    assert [task.text for task in episode.tasks] == [
        "Go to the door.", "Go.", "Only revised.", texts[3], "plain words", '{"broken',
    ]  # fmt: skip
    assert [task.source for task in episode.tasks] == [*tasks, {}, {}]
    assert episode.task_index.tolist() == [1] * 4 + [0] * (FRAMES - 4)


def test_task_index_refers_to_all_tasks_of_the_scene(scenes: Path) -> None:
    folder = scenes / "sample_zed/house_000"
    rows = [json.loads(line) for line in (folder / "meta/tasks.jsonl").read_text().splitlines()]
    own = json.loads((folder / "meta/episodes.jsonl").read_text().splitlines()[1])["tasks"]
    path = folder / "data/chunk-000/episode_000001.parquet"
    table = pq.read_table(path)
    last = next(row["task_index"] for row in rows if row["task"] == own[-1])
    given = pa.array([last] * table.num_rows, pa.int64())
    pq.write_table(table.drop_columns(["task_index"]).append_column("task_index", given), path)
    assert set(read(scenes, 1).task_index.tolist()) == {len(own) - 1}


# Sources with a video instead of images


def test_source_with_only_a_video_is_read(
    source: Path, trajectory_tree: Path, tmp_path: Path
) -> None:
    """Without images, the intrinsics are scaled to the video: from 480 x 270 to 480 x 272."""
    shutil.rmtree(source / TRAJECTORY / RGB)
    shutil.rmtree(source / TRAJECTORY / DEPTH)
    episode, whole = read(source), read(trajectory_tree)
    assert "intrinsics are scaled to it" in notes(episode)["video only"]
    assert (episode.image_size, whole.image_size) == ((480, 272), (480, 270))
    assert episode.intrinsics is not None
    assert whole.intrinsics is not None
    scale = np.diag([1, 272 / 270, 1])
    np.testing.assert_allclose(episode.intrinsics, scale @ whole.intrinsics)
    difference = episode.read_rgb(10)[:270].astype(float) - whole.read_rgb(10)
    assert np.abs(difference).mean() < 12
    assert episode.read_rgb(3).shape == (272, 480, 3)
    with pytest.raises(OccGenError, match=f"{TRAJECTORY}: has no depth, which the engine rgbd"):
        load_engine("rgbd").reconstruct(episode, load_config(), tmp_path)


def test_intrinsics_are_scaled_to_a_smaller_video(source: Path, trajectory_tree: Path) -> None:
    shutil.rmtree(source / TRAJECTORY / RGB)
    shutil.rmtree(source / TRAJECTORY / DEPTH)
    frames = [np.full((90, 240, 3), 20 * t, np.uint8) for t in range(FRAMES)]
    write_video(source / TRAJECTORY / VIDEO, frames, 10)
    episode, whole = read(source), read(trajectory_tree)
    assert episode.intrinsics is not None
    assert whole.intrinsics is not None
    np.testing.assert_allclose(episode.intrinsics, np.diag([0.5, 1 / 3, 1]) @ whole.intrinsics)


def test_video_with_another_frame_count_is_refused(source: Path) -> None:
    shutil.rmtree(source / TRAJECTORY / RGB)
    write_video(source / TRAJECTORY / VIDEO, [np.zeros((90, 160, 3), np.uint8)] * 3, 10)
    with pytest.raises(SourceError, match=rf"has 3 frames, the parquet {FRAMES}"):
        read(source)


def test_source_with_a_video_and_depth_images_is_built(source: Path, tmp_path: Path) -> None:
    """The video frames are resized to the depth images, to which the intrinsics belong."""
    shutil.rmtree(source / TRAJECTORY / RGB)
    assert not build(source, tmp_path / "out").failures
    assert validate(tmp_path / "out").findings == ()
    built = Trajectory.open(tmp_path / "out" / TRAJECTORY)
    assert built.image_size == (480, 270)
    shown = built.rgb(0).astype(int) - read(source).read_rgb(0)
    assert np.abs(shown).mean() < 3
    np.testing.assert_array_equal(built.intrinsics(), read(source).intrinsics)


# What is passed through


def test_additional_columns_are_passed_through_and_declared(source: Path, tmp_path: Path) -> None:
    path = source / TRAJECTORY / PARQUET
    speed = np.arange(FRAMES * 3, dtype=np.float64).reshape(FRAMES, 3)
    words = [f"word {n}" for n in range(FRAMES)]
    table = pq.read_table(path)
    table = table.append_column("speed", pa.array(speed.tolist(), pa.list_(pa.float64())))
    table = table.append_column("done", pa.array([False] * (FRAMES - 1) + [True]))
    table = table.append_column("said", pa.array(words))
    pq.write_table(table, path)

    assert not build(source, tmp_path / "out").failures
    assert validate(tmp_path / "out").findings == ()
    built = Trajectory.open(tmp_path / "out" / TRAJECTORY)
    features, written = built.info()["features"], built.table()
    assert features["speed"] == {"dtype": "float64", "shape": [3], "names": None}
    assert features["done"] == {"dtype": "bool", "shape": [1], "names": None}
    assert features["said"] == {"dtype": "string", "shape": [1], "names": None}
    assert written["speed"].to_pylist() == speed.tolist()
    assert written["done"].to_pylist() == [False] * (FRAMES - 1) + [True]
    assert written["said"].to_pylist() == words
    for name in ("action", "observation.camera_intrinsic", "observation.camera_extrinsic"):
        assert written[name].to_pylist() == table[name].to_pylist()


@pytest.mark.parametrize("media", ["copy", "link", "none"])
def test_media_option_copies_links_or_omits_files(
    media: str, trajectory_tree: Path, tmp_path: Path
) -> None:
    assert not build(trajectory_tree, tmp_path / "out", media=media).failures
    assert validate(tmp_path / "out").findings == ()
    place, origin = tmp_path / "out" / TRAJECTORY, trajectory_tree / TRAJECTORY
    pairs = {
        f"{RGB}/10.jpg": f"{RGB}/10.jpg",
        f"{DEPTH}/10.png": f"{DEPTH}/10.png",
        "data/chunk-000/path.ply": "data/chunk-000/path.ply",
        "videos/chunk-000/observation.video.trajectory/reference.mp4": VIDEO,
    }
    for name, source_name in pairs.items():
        if media == "none":
            assert not (place / name).exists()
            continue
        assert (place / name).read_bytes() == (origin / source_name).read_bytes()
        assert (place / name).samefile(origin / source_name) == (media == "link")
