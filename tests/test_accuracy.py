"""scripts/accuracy: each figure on cells with a known result, and a short run of the table."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from occgen_hub.config import Config
from occgen_hub.errors import SourceError
from occgen_hub.occupancy.grid import Grid
from occgen_hub.occupancy.visibility import OBSERVED, OCCUPIED, trace

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.append(str(SCRIPTS))
accuracy, cells, kinect, methods, metrics, table = map(
    importlib.import_module,
    ("accuracy", "accuracy_cells", "accuracy_kinect", "accuracy_methods", "accuracy_metrics",
     "accuracy_table"),
)  # fmt: skip

# A camera that looks at a wall in the middle of layer 50 of its grid, 1.01 m away.
GRID = Grid((-0.6, -0.6, 0.0), 0.02, (60, 60, 60))
VIEW = metrics.View(GRID, np.array([[80.0, 0, 40], [0, 80, 40], [0, 0, 1]]), (80, 80))
WALL = 50


def plane(z: float, x: tuple[float, float] = (-2, 2), y: tuple[float, float] = (-2, 2)):
    """The two triangles of a rectangle that faces the camera."""
    a, b, c, d = ([p, q, z] for p, q in ((x[0], y[0]), (x[1], y[0]), (x[1], y[1]), (x[0], y[1])))
    return np.array([[a, b, c], [a, c, d]], np.float64)


def seen(*parts: tuple[slice, slice, int]):
    """What the camera sees if these cells are occupied. Each part: (x cells, y cells, layer)."""
    occupied = np.zeros(GRID.shape, np.uint8)
    for i, j, k in parts:
        occupied[i, j, k] = OCCUPIED
    state = occupied.reshape(-1)
    trace(GRID, VIEW.K, VIEW.size, state)
    visible = np.flatnonzero(state == OCCUPIED | OBSERVED).astype(np.int32)
    return metrics.FrameResult(visible, np.packbits(state & OBSERVED > 0))


def layer(k: int):
    return slice(None), slice(None), k


def figures(triangles, seen, person=None):
    truth = metrics.FrameTruth.of(VIEW, triangles, person)
    return metrics.figures(metrics.frame_counts(VIEW, truth, seen))


def test_cells_of_the_true_plane_are_exact():
    found = figures(plane(1.01), seen(layer(WALL)))
    assert found["exact"] == found["near"] == found["within_2cm"] == found["recall"] == 1
    assert found["recall_strict"] == 1
    assert found["ghosts"] == found["leaks"] == found["false_free"] == 0
    assert "people" not in found
    assert "thin" not in found
    assert found["near incidence 0-45"] == found["recall range 1-2"] == 1
    assert "near range 0-1" not in found


def test_cells_one_layer_behind_the_plane_are_near_and_leave_false_free_cells():
    found = figures(plane(1.01), seen(layer(WALL + 1)))
    assert found["exact"] == found["recall_strict"] == found["ghosts"] == found["leaks"] == 0
    assert found["near"] == found["within_2cm"] == found["recall"] == 1
    # Of about 51 layers of observed free cells in front of it, the last is the true plane.
    assert 1 / 51 < found["false_free"] < 3 / 51
    assert found["false_free_alone"] == 0


def test_cells_two_layers_behind_the_plane_are_not_near():
    found = figures(plane(1.01), seen(layer(WALL + 2)))
    assert found["near"] == found["within_2cm"] == found["recall"] == 0
    assert found["ghosts"] == found["leaks"] == 0
    assert found["false_free_alone"] == found["false_free"] > 0


def test_cells_12_cm_in_front_of_the_plane_are_ghosts():
    found = figures(plane(1.01), seen(layer(WALL - 6)))
    assert found["ghosts"] == 1
    assert found["near"] == found["recall"] == found["leaks"] == found["false_free"] == 0


def test_cells_12_cm_behind_the_plane_are_ghosts_and_leaks():
    found = figures(plane(1.01), seen(layer(WALL + 6)))
    assert found["ghosts"] == found["leaks"] == 1
    assert found["near"] == found["recall"] == 0


def test_cells_seen_through_a_hole_are_leaks():
    whole = seen(layer(WALL))
    hole = seen((slice(0, 29), slice(None), WALL), (slice(31, 60), slice(None), WALL), layer(58))
    leaked = np.setdiff1d(hole.visible, whole.visible)
    assert len(leaked)
    found = figures(plane(1.01), hole)
    assert found["leaks"] == pytest.approx(len(leaked) / len(hole.visible))
    assert found["recall"] == 1  # Each cell of a hole of two has an occupied neighbour.


def test_people_are_measured_only_in_frames_that_contain_them():
    someone = plane(0.61, (-0.2, 0.2), (-0.3, 0.6))
    together = np.concatenate([plane(1.01), someone])
    person = np.array([False, False, True, True])
    body = slice(20, 40), slice(15, 60), 30
    assert figures(together, seen(layer(WALL), body), person)["people"] == 1
    missed = figures(together, seen(layer(WALL)), person)
    assert missed["people"] == 0
    assert missed["leaks"] > 0.1
    gone = figures(plane(1.01), seen(layer(WALL), body))
    assert "people" not in gone
    assert gone["ghosts"] > 0.1


def test_truth_uses_the_people_and_pose_of_each_frame():
    pose = np.eye(4)
    pose[:3, 3] = [3.0, -2.0, 0.5]
    world = plane(1.01) + pose[:3, 3]
    someone = plane(0.61, (-0.2, 0.2), (-0.3, 0.6)).reshape(-1, 3)
    faces = np.arange(6).reshape(2, 3)
    people = np.stack([someone + pose[:3, 3], someone + np.array([0, 0, 50])])
    truth = metrics.Truth(world.reshape(-1, 3), faces, np.stack([pose, pose]), people, faces)
    body = slice(20, 40), slice(15, 60), 30
    frames = [truth.frame(t, VIEW) for t in range(2)]
    here, gone = (
        metrics.figures(metrics.frame_counts(VIEW, frame, seen(layer(WALL), body)))
        for frame in frames
    )
    assert here["exact"] == here["people"] == 1
    assert "people" not in gone
    assert gone["ghosts"] > 0.1


@pytest.mark.parametrize(("width", "thin"), [(0.03, True), (0.2, False)])
def test_objects_narrower_than_4_cm_are_thin(width, thin):
    bar = plane(0.61, (-width / 2, width / 2), (-2, 2))
    missed = figures(np.concatenate([plane(1.01), bar]), seen(layer(WALL)))
    assert ("thin" in missed) is thin
    if thin:
        assert missed["thin"] == 0
        post = slice(29, 31), slice(None), 30
        assert figures(np.concatenate([plane(1.01), bar]), seen(layer(WALL), post))["thin"] == 1


def test_slanted_floor_is_not_thin_and_has_correct_incidence():
    floor = np.array([[[-5, 0.4, -1], [5, 0.4, -1], [5, 0.4, 40]]], np.float64)
    truth = metrics.FrameTruth.of(VIEW, floor)
    assert np.isfinite(truth.depth).sum() > 1000
    assert not truth.thin.any()
    v = 70.5
    along = np.array([0.5 / 80, (v - 40) / 80, 1])
    expected = abs(along[1]) / np.linalg.norm(along)
    assert truth.cosine[70, 40] == pytest.approx(expected, abs=1e-5)


def test_empty_prediction_and_empty_truth_are_accepted():
    nothing = metrics.FrameResult(np.zeros(0, np.int32), np.zeros(GRID.cells // 8, np.uint8))
    assert figures(plane(1.01), nothing)["recall"] == 0
    empty = figures(np.zeros((0, 3, 3)), seen(layer(WALL)))
    assert empty["ghosts"] == 1
    assert empty["near"] == 0
    assert "recall" not in empty


def test_visible_cells_match_the_true_mesh(sample_tree, dataset):
    counts = metrics.measure(metrics.SampleTruth(sample_tree), dataset, 1)
    assert len(counts) == 2
    found = metrics.figures(sum(counts.values(), metrics.Counts()))
    assert found["exact"] >= 0.98
    assert found["leaks"] <= 0.005
    assert found["recall"] >= 0.93
    # The true mesh limits the recall of any exact visibility: see accuracy_metrics.
    assert found["recall_bounded"] >= min(0.99, found["recall_bound"])


def test_evaluate_measures_only_the_requested_frames(sample_tree, dataset):
    truth = metrics.SampleTruth(sample_tree)
    whole = metrics.evaluate(sample_tree, dataset)
    first = metrics.evaluate(sample_tree, dataset, frames=[0])
    assert set(whole) == set(first) == {"all", *metrics.measure(truth, dataset, frames=[])}
    assert 0 < first["all"]["visible_cells"] < whole["all"]["visible_cells"]


# Triangles and cells


@given(st.integers(0, 2**32 - 1))
def test_triangle_with_a_point_in_a_box_crosses_it(seed):
    rng = np.random.default_rng(seed)
    triangle = rng.normal(0, 1, (1, 3, 3))
    weights = rng.dirichlet([1, 1, 1])
    lower = weights @ triangle[0] - rng.uniform(0.01, 0.5, 3)
    assert cells.crosses(lower[None], (lower + 0.51)[None], triangle).all()


def test_a_box_beside_a_triangle_is_not_crossed():
    triangle = np.array([[[0.0, 0, 0], [1, 0, 0], [0, 1, 0]]])
    beside = np.array([[0.6, 0.6, -0.1], [0.2, 0.2, 0.01], [-0.3, 0.2, -0.1], [0.9, 0.15, -0.1]])
    assert not cells.crosses(beside, beside + 0.2, np.repeat(triangle, 4, axis=0)).any()
    touching = np.array([[0.4, 0.4, -0.1], [0.2, 0.2, -0.1]])
    assert cells.crosses(touching, touching + 0.2, np.repeat(triangle, 2, axis=0)).all()


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_crossed_cells_match_brute_force(seed, flat):
    rng = np.random.default_rng(seed)
    triangles = rng.normal(0.5, 0.6, (3, 3, 3))
    if flat:  # Perpendicular to an axis, or without area.
        triangles[0, :, 1] = triangles[0, 0, 1]
        triangles[1, 2] = triangles[1, 1]
    shape, size = (9, 7, 8), 0.13
    lower = np.array([0.01, -0.02, 0.03])
    corners = lower + np.argwhere(np.ones(shape, bool)) * size
    expected = np.zeros(len(corners), bool)
    for triangle in triangles:
        pairs = np.broadcast_to(triangle, (len(corners), 3, 3))
        expected |= cells.crosses(corners, corners + size, pairs)
    found = cells.crossed_cells(lower, size, shape, triangles)
    np.testing.assert_array_equal(found.ravel(), expected)


@given(st.integers(0, 2**32 - 1), st.integers(1, 2))
def test_beside_finds_cells_within_reach(seed, reach):
    rng = np.random.default_rng(seed)
    occupied = rng.random((6, 5, 7)) < 0.02
    set_cells = np.argwhere(occupied)
    place = np.argwhere(np.ones(occupied.shape, bool))
    gap = np.abs(place[:, None] - set_cells).max(axis=2)
    expected = (gap <= reach).any(axis=1)
    np.testing.assert_array_equal(cells.near_set_cells(occupied, np.arange(210), reach), expected)


# The table


def test_short_run_prints_and_saves_the_table(tmp_path, capsys):
    ours = [name for name, method in methods.METHODS.items() if method.ours]
    assert ours[0] == "union"
    asked = ["--row", "kinect", "--seeds", "1", "--trajectories", "1", "--frames", "3"]
    for name in ours:
        asked += ["--method", name]
    code = accuracy.main([*asked, "--details", "--json", str(tmp_path / "a.json")])
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "a.json").read_text())
    (row,) = report["table"]
    assert row == "kinect + flying + speckle"
    assert list(report["table"][row]) == ours
    assert 0.5 < report["table"][row]["union"]["near"] < 1
    assert report["table"][row] == {n: f["401"] for n, f in report["by_seed"][row].items()}
    assert code == (0 if all(c.met for c in table.checks(report["table"])) else 1)
    assert row in printed
    assert "near of" in printed
    assert "free cells of" in printed
    for found in report["table"][row].values():
        assert 0 <= found["hidden_free"] < 0.05
        assert 0.9 < found["free_recall"] <= 1

    assert accuracy.main(["--markdown", "--from", str(tmp_path / "a.json")]) == code
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("| corruption | method | near | exact | ghosts | recall |")
    assert lines[3].startswith(f"| {row} | union | ")


def test_our_figures_are_checked_against_targets(monkeypatch):
    monkeypatch.setattr(table, "OURS", "evidence")
    good = {"near": 0.9995, "ghosts": 0.0, "recall": 0.97, "thin": 0.95, "leaks": 0.001}
    union = {"near": 1.0, "ghosts": 0.0, "recall": 0.971, "thin": 0.96}
    met = list(table.checks({"none": {"union": union, "evidence": good}}))
    assert all(check.met for check in met)
    assert {check.name for check in met} == {"near", "ghosts", "recall", "thin", "leaks"}
    worse = {**good, "recall": 0.9675, "leaks": 0.006}
    found = table.checks({"none": {"union": union, "evidence": worse}})
    assert [check.name for check in found if not check.met] == ["leaks", "recall"]


def test_our_near_figure_must_beat_every_other_method_on_corrupted_depth(monkeypatch):
    monkeypatch.setattr(table, "OURS", "evidence")
    ours = {"near": 0.98, "ghosts": 0.001, "recall": 0.97}
    row = {"union": {"near": 0.6}, "TSDF": {"near": 0.985}, "evidence": ours}
    (missed,) = (c for c in table.checks({"stereo, correlated": row}) if not c.met)
    assert (missed.name, missed.target, missed.note) == ("near", 0.985, "TSDF's")


def test_method_names_its_missing_package():
    there = methods.Method("there", surface=methods.tsdf_surface, package="numpy")
    absent = methods.Method("absent", surface=methods.tsdf_surface, package="no_such_package")
    assert there.missing is None
    assert str(absent.missing).startswith("no_such_package is not installed")


@pytest.mark.parametrize(
    "wrong", [["--row", "no such row"], ["--row", "p"], ["--seeds", "0"], ["--method", "none"]]
)
def test_invalid_options_are_errors(wrong, capsys):
    with pytest.raises(SystemExit) as raised:
        accuracy.main(wrong)
    assert raised.value.code == 2
    assert wrong[0].lstrip("-") in capsys.readouterr().err


def test_file_without_figures_is_an_error(tmp_path, capsys):
    (tmp_path / "a.json").write_text("[]")
    assert accuracy.main(["--from", str(tmp_path / "a.json")]) == 2
    assert "a.json: has no table of figures" in capsys.readouterr().err


# Real frames


@pytest.fixture
def folder(tmp_path):
    """Four frames of a wall 1.5 m ahead, from a camera that moves sideways."""
    place = tmp_path / "frames"
    place.mkdir()
    np.savetxt(tmp_path / "camera-intrinsics.txt", [[60.0, 0, 40], [0, 60, 30], [0, 0, 1]])
    for t in range(4):
        depth = np.full((60, 80), 1510, np.uint16)
        depth[:5] = 0
        depth[5:10] = 65535
        pose = np.eye(4)
        pose[0, 3] = 0.05 * t
        stem = place / f"frame-{t:06d}"
        Image.fromarray(depth).save(f"{stem}.depth.png")
        Image.fromarray(np.zeros((60, 80, 3), np.uint8)).save(f"{stem}.color.jpg")
        np.savetxt(f"{stem}.pose.txt", pose)
    return place


def test_wall_is_built_at_its_measured_depth(folder, tmp_path):
    found = kinect.measure_kinect(folder, tmp_path / "out", Config())
    assert found["in_front"] == 0
    assert abs(found["median"]) <= 0.01
    assert found["measured_found"] == 1
    assert 0.5 < found["times_tsdf"] < 2
    assert found["free_behind"] == 0


def test_free_cells_without_depth_and_behind_it_are_counted():
    depth = np.full((80, 80), 0.5)
    depth[:, 40:] = 0
    free = np.flatnonzero(np.ones(GRID.cells, bool))
    seen, unmeasured, behind = kinect.free_counts(GRID, VIEW.K, free, depth)
    assert unmeasured == pytest.approx(seen / 2, rel=0.02)
    # Half of the cells in the image beyond 0.6 m; the pyramid in view has a volume like z cubed.
    assert behind / seen == pytest.approx((1.2**3 - 0.6**3) / 1.2**3 / 2, rel=0.03)


@pytest.mark.parametrize("measure", [kinect.in_front, kinect.in_front_by_rays])
def test_cells_in_front_of_the_measured_depth_are_counted(measure):
    depth = np.full((80, 80), 1.01)
    depth[:20] = 0
    early = seen(layer(WALL - 6)).visible
    ahead = measure(GRID, VIEW.K, early, depth)
    np.testing.assert_allclose(ahead, 0.12, atol=1e-6)
    assert 0.5 * len(early) < len(ahead) < len(early)
    here = seen(layer(WALL)).visible
    assert np.abs(measure(GRID, VIEW.K, here, depth)).max() < 1e-6


def test_measured_cells_with_a_visible_cell_nearby_are_counted():
    depth, within = np.full((80, 80), 1.01), (0.1, 2.0)
    for k, share in ((WALL, 1), (WALL + 2, 1), (WALL + 3, 0)):
        number, found = kinect.measured_found(GRID, VIEW.K, seen(layer(k)).visible, depth, within)
        assert number > 1000
        assert found == share * number


def test_frame_without_a_pose_is_an_error(folder, capsys):
    (folder / "frame-000002.pose.txt").unlink()
    with pytest.raises(SourceError, match=r"frame-000002.pose.txt.*missing"):
        next(map(kinect.KinectFolder(folder).read, kinect.KinectFolder(folder).episodes()))
    assert accuracy.main(["--kinect", str(folder)]) != 0
    assert "frame-000002.pose.txt" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name, m in methods.METHODS.items() if not m.ours])
def test_other_methods_find_the_wall(name, folder):
    method = methods.METHODS[name]
    if method.missing:
        pytest.skip(method.missing)
    builder = kinect.KinectFolder(folder)
    points = method.surface(builder.read(next(builder.episodes())), Config())
    assert np.abs(points[:, 2] - 1.51).max() <= 0.03
    # The frames see 50 rows and 80 columns of the image, and 15 cm more. TSDF omits what fewer
    # than three of the four frames saw.
    low, high = points.min(axis=0), points.max(axis=0)
    assert high[0] - low[0] == pytest.approx(80 / 60 * 1.51, abs=0.25)
    assert high[1] - low[1] == pytest.approx(50 / 60 * 1.51, abs=0.15)
