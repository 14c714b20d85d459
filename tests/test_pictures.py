"""Pictures, videos, recordings and reports: drawn without a display, read back and checked."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from scipy.spatial.transform import Rotation

from occgen_hub.cli import cli
from occgen_hub.errors import UsageError
from occgen_hub.geometry.ply import read_ply
from occgen_hub.loading import Trajectory, trajectories
from occgen_hub.media import video_frames
from occgen_hub.occupancy.grid import cell_centres, cell_numbers
from occgen_hub.occupancy.history import moved
from occgen_hub.occupancy.visibility import OCCUPIED, first_occupied
from occgen_hub.visual.colors import INK, OCCUPANCY, PAPER, RAMP, ramp
from occgen_hub.visual.cubes import cube_faces
from occgen_hub.visual.frames import frame_title, frames
from occgen_hub.visual.heights import Heights, world_up
from occgen_hub.visual.inspection import describe
from occgen_hub.visual.legend import AXES, BAR, round_length
from occgen_hub.visual.preview import TEXT, preview
from occgen_hub.visual.report import write_report
from occgen_hub.visual.sequences import SEQUENCES, estimate_bytes, write_sequences
from occgen_hub.visual.viewer import FREE_ALPHA
from occgen_hub.visual.viewpoint import Viewpoint, automatic

SIZE = (480, 180)


def run(*arguments: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "occgen_hub", *map(str, arguments)]
    env = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")} | more
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=env
    )


@pytest.fixture(scope="module")
def trajectory(dataset) -> Trajectory:
    return Trajectory.open(trajectories(dataset)[0])


# visualize


def test_sequence_files_match_the_dataset(trajectory, tmp_path):
    count = write_sequences(trajectory, tmp_path / "out", history_len=2, history_step=1)
    poses, grid, cloud = trajectory.world_from_camera(), trajectory.grid, trajectory.cloud()
    assert count == 6 * len(poses)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(SEQUENCES)
    cells = list(trajectory.visible_frames())
    for t, pose in enumerate(poses):
        expected = set(cells[t].tolist())
        for past in range(max(0, t - 2), t):
            motion = np.linalg.inv(pose) @ poses[past]
            expected |= set(moved(cells[past], motion, grid).tolist())
        out = tmp_path / "out"
        alone = np.load(out / "occ_only_cam_npy" / f"{t:06d}.npy")
        assert alone.shape[1] == 4
        assert (alone[:, 3] == 2).all()
        np.testing.assert_allclose(alone[:, :3], grid.centres(np.array(sorted(expected))))
        camera = np.load(out / "merge_npy_sequence_cam" / f"{t:06d}.npy")
        world = np.load(out / "merge_npy_sequence_world" / f"{t:06d}.npy")
        assert (camera.shape[1], world.shape[1]) == (4, 7)
        np.testing.assert_array_equal(world[: len(cloud), :3], cloud.points)
        shades = cloud.colors / np.float32(255)  # As in Open3D.
        np.testing.assert_array_equal(world[: len(cloud), 3:6], shades)
        assert world[:, 3:6].min() >= 0
        assert 0.5 < world[:, 3:6].max() <= 1
        # One scene in both frames, the path ends at the camera, and the camera is the origin.
        scene, seen = world[world[:, 6] < 2], camera[camera[:, 3] < 2]
        back = seen[:, :3] @ pose[:3, :3].T + pose[:3, 3]
        np.testing.assert_allclose(back, scene[:, :3], atol=1e-4)
        np.testing.assert_allclose(world[world[:, 6] == 1][-1, :3], pose[:3, 3], atol=1e-5)
        # The world has no grid limits: it has every cell of all frames in the history.
        for past in range(max(0, t - 2), t + 1):
            centres = grid.centres(cells[past]) @ poses[past][:3, :3].T + poses[past][:3, 3]
            has = {tuple(c) for c in np.floor(world[world[:, 6] == 2][:, :3] / 0.02).astype(int)}
            want = {tuple(c) for c in np.floor(centres.astype(np.float32) / 0.02).astype(int)}
            assert len(want - has) <= 0.001 * len(want)  # Rounding at the edges of cells.
        for name, array in (("merge_ply_sequence_cam", camera), ("occ_only_cam_ply", alone)):
            points = read_ply(out / name / f"{t:06d}.ply").points
            np.testing.assert_array_equal(points, array[:, :3])


def test_sequences_without_history_have_only_the_cells_of_the_frame(trajectory, tmp_path):
    write_sequences(trajectory, tmp_path / "out", only=["occ_only_cam_npy"], history_len=0)
    for t, columns in enumerate(trajectory.visible_frames()):
        alone = np.load(tmp_path / "out" / "occ_only_cam_npy" / f"{t:06d}.npy")
        np.testing.assert_allclose(alone[:, :3], trajectory.grid.centres(columns))


def test_visualize_overwrites_nothing(trajectory, tmp_path):
    place = tmp_path / "mine"
    place.mkdir()
    (place / "thesis.tex").write_text("precious")
    with pytest.raises(UsageError, match="already exists"):
        write_sequences(trajectory, place)
    assert (place / "thesis.tex").read_text() == "precious"


def test_visualize_prints_the_output_size_and_asks_above_a_limit(trajectory, tmp_path, monkeypatch):
    only = ["merge_npy_sequence_world", "occ_only_cam_npy", "merge_ply_sequence_cam"]
    write_sequences(trajectory, tmp_path / "out", only=only, history_len=1)
    written = sum(p.stat().st_size for p in (tmp_path / "out").rglob("*.*"))
    assert 0.8 < estimate_bytes(trajectory, only=only, history_len=1) / written < 1.6

    monkeypatch.setattr("occgen_hub.cli.picture.MOST_BYTES", 10)
    command = ["visualize", str(trajectory.path), str(tmp_path / "b"), "--only", only[1]]
    result = CliRunner().invoke(cli, command)
    assert isinstance(result.exception, UsageError)
    assert "would be written; add --yes" in str(result.exception)
    assert not (tmp_path / "b").exists()
    monkeypatch.setattr("occgen_hub.cli.picture._can_answer", lambda: True)
    assert CliRunner().invoke(cli, command, input="n\n").exit_code == 1
    assert not (tmp_path / "b").exists()
    result = CliRunner().invoke(cli, [*command, "--yes"], catch_exceptions=False)
    assert re.search(r"About \d+ MB in 1 folder\.", result.stderr)
    assert (tmp_path / "b").is_dir()


def test_visualize_from_the_source_matches_the_built_trajectory(sample_tree, dataset, tmp_path):
    path = trajectories(dataset)[0]
    name = path.relative_to(dataset).as_posix()
    only = ("--only", "occ_only_cam_npy")
    assert run("visualize", path, tmp_path / "a", *only).returncode == 0
    result = run("visualize", "--input", sample_tree, name, tmp_path / "b", *only)
    assert result.returncode == 0, result.stderr
    made = sorted((tmp_path / "a").rglob("*.npy"))
    assert made
    for file in made:
        other = tmp_path / "b" / file.relative_to(tmp_path / "a")
        assert file.read_bytes() == other.read_bytes()
    wrong = run("visualize", "--input", sample_tree, "nowhere", tmp_path / "c", *only)
    assert wrong.returncode == 2
    assert "there is no such episode" in wrong.stderr


# Cubes and viewpoints


def test_cubes_show_each_outer_face_once():
    rng = np.random.default_rng(5)
    cells = np.unique(rng.integers(0, 5, (60, 3)), axis=0)
    faces = cube_faces(cells * 0.5 + 3.0, 0.5)
    there = {tuple(c) for c in cells.tolist()}
    expected = set()
    steps = [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)]
    for cell in there:
        for n, step in enumerate(steps):
            if tuple(np.add(cell, step)) not in there:
                expected.add((*cell, n))
    found = [(*cells[o], d) for o, d in zip(faces.owner, faces.direction, strict=True)]
    assert len(found) == len(set(found))
    assert {tuple(map(int, f)) for f in found} == expected
    centres = faces.corners.mean(axis=1)
    wanted = cells[faces.owner] * 0.5 + 3.0 + np.array(steps)[faces.direction] * 0.25
    np.testing.assert_allclose(centres, wanted, atol=1e-5)


def test_the_automatic_viewpoint_frames_the_scene(trajectory):
    points, poses = trajectory.cloud().points, trajectory.world_from_camera()
    view = automatic(points, poses, SIZE)
    pose, K = view.world_from_camera(), view.intrinsics(SIZE)
    local = (poses[:, :3, 3] - pose[:3, 3]) @ pose[:3, :3]
    pixels = local[:, :2] / local[:, 2:] * K[0, 0] + K[:2, 2]
    assert (local[:, 2] > 0).all()
    assert ((pixels > 0) & (pixels < SIZE)).all()
    assert view.position[2] > poses[:, 2, 3].max()  # From above, since z points up.


def test_viewpoint_file_round_trip(tmp_path):
    view = Viewpoint((1.0, 2.0, 3.0), (0.0, 0.5, 0.0), (0.0, 0.0, 1.0), 40.0)
    view.save(tmp_path / "camera.json")
    assert Viewpoint.load(tmp_path / "camera.json") == view
    for wrong in (
        {},
        {"position": [0, 0, 1], "target": [0, 0, 0], "up": [0, 0, 1]},
        {"position": [10**400, 0, 1], "target": [0, 0, 0], "up": [0, 1, 0]},
    ):
        (tmp_path / "camera.json").write_text(json.dumps(wrong))
        with pytest.raises(UsageError, match="is not a viewpoint"):
            Viewpoint.load(tmp_path / "camera.json")


# render


def test_ego_view_draws_cells_where_rays_hit_them(trajectory):
    """Compared with a traversal of the grid for each pixel."""
    from occgen_hub.visual.ego import EgoView

    view = EgoView(trajectory, trajectory.image_size)
    for frame in islice(frames(trajectory), 3):
        drawn = (view(frame) != PAPER).any(axis=2)
        state = np.zeros(trajectory.grid.cells, np.uint8)
        state[frame.cells.columns] = OCCUPIED
        hit = first_occupied(trajectory.grid, frame.intrinsics, trajectory.image_size, state) >= 0
        assert 0.05 < hit.mean() < 1
        assert (drawn & hit).sum() / (drawn | hit).sum() > 0.98
    view.close()


def test_frame_cells_hold_the_points_inside_them(trajectory):
    frame = next(frames(trajectory))
    cells, grid = frame.cells, trajectory.grid
    centres, half = cells.in_world(), grid.voxel_size / 2
    rng = np.random.default_rng(0)
    within = (
        rng.uniform(-0.99 * half, 0.99 * half, centres.shape) @ cells.world_from_camera[:3, :3].T
    )
    assert cells.contain(centres + within).all()
    points = rng.uniform(centres.min(axis=0) - 0.1, centres.max(axis=0) + 0.1, (300, 3))
    axes = cells.world_from_camera[:3, :3]
    near = [bool((np.abs((p - centres) @ axes).max(axis=1) < half).any()) for p in points]
    assert 0 < sum(near) < 300
    assert cells.contain(points).tolist() == near


def test_cells_of_a_past_frame_are_computed_once(trajectory, monkeypatch):
    from occgen_hub.visual.frames import FrameCells
    from occgen_hub.visual.world import _Occupied

    cloud, size, asked = trajectory.cloud(), trajectory.grid.voxel_size, []
    hold = FrameCells.contain
    monkeypatch.setattr(
        FrameCells, "contain", lambda self, points: (asked.append(1), hold(self, points))[1]
    )
    drawn = _Occupied(cloud, size, size)
    for frame in frames(trajectory, 2, 2):  # The history has only every other frame.
        drawn.of(frame)
    assert len(asked) == len(trajectory.world_from_camera())


def test_large_cells_are_drawn_with_edges():
    from occgen_hub.visual.cubes import CLEAR, with_edges

    faces = cube_faces(np.array([[0, 0, 0.5], [0, 0, 8.0]]), 0.02, np.zeros(3))
    colors = np.full((len(faces), 3), 200, np.uint8)
    both, shades = with_edges(faces, colors, 1000.0, 0.02)  # 40 pixels, and 2.5.
    assert 0.02 / 8 * 1000 < CLEAR < 0.02 / 0.5 * 1000
    assert len(both) == len(faces) + 1
    near, far = faces.owner == 0, faces.owner == 1
    assert (shades[: len(faces)][near] < 180).all()
    assert (shades[: len(faces)][far] == 200).all()
    assert (shades[-1] == 200).all()
    # The added face covers the middle of the dark one and lies in front of it.
    dark, bright = both.corners[np.flatnonzero(near)[0]], both.corners[-1]
    inner, outer = (c[:, :2] / c[:, 2:] * 1000 for c in (bright, dark))
    assert 1 < (np.ptp(outer, axis=0) - np.ptp(inner, axis=0)).min() < 4
    assert (bright[:, 2] < dark[:, 2]).all()


def test_world_view_fills_gaps_of_rotated_cells(trajectory):
    """A cell of the cloud is drawn if one of its points lies in a cell of the frame."""
    from occgen_hub.visual.world import _Occupied

    cloud, size = trajectory.cloud(), trajectory.grid.voxel_size
    drawn = _Occupied(cloud, size, size)
    coarser = _Occupied(cloud, 2 * size, size)
    gained = 0
    for frame in frames(trajectory, 2, 1):
        numbers, own = drawn.of(frame)
        assert (np.diff(numbers) > 0).all()
        held = cell_numbers(cloud.points[frame.cells.contain(cloud.points)], size)
        assert np.isin(held, numbers[own]).all()
        assert np.isin(frame.accumulated_world_cells, numbers).all()
        assert np.array_equal(coarser.of(frame)[0], frame.accumulated_world_cells)
        gained += len(numbers) - len(frame.accumulated_world_cells)
    assert gained > 0


def test_world_view_draws_the_camera_at_its_position(trajectory):
    """The image on the frustum is drawn around its projected centre and moves with the frames."""
    from occgen_hub.visual.world import WorldView

    view = WorldView(trajectory, (640, 360))
    pose, K = view.viewpoint.world_from_camera(), view.viewpoint.intrinsics((640, 360))
    green = np.zeros((*trajectory.image_size[::-1], 3), np.uint8)
    green[..., 1] = 255
    for frame in frames(trajectory, 2, 1):
        picture = view(frame, green).astype(int)
        shown = (picture[..., 1] > 240) & (picture[..., [0, 2]].max(axis=2) < 15)
        assert shown.sum() > 20
        camera = frame.world_from_camera
        middle = camera[:3, 3] + camera[:3, 2] * view.reach
        x, y, z = (middle - pose[:3, 3]) @ pose[:3, :3]
        v, u = np.nonzero(shown)
        assert abs(np.median(u) - (K[0, 0] * x / z + K[0, 2])) < 8
        assert abs(np.median(v) - (K[1, 1] * y / z + K[1, 2])) < 8
    view.close()


def test_world_view_has_no_stripes(trajectory):
    """No pixel between drawn cells shows the plain cloud, and the cloud covers no cell."""
    from occgen_hub.visual.world import WorldView

    view = WorldView(trajectory, (480, 270))
    frame = list(frames(trajectory, 2, 1))[-1]
    view(frame, None)
    for name in ("behind", "ahead"):  # Draw only the cells.
        view._stage.put_lines(name, np.zeros((0, 3)), (0, 0, 0), 0.1)
    view._stage.put_segments("frustum", np.zeros((1, 2, 3)), (0, 0, 0), 1e-6)
    tint, cells = view._put_occupancy(frame), view._stage.picture()
    ahead = cells.depth() <= view._scenery.depth() + trajectory.grid.voxel_size
    drawn = cells.zbuffer < view._limit
    assert drawn.sum() > 4000
    assert drawn[ahead & np.isfinite(cells.depth())].all()
    # Visible faces of cells that lie between two occupied cells are tinted.
    size = trajectory.grid.voxel_size
    numbers, _ = view._occupied.of(frame)
    shown = view._heights.below_ceiling(cell_centres(numbers, size))
    cloud = np.unique(cell_numbers(view._gaps.centres, size))
    between = np.zeros(len(cloud), np.bool_)
    for step in (1 << 42, 1 << 21, 1):
        sides = [
            np.isin(cloud + sign * step, numbers[shown])
            | np.isin(cloud + 2 * sign * step, numbers[shown])
            for sign in (1, -1)
        ]
        between |= sides[0] & sides[1]
    between &= ~np.isin(cloud, numbers)
    seen = np.unique(view._face[~drawn & (view._face >= 0)])
    wanted = seen[between[view._gaps.owner[seen]]]
    assert len(wanted) > 100
    assert (tint[wanted, 3] > 0).all()
    assert (tint[:, 3] == 0).any()  # Cells that no frame saw are not tinted.
    view.close()


def test_scale_bar_has_the_stated_length(trajectory):
    """The stated length, projected at the distance of the target, gives the length in pixels."""
    from occgen_hub.visual.world import WorldView

    view = WorldView(trajectory, (640, 360))
    pose, K = view.viewpoint.world_from_camera(), view.viewpoint.intrinsics((640, 360))
    picture = view(next(frames(trajectory)), None)
    view.close()
    ends = np.asarray(view.viewpoint.target) + pose[:3, :1].T * [[0.0], [view.scale_bar]]
    x, _, z = ((ends - pose[:3, 3]) @ pose[:3, :3]).T
    expected = np.diff(K[0, 0] * x / z).item()
    assert 40 < expected <= 11 * 12
    rows = [runs_of(line, INK) for line in picture[330:, 320:]]
    assert abs(max(map(max, rows)) - expected) <= 3


@pytest.mark.parametrize("tilt", [0, 12, 25, 40])
def test_up_is_found_in_tilted_worlds(trajectory, tilt):
    """SLAM starts with a camera that looks down or sideways; floors and tables show where up is."""
    points, poses = trajectory.scene_cells().astype(np.float64), trajectory.world_from_camera()
    turn = np.eye(4)
    axes = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]])  # From z up to y down.
    turn[:3, :3] = (
        Rotation.from_rotvec(np.radians(tilt) * np.array([0.8, 0, 0.6])).as_matrix() @ axes
    )
    tilted, moved_poses = points @ turn[:3, :3].T, turn @ poses
    up = world_up(tilted, moved_poses)
    expected = turn[:3, :3] @ (0, 0, 1)
    assert np.degrees(np.arccos(np.clip(up @ expected, -1, 1))) < 1.5
    if not tilt:
        assert up.tolist() == [0, -1, 0]
    heights = Heights(tilted, moved_poses)
    np.testing.assert_allclose(np.ptp(heights.of(tilted)), np.ptp(points[:, 2]), atol=0.3)
    view = automatic(tilted, moved_poses, (160, 90))
    away = np.subtract(view.position, view.target)
    assert 0.7 < away @ expected / np.linalg.norm(away) < 0.97  # 45 to 75 degrees above the scene.


def test_up_is_an_axis_without_level_surfaces():
    """A ball and noise have no most common normal."""
    rng = np.random.default_rng(4)
    ball = rng.normal(size=(20_000, 3))
    ball /= np.linalg.norm(ball, axis=1, keepdims=True)
    poses = np.tile(np.eye(4), (3, 1, 1))
    poses[:, :3, :3] = Rotation.from_euler("x", 20, degrees=True).as_matrix()
    wrong = np.where(rng.random((20_000, 3)) < 0.5, np.nan, 1e30)
    for points in (ball, rng.random((20_000, 3)), ball[:5], ball[:0], 1e9 * ball, wrong):
        assert world_up(points, poses).tolist() == [0, -1, 0]


def test_outlines_of_the_depth_are_drawn_over_the_image(trajectory):
    """They are at the edges of near surfaces, and not on walls and floors seen at an angle."""
    from occgen_hub.fusion.registration import outlines
    from occgen_hub.visual.preview import OUTLINE

    v, u = np.mgrid[:60, :80] + 0.5
    floor = 1.2 / np.maximum((v - 25) / 70, 1e-9)  # A camera 1.2 m above a floor.
    wall = 1.5 / np.maximum((u - 10) / 70, 1e-9)  # A wall on its right side, seen at an angle.
    room = np.minimum(np.minimum(floor, wall), 5.0)
    assert not outlines(np.minimum(floor, 1e9) * (v > 27)).any()
    scene = room.copy()
    scene[20:40, 30:50] = 1.0
    found = outlines(scene)
    rim = np.zeros_like(found)
    rim[20:40, [30, 49]] = rim[[20, 39], 30:50] = True
    assert (found & rim).sum() > 0.9 * rim.sum()
    assert not (found & ~rim)[:45].any()
    assert not outlines(np.zeros((9, 9))).any()
    picture = np.asarray(preview(trajectory))[22:300, :640]
    assert (picture == OUTLINE).all(axis=2).sum() > 100


def test_preview_from_above_has_a_scale_bar(trajectory):
    """Its length agrees with the camera's triangle, which has a base of one metre."""
    from scipy.spatial.distance import pdist

    canvas = np.asarray(preview(trajectory))[360 + 22 : 720 - 36, 640:]
    bar = max(max(runs_of(line, INK)) for line in canvas[-20:, 320:])
    metre = pdist(np.argwhere((canvas[:-30] == INK).all(axis=2))).max()
    assert abs(bar / (round_length(BAR * TEXT / metre) * metre) - 1) < 0.07
    for color in AXES.values():
        assert (canvas == color).all(axis=2).any() == (color != AXES["z"])  # z points up.


def runs_of(line: np.ndarray, color: tuple[int, int, int]) -> list[int]:
    """Lengths of the runs of a colour on a line of pixels; always includes 0."""
    same = np.concatenate([[0], (line == color).all(axis=1), [0]]).astype(int)
    steps = np.diff(same)
    return [0, *(np.flatnonzero(steps == -1) - np.flatnonzero(steps == 1)).tolist()]


@pytest.mark.parametrize("view", ["ego", "world", "panels"])
def test_every_view_has_a_colour_bar_in_metres(view, trajectory):
    """The colours are in their order, with lengths in metres below."""
    from occgen_hub.visual.render import RenderOptions, pictures

    stops = ramp(np.linspace(0.2, 0.9, 12), OCCUPANCY if view == "world" else RAMP).astype(int)
    picture = next(pictures(trajectory, RenderOptions(view, (960, 540))))
    foot = picture[400:].astype(int)
    found = []
    for number, line in enumerate(foot):
        off = np.abs(line[None] - stops[:, None]).max(axis=2)
        steps = np.diff(off.argmin(axis=1))
        if off.min(axis=1).max() < 12 and ((steps > 0).all() or (steps < 0).all()):
            found.append((number, int(off.argmin(axis=1).min()), int(off.argmin(axis=1).max())))
    assert found
    number, left, right = found[-1]
    below = foot[number + 2 : number + 40, left - 20 : right + 20]
    assert (below > 200).all(axis=2).sum() > 10


def test_scale_bar_lengths_are_round():
    assert [round_length(x) for x in (0.37, 1.0, 4.99, 5.0, 23.0)] == [0.2, 1.0, 2.0, 5.0, 20.0]


def test_rendered_video_plays_in_browsers(trajectory, tmp_path):
    place = tmp_path / "room.mp4"
    result = run("render", trajectory.path, place, "--size", "480x180", "--fps", "5")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    with av.open(str(place)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height, float(stream.average_rate)) == (480, 180, 5.0)
    content = place.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")  # It plays while it downloads.
    shown = list(video_frames(place))
    assert len(shown) == len(trajectory.world_from_camera())
    for number, picture in enumerate(shown):
        assert picture.std() > 20
        # The first panel is the recorded image.
        image = Image.fromarray(trajectory.rgb(number))
        left = picture[:, 2:158].astype(int)
        height = round(154 * image.height / image.width)
        middle = left[90 - height // 4 : 90 + height // 4].mean(axis=(0, 1))
        core = np.asarray(image.resize((154, height)))[height // 4 : 3 * height // 4]
        assert np.abs(middle - core.mean(axis=(0, 1))).max() < 12
    assert np.abs(shown[0].astype(int) - shown[-1]).mean() > 1


def test_render_refuses_wrong_arguments(trajectory, dataset, tmp_path):
    for arguments, words in (
        ((trajectory.path, tmp_path / "a.gif"), "ends in .mp4"),
        ((trajectory.path, tmp_path / "a.png", "--frame", "999"), "numbered from 0"),
        ((trajectory.path, tmp_path / "a.mp4", "--size", "481x180"), "even numbers"),
        ((dataset, tmp_path / "a.mp4"), "has 2 trajectories"),
    ):
        result = run("render", *arguments)
        assert result.returncode == 2, result.stderr
        assert words in result.stderr
        assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["render", "view"])
def test_missing_extra_error_names_the_remedy(command, trajectory, tmp_path):
    code = (
        "import sys; sys.modules['pyvista'] = sys.modules['rerun'] = None\n"
        "from occgen_hub.cli import main\n"
        f"sys.argv = ['occgen-hub', '{command}', {str(trajectory.path)!r}, *{{}}]\n"
        "main()"
    )
    more = [str(tmp_path / "a.mp4")] if command == "render" else ["--save", str(tmp_path / "a.rrd")]
    result = subprocess.run(
        [sys.executable, "-c", code.format(more)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "pip install -e '.[visual]'" in result.stderr
    assert len(result.stderr.splitlines()) == 1


# view


def test_rerun_recording_has_the_trajectory_over_time(trajectory, tmp_path):
    experimental = pytest.importorskip("rerun.experimental")
    result = run("view", trajectory.path, "--save", tmp_path / "room.rrd")
    assert result.returncode == 0, result.stderr
    store = experimental.RrdReader(tmp_path / "room.rrd").store()
    columns = {c.entity_path for c in store.schema().component_columns()}
    assert {
        *("/world/cloud", "/world/path", "/world/camera", "/world/camera/image"),
        *("/world/camera/depth", "/world/camera/occupied", "/world/camera/observed"),
    } <= columns
    found: dict[int, np.ndarray] = {}
    for chunk in store.stream():
        if chunk.entity_path == "/world/camera":
            batch = chunk.to_record_batch()
            names = {n.split(":")[-1]: n for n in batch.schema.names}
            moves = batch.column(names["translation"]).to_pylist()
            for frame, place in zip(batch.column("frame").to_pylist(), moves, strict=True):
                found[frame] = np.array(place[0])
        if chunk.entity_path == "/world/camera/observed":  # A transparent surface.
            batch = chunk.to_record_batch()
            (color,) = (n for n in batch.schema.names if n.endswith("albedo_factor"))
            assert {row[0] & 255 for row in batch.column(color).to_pylist()} == {FREE_ALPHA}
            (corners,) = (n for n in batch.schema.names if n.endswith("vertex_positions"))
            assert min(len(row) for row in batch.column(corners).to_pylist()) > 400
    poses = trajectory.world_from_camera()
    assert sorted(found) == list(range(len(poses)))
    for frame, place in found.items():
        np.testing.assert_allclose(place, poses[frame, :3, 3], atol=1e-5)


def test_the_viewer_is_served_until_ctrl_c(trajectory):
    import socket

    with socket.socket() as one, socket.socket() as two:
        for probe in (one, two):
            probe.bind(("127.0.0.1", 0))
        ports = [str(probe.getsockname()[1]) for probe in (one, two)]
    command = [sys.executable, "-m", "occgen_hub", "view", str(trajectory.path), "--web", "--ports"]
    process = subprocess.Popen([*command, *ports], stdout=subprocess.PIPE, text=True)
    guard = threading.Timer(60, process.kill)
    guard.start()
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split()[1]
        for _ in range(100):
            try:
                page = urllib.request.urlopen(address, timeout=5).read()
                break
            except OSError:
                threading.Event().wait(0.2)
        assert b"erun" in page
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
    finally:
        guard.cancel()
        process.kill()


def test_view_without_a_screen_is_an_error(trajectory, tmp_path):
    result = run("view", trajectory.path)
    assert result.returncode == 2
    assert "--web" in result.stderr
    result = run("view", trajectory.path, "--choose-camera", tmp_path / "camera.json")
    assert result.returncode == 2
    assert "no screen" in result.stderr


def test_viewpoint_set_in_the_window_is_read_back(trajectory):
    from occgen_hub.visual.viewpoint_picker import look_from, viewpoint_of, window

    plotter = window(trajectory, off_screen=True)
    view = Viewpoint((-20.0, -30.0, 6.0), (-27.0, -18.0, 0.0), (0.0, 0.0, 1.0), 31.0)
    look_from(plotter, view)
    plotter.show(auto_close=False, interactive=False)
    found = viewpoint_of(plotter)
    plotter.close()
    np.testing.assert_allclose(found.world_from_camera(), view.world_from_camera(), atol=1e-6)
    assert found.field_of_view == 31.0


# report


HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


@pytest.fixture(scope="module")
def page(dataset, tmp_path_factory) -> Path:
    """A report of a dataset with HTML in its texts and one broken trajectory."""
    out = tmp_path_factory.mktemp("report")
    root = shutil.copytree(dataset, out / "set")
    first, second = trajectories(root)
    (first / "meta" / "tasks.jsonl").write_text(json.dumps({"task_index": 0, "task": HOSTILE}))
    failure = {"episode": HOSTILE, "reason": f"{HOSTILE} is broken"}
    (root / "failures.jsonl").write_text(json.dumps(failure) + "\n")
    broken = second.with_name("trajectory_9")
    shutil.copytree(second, broken)
    next(broken.rglob("occ_sequence.npz")).write_bytes(b"no")
    result = run("report", root, "--output", out / "page.html")
    assert result.returncode == 0, result.stderr
    return out / "page.html"


def test_report_refers_to_no_other_files(page):
    text = page.read_text("utf-8")
    assert "http://" not in text
    assert "https://" not in text
    places = re.findall(r'<[^>]*? (?:src|href)="([^"]*)"', text)
    assert len(places) > 8
    assert all(place.startswith(("data:", "#")) for place in places)
    assert "<script>document" not in text
    assert page.stat().st_size < 600_000


def test_report_table_has_no_empty_column(page):
    table = re.search(r'<table id="trajectories">.*?</table>', page.read_text("utf-8"), re.S)
    assert table is not None
    heads = re.findall(r"<th .*?<button>(.*?)</button>", table[0])
    rows = re.findall(r"<tr data-text.*?</tr>", table[0], re.S)
    cells = [re.findall(r'<td[^>]* data-value="([^"]*)"', row) for row in rows]
    assert len(rows) == 3
    assert len(heads) > 8
    for head, *values in zip(heads, *cells, strict=True):
        assert any(values), head


def test_the_report_works_in_a_browser(page):
    webdriver = pytest.importorskip("selenium.webdriver")
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if not (browser and driver):
        pytest.skip("chromium and chromium-driver are not installed")
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.common.by import By

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    try:
        chrome.get(page.as_uri())
        assert "OccGen" in chrome.title
        sizes = chrome.execute_script(
            "return [...document.images].map(i => i.complete ? i.naturalWidth : 0)"
        )
        assert len(sizes) == 2 * 4
        assert min(sizes) > 100

        def column(number: int) -> list[str]:
            rows = chrome.find_elements(By.CSS_SELECTOR, "#trajectories tbody tr")
            return [
                row.find_elements(By.TAG_NAME, "td")[number].get_attribute("data-value")
                for row in rows
            ]

        heads = chrome.find_elements(By.CSS_SELECTOR, "#trajectories th button")
        heads[2].click()
        rising = column(2)
        heads[2].click()
        falling = column(2)
        known = [float(value) for value in rising if value]
        assert known == sorted(known)
        assert len(set(known)) == 2
        assert [float(value) for value in falling if value] == known[::-1]
        assert (rising[-1], falling[-1]) == ("", "")  # The broken one is last in both orders.
        assert HOSTILE in chrome.find_element(By.ID, "failures").text
        chrome.find_element(By.ID, "search").send_keys("trajectory_9")
        shown = chrome.find_elements(By.CSS_SELECTOR, "#trajectories tbody tr:not([hidden])")
        assert len(shown) == 1
        assert "OccGen" in chrome.title  # No script from the data was executed.
        for width in (1440, 390):  # The screens of a laptop and a phone.
            screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
            chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
            assert chrome.execute_script(
                "return [document.documentElement, ...document.querySelectorAll('.wide')]"
                ".every(e => e.scrollWidth <= e.clientWidth)"
            )
        assert chrome.get_log("browser") == []
    finally:
        chrome.quit()


def test_frame_title_has_the_first_and_the_last_frame():
    assert [frame_title(n, 8) for n in (0, 7)] == ["frame 0 (0 to 7)", "frame 7 (0 to 7)"]


def test_inspect_and_report_give_the_same_number_of_cells(dataset, tmp_path, monkeypatch):
    """Also where the mean has to be rounded up."""
    page = tmp_path / "page.html"
    write_report(dataset, page)
    lines = [
        line for line in describe(dataset) if line.endswith("visible occupied cells per frame")
    ]
    assert len(lines) == 2
    for line, path in zip(lines, trajectories(dataset), strict=True):
        count = re.search(r"([\d,]+) visible occupied cells per frame", line)
        assert f">{count[1]}<" in page.read_text()
        ends = Trajectory.open(path).row_ends("visible")
        assert count[1] == f"{ends[-1] / (len(ends) - 1):,.0f}"
    ends = np.array([0, 3, 6, 8])
    monkeypatch.setattr(Trajectory, "row_ends", lambda self, key: ends)
    monkeypatch.setattr("occgen_hub.visual.inspection._frames", lambda trajectory: 3)
    assert [
        line for line in describe(dataset) if line.endswith("3 visible occupied cells per frame")
    ]
