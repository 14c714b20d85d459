"""The source `capture`: every layout gives the same scene, and errors name the cause."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import captures
import numpy as np
import pytest
from click.testing import CliRunner, Result
from commands import occgen_hub
from made_up import depth_of, episode_of, room, share_beside
from made_up import path as side_by_side
from PIL import Image
from scipy.spatial.transform import Rotation

import occgen_hub as library
from occgen_hub.builder import load_builder
from occgen_hub.camera_mapping import CameraMapping
from occgen_hub.cli.build import build
from occgen_hub.engines import load_engine
from occgen_hub.episode import Episode, check_episode
from occgen_hub.episode_build import Settings, build_episode, why_outdated
from occgen_hub.errors import OccGenError, SourceError, UsageError
from occgen_hub.fusion.conventions import check_conventions
from occgen_hub.geometry.poses import ROS_FROM_OPENCV
from occgen_hub.geometry.trajectory import poses_at
from occgen_hub.job import list_episodes
from occgen_hub.lerobot.writer import Media
from occgen_hub.loading import Trajectory, trajectories
from occgen_hub.training import items
from occgen_hub.validation import validate

KINECT = Path(__file__).parent.parent.parent / "shared/data/kinect"
SMALL = library.Config(pc_range=(-0.4, -0.4, 0.4, 0.4, 0.4, 1.2))
"""Cells of the usual size in a small range, which is fast."""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source tree of one trajectory, in which the camera walks and turns."""
    from occgen_hub.sample import make_sample

    out = tmp_path_factory.mktemp("captured") / "tree"
    make_sample(out, trajectories=1, frames=12, seed=7)
    return out


@pytest.fixture(scope="module")
def episode(tree: Path) -> Episode:
    builder = load_builder("internnav", tree)
    return builder.read(next(builder.episodes()))


@pytest.fixture(scope="module")
def cells(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """The scene's cells as built from the InternData-N1 tree."""
    return scene_cells("internnav", tree, tmp_path_factory.mktemp("tree") / "out")


def scene_cells(
    source: str, root: Path, out: Path, media: Media = "none", **mapping: object
) -> np.ndarray:
    """(n, 3) cell numbers of the scene that is built."""
    cameras = [CameraMapping(**mapping)] if mapping else []
    builder = load_builder(source, root, cameras)
    (ref,) = list_episodes(builder)
    build_episode(builder, ref, out, Settings(SMALL, media=media))
    centres = Trajectory.open(out / ref.id).scene_cells()
    return np.floor(centres / SMALL.voxel_size).astype(np.int64)


WRITERS: dict[str, Callable[[Episode, Path], None]] = {
    "tum": captures.write_tum,
    "seven_scenes": captures.write_seven_scenes,
    "scannet": captures.write_scannet,
    "transforms": captures.write_transforms,
    "stray_scanner": captures.write_stray_scanner,
    "mcap": captures.write_bag,
}


@pytest.mark.parametrize("layout_name", WRITERS)
def test_every_layout_builds_the_same_scene(
    layout_name: str, episode: Episode, cells: np.ndarray, tmp_path: Path
) -> None:
    place = tmp_path / "recording"
    if layout_name == "mcap":
        pytest.importorskip("rosbags")
    else:
        place.mkdir()
    WRITERS[layout_name](episode, place)
    if layout_name == "mcap":  # Without its metadata.yaml, as bags are often shared.
        (place,) = place.glob("*.mcap")
    options = {}
    if layout_name == "tum":
        options["intrinsics"] = captures.opencv_intrinsics(episode)
    out = tmp_path / "out"
    kept = layout_name in ("tum", "mcap", "stray_scanner")
    found = scene_cells("capture", place, out, "copy" if kept else "none", **options)
    assert share_beside(found, cells) >= 0.98
    assert share_beside(cells, found) >= 0.98

    trajectory = Trajectory.open(trajectories(out)[0])
    assert len(trajectory.world_from_camera()) == episode.length
    assert np.allclose(trajectory.world_from_camera(), episode.world_from_camera, atol=2e-3)
    assert np.allclose(trajectory.intrinsics(), episode.intrinsics, atol=1e-3)
    if kept:  # Written media are those of a pinhole camera, in the units of the dataset.
        depth = np.array(episode.read_depth(2))
        if layout_name == "stray_scanner":  # Without the corner of low confidence.
            width, height = episode.image_size
            depth[: height // 10, : width // 10] = 0
        assert np.allclose(trajectory.depth(2), depth, atol=6e-4)
        assert np.array_equal(trajectory.rgb(2), episode.read_rgb(2)) == (layout_name == "tum")
        loss = 4 if layout_name == "stray_scanner" else 2  # Of a video, or of a JPEG.
        assert np.abs(trajectory.rgb(2).astype(int) - episode.read_rgb(2)).mean() < loss
    assert trajectory.record["source"].get("cameras", []) == ([options] if options else [])
    if kept:
        times = trajectory.table()["source_timestamp"].to_numpy()
        assert np.allclose(np.diff(times), 1 / episode.fps, atol=1e-6)
        assert json.loads(trajectory.file("info").read_text())["fps"] == episode.fps


def test_world_far_from_its_origin_gives_the_same_cells(
    episode: Episode, cells: np.ndarray, tmp_path: Path
) -> None:
    """Poses in UTM coordinates. float32 resolves only 3 cm at 500 km."""
    offset = np.array([512_000.0, 5_403_000.0, 0.0])
    far = episode.world_from_camera.copy()
    far[:, :3, 3] += offset
    moved, out = replace(episode, world_from_camera=far), tmp_path / "out"
    (tmp_path / "room").mkdir()
    captures.write_tum(moved, tmp_path / "room")
    K = captures.opencv_intrinsics(episode)
    found = scene_cells("capture", tmp_path / "room", out, intrinsics=K)
    assert share_beside(found, cells) >= 0.98
    assert share_beside(cells, found) >= 0.98
    trajectory = Trajectory.open(trajectories(out)[0])
    assert np.array_equal(trajectory.world_origin, offset)
    assert np.allclose(trajectory.world_from_camera(), episode.world_from_camera, atol=2e-3)
    assert any("(512000, 5403000, 0) m are subtracted" in n for n in trajectory.record["notes"])
    assert validate(out).valid


def build_room(place: Path, size: tuple[int, int]) -> Path:
    """A dataset of a plain folder, with y down in the world as in the first camera's frame."""
    (place / "room/color").mkdir(parents=True)
    poses = side_by_side(6)
    episode = episode_of([depth_of(room(), pose, size) for pose in poses], poses)
    for frame in range(episode.length):
        captures.write_depth(episode, frame, place / f"room/depth/{frame}.png", 1000)
        Image.new("RGB", size).save(place / f"room/color/{frame}.png")
    lines = [captures.tum_line(frame / 10, pose) for frame, pose in enumerate(poses)]
    (place / "room/trajectory.txt").write_text("\n".join(lines))
    K = ",".join(map(str, captures.opencv_intrinsics(episode)))
    options = ["--source", "capture", "--intrinsics", K, "--set", "voxel_size=0.1"]
    options += ["--input", str(place / "room"), "--output", str(place / "out")]
    result = CliRunner().invoke(build, options)
    assert result.exit_code == 0, result.output
    return place / "out"


def test_images_of_one_pixel_are_built(tmp_path: Path) -> None:
    out = build_room(tmp_path, (1, 1))
    assert validate(out).valid
    assert Trajectory.open(trajectories(out)[0]).rgb(5).shape == (1, 1, 3)


def test_upright_grids_warn_of_a_world_that_is_not_upright(tmp_path: Path, caplog) -> None:
    frames = library.OccupancyDataset(build_room(tmp_path, (64, 48)), upright=True)
    items._warn_of_tilt.cache_clear()
    assert [frames[0], frames[1]]
    assert caplog.text.count("upright=True assumes that the world's z axis points up") == 1


def test_plain_folder_is_read(episode: Episode, tmp_path: Path) -> None:
    captures.write_plain(episode, tmp_path)
    found = read(tmp_path, intrinsics=captures.opencv_intrinsics(episode))
    check_equal(found, episode)
    assert np.array_equal(found.read_rgb(2), episode.read_rgb(2))
    for distortion in ((), (0.1, 0.01, 0.0, 0.0)):
        with pytest.raises(OccGenError, match=r"field of view .* must be in pixels"):
            read(tmp_path, intrinsics=(0.8, 1.1, 0.5, 0.5, *distortion))


@pytest.mark.parametrize("first", [0, 1])
def test_numbered_images_take_poses_in_order(first: int, episode: Episode, tmp_path: Path) -> None:
    """0.jpg and 1.jpg are not milliseconds, though the trajectory's times begin at 0."""
    rows = []
    for frame, pose in enumerate(episode.world_from_camera):
        captures.copy_color(episode, frame, tmp_path / f"color/{frame + first}.jpg")
        captures.write_depth(episode, frame, tmp_path / f"depth/{frame + first}.png", 1000)
        rows.append(captures.tum_line(frame / 10, pose))
    (tmp_path / "trajectory.txt").write_text("\n".join(rows))
    intrinsics = captures.opencv_intrinsics(episode)
    (tmp_path / "intrinsics.txt").write_text(" ".join(map(str, intrinsics)))
    check_equal(read(tmp_path), episode)


def test_bag_with_odometry_is_read(episode: Episode, tmp_path: Path) -> None:
    pytest.importorskip("rosbags")
    captures.write_bag(episode, tmp_path / "walk", odometry=True)
    found = read(tmp_path / "walk")
    check_equal(found, episode)
    assert np.array_equal(found.read_rgb(2), episode.read_rgb(2))
    topics = "/camera/color/image_raw", "/camera/aligned_depth_to_color/image_raw"
    again = read(tmp_path / "walk", rgb=topics[0], depth=topics[1], pose="/odom")
    check_equal(again, episode)
    with pytest.raises(SourceError, match="give --topics depth=TOPIC"):
        read(tmp_path / "walk", depth="/odom")


def check_equal(found: Episode, episode: Episode) -> None:
    """Compare all but colours. Depth has millimetres; poses have the precision of text files."""
    assert (found.length, found.fps) == (episode.length, episode.fps)
    assert np.allclose(found.world_from_camera, episode.world_from_camera, atol=1e-6)
    assert np.allclose(found.intrinsics, episode.intrinsics)
    assert np.allclose(found.read_depth(2), episode.read_depth(2), atol=6e-4)


# Errors name the cause


def read(place: Path, **mapping: object) -> Episode:
    builder = load_builder("capture", place, [CameraMapping(**mapping)] if mapping else [])
    (ref,) = list_episodes(builder)
    return check_episode(builder.read(ref))


def convention_notes(episode: Episode) -> list[str]:
    """The notes about an episode's conventions. Raises OccGenError if they are wrong."""
    config = library.Config()
    views = load_engine("rgbd").reconstruct(episode, config, Path("unused"))
    return [note.text for note in check_conventions(views, episode.id, config, fps=episode.fps)]


def shared_recording(name: str, write: Callable[[Episode, Path], None]) -> Any:
    """A fixture for a recording that a module's tests must not change. name: of its folder."""

    @pytest.fixture(scope="module")
    def made(episode: Episode, tmp_path_factory: pytest.TempPathFactory) -> Path:
        place = tmp_path_factory.mktemp("shared") / name
        place.mkdir()
        write(episode, place)
        return place

    return made


tum = shared_recording("rgbd_dataset", captures.write_tum)
seven = shared_recording("seq-01", captures.write_seven_scenes)
stray = shared_recording("71de12f9", captures.write_stray_scanner)


def test_wrong_depth_unit_is_named(tum: Path, episode: Episode) -> None:
    K = captures.opencv_intrinsics(episode)
    assert convention_notes(read(tum, intrinsics=K)) == []
    with pytest.raises(OccGenError, match=r"as if depth were 0\.2 times as large"):
        convention_notes(read(tum, intrinsics=K, depth_unit=0.001))


def test_inverse_poses_are_named_with_the_option_to_change(seven: Path) -> None:
    with pytest.raises(OccGenError, match=r"inverted; .*--pose-direction"):
        convention_notes(read(seven, pose_direction="camera_from_world"))


def test_wrong_axes_are_named_with_the_option_to_change(seven: Path) -> None:
    with pytest.raises(
        OccGenError, match=r"y and z axes had the opposite directions; .*--pose-axes"
    ):
        convention_notes(read(seven, pose_axes="opengl"))


def test_ros_axes_are_named_and_the_remedy_works(tum: Path, episode: Episode) -> None:
    K = captures.opencv_intrinsics(episode)
    right = read(tum, intrinsics=K)
    body = replace(right, world_from_camera=right.world_from_camera @ ROS_FROM_OPENCV.T)
    with pytest.raises(OccGenError, match=r"of a body in ROS .*; give --pose-axes ros"):
        convention_notes(body)
    with pytest.raises(OccGenError, match="leave --pose-axes ros out"):
        convention_notes(read(tum, intrinsics=K, pose_axes="ros"))
    meant = CameraMapping(pose_axes="ros").world_from_camera(body.world_from_camera)
    np.testing.assert_allclose(meant, right.world_from_camera, atol=1e-12)


def test_wrong_quaternion_order_is_named(tum: Path, episode: Episode, tmp_path: Path) -> None:
    place = Path(shutil.copytree(tum, tmp_path / "tum"))
    rows = [line.split() for line in (place / "groundtruth.txt").read_text().splitlines()]
    lines = [" ".join(r if r[0] == "#" else [*r[:4], r[7], *r[4:7]]) for r in rows]
    (place / "groundtruth.txt").write_text("\n".join(lines))
    with pytest.raises(OccGenError, match=r"the quaternions were w, x, y, z; write them as x, y"):
        convention_notes(read(place, intrinsics=captures.opencv_intrinsics(episode)))

    right = read(tum, intrinsics=captures.opencv_intrinsics(episode))
    numbers = [[*pose[:3, 3], *captures.quaternion(pose)] for pose in right.world_from_camera]
    wrong = CameraMapping(pose_layout="xyz_quaternion_wxyz").poses(np.array(numbers))
    with pytest.raises(OccGenError, match=r"were read as w, x, y, z; give pose_layout: .*_xyzw"):
        convention_notes(replace(right, world_from_camera=wrong))


def test_swapped_focal_lengths_are_named(episode: Episode, tmp_path: Path) -> None:
    captures.write_transforms(episode, tmp_path, swapped=True)
    with pytest.raises(OccGenError, match="as if the focal lengths were swapped"):
        convention_notes(read(tmp_path))


@pytest.mark.parametrize("offset", [0.2, -0.35])
def test_time_offset_is_named_and_the_advised_value_works(
    offset: float, episode: Episode, tmp_path: Path
) -> None:
    captures.write_tum(episode, tmp_path, offset)
    K = captures.opencv_intrinsics(episode)
    with pytest.raises(OccGenError, match=r"too (late|early) *; .*--time-offset") as error:
        convention_notes(read(tmp_path, intrinsics=K))
    assert ("late" in str(error.value)) == (offset > 0)
    advised = float(str(error.value).rstrip(".").rpartition(" ")[2])
    assert abs(advised + offset) <= 0.05
    assert convention_notes(read(tmp_path, intrinsics=K, time_offset=advised)) == []


@pytest.mark.parametrize("start", [0.0, 1.7e9])
def test_images_named_by_time_take_the_poses_of_that_time(
    start: float, episode: Episode, tmp_path: Path
) -> None:
    """Names are seconds with a decimal point. Times of another clock are refused."""
    named = tmp_path / "named"
    captures.write_plain(episode, tmp_path / "plain")
    K = captures.opencv_intrinsics(episode)
    for kind in ("color", "depth"):
        (named / kind).mkdir(parents=True)
        for t, path in enumerate(sorted((tmp_path / "plain" / kind).iterdir())):
            shutil.copy(path, named / kind / f"{start + t / episode.fps:.6f}{path.suffix}")
    lines = [
        captures.tum_line(start + t / episode.fps, pose)
        for t, pose in enumerate(episode.world_from_camera)
    ]
    (named / "trajectory.txt").write_text("\n".join(lines))
    found = read(named, intrinsics=K)
    np.testing.assert_allclose(found.world_from_camera, episode.world_from_camera, atol=1e-4)
    lines = [
        captures.tum_line(t / 10 + 5e8, pose) for t, pose in enumerate(found.world_from_camera)
    ]
    (named / "trajectory.txt").write_text("\n".join(lines))
    with pytest.raises(SourceError, match=r"named by times from .*; give --time-offset"):
        read(named, intrinsics=K)


# Parts of recordings


def test_frames_without_depth_or_pose_are_left_out(tum: Path, episode: Episode, tmp_path: Path):
    place = Path(shutil.copytree(tum, tmp_path / "tum"))
    lines = (place / "depth.txt").read_text().splitlines()
    (place / "depth.txt").write_text("\n".join(lines[:3] + lines[4:]))
    poses = (place / "groundtruth.txt").read_text().splitlines()
    lost = captures.START + (episode.length - 2) / episode.fps
    (place / "groundtruth.txt").write_text(
        "\n".join(
            " ".join([row.split()[0], *["nan"] * 7])
            if row[0] != "#" and float(row.split()[0]) > lost else row
            for row in poses
        )
    )  # fmt: skip
    found = read(place, intrinsics=captures.opencv_intrinsics(episode))
    (note,) = (note.text for note in found.notes if note.code == "left out")
    assert note.startswith(f"{3} of {episode.length} frames are left out: 1 without depth, 2 with")
    assert found.length == episode.length - 3
    kept = [n for n in range(episode.length - 2) if n != 2]
    assert np.allclose(found.world_from_camera, episode.world_from_camera[kept], atol=1e-4)


def test_times_of_poses_may_be_nanoseconds_and_gaps_are_named(
    episode: Episode, tmp_path: Path
) -> None:
    """Every tenth pose, as a SLAM system writes keyframes, next to the poses of all frames."""
    captures.write_plain(episode, tmp_path)
    K = captures.opencv_intrinsics(episode)
    file = tmp_path / "trajectory.txt"
    rows = [line.split() for line in file.read_text().splitlines()]
    lines = [" ".join([f"{float(row[0]) * 1e9:.0f}", *row[1:]]) for row in rows]
    file.rename(tmp_path / "unused")
    (tmp_path / "CameraTrajectory.txt").write_text("\n".join(lines))
    (tmp_path / "KeyFrameTrajectory.txt").write_text("\n".join(lines[::10]))
    found = read(tmp_path, intrinsics=K)
    check_equal(found, episode)
    assert (
        "those of CameraTrajectory.txt; KeyFrameTrajectory.txt is not used" in found.notes[0].text
    )
    (tmp_path / "CameraTrajectory.txt").unlink()
    found = read(tmp_path, intrinsics=K)
    (note,) = (note.text for note in found.notes if note.code == "left out")
    assert "without a pose at their time (gaps over 0.25 s are not interpolated)" in note
    assert "without depth" not in note


def test_frames_with_lost_tracking_are_left_out(
    seven: Path, episode: Episode, tmp_path: Path
) -> None:
    place = Path(shutil.copytree(seven, tmp_path / "seq"))
    (place / "frame-000001.pose.txt").write_text("\n".join(["-inf -inf -inf -inf"] * 4))
    (place / "frame-000003.depth.png").unlink()
    units = np.asarray(Image.open(place / "frame-000000.depth.png")).copy()
    units[:9] = 65535
    Image.fromarray(units).save(place / "frame-000000.depth.png")
    found = read(place)
    assert found.length == episode.length - 2
    assert not found.read_depth(0)[:9].any()
    (note,) = (note.text for note in found.notes if note.code == "left out")
    assert "1 without depth or pose, 1 where tracking was lost" in note


@pytest.mark.parametrize("binary", [False, True], ids=["text", "binary"])
def test_colmap_models_are_read(binary: bool, episode: Episode, tmp_path: Path) -> None:
    captures.write_colmap(episode, tmp_path, binary=binary)
    found = read(tmp_path)
    assert found.read_depth is None
    assert np.allclose(found.world_from_camera, episode.world_from_camera, atol=1e-9)
    assert np.allclose(found.intrinsics, episode.intrinsics)
    assert np.array_equal(found.read_rgb(3), episode.read_rgb(3))
    assert {note.code for note in found.notes} >= {"units"}


def test_transforms_without_depth_are_read_with_a_note_on_units(
    episode: Episode, tmp_path: Path
) -> None:
    captures.write_transforms(episode, tmp_path, with_depth=False)
    found = read(tmp_path)
    assert found.read_depth is None
    assert np.allclose(found.world_from_camera, episode.world_from_camera)
    assert "often not metres" in next(n.text for n in found.notes if n.code == "units")


def test_colour_is_resized_to_depth(episode: Episode, tmp_path: Path) -> None:
    captures.write_scannet(episode, tmp_path)
    K = np.eye(4)
    K[:3, :3] = np.diag([2, 2, 1]) @ episode.intrinsics[0]
    K[:2, 2] -= 0.5
    np.savetxt(tmp_path / "intrinsic/intrinsic_color.txt", K)
    for path in (tmp_path / "color").iterdir():
        Image.open(path).resize((960, 540), Image.Resampling.NEAREST).save(path, quality=100)
    found = read(tmp_path)
    assert found.image_size == episode.image_size
    assert np.allclose(found.intrinsics, episode.intrinsics)
    off = np.abs(found.read_rgb(2).astype(int) - episode.read_rgb(2))
    assert off.mean() < 3
    assert {note.code for note in found.notes} >= {"color size"}
    Image.new("RGB", (540, 540)).save(tmp_path / "color/0.jpg")
    with pytest.raises(SourceError, match="differ in shape"):
        read(tmp_path)


def test_incomplete_frames_of_stray_scanner_are_left_out(
    stray: Path, episode: Episode, tmp_path: Path
) -> None:
    place = Path(shutil.copytree(stray, tmp_path / "phone"))
    rows = (place / "odometry.csv").read_text().splitlines()
    lost = ", ".join(rows[5].split(", ")[:5] + ["0.0"] * 4)
    again = [f"{9000 + n}, {100 + n:06d}, 0, 0, 0, 0, 0, 0, 1" for n in range(2)]
    (place / "odometry.csv").write_text("\n".join([*rows[:5], lost, *rows[6:], *again]))
    (place / "depth/000003.png").unlink()
    (place / "confidence/000004.png").unlink()
    found = read(place)
    assert found.length == episode.length - 2
    (text,) = (note.text for note in found.notes if note.code == "left out")
    assert text == (
        f"4 of {episode.length + 2} frames are left out: 2 after the end of the video, 1 without "
        "depth, 1 where tracking was lost"
    )
    kept = [n for n in range(episode.length) if n not in (0, 4)]
    assert np.allclose(found.world_from_camera, episode.world_from_camera[kept], atol=1e-6)
    assert found.read_depth is not None
    corner = [found.read_depth(n)[0, 0] for n in (0, 1)]
    assert corner == pytest.approx([0.6, 0.0])  # Without a file, depth has no low confidence.
    shown = found.read_rgb(3).astype(int)
    others = [np.abs(shown - episode.read_rgb(n)).mean() for n in range(episode.length)]
    assert np.argmin(others) == kept[3]

    (place / "odometry.csv").write_text("\n".join(rows[:8]))
    (note,) = (note for note in read(place).notes if note.code == "video frames")
    counts = f"rgb.mp4 has {episode.length} frames and odometry.csv 7"
    assert note.text == f"{counts}: the last ones are not used"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("odometry.csv", "", "has no table with the columns timestamp, frame, x"),
        ("odometry.csv", "1, 000000, 0, 0, 0", "does not begin with the columns timestamp, frame"),
        ("odometry.csv", "{header}\n1, 2, 3", "has no table with the columns"),
        ("odometry.csv", "{header}\n1, 0.5, 0, 0, 0, 0, 0, 0, 1", "is not a whole number"),
        ("odometry.csv", "{header}\n1, 3, 0, 0, 0, 0, 0, 0, 0", "has no frame with colour, a pose"),
        ("camera_matrix.csv", None, "camera_matrix.csv: is missing; .* --intrinsics fx,fy,cx,cy"),
        ("camera_matrix.csv", "1, 2", "does not contain a 3 x 3 matrix"),
        ("rgb.mp4", "video", "rgb.mp4: "),
        ("confidence/000005.png", "low", "confidence/000005.png: "),
    ],
)
def test_damaged_recordings_of_stray_scanner_are_named(
    file: str, content: str | None, message: str, stray: Path, tmp_path: Path
) -> None:
    place = Path(shutil.copytree(stray, tmp_path / "phone"))
    header = (place / "odometry.csv").read_text().splitlines()[0]
    (place / file).unlink()
    if content is not None:
        (place / file).write_text(content.replace("{header}", header))
    with pytest.raises(SourceError, match=message):
        read(place).read_depth(2)


def test_open3d_files_and_floating_point_depth_are_read(episode: Episode, tmp_path: Path) -> None:
    rows = []
    for frame, pose in enumerate(episode.world_from_camera):
        captures.copy_color(episode, frame, tmp_path / f"color/{frame:06d}.jpg")
        (tmp_path / "depth").mkdir(exist_ok=True)
        metres = np.where(episode.read_depth(frame) > 0, episode.read_depth(frame), np.nan)
        np.save(tmp_path / f"depth/{frame:06d}.npy", metres.astype(np.float32))
        rows += [
            f"{frame} {frame} {frame + 1}",
            *(" ".join(map(repr, map(float, r))) for r in pose),
        ]
    (tmp_path / "trajectory.log").write_text("\n".join(rows))
    fx, fy, cx, cy = captures.opencv_intrinsics(episode)
    width, height = episode.image_size
    K = [fx, 0, 0, 0, fy, 0, cx, cy, 1]  # Column by column.
    values = {"width": width, "height": height, "intrinsic_matrix": K}
    (tmp_path / "camera_intrinsic.json").write_text(json.dumps(values))
    found = read(tmp_path)
    assert np.allclose(found.world_from_camera, episode.world_from_camera)
    assert np.allclose(found.intrinsics, episode.intrinsics)
    assert np.allclose(found.read_depth(1), episode.read_depth(1), atol=1e-6)
    assert np.allclose(read(tmp_path, depth_unit=0.01).read_depth(1), found.read_depth(1) / 100)
    (tmp_path / "depth/000002.npy").write_bytes(b"\x93NUMPY" + bytes(20))
    with pytest.raises(SourceError, match=r"000002\.npy: is not a readable array"):
        read(tmp_path).read_depth(2)


@pytest.mark.parametrize("fisheye", [False, True])
def test_distortion_is_removed_once(fisheye: bool, tmp_path: Path) -> None:
    """A distorted photograph of a known pattern becomes the pattern as a pinhole camera sees it."""
    import cv2

    size, f, c = (160, 120), 110.0, (79.0, 61.0)
    D = [0.08, -0.01, 0.002, -0.001] if fisheye else [-0.2, 0.05, 0.003, -0.002, 0.01]
    K = np.array([[f, 0, c[0] - 0.5], [0, f, c[1] - 0.5], [0, 0, 1]])

    def pattern(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return 128 + 60 * np.sin(9 * x) + 60 * np.cos(7 * y)

    u, v = np.meshgrid(np.arange(size[0], dtype=float), np.arange(size[1], dtype=float))
    pixels = np.stack([u, v], axis=-1).reshape(-1, 1, 2)
    undistort = cv2.fisheye.undistortPoints if fisheye else cv2.undistortPoints
    x, y = undistort(pixels, K, np.array(D)).reshape(*u.shape, 2).transpose(2, 0, 1)
    photograph = np.repeat(pattern(x, y)[..., None], 3, axis=2).round().astype(np.uint8)
    depth = np.rint(1000 + 100 * x + 50 * y).astype(np.uint16)
    names = ("k1", "k2", "k3", "k4") if fisheye else ("k1", "k2", "p1", "p2", "k3")
    Image.fromarray(photograph).save(tmp_path / "0.png")
    Image.fromarray(depth).save(tmp_path / "0_depth.png")
    values = {
        "camera_model": "OPENCV_FISHEYE" if fisheye else "OPENCV",
        "fl_x": f, "fl_y": f, "cx": c[0], "cy": c[1], "w": size[0], "h": size[1],
        **dict(zip(names, D, strict=True)),
        "frames": [{"file_path": "0.png", "depth_file_path": "0_depth.png",
                    "transform_matrix": np.eye(4).tolist()}],
    }  # fmt: skip
    (tmp_path / "transforms.json").write_text(json.dumps(values))
    found = read(tmp_path)
    expected = pattern((u + 0.5 - c[0]) / f, (v + 0.5 - c[1]) / f)
    inside = np.zeros(u.shape, bool)
    inside[8:-8, 8:-8] = True
    off = np.abs(found.read_rgb(0)[..., 0] - expected)[inside]
    assert np.median(off) < 1
    assert off.max() < 6
    assert np.abs(photograph[..., 0] - expected)[inside].max() > 40  # The photograph is distorted.
    metres = 1 + 0.1 * (u + 0.5 - c[0]) / f + 0.05 * (v + 0.5 - c[1]) / f
    assert np.abs(found.read_depth(0) - metres)[inside].max() < 2e-3
    assert np.allclose(found.intrinsics[0], [[f, 0, c[0]], [0, f, c[1]], [0, 0, 1]])
    # The undistorted image and depth are written.
    assert all(item.read is not None for item in found.media)


def test_poses_are_interpolated_on_se3_and_not_across_gaps() -> None:
    poses = np.tile(np.eye(4), (3, 1, 1))
    poses[1, :3, :3] = Rotation.from_euler("y", 40, degrees=True).as_matrix()
    poses[:, 0, 3] = (0, 1, 5)
    times = np.array([0.1, 0.19, 0.5, 1.2, 1.221])
    found, good = poses_at(times, np.array([0.0, 0.2, 1.2]), poses, 0.25, 0.02)
    assert good.tolist() == [True, True, False, True, False]
    assert np.allclose(found[0, :3, :3], Rotation.from_euler("y", 20, degrees=True).as_matrix())
    assert np.allclose(found[0, :3, 3], (0.5, 0, 0))


def test_body_poses_are_converted_to_camera_poses() -> None:
    mount = captures.np.eye(4)
    mount[:3, 3] = (0, 0, 1)
    mapping = CameraMapping(body_from_camera=tuple(mount.ravel()), pose_axes="opengl")
    pose = np.eye(4)[None]
    assert np.allclose(mapping.world_from_camera(pose)[0], mount @ np.diag([1, -1, -1, 1]))
    with pytest.raises(ValueError, match="rigid"):
        CameraMapping(body_from_camera=(1.0,) * 16)


# Commands


def test_real_kinect_frames_build_with_one_command(tmp_path: Path) -> None:
    if not KINECT.is_dir():
        pytest.skip("../shared/data/kinect is missing")
    few = tmp_path / "kinect/rgbd-frames"
    few.mkdir(parents=True)
    shutil.copy(KINECT / "camera-intrinsics.txt", few.parent)
    for path in sorted((KINECT / "rgbd-frames").iterdir())[:24]:
        shutil.copy(path, few)
    done = occgen_hub(
        "build", "--source", "capture", "--input", tmp_path / "kinect", "--output",
        tmp_path / "out", "--set", "pc_range=[-0.4, -0.4, 0.4, 0.4, 0.4, 1.2]",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 built" in done.stdout
    assert "contradict" not in done.stdout + done.stderr
    (trajectory,) = trajectories(tmp_path / "out")
    opened = Trajectory.open(trajectory)
    assert opened.path == tmp_path / "out/capture/kinect/rgbd-frames"
    assert len(opened.world_from_camera()) == 8
    assert opened.record["quality"]["contradicted"] < 0.2


def command(*options: str | Path) -> Result:
    """The command `build`, in this process."""
    return CliRunner().invoke(build, [str(option) for option in options], standalone_mode=False)


def test_intrinsics_for_another_image_size_give_a_note(tum: Path, episode: Episode) -> None:
    fx, fy, cx, cy = captures.opencv_intrinsics(episode)
    right = read(tum, intrinsics=(fx, fy, cx, cy)).notes
    assert "principal point" not in {note.code for note in right}
    (note,) = [
        note
        for note in read(tum, intrinsics=(615, 615, 320, 240)).notes
        if note.code == "principal point"
    ]
    assert "(320, 240) is far from the middle of images of 480 x 270" in note.text


def test_endless_name_in_a_list_is_shown_shortened(tum: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(tum, tmp_path / "tum"))
    lines = (place / "rgb.txt").read_text().splitlines()
    lines[-1] += "0.jpg" * 40_000
    (place / "rgb.txt").write_text("\n".join(lines))
    with pytest.raises(SourceError) as caught:
        read(place, intrinsics=(100, 100, 50, 50))
    assert len(str(caught.value)) < 1000


def test_rate_follows_from_names_if_poses_have_no_times(episode: Episode, tmp_path: Path) -> None:
    captures.write_plain(episode, tmp_path)
    rows = [" ".join(map(str, pose.ravel())) for pose in episode.world_from_camera]
    (tmp_path / "trajectory.txt").write_text("\n".join(rows))
    K = captures.opencv_intrinsics(episode)
    found = read(tmp_path, intrinsics=K)
    assert found.fps == pytest.approx(episode.fps, abs=0.01)
    assert "fps" not in {note.code for note in found.notes}
    for number, folder in enumerate(("color", "depth")):  # Numbers are no times.
        for n, image in enumerate(sorted((tmp_path / folder).iterdir())):
            image.rename(image.with_name(f"{n + number}{image.suffix}"))
    assert "fps" in {note.code for note in read(tmp_path, intrinsics=K).notes}


def test_intrinsics_that_replace_others_give_a_note(episode: Episode, tmp_path: Path) -> None:
    captures.write_seven_scenes(episode, tmp_path)
    stated = episode.intrinsics[0]
    same = (stated[0, 0], stated[1, 1], stated[0, 2], stated[1, 2])
    for given, expected in ((same, 0), ((150.0, 150.0, *same[2:]), 1)):
        notes = [note.text for note in read(tmp_path, intrinsics=given).notes]
        found = [text for text in notes if "replaces those of camera-intrinsics.txt" in text]
        assert len(found) == expected
        assert all(f"{stated[0, 0]:.1f}, {stated[1, 1]:.1f}" in text for text in found)


def test_error_for_unknown_folder_names_lists_the_expected_ones(tum: Path, tmp_path: Path) -> None:
    shutil.copytree(tum / "rgb", tmp_path / "x/rgb_images")
    shutil.copytree(tum / "depth", tmp_path / "x/depth")
    done = command("--source", "capture", "--input", tmp_path / "x", "--output", tmp_path / "out")
    assert "name the folders color and depth, and the poses trajectory.txt" in str(done.exception)


def test_mapping_options_are_used_and_a_change_causes_a_rebuild(
    tum: Path, episode: Episode, tmp_path: Path
) -> None:
    K, out = captures.opencv_intrinsics(episode), tmp_path / "out"
    usual = ("--source", "capture", "--input", tum, "--output", out, "--media", "none")
    done = command(*usual)
    assert done.return_value == 1
    assert "give --intrinsics fx,fy,cx,cy" in done.stdout
    given = (*usual, "--intrinsics", ",".join(map(str, K)))
    wrong = command(*given, "--depth-scale", "1000")
    assert wrong.return_value == 1
    assert "as if depth were 0.2 times as large" in wrong.stdout

    settings = Settings(SMALL, media="none")

    def why(**more: float) -> str | None:
        builder = load_builder("capture", tum, [CameraMapping(intrinsics=K, **more)])
        (ref,) = list_episodes(builder)
        if not (out / ref.id).exists():
            build_episode(builder, ref, out, settings)
        return why_outdated(builder, ref, out, settings)

    assert why() is None
    assert "was built with another source" in str(why(depth_unit=1 / 5001))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--intrinsics", "500,500"], "--intrinsics: has to be fx,fy,cx,cy"),
        (["--intrinsics", "a,b"], "--intrinsics a,b: is not a list of numbers"),
        (["--depth-unit", "mm", "--depth-scale", "1000"], "leave one of them out"),
        (["--topics", "colour=/x"], "the kinds are rgb, depth, pose, info"),
        (["--topics", "rgb=/x"], "has no bag; leave the option out"),
        (["--source", "video", "--time-offset", "1"], "--time-offset: is not used by"),
        (["--source", "video", "--topics", "rgb=/x"], "--topics: is not used by"),
    ],
)
def test_wrong_options_are_refused(options: list[str], message: str, tum: Path, tmp_path: Path):
    usual = ("--source", "capture", "--input", tum, "--output", tmp_path / "out")
    done = command(*usual, *options)
    assert isinstance(done.exception, UsageError)
    assert message in str(done.exception)


def test_bag_without_rosbags_names_the_extra(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "rosbags.highlevel", None)
    (tmp_path / "walk.mcap").write_bytes(b"\x89MCAP0\r\n")
    builder = load_builder("capture", tmp_path / "walk.mcap")
    (ref,) = list_episodes(builder)
    assert ref.id == "capture/walk/trajectory_0"
    with pytest.raises(UsageError, match=r"\[ros\]"):
        builder.has_depth(ref)


def test_damaged_bag_is_named(tmp_path: Path) -> None:
    pytest.importorskip("rosbags")
    (tmp_path / "walk.mcap").write_bytes(b"\x89MCAP0\r\n" + bytes(100))
    with pytest.raises(SourceError, match=r"walk\.mcap: cannot be read"):
        read(tmp_path / "walk.mcap")


def test_metadata_of_a_bag_without_end_is_an_error(episode: Episode, tmp_path: Path) -> None:
    pytest.importorskip("rosbags")
    captures.write_bag(episode, tmp_path / "walk")
    with (tmp_path / "walk/metadata.yaml").open("r+b") as file:
        file.truncate(1 << 33)
    with pytest.raises(SourceError, match=r"metadata\.yaml: is larger than 512 kB"):
        read(tmp_path / "walk")


def test_pipe_instead_of_a_bag_file_is_refused(episode: Episode, tmp_path: Path) -> None:
    pytest.importorskip("rosbags")
    captures.write_bag(episode, tmp_path / "walk")
    (held,) = (tmp_path / "walk").glob("*.mcap")
    held.unlink()
    os.mkfifo(held)
    with pytest.raises(SourceError, match="is not a regular file"):
        read(tmp_path / "walk")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("groundtruth.txt", "1 2 3", r"is not a trajectory \(its lines have 3 numbers\)"),
        ("groundtruth.txt", "1 0 0 0 0 0 0 1", "has no pose at the time of any frame"),
        ("groundtruth.txt", "a b", r"line 1: is not a row of numbers \(a b\)"),
        ("groundtruth.txt", "time,x,y,z\n", r"\(time,x,y,z\); remove a header or begin it with #"),
        ("rgb.txt", "x", "line 1: is not 'time name'"),
        ("depth.txt", "1.0 depth/\0.png", "line 1: is not 'time name'"),
        ("rgb.txt", "", "lists 0 images"),
        ("depth.txt", "5.0 depth/a.png", "has no time within 0.02 s"),
    ],
)
def test_damaged_recordings_are_named(
    file: str, content: str, message: str, tum: Path, episode: Episode, tmp_path: Path
) -> None:
    place = Path(shutil.copytree(tum, tmp_path / "tum"))
    (place / file).write_text(content)
    with pytest.raises(SourceError, match=message):
        read(place, intrinsics=captures.opencv_intrinsics(episode))


def test_control_characters_of_a_file_are_escaped_in_its_failure(
    seven: Path, tmp_path: Path
) -> None:
    place = Path(shutil.copytree(seven, tmp_path / "seq-01"))
    (place / "frame-000001.pose.txt").write_bytes(b"\xff\x1b[2J\x00\x07 1 2\n")
    result = occgen_hub(
        "build", "--source", "capture", "--input", place, "--output", tmp_path / "out"
    )
    assert result.returncode == 1
    assert r"\x1b[2J\x00\x07" in result.stderr
    assert not {"\x1b", "\0", "\7"} & set(result.stdout + result.stderr)
