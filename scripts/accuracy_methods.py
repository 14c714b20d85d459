"""The methods that scripts/accuracy compares: ours with its settings, and others.

Part of scripts/accuracy. All other methods get the depth images after the same edge filter, the
recorded poses and the same depth range. They return surface points in the recorded world, and our
exact visibility computes the cells that each frame sees.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import open3d as o3d
from accuracy_metrics import Counts, FrameResult, SampleTruth, View, measure
from numpy.typing import NDArray

from occgen_hub.builder import DatasetBuilder, EpisodeRef, load_builder
from occgen_hub.config import Config, load_config
from occgen_hub.engines import load_engine
from occgen_hub.episode import Episode
from occgen_hub.episode_build import Settings
from occgen_hub.errors import OccGenError
from occgen_hub.geometry.camera import continues, unproject
from occgen_hub.geometry.cloud import VoxelDownsample
from occgen_hub.geometry.poses import transform
from occgen_hub.job import Job, list_episodes
from occgen_hub.occupancy.grid import Grid, cell_centres, cell_numbers
from occgen_hub.occupancy.point_blocks import into_blocks
from occgen_hub.occupancy.visibility import observe
from occgen_hub.prefetch import own_threads
from occgen_hub.runtime.build import build_dataset

HIT, MISS = 0.7, 0.4
"""OctoMap's defaults for its sensor model. Its clamping limits and threshold are defaults too."""

TRUNCATION, LEAST_WEIGHT = 4.0, 3.0
"""TSDF: truncation distance in voxels, and the number of frames that have to see a voxel (Open3D's
default)."""

DUFO_VOXEL, DUFO_HIT, DUFO_UNKNOWN = 0.02, 0.04, 1
"""DUFOMap: voxel size and length of a hit along its ray, metres; dilation of the unknown, voxels.
The authors' values for lidar are 0.1, 0.2 and 1. These are the same for voxels of 2 cm; they found
more moving points in rooms.
"""

Points = NDArray[np.float32]


@dataclass(frozen=True)
class Method:
    """settings: of our method, as for --set; surface: of another method, computes an episode's
    points in the recorded world; package: the package that it needs.
    """

    name: str
    settings: tuple[str, ...] = ()
    surface: Callable[[Episode, Config], Points] | None = None
    package: str | None = None

    @property
    def ours(self) -> bool:
        """Whether this is our own method."""
        return self.surface is None

    @property
    def missing(self) -> str | None:
        """Why the method cannot run; None if it can."""
        if self.package is None or importlib.util.find_spec(self.package) is not None:
            return None
        return f"{self.package} is not installed: .venv/bin/pip install -e '.[bench]'"

    def with_settings(self, settings: tuple[str, ...]) -> Method:
        """A copy with further settings before its own. Only our method uses settings."""
        return replace(self, settings=(*settings, *self.settings))

    def measure(
        self,
        truth: SampleTruth,
        out: Path,
        bounds: int = 0,
        progress: Callable[[], object] = lambda: None,
    ) -> dict[str, Counts]:
        """Count the results of every episode of a sample. Our method is built into `out`."""
        builder = load_builder("internnav", truth.sample)
        config = load_config(None, self.settings)
        if self.surface is None:
            build(builder, out, config)
            return measure(truth, out, bounds, progress=progress)
        found = {}
        for ref in builder.episodes():
            episode = builder.read(ref)
            poses, K = _cameras(episode)
            views = [View(Grid.of(config), one, episode.image_size) for one in K]
            seen = observe_frames(episode, self.surface(episode, config), config)
            found[ref.id] = truth.counts(ref.id, poses, views, seen, bounds, progress=progress)
        return found


def build(builder: DatasetBuilder, out: Path, config: Config) -> None:
    """Build every episode of a source with sensor depth. Raises OccGenError if one fails."""
    settings = Settings(config, load_engine("rgbd"), media="none")
    refs: list[EpisodeRef] = list_episodes(builder)
    summary = build_dataset(Job(builder, refs, out, settings, parquet_occupancy=False))
    if summary.failures:
        raise OccGenError(summary.failures[0].reason)


def observe_frames(episode: Episode, points: Points, config: Config) -> Iterator[FrameResult]:
    """Yield each frame's occupancy, from (n, 3) points in world metres and the recorded poses."""
    cloud, grid = into_blocks(points), Grid.of(config)
    assert episode.read_depth is not None
    for t, (pose, K) in enumerate(zip(*_cameras(episode), strict=True)):
        size, unmeasured = episode.image_size, None
        if config.unmeasured == "unknown":
            unmeasured = episode.read_depth(t) < grid.exit_depths(K, size)
        frame = observe(grid, cloud, pose, K, size, unmeasured=unmeasured)
        yield FrameResult(frame.visible, frame.observed)


def _cameras(episode: Episode) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The recorded poses, and the intrinsics as a dataset stores them."""
    poses, intrinsics = episode.world_from_camera, episode.intrinsics
    if poses is None or intrinsics is None or episode.read_depth is None:
        raise OccGenError(f"{episode.id}: has no depth, poses or intrinsics; all are required.")
    return poses, intrinsics.astype(np.float32).astype(np.float64)


def _measured_points(episode: Episode, config: Config) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Yield each frame's number and its (n, 3) measured points, in the camera frame."""
    _, K = _cameras(episode)
    assert episode.read_depth is not None
    for t in range(0, episode.length, config.interval):
        points, _ = unproject(episode.read_depth(t), K[t], config.depth_range, config.depth_edge)
        yield t, points


def _fill_cells(numbers: NDArray[np.int64], voxel_size: float) -> Points:
    """Eight points per cell: a rotated camera grid would have gaps with only one."""
    quarter = voxel_size / 4
    corners = np.stack(np.meshgrid(*[[-quarter, quarter]] * 3), axis=-1).reshape(-1, 3)
    centres = cell_centres(numbers, voxel_size)
    points: Points = (centres[:, None] + corners).reshape(-1, 3).astype(np.float32)
    return points


def octomap_surface(episode: Episode, config: Config) -> Points:
    """Points in the cells that are occupied according to OctoMap."""
    import octomap

    size, poses = config.voxel_size, _cameras(episode)[0]
    tree = octomap.OcTree(size)
    tree.setProbHit(HIT)
    tree.setProbMiss(MISS)
    hit = np.zeros(0, np.int64)
    for t, points in _measured_points(episode, config):
        # One point per cell is enough: OctoMap updates a cell once per frame.
        numbers = np.unique(cell_numbers(transform(poses[t], points), size))
        ends = cell_centres(numbers, size).astype(np.float64)
        tree.insertPointCloud(
            ends, poses[t, :3, 3].copy(), maxrange=config.depth_range[1], lazy_eval=True
        )
        hit = np.union1d(hit, numbers)
    # Only cells that had a point can be occupied.
    occupied = np.asarray(tree.getLabels(cell_centres(hit, size).astype(np.float64))) == 1
    return _fill_cells(hit[occupied], size)


def tsdf_surface(episode: Episode, config: Config) -> Points:
    """Points of the surface of Open3D's TSDF, one per voxel of half a cell."""
    size, poses, K = config.voxel_size, *_cameras(episode)
    assert episode.read_depth is not None
    volume = o3d.t.geometry.VoxelBlockGrid(
        ("tsdf", "weight"), (o3d.core.float32, o3d.core.float32), ((1,), (1,)), size, 16, 20_000
    )
    nearest, farthest = config.depth_range
    for t in range(0, episode.length, config.interval):
        metres = episode.read_depth(t)
        kept = (metres >= nearest) & (metres <= farthest)
        if config.depth_edge > 0:
            kept &= continues(metres, config.depth_edge)
        image = o3d.t.geometry.Image(np.where(kept, metres, 0).astype(np.float32))
        # Open3D puts pixel centres at integer coordinates.
        intrinsic = o3d.core.Tensor(K[t] - [[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])
        extrinsic = o3d.core.Tensor(np.linalg.inv(poses[t]))
        blocks = volume.compute_unique_block_coordinates(
            image, intrinsic, extrinsic, 1.0, farthest, TRUNCATION
        )
        volume.integrate(blocks, image, intrinsic, extrinsic, 1.0, farthest, TRUNCATION)
    mesh = volume.extract_triangle_mesh(weight_threshold=LEAST_WEIGHT)
    if not len(mesh.vertex.positions):
        return np.zeros((0, 3), np.float32)
    corners = mesh.vertex.positions.numpy()[mesh.triangle.indices.numpy()].astype(np.float64)
    # Triangles are at most a voxel wide. With the centres of triangles and edges added, points are
    # at most half a cell apart.
    edges = (corners + np.roll(corners, 1, axis=1)) / 2
    points = np.concatenate([corners.reshape(-1, 3), edges.reshape(-1, 3), corners.mean(axis=1)])
    return _downsampled([points], config)


def dufomap_surface(episode: Episode, config: Config) -> Points:
    """The points that are static according to DUFOMap, one per voxel of half a cell."""
    os.environ.setdefault("GLOG_minloglevel", "1")  # Hides DUFOMap's list of parameters.
    from dufomap import dufomap

    poses = _cameras(episode)[0]
    moving = dufomap(DUFO_VOXEL, DUFO_HIT, DUFO_UNKNOWN, num_threads=own_threads())
    frames = [
        (transform(poses[t], points).astype(np.float32), poses[t])
        for t, points in _measured_points(episode, config)
    ]
    for points, pose in frames:
        moving.run(points, pose, cloud_transform=False)
    moving.oncePropagateCluster(if_propagate=True, if_cluster=False)
    return _downsampled(
        (
            points[moving.segment(points, pose, cloud_transform=False) == 0].astype(np.float64)
            for points, pose in frames
        ),
        config,
    )


def _downsampled(clouds: Iterable[NDArray[np.float64]], config: Config) -> Points:
    thinned = VoxelDownsample(config.fusion_size)
    for points in clouds:
        thinned.add(points, np.zeros((len(points), 3), np.uint8))
    return thinned.cloud().points


EVIDENCE = "fusion" in Config.model_fields
"""Whether this version has a fusion other than the union of all points."""

OURS = "evidence" if EVIDENCE else "union"

METHODS = {
    method.name: method
    for method in (
        Method("union", ("fusion=union",) if EVIDENCE else ()),
        *([Method("evidence", ("fusion=evidence",))] if EVIDENCE else []),
        Method("OctoMap", surface=octomap_surface, package="octomap"),
        Method("TSDF", surface=tsdf_surface),
        Method("DUFOMap", surface=dufomap_surface, package="dufomap"),
    )
}
