"""The source `lerobot`: datasets with several episodes and cameras give the recorded scene."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import lerobots
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner, Result
from hub_server import READER, Hub, Repository
from made_up import share_beside
from standin import save, weights_fitted_to

import occgen_hub as library
from occgen_hub.builder import DatasetBuilder, load_builder
from occgen_hub.builders.lerobot.images import metres_of_codes
from occgen_hub.camera_mapping import CameraMapping, camera_mapping, read_cameras
from occgen_hub.cli import cli
from occgen_hub.engines import load_engine
from occgen_hub.episode import Episode, check_episode
from occgen_hub.episode_build import Settings, build_episode
from occgen_hub.errors import OccGenError, SourceError, UsageError
from occgen_hub.fusion.conventions import check_conventions
from occgen_hub.geometry.sim3 import Sim3
from occgen_hub.job import list_episodes
from occgen_hub.loading import Trajectory
from occgen_hub.source_check import check_source

SMALL = library.Config(pc_range=(-0.4, -0.4, 0.4, 0.4, 0.4, 1.2))
"""The usual cell size in a small range, for speed."""

FRAMES = 10
PARTS = (range(3), range(FRAMES))
"""The frames of two episodes: the first three, and all."""


@pytest.fixture(scope="module")
def episode(tmp_path_factory: pytest.TempPathFactory) -> Episode:
    """A synthetic recording in which the camera walks and turns."""
    from occgen_hub.sample import make_sample

    out = tmp_path_factory.mktemp("recorded") / "tree"
    make_sample(out, trajectories=1, frames=FRAMES, seed=7)
    builder = load_builder("internnav", out)
    return builder.read(next(builder.episodes()))


@pytest.fixture(scope="module")
def cells(episode: Episode, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """The scene's cells as built from the InternData-N1 tree."""
    tree = Path(episode.media[0].path)
    root = next(parent for parent in tree.parents if parent.name == "tree")
    out = tmp_path_factory.mktemp("tree") / "out"
    return scene_cells(load_builder("internnav", root), out)[0]


def scene_cells(builder: DatasetBuilder, out: Path, cameras: int = 2) -> list[np.ndarray]:
    """(n, 3) scene cells as built from each of the last cameras of the last episode."""
    refs = list_episodes(builder)
    found = []
    for ref in [ref for ref in refs if ref.index == refs[-1].index][-cameras:]:
        build_episode(builder, ref, out, Settings(SMALL, media="none"))
        centres = Trajectory.open(out / ref.id).scene_cells()
        found.append(np.floor(centres / SMALL.voxel_size).astype(np.int64))
    return found


@pytest.fixture(scope="module")
def v21(episode: Episode, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A v2.1 dataset. Tests must not change it."""
    root = tmp_path_factory.mktemp("v21") / "robot"
    lerobots.write_v21(episode, root, PARTS)
    (root.parent / "cameras.yaml").write_text(lerobots.V21_MAPPING)
    return root


@pytest.fixture(scope="module")
def v30(episode: Episode, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A v3.0 dataset, written by lerobot. Tests must not change it."""
    root = tmp_path_factory.mktemp("v30") / "robot"
    lerobots.write_v30(episode, root, PARTS)
    (root.parent / "cameras.yaml").write_text(lerobots.v30_mapping(episode))
    return root


@pytest.fixture(params=["v21", "v30"])
def lerobot_dataset(request: pytest.FixtureRequest) -> Path:
    """One of the datasets, with its mapping file in the parent folder."""
    return request.getfixturevalue(request.param)


def builder_of(root: Path, **changed: object) -> DatasetBuilder:
    """A builder with the dataset's mapping, with changes for the front camera."""
    front, *others = read_cameras(root.parent / "cameras.yaml")
    return load_builder("lerobot", root, [front.model_copy(update=changed), *others])


def read(root: Path, camera: str = "front", **changed: object) -> Episode:
    """The last episode of a camera."""
    builder = builder_of(root, **changed)
    *_, ref = (ref for ref in list_episodes(builder) if ref.id.endswith(camera))
    return check_episode(builder.read(ref))


def test_both_versions_give_the_scene_of_the_internnav_tree(
    lerobot_dataset: Path, episode: Episode, cells: np.ndarray, tmp_path: Path
) -> None:
    """Several episodes in a file, two cameras, an action of 26 numbers."""
    out = tmp_path / "out"
    joined = lerobot_dataset.parent.name.startswith("v30")
    *back, front = scene_cells(builder_of(lerobot_dataset), out, cameras=1 if joined else 2)
    assert all(np.array_equal(own, front) for own in back)  # All cameras give the same scene.
    assert share_beside(front, cells) >= 0.98
    assert share_beside(cells, front) >= 0.98

    trajectory = Trajectory.open(out / "lerobot/robot/episode_000001.front")
    table, info = trajectory.table(), trajectory.info()
    assert np.allclose(trajectory.world_from_camera(), episode.world_from_camera, atol=1e-5)
    assert np.allclose(trajectory.intrinsics(), episode.intrinsics, atol=1e-3)
    assert info["features"]["action"]["shape"] == [26]
    assert info["features"]["action"]["names"][25] == "motor_25"
    assert np.allclose(np.stack(table["action"].to_pylist()), lerobots.actions(range(FRAMES)))
    assert table["source_episode_index"].to_pylist() == [1] * FRAMES
    assert table["source_frame_index"].to_pylist() == [*range(FRAMES)]
    assert trajectory.tasks() == list(lerobots.TASKS)
    assert (info["fps"], info["robot_type"]) == (lerobots.FPS, "walker")
    assert not trajectory.file("rgb", 0).exists()
    if back:
        other = Trajectory.open(out / "lerobot/robot/episode_000001.back")
        assert np.allclose(other.world_from_camera(), episode.world_from_camera[::-1], atol=1e-5)


def test_each_episode_has_its_own_frames(lerobot_dataset: Path, episode: Episode) -> None:
    for camera in ("front", "back"):
        found = read(lerobot_dataset, camera)
        shown = lerobots.recorded_frames(episode, camera, range(FRAMES))
        for frame in (FRAMES - 1, 4, 0):  # Also backwards.
            image, metres = episode.read_rgb(shown[frame]), episode.read_depth(shown[frame])
            assert np.abs(found.read_rgb(frame).astype(int) - image).mean() < 6
            near = metres < 9
            assert np.allclose(found.read_depth(frame)[near], metres[near], atol=2e-3)
        assert np.allclose(found.world_from_camera, episode.world_from_camera[shown], atol=1e-5)


def test_check_source_accepts_a_lerobot_dataset(v21: Path) -> None:
    first, second = check_source(builder_of(v21), episodes=2)
    assert first.id == "lerobot/robot/episode_000000.back"
    assert (first.length, len(first.beside)) == (3, 1)
    codes = {note.code for note in first.notes}
    assert "negative focal length" in codes
    assert "negative focal length" not in {note.code for note in second.notes}


# Errors in a mapping


def convention_notes(episode: Episode) -> list[str]:
    """The notes of the convention check; raises OccGenError for wrong conventions."""
    config = library.Config()
    views = load_engine("rgbd").reconstruct(episode, config, Path("unused"))
    return [note.text for note in check_conventions(views, episode.id, config, fps=episode.fps)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"depth_unit": 0.001}, r"as if depth were 0\.1 times as large"),
        ({"pose_direction": "camera_from_world"}, "as if the poses were inverted"),
        ({"pose_axes": "opencv"}, "as if the cameras' y and z axes had the opposite"),
        ({"time_offset": 0.2}, r"the poses were 2 frames \(0\.2 s\) too late"),
    ],
)
def test_convention_check_names_a_wrong_mapping(
    wrong: dict[str, object], message: str, v21: Path
) -> None:
    with pytest.raises(OccGenError, match=message):
        convention_notes(read(v21, **wrong))


def test_convention_check_names_swapped_focal_lengths(v21: Path, episode: Episode) -> None:
    fx, fy, cx, cy = lerobots.opencv_intrinsics(episode)
    assert convention_notes(read(v21)) == []
    swapped = {"info": None, "intrinsics": (fy, fx, cx, cy)}
    with pytest.raises(OccGenError, match="as if the focal lengths were swapped"):
        convention_notes(read(v21, **swapped))


@pytest.mark.parametrize(
    ("front", "message"),
    [
        ({"depth": "observation.depth.side"}, "has no such feature; it has action"),
        ({"depth": "action"}, r"depth action: is float32 of shape \[26\], which cannot be depth"),
        ({"pose": "action"}, "column action has 26 numbers, which do not fit any pose_layout"),
        ({"info": "action"}, "column action has 26 numbers, not fx, fy, cx, cy or 3 x 3"),
        ({"pose_layout": "xyz_rpy"}, "has 16 numbers, which do not fit xyz_rpy"),
        ({"info": None}, "but no intrinsics"),
    ],
)
def test_mapping_that_does_not_match_the_dataset_is_refused(
    front: dict[str, object], message: str, v21: Path
) -> None:
    with pytest.raises((UsageError, SourceError), match=message):
        read(v21, **front)


def test_column_major_matrices_are_refused(v21: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(v21.parent, tmp_path / "copy")) / "robot"
    place = root / "data/task-0000/episode_00000001.parquet"
    table = pq.read_table(place)
    name = "observation.extrinsic.front"
    turned = [np.transpose(pose).tolist() for pose in table[name].to_pylist()]
    column = table.column_names.index(name)
    table = table.set_column(column, name, pa.array(turned, table.schema.field(name).type))
    pq.write_table(table, place)
    with pytest.raises(SourceError, match="are in column-major order; write them in row"):
        read(root)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cameras: 3", "has no list 'cameras'"),
        ("cameras: [{depth: a}]", "camera 1: rgb: is missing"),
        ("cameras: [{rgb: a, unit: 3}]", "camera 1: unit: Extra inputs are not permitted"),
        ("cameras: [{rgb: a, depth_unit: mile}]", "camera 1: depth_unit: should be a valid num"),
        ("cameras: [{rgb: a, intrinsics: b, info: c}]", "info says the same"),
        ("cameras: [", "is not YAML"),
    ],
)
def test_invalid_mapping_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "cameras.yaml").write_text(text)
    with pytest.raises(UsageError, match=message):
        read_cameras(tmp_path / "cameras.yaml")


def test_all_pose_layouts_are_read() -> None:
    pose = np.eye(4)
    pose[:3, :3] = [[0, -1, 0], [1, 0, 0], [0, 0, 1]]
    pose[:3, 3] = (1, 2, 3)
    half = np.sqrt(0.5)
    for numbers, layout in (
        (pose, None), (pose.ravel(), "matrix"), (pose[:3], None),
        ([1, 2, 3, 0, 0, np.pi / 2], None),
        ([1, 2, 3, 0, 0, half, half], None), ([1, 2, 3, half, 0, 0, half], "xyz_quaternion_wxyz"),
    ):  # fmt: skip
        mapping = camera_mapping("", {"pose_layout": layout})
        assert np.allclose(mapping.poses(np.asarray(numbers)[None])[0], pose)
    lost = CameraMapping().poses(np.zeros((1, 7)))
    assert np.isnan(lost).all()


# Parts of datasets


def test_depth_codes_are_decoded_as_lerobot_does() -> None:
    from lerobot.datasets.depth_utils import dequantize_depth

    codes = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    for log in (True, False):
        values = {"depth_min": 0.1, "depth_max": 8.0, "shift": 2.0, "use_log": log}
        expected = dequantize_depth(codes, **values, output_unit="m", output_tensor=False)
        found = metres_of_codes({f"video.{key}": value for key, value in values.items()})
        assert np.allclose(found[1:-1], expected.ravel()[1:-1], atol=1e-5)
        assert found[0] == found[-1] == 0


def test_frames_without_a_pose_are_left_out_for_all_cameras(v21: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(v21.parent, tmp_path / "copy")) / "robot"
    place = root / "data/task-0000/episode_00000001.parquet"
    table = pq.read_table(place)
    name = "observation.extrinsic.back"
    poses = np.array(table[name].to_pylist())
    poses[2] = np.nan
    column = table.column_names.index(name)
    table = table.set_column(column, name, pa.array(poses.tolist()))
    pq.write_table(table, place)
    found = read(root)
    assert found.length == FRAMES - 1
    kept = [n for n in range(FRAMES) if n != 2]
    assert found.columns["source_frame_index"].values.tolist() == kept
    assert np.array_equal(found.read_rgb(2), read(v21).read_rgb(3))
    notes = {note.code: note.text for note in found.notes}
    assert notes["left out"] == f"1 of {FRAMES} frames are left out: no pose is known"
    assert np.isfinite(found.columns["observation.extrinsic.back"].values).all()


def test_static_camera_gives_a_note(v21: Path, episode: Episode, tmp_path: Path) -> None:
    root = Path(shutil.copytree(v21.parent, tmp_path / "copy")) / "robot"
    place = root / "data/task-0000/episode_00000001.parquet"
    table = pq.read_table(place)
    name = "observation.depth.back"
    still = [table[name][0].as_py()] * FRAMES
    table = table.set_column(table.column_names.index(name), name,
                             pa.array(still, table.schema.field(name).type))  # fmt: skip
    pq.write_table(table, place)
    camera = CameraMapping(
        rgb=lerobots.BACK, depth=name, intrinsics=lerobots.opencv_intrinsics(episode),
        body_from_camera=episode.world_from_camera[-1].ravel().tolist(),
    )  # fmt: skip
    builder = load_builder("lerobot", root, [camera])
    refs = list_episodes(builder)
    built = build_episode(builder, refs[1], tmp_path / "out", Settings(SMALL, media="none"))
    assert "static camera" in {note.code for note in built.notes}


def test_mapping_of_only_rgb_gives_only_images(v21: Path) -> None:
    builder = load_builder("lerobot", v21, [CameraMapping(rgb=lerobots.FRONT)])
    (first, _) = list_episodes(builder)
    assert not builder.has_depth(first)
    assert builder.footage(first) == (3, (480, 270))
    found = check_episode(builder.read(first))
    assert found.read_depth is found.world_from_camera is found.intrinsics is None


def test_camera_without_depth_is_reconstructed_by_a_network(v21: Path, tmp_path: Path) -> None:
    """A network that is fitted to the images of the camera gives its path and its scale."""
    known = read(v21)
    config = SMALL.model_copy(update={"max_pixels": 40_000, "refine_poses": False})
    gauge = Sim3(0.6, np.eye(3), np.array([3.0, -2.0, 1.0]))
    weights = save(tmp_path / "weights", "pi3", weights_fitted_to(known, gauge, config))
    builder = builder_of(v21, depth=None)
    *_, ref = (ref for ref in list_episodes(builder) if ref.id.endswith("front"))
    assert not builder.has_depth(ref)
    engine = load_engine("pi3", weights, "cpu")
    build_episode(builder, ref, tmp_path / "out", Settings(config, engine, media="none"))
    built = Trajectory.open(tmp_path / "out" / ref.id)
    np.testing.assert_allclose(built.world_from_camera(), known.world_from_camera, atol=2e-2)
    assert sum(len(cells) for cells in built.visible_frames()) > 100


def test_invalid_path_template_is_refused(v21: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(v21, tmp_path / "robot"))
    info = json.loads((root / "meta/info.json").read_text())
    for template in ("../{episode_index}", "/{episode_index}", "{task}/{episode_index:06d}", ""):
        (root / "meta/info.json").write_text(json.dumps({**info, "data_path": template}))
        with pytest.raises(SourceError, match="has a path template that cannot be filled in"):
            list_episodes(load_builder("lerobot", root, [CameraMapping(rgb=lerobots.FRONT)]))


# Commands


def command(*arguments: str | Path) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(cli, [str(a) for a in arguments], standalone_mode=False)


def test_cameras_command_lists_features_and_writes_a_mapping(v21: Path, tmp_path: Path) -> None:
    out = tmp_path / "found.yaml"
    done = command("cameras", v21, "--output", out)
    assert done.exception is None, done.output
    assert "colour: observation.images.front (video 3x270x480), observation.images" in done.output
    front, back = yaml.safe_load(out.read_text())["cameras"]
    assert front == {
        "rgb": "observation.images.front", "depth": "observation.depth.front", "depth_unit": "mm",
        "intrinsics": "observation.intrinsic.front", "pose": "observation.extrinsic.front",
        "pose_layout": "matrix", "pose_direction": "world_from_camera", "pose_axes": "opencv",
    }  # fmt: skip
    assert (back["depth_unit"], back["pose_layout"]) == ("m", "xyz_rpy")
    assert read_cameras(out)[0].info == "observation.intrinsic.front"
    assert "already exists" in str(command("cameras", v21, "--output", out).exception)


def test_cameras_command_explains_a_folder_without_a_dataset(tmp_path: Path) -> None:
    (tmp_path / "color").mkdir()
    message = str(command("cameras", tmp_path, "--output", tmp_path / "cameras.yaml").exception)
    assert "is not a LeRobot dataset: it has no meta/info.json; " in message
    assert "give the folder with meta, data and videos" in message


def test_options_select_cameras_and_override_the_mapping_file(v21: Path, tmp_path: Path) -> None:
    usual = ("build", "--source", "lerobot", "--input", v21, "--output", tmp_path / "out")
    several = command(*usual)
    assert "has 2 cameras (" in str(several.exception)
    assert "choose with --camera KEY" in str(several.exception)
    given = (*usual, "--cameras", v21.parent / "cameras.yaml", "--dry-run")
    done = command(*given, "--camera", lerobots.BACK)
    assert done.output.count("to build") == 2
    assert "robot/episode_000001.back  to build" in done.output
    assert "is not in" in str(command(*given, "--camera", "other").exception)
    wrong = command(*given[:-1], "--limit", "2", "--camera", lerobots.FRONT, "--depth-unit", "mm")
    assert wrong.return_value == 1
    assert "as if depth were 0.1 times as large" in wrong.output


def test_other_sources_refer_to_source_lerobot(v21: Path) -> None:
    for source in ("capture", "internnav", "video"):
        with pytest.raises(UsageError, match=r"a LeRobot v2\.1 dataset.*use --source lerobot"):
            list_episodes(load_builder(source, v21))
    with pytest.raises(UsageError, match="is not a LeRobot dataset"):
        list_episodes(load_builder("lerobot", v21 / "data"))


def test_record_of_a_hub_dataset_has_its_commit(
    v30: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, repository = Hub(), Repository(private=False)
    files = {p.relative_to(v30).as_posix(): p.read_bytes() for p in v30.rglob("*") if p.is_file()}
    commit = repository.commit("main", files, "robot")
    hub.repositories["org/robot"] = repository
    address = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    constants = {
        "ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": address, "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": str(tmp_path / "cache"),
    }  # fmt: skip
    for name, value in constants.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setenv("HF_TOKEN", READER)
    try:
        cameras = read_cameras(v30.parent / "cameras.yaml")[1:]
        summary = library.build(
            "lerobot", "org/robot", tmp_path / "out", cameras=cameras, config=SMALL, limit=1
        )
    finally:
        hub.close()
    assert (summary.built, summary.failures) == (1, [])
    trajectory = Trajectory.open(tmp_path / "out/lerobot/org_robot/episode_000000.back")
    assert trajectory.record["origin"] == {"repo_id": "org/robot", "revision": commit}
    assert not any("front" in line and "/resolve/" in line for line in hub.asked)
    assert not list(trajectory.path.rglob("*.jpg"))
