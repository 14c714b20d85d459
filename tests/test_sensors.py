"""Errors in the sample: noise of depth and poses, people, and the ground truth of each frame."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import open3d as o3d
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image
from scipy import ndimage

from occgen_hub.builder import load_builder
from occgen_hub.cli import cli
from occgen_hub.errors import UsageError
from occgen_hub.sample import make_sample, sensors
from occgen_hub.sample.episode import CAMERAS, plan_episode
from occgen_hub.sample.figure import Figure
from occgen_hub.sample.people import APART, plan_people
from occgen_hub.sample.pose_errors import with_drift, with_noise
from occgen_hub.sample.render import Renderer
from occgen_hub.sample.scene import build_scene
from occgen_hub.sample.sensors import View

SHAPE = (120, 160)
K = np.array([[200.0, 0, 80], [0, 200.0, 60], [0, 0, 1]])
OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])
RGB, DEPTH = "videos/chunk-000/observation.images.rgb", "videos/chunk-000/observation.images.depth"
FIRST = "sample_zed/house_000/trajectory_0"
NOISY: dict[str, Any] = {
    "noise": ["kinect", "flying", "speckle"],
    "pose_noise": (0.004, 0.15),
    "pose_drift": (0.02, 0.3),
    "people": 2,
}


def wall(depth: float) -> View:
    """A wall perpendicular to the optical axis."""
    return View(np.full(SHAPE, depth), K)


def floor(height: float = 0.4) -> View:
    """A floor `height` metres below the camera, in the lower half of the image, to 20 m."""
    v = np.arange(SHAPE[0]) + 0.5 - K[1, 2]
    depth = np.where(v > 0, K[1, 1] * height / np.maximum(v, 1e-9), 0)
    return View(np.repeat(np.where(depth < 20, depth, 0)[:, None], SHAPE[1], axis=1), K)


def box(near: float = 1.0, far: float = 3.0) -> View:
    """A square at `near`, from pixel 60 to 100, in front of a wall at `far`."""
    depth = np.full(SHAPE, far)
    depth[40:80, 60:100] = near
    return View(depth, K)


def measure(model: sensors.Model, view: View, count: int) -> np.ndarray:
    return np.stack([model(view, view.depth, np.random.default_rng(i)) for i in range(count)])


# The models


@pytest.mark.parametrize("depth", [0.8, 1.5, 3.0, 5.0])
def test_kinect_noise_grows_with_depth(depth: float) -> None:
    measured = measure(sensors.kinect, wall(depth), 4)
    # Quantized disparity spreads depth evenly over one step.
    step = depth**2 / sensors.DISPARITIES
    sigma = 0.0012 + 0.0019 * (depth - 0.4) ** 2
    assert measured.std() == pytest.approx(np.hypot(sigma, step / np.sqrt(12)), rel=0.12)
    assert measured.mean() == pytest.approx(depth, abs=step / 2)
    steps = sensors.DISPARITIES / measured
    assert np.allclose(steps, np.rint(steps), atol=1e-6)


def test_kinect_has_no_depth_below_its_range_and_at_grazing_angles() -> None:
    assert (measure(sensors.kinect, wall(0.39), 1) == 0).all()
    view = floor()
    measured = measure(sensors.kinect, view, 1)[0]
    ground = view.depth > 0
    angle = np.arctan2(view.depth, 0.4)  # At the middle column.
    middle = np.zeros(SHAPE, bool)
    middle[:, 80] = True
    assert np.allclose(view.incidence[ground & middle], angle[ground & middle], atol=0.02)
    assert (measured[ground & middle & (angle > np.radians(85))] == 0).all()
    assert (measured[ground & middle & (angle < np.radians(82))] > 0).all()


def test_kinect_noise_grows_with_the_incidence_angle() -> None:
    # The same depth at angles from 0 to 75 degrees.
    angle = np.radians([0.0, 30.0, 59.0, 61.0, 75.0])
    sigma = sensors.kinect_sigma(np.full(5, 2.0), angle)
    assert sigma[0] == sigma[1] == sigma[2] < sigma[3] < sigma[4]


def test_kinect_has_a_shadow_left_of_near_objects() -> None:
    view = box()
    measured = measure(sensors.kinect, view, 8)
    holes = (measured == 0).all(axis=0)
    rows = holes[45:75]
    # Focal length times baseline of the projector, times the difference of 1 / depth.
    width = K[0, 0] * sensors.PROJECTOR * (1 / 1 - 1 / 3)
    assert rows[:, :60].sum(axis=1).mean() == pytest.approx(width, abs=1.5)
    assert rows[:, 59 - int(width) + 2 : 60].all()
    assert not rows[:, 60:].any()
    assert not holes[:35].any()
    assert not holes[85:].any()


@pytest.mark.parametrize("depth", [1.0, 2.0, 4.0])
def test_stereo_noise_grows_with_the_square_of_depth(depth: float) -> None:
    measured = measure(sensors.stereo, wall(depth), 40)
    focal = K[0, 0] * 848 / SHAPE[1]
    sigma = depth**2 * 0.08 / (focal * 0.05)
    assert measured.std() == pytest.approx(sigma, rel=0.1)


def test_stereo_noise_is_correlated_in_space_and_independent_in_time() -> None:
    view = wall(2.0)
    error = measure(sensors.stereo, view, 40) - 2.0
    error /= error.std()

    def correlation(lag: int) -> float:
        return float((error[..., lag:] * error[..., : error.shape[-1] - lag]).mean())

    assert correlation(1) > 0.8
    assert 0.4 < correlation(3) < 0.85
    assert 0.1 < correlation(10) < 0.45  # Only the coarser component.
    assert abs(correlation(60)) < 0.1
    assert abs((error[1:] * error[:-1]).mean()) < 0.1


def test_stereo_fattens_foreground() -> None:
    row = np.median(measure(sensors.stereo, box(), 9), axis=0)[60]
    near = np.flatnonzero(row < 2)
    assert (near[0], near[-1]) == (60 - sensors.FATTENING, 99 + sensors.FATTENING)


def test_network_error_is_smooth_with_a_scale_per_frame() -> None:
    ratio = np.log(measure(sensors.network, wall(2.0), 60) / 2.0)
    assert np.abs(np.diff(ratio, axis=2)).max() < 0.005
    assert np.abs(np.diff(ratio, axis=1)).max() < 0.005
    # The scale and, at the corner, which is a node of the factor map, the factor.
    assert ratio[:, 0, 0].std() == pytest.approx(np.hypot(0.01, 0.01), rel=0.3)
    assert ratio.std() == pytest.approx(np.hypot(0.01, 0.008), rel=0.2)
    # Apart from the scale, errors of distant pixels are independent.
    far = np.corrcoef(ratio[:, 0, 0], ratio[:, -1, -1])[0, 1]
    assert far < 0.8
    assert 0.004 < ratio.mean(axis=(1, 2)).std() < 0.025


def test_network_blurs_edges_and_keeps_planes() -> None:
    row = np.median(measure(sensors.network, box(), 9), axis=0)[60]
    ramp = (row > 1.04) & (row < 2.9)
    assert 1 <= ramp[50:70].sum() <= 3
    assert (np.diff(row[55:64]) < 0.05).all()
    view = floor()
    ratio = np.log(measure(sensors.network, view, 30)[:, 75:] / view.depth[75:])
    assert np.abs(ratio.mean(axis=0)).max() < 0.03


def test_flying_pixels_lie_between_foreground_and_background() -> None:
    view = box()
    measured = measure(sensors.flying, view, 20)
    changed = measured != view.depth
    assert ((measured[changed] > 1) & (measured[changed] < 3)).all()
    square = np.ones((5, 5))
    beside = ndimage.binary_dilation(view.depth < 2, square)
    beside &= ~ndimage.binary_erosion(view.depth < 2, square)
    assert not changed[:, ~beside].any()
    edge = np.zeros(SHAPE, bool)
    edge[45:75, 59:61] = True
    assert changed[:, edge].mean() == pytest.approx(0.5, abs=0.05)
    # They are spread over the whole range between.
    assert np.histogram(measured[changed], 4, (1, 3))[0].min() > 0.15 * changed.sum()
    for plane in (wall(2.0), floor()):
        kept = measure(sensors.flying, plane, 1)[0]
        near = plane.depth < 8  # The far end of the floor is an edge.
        assert (kept == plane.depth)[near].all()


def test_speckle_is_small_and_rare() -> None:
    view = View(np.full((240, 320), 7.0), K)
    measured = measure(sensors.speckle, view, 20)
    wrong = measured != 7.0
    assert 0.002 < wrong.mean() < 0.003
    assert (measured[wrong] == 0).any()
    assert ((measured[wrong] == 0) | ((measured[wrong] >= 0.4) & (measured[wrong] <= 6))).all()
    single = 0
    for frame in wrong:
        labels, _ = ndimage.label(frame)
        sizes = [max(s.stop - s.start for s in where) for where in ndimage.find_objects(labels)]
        single += sizes.count(1)
        # Two speckles may touch.
        assert np.quantile(sizes, 0.9) <= 5
        assert sizes.count(1) < len(sizes)
    assert single > 0


def test_noise_depends_on_the_seed_not_on_the_order_of_models() -> None:
    depth = box().depth.astype(np.float32)
    depth[:5] = np.inf
    a = sensors.corrupt(depth, K, ["speckle", "kinect"], [1, 2])
    assert (a == sensors.corrupt(depth, K, ["kinect", "speckle", "kinect"], [1, 2])).all()
    assert (a != sensors.corrupt(depth, K, ["kinect", "speckle"], [1, 3])).any()
    assert np.isfinite(a).all()
    for name in sensors.MODELS:
        out = sensors.corrupt(depth, K, [name], [0])
        assert np.isfinite(out).all()
        assert (out >= 0).all()
        if name not in ("speckle", "flying"):
            assert (out[:2] == 0).all()  # Stereo's foreground grows by two pixels.


# Poses


def test_pose_noise_has_the_stated_spread() -> None:
    poses = np.repeat(np.eye(4)[None], 4000, axis=0)
    noisy = with_noise(poses, (0.004, 0.15), np.random.default_rng(0))
    assert np.allclose(noisy[:, :3, 3].std(axis=0), 0.004, rtol=0.05)
    turn = np.degrees(noisy[:, [2, 0, 1], [1, 2, 0]])  # Small rotations about x, y and z.
    assert np.allclose(turn.std(axis=0), 0.15, rtol=0.05)
    assert np.allclose(noisy[:, :3, :3] @ noisy[:, :3, :3].transpose(0, 2, 1), np.eye(3))


def test_pose_drift_starts_at_zero_and_peaks_at_the_stated_size() -> None:
    poses = np.repeat(np.eye(4)[None], 40, axis=0)
    for seed in range(5):
        drifted = with_drift(poses, (0.02, 0.3), np.random.default_rng(seed))
        assert np.allclose(drifted[0], np.eye(4))
        shift = drifted[:, :3, 3]
        assert np.allclose(np.abs(shift).max(axis=0), 0.02)
        assert np.abs(np.diff(shift, axis=0)).max() < 0.008
        angle = np.degrees(np.arccos((np.trace(drifted[:, :3, :3], axis1=1, axis2=2) - 1) / 2))
        assert 0.29 < angle.max() < 0.53
    assert np.allclose(with_drift(poses[:1], (0.02, 0.3), np.random.default_rng(0)), np.eye(4))


# The sample tree


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("clean") / "tree"
    make_sample(out, trajectories=1, frames=4)
    return out


@pytest.fixture(scope="module")
def noisy_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hard") / "tree"
    make_sample(out, trajectories=1, frames=4, **NOISY)
    return out


@pytest.fixture(scope="module")
def with_people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """People, but no noise."""
    out = tmp_path_factory.mktemp("crowd") / "tree"
    make_sample(out, trajectories=1, frames=4, people=2)
    return out


def files(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def truth(tree: Path, name: str = FIRST) -> dict[str, np.ndarray]:
    with np.load(tree / f"ground_truth/{name}.npz", allow_pickle=False) as data:
        return dict(data)


def stored_poses(folder: Path) -> np.ndarray:
    table = pq.read_table(folder / "data/chunk-000/episode_000000.parquet")
    return np.array(table["action"].to_pylist()) @ OPENCV


def depth_of(tree: Path, frame: int) -> np.ndarray:
    with Image.open(tree / FIRST / DEPTH / f"{frame}.png") as image:
        return np.asarray(image) / 10_000


def test_default_recording_is_unchanged(clean: Path) -> None:
    """Depth values of a recording made before the noise options existed."""
    with Image.open(clean / FIRST / DEPTH / "2.png") as image:
        units = np.asarray(image).astype(int)[20::60, 30::80]
    then = [
        [36016, 16656, 36016, 36016, 32010, 19450], [39218, 16656, 44064, 44323, 32010, 19707],
        [26978, 16656, 37373, 44736, 32010, 5322], [13572, 13572, 13572, 13218, 13218, 5322],
        [7083, 7083, 7083, 7083, 7083, 7083],
    ]  # fmt: skip
    assert np.abs(units - then).max() <= 1


def test_ground_truth_without_people_has_empty_meshes(clean: Path) -> None:
    data = truth(clean)
    kinds = {name: (a.shape, a.dtype.name) for name, a in data.items()}
    assert kinds == {
        "world_from_camera": ((4, 4, 4), "float64"),
        "intrinsics": ((3, 3), "float64"),
        "people_vertices": ((4, 0, 3), "float32"),
        "people_faces": ((0, 3), "int32"),
        "people_labels": ((0,), "int32"),
    }
    assert np.allclose(data["world_from_camera"], stored_poses(clean / FIRST), atol=1e-5)
    table = pq.read_table(clean / FIRST / "data/chunk-000/episode_000000.parquet")
    assert (data["intrinsics"] == table["observation.camera_intrinsic"].to_pylist()[0]).all()


def test_ground_truth_files_are_named_by_episode(tmp_path: Path) -> None:
    for layout in ("trajectories", "scenes"):
        out = tmp_path / layout
        make_sample(out, trajectories=2, frames=1, layout=layout)  # type: ignore[arg-type]
        names = {
            p.relative_to(out / "ground_truth").with_suffix("").as_posix()
            for p in (out / "ground_truth").rglob("*.npz")
        }
        assert names == {ref.id for ref in load_builder("internnav", out).episodes()}
        assert len(names) == 2


def test_noise_affects_depth_and_poses_only(
    clean: Path, noisy_tree: Path, with_people: Path, tmp_path: Path
) -> None:
    a, b, c = files(clean), files(noisy_tree), files(with_people)
    assert a.keys() == b.keys() == c.keys()
    assert b["ground_truth/mesh.ply"] == a["ground_truth/mesh.ply"]
    # Noise changes neither colour nor ground truth.
    assert {n for n in b if b[n] != c[n]} == {
        *(n for n in b if DEPTH in n or "video.depth" in n),
        f"{FIRST}/data/chunk-000/episode_000000.parquet",
        f"{FIRST}/data/chunk-000/path.ply",
        f"{FIRST}/meta/episodes_stats.jsonl",
    }
    assert (truth(noisy_tree)["world_from_camera"] == truth(clean)["world_from_camera"]).all()
    off = stored_poses(noisy_tree / FIRST) - truth(noisy_tree)["world_from_camera"]
    assert 0.001 < np.abs(off[:, :3, 3]).max() < 0.045
    assert 1e-3 < np.abs(off[:, :3, :3]).max() < 0.03
    make_sample(
        tmp_path / "again", trajectories=1, frames=4, **{**NOISY, "noise": NOISY["noise"][::-1]}
    )
    assert files(tmp_path / "again") == b


def test_people_match_the_depth_images(clean: Path, with_people: Path) -> None:
    data = truth(with_people)
    assert data["people_vertices"].shape[1] > 2000
    assert data["people_faces"].max() == data["people_vertices"].shape[1] - 1
    assert set(data["people_labels"]) == {0, 1}
    assert len(data["people_labels"]) == len(data["people_faces"])
    seen = []
    for t, pose in enumerate(data["world_from_camera"]):
        depth, empty = depth_of(with_people, t), depth_of(clean, t)
        changed = depth != empty
        seen.append(changed.mean())
        v, u = np.nonzero(changed)
        fx, fy, cx, cy = data["intrinsics"][[0, 1, 0, 1], [0, 1, 2, 2]]
        local = np.stack([(u + 0.5 - cx) / fx, (v + 0.5 - cy) / fy, np.ones(len(u))], axis=1)
        points = local * depth[changed][:, None] @ pose[:3, :3].T
        scene = o3d.t.geometry.RaycastingScene()
        scene.add_triangles(
            o3d.core.Tensor((data["people_vertices"][t] - pose[:3, 3]).astype(np.float32)),
            o3d.core.Tensor(data["people_faces"].astype(np.uint32)),
        )
        distance = scene.compute_distance(o3d.core.Tensor(points.astype(np.float32))).numpy()
        assert np.quantile(distance, 0.999) < 2e-4
        near = empty[changed]
        assert ((depth[changed] < near) | (near == 0)).all()
        with (
            Image.open(with_people / FIRST / RGB / f"{t}.jpg") as a,
            Image.open(clean / FIRST / RGB / f"{t}.jpg") as b,
        ):
            difference = np.abs(np.asarray(a).astype(int) - np.asarray(b)).sum(axis=2)
        assert (difference[changed] > 30).mean() > 0.8
    assert min(seen) > 0.003


@pytest.mark.parametrize("seed", [0, 1])
def test_people_walk_on_free_floor_in_view_and_one_stops(seed: int) -> None:
    scene = build_scene(seed, 0)
    renderer = Renderer(scene)
    episode = plan_episode(renderer, CAMERAS[0], 0, 24, [seed, 0, 2, 0])
    people = plan_people(renderer, episode, 2, [seed, 0, 5, 0])
    vertices = np.stack([people.at(t).vertices for t in range(24)])
    half = vertices.shape[1] // 2
    walker, stopper = vertices[:, :half].mean(axis=1), vertices[:, half:].mean(axis=1)
    steps = [np.linalg.norm(np.diff(p[:, :2], axis=0), axis=1) for p in (walker, stopper)]
    assert steps[0].sum() > 0.8
    assert max(s.max() for s in steps) < 0.2
    assert steps[1][:5].sum() > 0.05
    # A person who stops does not move at all.
    assert (vertices[-4:, half:] == vertices[-1, half:]).all()
    assert (vertices[-4:, :half] != vertices[-1, :half]).any()
    for t in range(24):
        body = vertices[t].astype(np.float64)
        assert np.linalg.norm(body - episode.house_from_camera[t][:3, 3], axis=1).min() > 0.3
        high = body[body[:, 2] > 0.1]
        assert renderer.distance(high).min() > 0.03
        for part in (body[:half], body[half:]):
            assert part[:, 2].min() == pytest.approx(0, abs=1e-6)
            assert 1.5 < np.ptp(part[:, 2]) < 1.85
    apart = np.linalg.norm(people.strolls[0].xy - people.strolls[1].xy, axis=1)
    assert apart.min() > APART
    # They are in view in most frames.
    seen = 0
    for t in range(0, 24, 3):
        pose = episode.house_from_camera[t] @ OPENCV
        depth = renderer.picture(CAMERAS[0], pose, people.at(t))[1]
        seen += (depth < renderer.picture(CAMERAS[0], pose)[1]).mean() > 0.003
    assert seen >= 5


def test_figure_swings_its_legs_and_has_a_closed_mesh() -> None:
    figure = Figure(np.random.default_rng(0))
    xy = np.zeros(2)
    standing, _ = figure.posed(xy, 0.0, 1.0, 0.0)
    wide = [np.ptp(figure.posed(xy, 0.0, phase, 1.0)[0][:, 0]) for phase in np.linspace(0, 6.3, 9)]
    assert max(wide) > 0.75 > min(wide) > np.ptp(standing[:, 0])
    vertices, normals = figure.posed(xy, 0.7, 0.4, 1.0)
    assert np.allclose(np.linalg.norm(normals, axis=1), 1)
    # Faces point outward: the volume is positive.
    a, b, c = (vertices[figure.faces[:, k]] for k in range(3))
    volume = np.einsum("ij,ij->i", a, np.cross(b, c)).sum() / 6
    assert 0.03 < volume < 0.12
    edges = np.sort(figure.faces[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2), axis=1)
    assert (np.unique(edges, axis=0, return_counts=True)[1] == 2).all()


# Wrong arguments


@pytest.mark.parametrize(
    "wrong",
    [
        {"noise": ["fog"]},
        {"noise": "fog"},
        {"pose_noise": (0.1,)},
        {"pose_noise": (-0.1, 0.1)},
        {"pose_noise": ("a", "b")},
        {"pose_drift": (0.1, float("nan"))},
        {"pose_drift": 0.1},
        {"people": -1},
    ],
)
def test_wrong_arguments_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        make_sample(tmp_path / "out", frames=1, trajectories=1, **wrong)
    assert not (tmp_path / "out").exists()


def test_too_many_people_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="people is 60"):
        make_sample(tmp_path / "out", frames=2, trajectories=1, people=60)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_sample_command_passes_its_options_to_make_sample(tmp_path: Path) -> None:
    def call(*arguments: str) -> Any:
        return CliRunner().invoke(cli, ["sample", *arguments])

    short = ("--trajectories", "1", "--frames", "1")
    out = tmp_path / "out"
    made = call(
        str(out), *short, "--noise", "speckle", "--noise", "stereo", "--pose-noise",
        "--people", "1",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    same = tmp_path / "same"
    make_sample(
        same, trajectories=1, frames=1, noise=["stereo", "speckle"], pose_noise=(0.004, 0.15),
        people=1,
    )  # fmt: skip
    assert files(out) == files(same)
    wrong = (
        ("--noise", "fog"), ("--pose-noise", "0.1"), ("--pose-drift=1,b",),
    )  # fmt: skip
    for arguments in wrong:
        refused = call(str(tmp_path / "wrong"), *short, *arguments)
        assert refused.exit_code == 2
        assert not (tmp_path / "wrong").exists()
    assert isinstance(call(str(tmp_path / "wrong"), "--people", "-1").exception, UsageError)
    assert "metres,degrees" in call(str(tmp_path / "wrong"), "--pose-noise", "0.1").output
