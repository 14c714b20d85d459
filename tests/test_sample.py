"""The synthetic recording: its layout, its agreement with the mesh, and reproducible bytes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import open3d as o3d
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.spatial import cKDTree

from occgen_hub.errors import UsageError
from occgen_hub.sample import make_sample

REPO = Path(__file__).resolve().parents[1]
REAL = REPO.parent / "shared/data/internnav/traj_data/matterport3d_zed/1LXtFkjw3qL/trajectory_1"
MATRICES = ("observation.camera_intrinsic", "observation.camera_extrinsic", "action")
OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])
RGB, DEPTH = "videos/chunk-000/observation.images.rgb", "videos/chunk-000/observation.images.depth"
FRAMES = 4


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three trajectories in two houses, 4, 3 and 5 frames long."""
    return make_sample(tmp_path_factory.mktemp("sample") / "tree", trajectories=3, frames=FRAMES)


@pytest.fixture(scope="module")
def tree(sample: list[Path]) -> Path:
    return sample[0].parents[2]


@pytest.fixture(scope="module")
def truth(tree: Path) -> tuple[np.ndarray, np.ndarray]:
    """The exported mesh: vertices (V, 3) in world coordinates, triangles (F, 3)."""
    return read_mesh(tree / "ground_truth/mesh.ply")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One house with two episodes, in the newer layout."""
    out = tmp_path_factory.mktemp("scenes") / "tree"
    (folder,) = make_sample(out, trajectories=2, frames=2, layout="scenes")
    return folder


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("faulty") / "tree"
    (folder,) = make_sample(out, trajectories=1, frames=2, faults=True)
    return folder


def read_ply(path: Path) -> tuple[list[str], np.ndarray, bytes]:
    """The header lines, the vertices as double xyz and uchar rgb, and the remaining bytes."""
    header, rest = path.read_bytes().split(b"end_header\n", 1)
    lines = header.decode().splitlines()
    count = int(next(line for line in lines if "element vertex" in line).split()[-1])
    kind = np.dtype([("xyz", "<f8", 3), ("rgb", "u1", 3)])
    return lines, np.frombuffer(rest, kind, count), rest[count * kind.itemsize :]


def read_mesh(path: Path) -> tuple[np.ndarray, np.ndarray]:
    _, vertices, rest = read_ply(path)
    faces = np.frombuffer(rest, np.dtype([("n", "u1"), ("v", "<i4", 3)]))
    assert (faces["n"] == 3).all()
    return vertices["xyz"], faces["v"]


def tracer(vertices: np.ndarray, triangles: np.ndarray) -> Any:
    scene = o3d.t.geometry.RaycastingScene()
    scene.add_triangles(
        o3d.core.Tensor(vertices.astype(np.float32)), o3d.core.Tensor(triangles.astype(np.uint32))
    )
    return scene


def column(folder: Path, key: str, episode: int = 0) -> np.ndarray:
    table = pq.read_table(folder / f"data/chunk-000/episode_{episode:06d}.parquet")
    return np.array(table[key].to_pylist())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def info_of(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "meta/info.json").read_text())
    return loaded


def video(path: Path) -> tuple[int, int, int, float]:
    """Width, height, number of frames and frames per second."""
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        rate = stream.average_rate
        assert rate is not None
        return stream.width, stream.height, sum(1 for _ in file.decode(stream)), float(rate)


def files(folder: Path) -> dict[str, str]:
    """SHA-256 of each file in a folder, by relative path."""
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def names_without_numbers(folder: Path) -> Iterator[str]:
    for name in files(folder):
        stem = name.rsplit("/", 1)
        yield f"{stem[0]}/*{Path(name).suffix}" if Path(name).stem.isdigit() else name


def test_layout_matches_the_real_trajectory(sample: list[Path]) -> None:
    if not REAL.exists():
        pytest.skip(f"no real trajectory at {REAL}")
    for folder in sample:
        assert set(names_without_numbers(folder)) == set(names_without_numbers(REAL))


def test_columns_and_images_match_the_real_trajectory(sample: list[Path], faulty: Path) -> None:
    if not REAL.exists():
        pytest.skip(f"no real trajectory at {REAL}")
    parquet = "data/chunk-000/episode_000000.parquet"
    real = pq.read_schema(REAL / parquet)
    assert pq.read_schema(faulty / parquet).equals(real, check_metadata=True)
    for folder in sample:
        mine = pq.read_schema(folder / parquet)
        assert all(mine.field(name).equals(real.field(name)) for name in real.names)
    assert info_of(sample[0]).keys() == info_of(REAL).keys()
    assert info_of(faulty)["features"] == info_of(REAL)["features"]
    for name in ("episodes.jsonl", "tasks.jsonl"):
        assert lines(faulty / "meta" / name)[0].keys() == lines(REAL / "meta" / name)[0].keys()
    for key, stats in lines(REAL / "meta/episodes_stats.jsonl")[0]["stats"].items():
        mine_stats = lines(faulty / "meta/episodes_stats.jsonl")[0]["stats"][key]
        for name, value in stats.items():
            assert np.shape(mine_stats[name]) == np.shape(value), (key, name)
    for kind, name in ((RGB, "0.jpg"), (DEPTH, "0.png")):
        with Image.open(sample[0] / kind / name) as a, Image.open(REAL / kind / name) as b:
            assert (a.mode, a.size, a.format) == (b.mode, b.size, b.format)
    header, _, _ = read_ply(sample[0] / "data/chunk-000/path.ply")
    real_header, _, _ = read_ply(REAL / "data/chunk-000/path.ply")
    expected = [line for line in real_header if "comment" not in line and "element" not in line]
    assert [line for line in header if "element" not in line] == expected
    assert np.allclose(column(sample[0], MATRICES[0]), column(REAL, MATRICES[0])[0])
    turn, real_turn = (column(f, MATRICES[1])[0, :3, :3] for f in (sample[0], REAL))
    assert np.allclose(turn, real_turn, atol=1e-6)


@pytest.mark.parametrize(("k", "frames"), [(0, FRAMES), (1, 3), (2, 5)])
def test_trajectory_is_complete(sample: list[Path], k: int, frames: int) -> None:
    folder = sample[k]
    info = info_of(folder)
    assert column(folder, "index").tolist() == list(range(frames))
    assert (info["total_frames"], info["fps"]) == (frames, 10)
    held = pq.read_schema(folder / "data/chunk-000/episode_000000.parquet").names
    assert set(info["features"]) == set(held)
    (episode,) = lines(folder / "meta/episodes.jsonl")
    assert episode["length"] == frames
    assert {p.name for p in (folder / RGB).iterdir()} == {f"{i}.jpg" for i in range(frames)}
    assert {p.name for p in (folder / DEPTH).iterdir()} == {f"{i}.png" for i in range(frames)}
    K = column(folder, MATRICES[0])[0]
    with Image.open(folder / RGB / "0.jpg") as image:
        width, height = image.size
    assert (K[0, 2] * 2, K[1, 2] * 2) == (width, height)
    for key in ("trajectory", "depth"):
        mp4 = folder / f"videos/chunk-000/observation.video.{key}/episode_000000.mp4"
        assert video(mp4) == (-(-width // 16) * 16, -(-height // 16) * 16, frames, 10)


def test_trajectories_differ(sample: list[Path]) -> None:
    with Image.open(sample[0] / RGB / "0.jpg") as a, Image.open(sample[1] / RGB / "0.jpg") as b:
        assert a.size != b.size
    first, second = (column(folder, "action")[0, :3, 3] for folder in sample[:2])
    assert np.linalg.norm(first - second) > 0.3


def test_tasks_are_json_strings_inside_json(sample: list[Path]) -> None:
    tasks = [json.loads(t["task"]) for t in lines(sample[0] / "meta/tasks.jsonl")]
    assert set(tasks[0]) == {"sum_instruction", "sum_indexes"}
    assert tasks[0]["sum_indexes"] == [0, FRAMES - 1]
    for task in tasks[1:]:
        assert set(task) == {"sub_instruction", "sub_indexes", "revised_sub_instruction"}
    spans = [t["sub_indexes"] for t in tasks[1:]]
    assert [i for a, b in spans for i in range(a, b + 1)] == list(range(FRAMES))
    (episode,) = lines(sample[0] / "meta/episodes.jsonl")
    assert [json.loads(t) for t in episode["tasks"]] == tasks


def test_poses_are_rigid_with_a_fixed_mount(sample: list[Path]) -> None:
    for folder in sample:
        action, mount = column(folder, "action"), column(folder, MATRICES[1])
        for R in np.concatenate([action, mount])[:, :3, :3]:
            assert np.allclose(R @ R.T, np.eye(3), atol=1e-6)
            assert np.linalg.det(R) > 0
        assert (mount == mount[0]).all()
        assert 0.4 <= mount[0, 2, 3] <= 1.2
        # Without the mount, the body is upright and at the same height in each frame.
        body = action @ np.linalg.inv(mount)
        assert np.allclose(body[:, :3, 2], (0, 0, 1), atol=1e-6)
        assert np.ptp(body[:, 2, 3]) < 1e-5
        steps = np.linalg.norm(np.diff(action[:, :3, 3], axis=0), axis=1)
        assert steps.max() < 0.09


def test_depth_matches_the_exported_mesh(
    sample: list[Path], truth: tuple[np.ndarray, np.ndarray]
) -> None:
    """Traced again in world coordinates, using only the files."""
    vertices, triangles = truth
    worst = []
    for folder in sample:
        K, action = column(folder, MATRICES[0])[0], column(folder, "action")
        with Image.open(folder / DEPTH / f"{len(action) - 1}.png") as image:
            units = np.asarray(image)
        assert units.dtype == np.uint16
        pose = action[-1] @ OPENCV
        v, u = np.mgrid[: units.shape[0], : units.shape[1]]
        local = np.stack(
            [(u + 0.5 - K[0, 2]) / K[0, 0], (v + 0.5 - K[1, 2]) / K[1, 1], np.ones(u.shape)], -1
        )
        direction = local @ pose[:3, :3].T
        rays = np.concatenate([np.zeros_like(direction), direction], -1).astype(np.float32)
        hit = tracer(vertices - pose[:3, 3], triangles).cast_rays(o3d.core.Tensor(rays))
        depth = hit["t_hit"].numpy()
        far = depth > 6.5535
        assert (units[depth > 6.5545] == 0).all()
        assert (units[~far] > 0).mean() > 0.999
        error = np.abs(units / 10_000 - depth)[~far]
        worst.append(np.quantile(error, 0.999))
        # A few pixels lie exactly on an edge, where the two tracers may choose different sides.
        assert (error < 1e-3).mean() > 0.9995
        assert np.median(error) < 1e-4
    assert max(worst) < 2e-4


def test_camera_keeps_its_distance_from_surfaces(
    sample: list[Path], truth: tuple[np.ndarray, np.ndarray]
) -> None:
    scene = tracer(*truth)
    for folder in sample:
        at = column(folder, "action")[:, :3, 3].astype(np.float32)
        assert scene.compute_distance(o3d.core.Tensor(at)).numpy().min() >= 0.349


def test_pictures_have_texture_and_are_upright(sample: list[Path]) -> None:
    for folder in sample:
        with Image.open(folder / RGB / "0.jpg") as image:
            grey = np.asarray(image.convert("L"), np.float64)
        assert grey.std() > 20
        blocks = grey[: grey.shape[0] // 16 * 16, : grey.shape[1] // 16 * 16]
        blocks = blocks.reshape(grey.shape[0] // 16, 16, grey.shape[1] // 16, 16)
        assert (blocks.std(axis=(1, 3)) > 2).mean() > 0.7
        # The floor is nearer at the bottom of the image.
        with Image.open(folder / DEPTH / "0.png") as image:
            rows = np.median(np.asarray(image), axis=1)
        assert rows[-1] < rows[len(rows) // 2]


def test_cloud_lies_on_the_mesh(sample: list[Path], truth: tuple[np.ndarray, np.ndarray]) -> None:
    vertices, triangles = truth
    folder = sample[2]
    _, cloud, _ = read_ply(folder / "data/chunk-000/path.ply")
    action, mount = column(folder, "action"), column(folder, MATRICES[1])
    assert np.allclose(cloud["xyz"][: len(action)], action[:, :3, 3], atol=1e-5)
    points, colours = cloud["xyz"][len(action) :], cloud["rgb"][len(action) :]
    scene = tracer(vertices - points.mean(axis=0), triangles)
    query = o3d.core.Tensor((points - points.mean(axis=0)).astype(np.float32))
    distance = scene.compute_distance(query).numpy()
    # Distances from Open3D are off by some millimetres near long thin triangles.
    assert np.quantile(distance, 0.99) < 1e-4
    assert distance.max() < 6e-3
    floor = action[0, 2, 3] - mount[0, 2, 3]
    assert points[:, 2].min() == pytest.approx(floor, abs=1e-4)
    assert points[:, 2].max() <= floor + 0.9 + 1e-4
    apart = cKDTree(points).query(points[::20], k=2)[0][:, 1]
    assert 0.03 < np.median(apart) < 0.055
    high = points[:, 2] > floor + 0.11
    assert (colours[high] == (102, 102, 102)).all()
    assert (colours == (0, 0, 128)).all(axis=1).any()


def test_same_seed_gives_the_same_bytes_in_another_process(
    sample: list[Path], tree: Path, tmp_path: Path
) -> None:
    code = (
        "import sys; from pathlib import Path; from occgen_hub.sample import make_sample; "
        f"make_sample(Path(sys.argv[1]), trajectories=1, frames={FRAMES})"
    )
    # Filling new memory with other values reveals reads of uninitialized memory.
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "again")],
        cwd=REPO, check=True, env={**os.environ, "MALLOC_PERTURB_": "91"},
    )  # fmt: skip
    assert files(tmp_path / "again" / sample[0].relative_to(tree)) == files(sample[0])


def test_another_seed_gives_another_house(sample: list[Path], tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []
    (other,) = make_sample(
        tmp_path / "other", trajectories=1, frames=2, seed=1,
        progress=lambda i, n: done.append((i, n)),
    )  # fmt: skip
    assert done == [(1, 2), (2, 2)]
    a, b = files(other), files(sample[0])
    images = [name for name in a if name.endswith((".jpg", ".png"))]
    assert all(a[name] != b[name] for name in images)


def test_scenes_layout_has_all_episodes_in_one_folder(scenes: Path) -> None:
    assert {p.name for p in scenes.parent.iterdir()} == {"house_000"}
    names = {p.name for p in (scenes / "data/chunk-000").iterdir()}
    assert names == {"episode_000000.parquet", "episode_000001.parquet"}
    assert (scenes / "meta/pointcloud.ply").exists()
    ranges = [s["image_index"] for s in lines(scenes / "meta/episodes_stats.jsonl")]
    assert ranges == [{"min": 0, "max": 1}, {"min": 2, "max": 3}]
    assert {p.name for p in (scenes / RGB).iterdir()} == {f"{i}.jpg" for i in range(4)}
    assert {p.name for p in (scenes / DEPTH).iterdir()} == {f"{i}.png" for i in range(4)}
    assert info_of(scenes)["total_episodes"] == 2
    assert info_of(scenes)["total_frames"] == 4
    tasks = lines(scenes / "meta/tasks.jsonl")
    for k, episode in enumerate(lines(scenes / "meta/episodes.jsonl")):
        assert len(column(scenes, "action", k)) == episode["length"] == 2
        assert tasks[column(scenes, "task_index", k)[0]]["task"] == episode["tasks"][0]
        mp4 = scenes / f"videos/chunk-000/observation.video.trajectory/episode_{k:06d}.mp4"
        assert video(mp4)[2] == 2


def test_faults_match_those_of_the_real_files(faulty: Path) -> None:
    info = info_of(faulty)
    (episode,) = lines(faulty / "meta/episodes.jsonl")
    (stats,) = lines(faulty / "meta/episodes_stats.jsonl")
    assert (info["total_frames"], info["fps"], episode["length"]) == (4, 30, 4)
    assert all(s["count"] == [4] for s in stats["stats"].values())
    held = pq.read_schema(faulty / "data/chunk-000/episode_000000.parquet").names
    assert held == ["index", *MATRICES]
    missing = {"timestamp", "frame_index", "episode_index", "task_index"}
    assert set(info["features"]) == {*held, *missing}
    mp4 = faulty / "videos/chunk-000/observation.video.trajectory/episode_000000.mp4"
    assert video(mp4) == (480, 272, 2, 10)


def test_interrupted_sample_leaves_no_files(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_sample(tmp_path / "out", trajectories=1, frames=1, progress=stop)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
    assert not list(tmp_path.rglob("trajectory_0"))


def test_existing_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="not an empty folder"):
        make_sample(tmp_path)
    with pytest.raises(UsageError, match="not an empty folder"):
        make_sample(tmp_path / "mine.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    "wrong", [{"trajectories": 0}, {"frames": 0}, {"seed": -1}, {"layout": "flat"}]
)
def test_wrong_arguments_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        make_sample(tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()
