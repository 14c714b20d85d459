"""The engines pi3 and pi3x: frames, windows, alignment, and builds from a video."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from conftest import REAL
from hypothesis import given
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation
from standin import TINY, fit_weights, random_weights, save, weights_fitted_to

from occgen_hub.builder import load_builder
from occgen_hub.config import Config
from occgen_hub.engines import Auto, load_engine
from occgen_hub.engines.frames import depth_edges, network_depth, network_size
from occgen_hub.engines.network import unproject, window_size
from occgen_hub.engines.pi3.engine import MEMORY
from occgen_hub.engines.store import FrameStore
from occgen_hub.engines.windows import Assembly, Window, plan
from occgen_hub.episode_build import Settings
from occgen_hub.errors import OccGenError, UsageError
from occgen_hub.geometry.alignment import align_poses
from occgen_hub.geometry.poses import transform
from occgen_hub.geometry.sim3 import Sim3
from occgen_hub.job import Job, choose_engine, list_episodes
from occgen_hub.loading import trajectories
from occgen_hub.media import write_video
from occgen_hub.pipeline import reconstruct
from occgen_hub.prefetch import GPU_SHARED_BY
from occgen_hub.runtime.build import build_dataset
from occgen_hub.sample import make_sample
from occgen_hub.validation import validate

SMALL = Config(max_pixels=40_000, voxel_size=0.05, window=32, refine_poses=False)
SCALE = 1.7
"""Metres per unit of the stand-in network's world."""

GAUGE = Sim3(1 / SCALE, Rotation.from_euler("xyz", [1, 2, 3]).as_matrix(), np.array([3.0, -2, 1]))


def random_gauge(seed):
    random = np.random.default_rng(seed)
    rotation = Rotation.random(random_state=seed).as_matrix()
    return Sim3(float(np.exp(random.normal())), rotation, random.normal(size=3) * 5)


# Frames


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 270), (672, 378)),  # smaller: enlarged
        ((1920, 1080), (672, 378)),
        ((1080, 1920), (378, 672)),
        ((640, 480), (574, 434)),
        ((504, 504), (504, 504)),
    ],
)
def test_network_sizes_of_common_image_sizes(size, expected):
    assert network_size(size, 255_000, 14) == expected


@given(
    st.integers(1, 8000), st.integers(1, 8000), st.integers(1000, 600_000), st.sampled_from([7, 14])
)
def test_network_sizes_are_multiples_of_the_patch_and_keep_the_aspect_ratio(
    width, height, most, patch
):
    w, h = network_size((width, height), most, patch)
    assert w % patch == h % patch == 0
    assert 0 < w * h <= most
    if min(w, h) > 10 * patch:
        assert w * h > 0.7 * most
        assert w / h == pytest.approx(width / height, rel=0.15)


def test_depth_keeps_its_values_when_resized():
    depth = np.random.default_rng(0).uniform(1, 5, (27, 48))
    small = network_depth(depth, (24, 9))
    assert small.shape == (9, 24)
    assert set(small.ravel()) <= set(depth.astype(np.float32).ravel())
    np.testing.assert_array_equal(network_depth(depth, (48, 27)), depth.astype(np.float32))


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.03, 0.5]))
def test_depth_edges_are_where_the_3x3_range_is_wide(seed, tolerance):
    depth = np.random.default_rng(seed).uniform(1, 1.1, (2, 5, 7)).astype(np.float32)
    depth[:, 2, 3:] += 1
    padded = np.pad(depth, ((0, 0), (1, 1), (1, 1)), "edge")
    blocks = sliding_window_view(padded, (3, 3), axis=(1, 2))
    wide = np.ptp(blocks, axis=(3, 4)) > tolerance * depth
    np.testing.assert_array_equal(depth_edges(depth, tolerance), wide & (tolerance > 0))


# Windows


@given(st.integers(1, 500), st.integers(2, 64), st.integers(1, 64))
def test_windows_cover_every_frame_and_overlap(count, size, overlap):
    overlap = min(overlap, size // 2)
    windows = plan(count, size, overlap)
    assert {frame for window in windows for frame in window} == set(range(count))
    assert all(len(window) == min(size, count) for window in windows)
    for earlier, later in itertools.pairwise(windows):
        assert earlier.start < later.start
        assert earlier.stop - later.start >= overlap


def wavy_wall(views=40, height=12, width=16):
    """Poses, exact local points and intrinsics of views of a wavy wall along a curved path."""
    K = np.array([[14.0, 0, 8], [0, 14, 6], [0, 0, 1]])
    u, v = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    along = np.linspace(0, 6, views)
    poses = np.tile(np.eye(4), (views, 1, 1))
    poses[:, 0, 3], poses[:, 2, 3] = along, np.sin(along) * 0.5
    poses[:, :3, :3] = Rotation.from_rotvec(np.outer(0.2 * np.sin(along), [0, 1, 0])).as_matrix()
    depth = 2 + 0.3 * np.sin(u / 3)[None] * np.cos(v / 4) + 0.1 * along[:, None, None]
    rays = np.stack(((u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1], np.ones_like(u)), axis=-1)
    return poses, rays * depth[..., None], K


def assemble(folder, poses, local, size, overlap, gauge=random_gauge):
    """Join windows that each have a world of their own; returns the assembly and its store."""
    windows = plan(len(poses), size, overlap)
    store = FrameStore(folder, (16, 12))
    assembly = Assembly(store, (16, 12))
    before = 0
    for number, window in enumerate(windows):
        sim3 = gauge(number)
        part = slice(window.start, window.stop)
        kept = np.ones(local[part].shape[:3], np.bool_)
        colors = np.zeros((*kept.shape, 3), np.uint8)
        points = (local[part] * sim3.scale).astype(np.float32)
        after = window.stop - windows[number + 1].start if number + 1 < len(windows) else 0
        sure = kept.astype(np.float32)
        assembly.add(Window(sim3.poses(poses[part]), points, kept, sure, colors), before, after)
        before = after
    return assembly, store


@pytest.mark.parametrize(("size", "overlap"), [(40, 8), (12, 4), (8, 4), (13, 1), (6, 3)])
def test_windows_of_any_scale_and_pose_are_joined_into_one_scene(size, overlap, tmp_path):
    poses, local, K = wavy_wall()
    assembly, _ = assemble(tmp_path, poses, local, size, overlap)
    found = assembly.world_from_camera
    unit = np.linalg.norm(found[5, :3, 3] - found[0, :3, 3]) / np.linalg.norm(
        poses[5, :3, 3] - poses[0, :3, 3]
    )
    expected = np.linalg.inv(poses[0]) @ poses
    np.testing.assert_allclose(found[:, :3, :3], expected[:, :3, :3], atol=1e-4)
    np.testing.assert_allclose(found[:, :3, 3] / unit, expected[:, :3, 3], atol=2e-3)
    for fitted in assembly.intrinsics:
        np.testing.assert_allclose(fitted, K, rtol=1e-3)
    for view, points in enumerate(local):
        there = transform(expected[view], points.reshape(-1, 3))
        rays = points / points[..., 2:]
        stored = (assembly.depth(view)[..., None] * rays).reshape(-1, 3)
        distance = np.linalg.norm(transform(found[view], stored) / unit - there, axis=1)
        assert distance.max() < 0.02


def test_each_view_is_stored_once(tmp_path):
    poses, local, _ = wavy_wall(views=23)
    assembly, _ = assemble(tmp_path, poses, local, 8, 3)
    assert (tmp_path / "depth.raw").stat().st_size == 23 * 16 * 12 * 4
    assert len(assembly.world_from_camera) == len(assembly.intrinsics) == 23
    assert len(assembly.residuals) == len(plan(23, 8, 3)) - 1
    assert max(assembly.residuals) < 1e-3


def two_windows(folder, poses, first, second, kept=True):
    """Two windows of ten views with four views in common; their points there may differ."""
    assembly, before = Assembly(FrameStore(folder, (16, 12)), (16, 12)), 0
    for window, points in zip(plan(16, 10, 4), (first, second), strict=True):
        part = slice(window.start, window.stop)
        mask = np.full((10, 12, 16), kept)
        colors = np.zeros((*mask.shape, 3), np.uint8)
        after = 4 - before
        local = points[part].astype(np.float32)
        sure = np.ones(mask.shape, np.float32)
        assembly.add(Window(poses[part], local, mask, sure, colors), before, after)
        before = after
    return assembly


def test_poor_overlap_has_a_large_residual(tmp_path):
    poses, local, _ = wavy_wall(views=16)
    noise = np.random.default_rng(0).lognormal(0, 0.5, local.shape[:3])[..., None]
    assert two_windows(tmp_path, poses, local, local * noise).residuals[0] > 0.1


def test_windows_without_a_known_scale_are_counted(tmp_path):
    poses, local, _ = wavy_wall(views=16)
    still = np.repeat(poses[:1], 16, axis=0)
    assert two_windows(tmp_path, still, local, local, kept=False).unscaled == 1
    assert two_windows(tmp_path, poses, local, local).unscaled == 0


def test_window_sizes_are_from_a_fixed_set_and_grow_with_smaller_frames():
    sizes = [window_size(size, 14, "cpu", MEMORY) for size in ((672, 378), (308, 224), (112, 98))]
    assert sizes == sorted(sizes)
    assert set(sizes) <= {4, 6, 8, 12, 16, 24, 32}


def test_gpu_memory_is_divided_among_processes(monkeypatch):
    """A process with few cores still gets all memory of a GPU that it does not share."""
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda _: 0)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda _: 0)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (75 << 30, 80 << 30))
    monkeypatch.setenv("NUMBA_NUM_THREADS", "1")
    alone = window_size((672, 378), 14, "cuda:0", MEMORY)
    monkeypatch.setenv(GPU_SHARED_BY, "8")
    assert alone == 128 > window_size((672, 378), 14, "cuda:0", MEMORY) >= 8


PEAK_MEMORY = """
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from occgen_hub.builder import load_builder
from occgen_hub.config import Config
from occgen_hub.engines import load_engine
from occgen_hub.job import list_episodes
from occgen_hub.pipeline import reconstruct
builder = load_builder("video", Path(sys.argv[1]))
episode = builder.read(list_episodes(builder)[0])
config = Config(max_pixels=40_000, window=8, overlap=2, voxel_size=0.1)
with TemporaryDirectory() as scratch:
    reconstruct(episode, load_engine("pi3", Path(sys.argv[2]), "cpu"), config, Path(scratch))
lines = Path("/proc/self/status").read_text().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
"""


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("more", [100, 300])
def test_memory_does_not_grow_with_the_video(checkpoint, tmp_path, more):
    """The video repeats eight pictures, so the scene does not grow either."""
    blocks = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    picture = blocks.repeat(20, 0).repeat(20, 1)
    peaks = []
    for frames in (24, more):
        video = tmp_path / f"{frames}.mp4"
        write_video(video, (np.roll(picture, t % 8, 1) for t in range(frames)), 10)
        command = [sys.executable, "-c", PEAK_MEMORY, str(video), str(checkpoint)]
        # Return freed memory at once. Otherwise heap fragmentation can add tens of MB.
        env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        result = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
        peaks.append(int(result.stdout))
    # If points were kept, each frame would add over half a megabyte: 40 or 150 MB in all.
    # Only the long video has loops; verifying one takes as much as two windows: 18 MB.
    assert peaks[1] - peaks[0] < 30_000


# Reconstruction with a network that is fitted to the recording


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A sample source with one trajectory."""
    out = tmp_path_factory.mktemp("rgb") / "tree"
    make_sample(out, trajectories=1, frames=12, seed=3)
    return out


@pytest.fixture(scope="module")
def episode(tree):
    builder = load_builder("internnav", tree)
    return builder.read(list_episodes(builder)[0])


@pytest.fixture(scope="module")
def checkpoint(episode, tmp_path_factory):
    return save(
        tmp_path_factory.mktemp("ckpt") / "pi3", "pi3", weights_fitted_to(episode, GAUGE, SMALL)
    )


@pytest.fixture(scope="module")
def independent_checkpoint(episode, tmp_path_factory):
    """A checkpoint in which views are independent of each other."""
    return save(
        tmp_path_factory.mktemp("ckpt") / "alone",
        "pi3",
        weights_fitted_to(episode, GAUGE, SMALL, independent_views=True),
    )


def engine_views(checkpoint, episode, config=SMALL, name="pi3"):
    """The views that the engine returns, in a world of their own. Their depth is not read."""
    with TemporaryDirectory() as scratch:
        engine = load_engine(name, checkpoint, "cpu")
        return engine.reconstruct(episode, config, Path(scratch))


def reconstructed_scene(checkpoint, episode, config=SMALL, name="pi3"):
    """The reconstructed scene of an episode, in the world of the source."""
    with TemporaryDirectory() as scratch:
        engine = load_engine(name, checkpoint, "cpu")
        return reconstruct(episode, engine, config, Path(scratch))


def fit_notes(scene):
    """The notes without those of frames that disagree, since the depth is approximate."""
    return [note for note in scene.notes if note.code not in ("frames disagree", "poses")]


def test_cameras_and_scale_are_aligned_to_the_source(checkpoint, episode):
    found = engine_views(checkpoint, episode)
    scene = reconstructed_scene(checkpoint, episode)
    np.testing.assert_allclose(found.world_from_camera[0], np.eye(4), atol=1e-6)
    assert scene.scale == pytest.approx(SCALE, rel=1e-4)
    np.testing.assert_allclose(scene.world_from_camera, episode.world_from_camera, atol=1e-3)
    assert scene.alignment.translation_rmse < 1e-3
    assert scene.alignment.rotation_error < 0.05
    assert not fit_notes(scene)


def test_intrinsics_refer_to_the_original_image(checkpoint, episode):
    found = reconstructed_scene(checkpoint, episode)
    assert found.intrinsics.shape == (episode.length, 3, 3)
    focal = found.intrinsics[:, [0, 1], [0, 1]] / episode.intrinsics[:, [0, 1], [0, 1]]
    assert np.abs(np.median(focal, axis=0) - 1).max() < 0.15


def test_point_cloud_matches_the_room(checkpoint, episode, tmp_path):
    """Within the precision of the tiny network: tests scale and position of the points."""
    scene = reconstructed_scene(checkpoint, episode)
    truth = reconstruct(episode, load_engine("rgbd"), SMALL, tmp_path)
    known = cKDTree(truth.cloud.points)
    distance, _ = known.query(scene.cloud.points)
    unscaled, _ = known.query(scene.cloud.points / SCALE)
    assert np.median(distance) < min(0.4, 0.5 * np.median(unscaled))
    assert len(scene.cloud) > 1000
    voxels = np.unique(np.floor(scene.cloud.points / SMALL.fusion_size), axis=0)
    assert len(voxels) > 0.999 * len(scene.cloud)


@pytest.mark.parametrize("options", [{"window": 4}, {"window": 5, "overlap": 1}, {"window": 12}])
def test_window_options_do_not_change_the_cameras(independent_checkpoint, episode, options):
    config = SMALL.model_copy(update=options)
    scene = reconstructed_scene(independent_checkpoint, episode, config)
    np.testing.assert_allclose(scene.world_from_camera, episode.world_from_camera, atol=5e-3)
    assert scene.scale == pytest.approx(SCALE, rel=5e-3)


@pytest.mark.parametrize("interval", [2, 5])
def test_skipped_frames_get_interpolated_cameras(independent_checkpoint, episode, interval):
    config = SMALL.model_copy(update={"interval": interval})
    found, scene = (
        engine_views(independent_checkpoint, episode, config),
        reconstructed_scene(independent_checkpoint, episode, config),
    )
    assert found.frames.tolist() == list(range(0, episode.length, interval))
    assert len(scene.world_from_camera) == len(scene.intrinsics) == episode.length
    np.testing.assert_allclose(
        scene.world_from_camera[::interval], episode.world_from_camera[::interval], atol=5e-3
    )
    path = np.linalg.norm(np.diff(episode.world_from_camera[:, :3, 3], axis=0), axis=1).sum()
    off = scene.world_from_camera[:, :3, 3] - episode.world_from_camera[:, :3, 3]
    assert np.linalg.norm(off, axis=1).max() < 0.2 * path


def test_camera_at_rest_keeps_the_scale_of_the_network(checkpoint, episode):
    still = dataclasses.replace(
        episode, world_from_camera=np.repeat(episode.world_from_camera[:1], episode.length, axis=0)
    )
    scene = reconstructed_scene(checkpoint, still)
    assert scene.scale == 1.0
    (note,) = fit_notes(scene)
    assert note.code == "alignment"
    assert "assumed to be 1" in note.text


def test_single_frame_is_reconstructed(checkpoint, episode):
    one = dataclasses.replace(
        episode, length=1, world_from_camera=episode.world_from_camera[:1],
        intrinsics=episode.intrinsics[:1], task_index=episode.task_index[:1], columns={},
        media=(),
    )  # fmt: skip
    scene = reconstructed_scene(checkpoint, one)
    assert scene.scale == 1.0
    np.testing.assert_allclose(scene.world_from_camera, one.world_from_camera, atol=1e-6)


def test_poor_alignment_gives_a_note(episode, tmp_path):
    folder = save(tmp_path / "random", "pi3", random_weights("pi3"))
    scene = reconstructed_scene(folder, episode)
    assert any(note.code == "alignment" for note in scene.notes)


def test_first_camera_is_the_origin_without_source_poses(checkpoint, episode):
    bare = dataclasses.replace(episode, world_from_camera=None, intrinsics=None, read_depth=None)
    scene = reconstructed_scene(checkpoint, bare)
    np.testing.assert_allclose(scene.world_from_camera[0], np.eye(4), atol=1e-6)
    assert scene.scale == 1.0
    assert scene.alignment is None


def test_scene_beyond_the_limits_of_fusion_is_refused(checkpoint, episode):
    far = episode.world_from_camera.copy()
    far[:, :3, 3] *= 1e6
    with pytest.raises(OccGenError, match=r"m from the world's origin, beyond the .* m that"):
        reconstructed_scene(checkpoint, dataclasses.replace(episode, world_from_camera=far))


# A long video, with a network that is fitted to it


def test_path_of_300_frames_in_windows_is_accurate(episode, tmp_path):
    """A walk around a room in windows of 24 frames: errors stay below 0.5 % of the path."""
    count, size = 300, (112, 84)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 12, 16, 3), np.uint8).repeat(7, 1).repeat(7, 2)
    angle = np.linspace(0, 2 * np.pi, count)
    poses = np.tile(np.eye(4), (count, 1, 1))
    turned = Rotation.from_rotvec(-angle[:, None] * [0, 1, 0]).as_matrix()
    poses[:, :3, :3] = turned
    poses[:, :3, 3] = 3 * np.stack([np.cos(angle), 0.1 * np.sin(3 * angle), np.sin(angle)], 1)
    path = np.linalg.norm(np.diff(poses[:, :3, 3], axis=0), axis=1).sum()
    K = np.array([[90.0, 0, 56], [0, 90, 42], [0, 0, 1]])
    depth = np.full((count, *size[::-1]), 2.5) + 0.3 * np.sin(angle)[:, None, None]
    local = unproject(depth, np.repeat(K[None], count, axis=0)) * GAUGE.scale
    wide = TINY.model_copy(update={"camera_width": 512})
    known = fit_weights(images, local, GAUGE.poses(poses), independent_views=True, sizes=wide)
    long = dataclasses.replace(
        episode, length=count, image_size=size, world_from_camera=None, intrinsics=None,
        read_rgb=lambda t: images[t], read_depth=None, columns={}, media=(),
        task_index=np.zeros(count, np.int64),
    )  # fmt: skip
    config = Config(max_pixels=size[0] * size[1], window=24)
    checkpoint = save(tmp_path / "long", "pi3", known, wide)
    views = engine_views(checkpoint, long, config)
    fit = align_poses(views.world_from_camera, poses)
    off = np.linalg.norm(
        fit.sim3.points(views.world_from_camera[:, :3, 3]) - poses[:, :3, 3], axis=1
    )
    assert off.max() < 0.005 * path
    assert len(views.windows.scales) == len(plan(count, 24, 12)) > 20
    np.testing.assert_allclose(views.windows.scales, 1, atol=0.02)


def test_points_of_low_confidence_are_dropped(checkpoint, episode):
    sure = SMALL.model_copy(update={"confidence": 0.999})
    few = reconstructed_scene(checkpoint, episode, sure)
    many = reconstructed_scene(checkpoint, episode)
    assert len(few.cloud) < 0.5 * len(many.cloud)


@pytest.mark.long
def test_mesh_option_changes_the_cloud(checkpoint, episode):
    plain = reconstructed_scene(checkpoint, episode)
    meshed = reconstructed_scene(checkpoint, episode, SMALL.model_copy(update={"mesh": True}))
    assert len(meshed.cloud) > 0
    assert not np.array_equal(meshed.cloud.points, plain.cloud.points)


# Conditions of pi3x


@pytest.fixture(scope="module")
def pi3x_checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("ckpt") / "pi3x", "pi3x", random_weights("pi3x"))


@pytest.mark.parametrize("condition", [("depth",), ("intrinsics",), ("poses",)])
def test_conditions_reach_the_network(pi3x_checkpoint, episode, condition):
    plain = reconstructed_scene(pi3x_checkpoint, episode, name="pi3x")
    conditioned = reconstructed_scene(
        pi3x_checkpoint, episode, SMALL.model_copy(update={"condition": condition}), "pi3x"
    )
    assert not np.allclose(plain.world_from_camera, conditioned.world_from_camera, atol=1e-4)


@pytest.mark.parametrize("condition", ["depth", "intrinsics", "poses"])
def test_a_condition_that_the_source_lacks_is_refused(pi3x_checkpoint, episode, condition):
    bare = dataclasses.replace(episode, world_from_camera=None, intrinsics=None, read_depth=None)
    config = SMALL.model_copy(update={"condition": (condition,)})
    with pytest.raises(
        OccGenError, match=f"--condition {condition}: the source has no {condition}"
    ):
        reconstructed_scene(pi3x_checkpoint, bare, config, "pi3x")


def test_engines_without_conditions_refuse_them(checkpoint, episode):
    config = SMALL.model_copy(update={"condition": ("depth",)})
    with pytest.raises(UsageError, match="pi3 accepts no conditions; choose --engine pi3x"):
        reconstructed_scene(checkpoint, episode, config)
    with pytest.raises(UsageError, match="rgbd accepts no conditions"):
        load_engine("rgbd").check(config)
    with pytest.raises(UsageError, match="auto accepts no conditions"):
        Auto().check(config)


# Choice of the engine


def test_auto_engine_uses_rgbd_for_episodes_with_depth(tree, checkpoint):
    builder = load_builder("internnav", tree)
    refs = list_episodes(builder)
    engine = choose_engine(builder, refs)
    assert engine == Auto(None)
    with pytest.raises(UsageError, match="all episodes have depth"):
        choose_engine(builder, refs, weights=checkpoint)
    assert engine.for_episode("a/b/c", has_depth=True).name == "rgbd"


def test_auto_engine_identifies_the_network_by_its_weights(checkpoint, pi3x_checkpoint, tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    builder = load_builder("video", tmp_path)
    for weights, name in ((checkpoint, "pi3"), (pi3x_checkpoint, "pi3x")):
        engine = choose_engine(builder, list_episodes(builder), weights=weights, device="cpu")
        assert engine.for_episode("a/b/c", has_depth=False).name == name


def test_error_names_an_unusable_device(checkpoint):
    for device in ("cuda:99", "nonsense"):
        with pytest.raises(UsageError, match=f"--device {device}: cannot be used"):
            load_engine("pi3", checkpoint, device)


def test_rgbd_refuses_weights(checkpoint):
    with pytest.raises(UsageError, match="rgbd uses no weights"):
        load_engine("rgbd", checkpoint)


# The command line


def occgen_hub(*arguments, cwd=None, **environment):
    command = [sys.executable, "-m", "occgen_hub", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, cwd=cwd,
        env={**os.environ, **environment},
    )  # fmt: skip


def test_missing_weights_give_a_message_of_three_lines(tree, tmp_path):
    for path in tree.rglob("*.mp4"):
        video = path
    result = occgen_hub(
        "build", "--source", "video", "--input", video, "--output", tmp_path / "out",
        cwd=tmp_path, HF_HOME=str(tmp_path / "hub"),
    )  # fmt: skip
    assert result.returncode == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 3
    assert "no weights for pi3x" in lines[0]
    assert "occgen-hub weights pull pi3x" in lines[1]
    assert "ckpt/pi3x/model.safetensors" in lines[2]
    assert not (tmp_path / "out").exists()


def build_video(source, checkpoint, out, *more):
    result = occgen_hub(
        "build", "--source", "video", "--input", source, "--output", out, "--weights", checkpoint,
        "--set", "max_pixels=20000", "--set", "voxel_size=0.05", "--set", "window=8", *more,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result


def test_dataset_built_from_a_video_is_valid(tree, checkpoint, tmp_path):
    video = next(path for path in tree.rglob("*.mp4") if "trajectory" in path.parent.name)
    out = tmp_path / "out"
    build_video(video, checkpoint, out)
    report = validate(out)
    assert report.valid, report.findings
    (folder,) = trajectories(out)
    assert folder.relative_to(out).as_posix() == f"custom_videos/{video.stem}/trajectory_0"
    record = json.loads((folder / "meta/occgen.json").read_text())
    assert record["engine"] == "pi3"
    assert record["weights"]["license"] == "cc0-1.0"
    assert "alignment" not in record["scene"]
    again = build_video(video, checkpoint, out)
    assert "1 already there" in again.stdout


@pytest.mark.long
def test_other_weights_trigger_a_rebuild(tree, checkpoint, independent_checkpoint, tmp_path):
    video = next(path for path in tree.rglob("*.mp4") if "trajectory" in path.parent.name)
    build_video(video, checkpoint, tmp_path / "out")
    again = build_video(video, independent_checkpoint, tmp_path / "out")
    assert "1 built" in again.stdout
    assert "another weights" in again.stderr


@pytest.mark.long
def test_dataset_built_from_the_real_video_is_valid(checkpoint, tmp_path):
    if not REAL.is_dir():
        pytest.skip("../shared/data/internnav is missing")
    video = next(REAL.rglob("observation.video.trajectory/*.mp4"))
    build_video(video, checkpoint, tmp_path / "out")
    report = validate(tmp_path / "out")
    assert report.valid, report.findings
    assert report.frames == 52


def test_dataset_files_record_the_alignment(tree, checkpoint, tmp_path):
    builder = load_builder("internnav", tree)
    settings = Settings(SMALL, load_engine("pi3", checkpoint, "cpu"))
    summary = build_dataset(Job(builder, list_episodes(builder), tmp_path / "out", settings))
    assert not summary.failures, summary.failures
    (folder,) = trajectories(tmp_path / "out")
    line = json.loads((folder / "meta/episodes.jsonl").read_text())
    assert line["scale"] == pytest.approx(SCALE, rel=1e-4)
    record = json.loads((folder / "meta/occgen.json").read_text())
    fit = record["scene"]["alignment"]
    assert fit["inliers"] == fit["frames"] == 12
    assert fit["translation_rmse"] < 1e-3
    assert validate(tmp_path / "out").valid


@pytest.mark.long
def test_two_workers_give_the_same_bytes_as_one(sample_tree, checkpoint, tmp_path):
    builder = load_builder("internnav", sample_tree)
    settings = Settings(SMALL, load_engine("pi3", checkpoint, "cpu"))
    contents = []
    for workers in (1, 2):
        out = tmp_path / str(workers)
        summary = build_dataset(Job(builder, list_episodes(builder), out, settings), workers)
        assert not summary.failures, summary.failures
        shutil.rmtree(out / ".logs")
        (out / "report.json").unlink()
        files = sorted(path for path in out.rglob("*") if path.is_file())
        contents.append({path.relative_to(out): path.read_bytes() for path in files})
    assert contents[0] == contents[1]


# Poor results and wrong inputs


def test_result_without_points_gives_a_note(checkpoint, episode):
    found = reconstructed_scene(
        checkpoint, episode, SMALL.model_copy(update={"confidence": 0.99999})
    )
    assert len(found.cloud) == 0
    assert any("do not use it" in note.text for note in found.notes)


def test_depth_outside_the_range_is_not_fused(checkpoint, episode):
    near = reconstructed_scene(
        checkpoint, episode, SMALL.model_copy(update={"depth_range": (0.1, 1.5)})
    )
    whole = reconstructed_scene(checkpoint, episode)
    assert 0 < len(near.cloud) < 0.8 * len(whole.cloud)
    eyes = cKDTree(near.world_from_camera[:, :3, 3])
    assert eyes.query(near.cloud.points)[0].max() < 1.5 * 2


def test_weights_that_produce_no_cameras_are_refused(episode, tmp_path):
    weights = random_weights("pi3")
    weights["camera_head.fc_rot.weight"] *= float("nan")
    folder = save(tmp_path / "nan", "pi3", weights)
    with pytest.raises(OccGenError, match="found no cameras"):
        reconstructed_scene(folder, episode)


def test_pi3_without_poses_notes_its_arbitrary_unit(checkpoint, episode):
    bare = dataclasses.replace(episode, world_from_camera=None, intrinsics=None, read_depth=None)
    found = reconstructed_scene(checkpoint, bare)
    assert "no metres" in [note.code for note in found.notes]
