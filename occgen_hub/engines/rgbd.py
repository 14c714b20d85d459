"""Sensor depth with known poses: unproject every frame, fuse what they measured into one cloud."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from occgen_hub.config import Config
from occgen_hub.engines import Engine, Progress
from occgen_hub.episode import Episode, Reconstruction
from occgen_hub.errors import OccGenError, UsageError
from occgen_hub.geometry.camera import unproject
from occgen_hub.geometry.cloud import VoxelDownsample
from occgen_hub.geometry.poses import transform
from occgen_hub.prefetch import ahead


class SensorDepth(Engine):
    """Sensor depth with known poses."""

    name = "rgbd"

    def reconstruct(
        self, episode: Episode, config: Config, progress: Progress = lambda _: None
    ) -> Reconstruction:
        """See `reconstruct`."""
        return reconstruct(episode, config, progress)


def open_engine(weights: Path | None, device: str | None) -> SensorDepth:
    """The engine; raises UsageError for weights, of which it has none. It works on any device."""
    if weights is not None:
        raise UsageError(f"--weights {weights}: the engine rgbd has none; leave the option out.")
    return SensorDepth()


def reconstruct(
    episode: Episode, config: Config, progress: Progress = lambda _: None
) -> Reconstruction:
    """The scene that an episode's depth images show, in the source's world.

    Every `config.interval`-th frame is used. The fused cloud keeps one point for each voxel of
    `config.fusion_size`. Raises OccGenError when the episode has no depth or no poses, and
    SourceError for a frame that cannot be read.
    """
    if (
        episode.read_depth is None
        or episode.world_from_camera is None
        or episode.intrinsics is None
    ):
        raise OccGenError(
            f"{episode.id}: the engine rgbd needs depth, poses and intrinsics, which this source "
            "does not have; choose another with --engine."
        )
    read_depth, poses, intrinsics = (
        episode.read_depth,
        episode.world_from_camera,
        episode.intrinsics,
    )
    fused = VoxelDownsample(config.fusion_size)
    farthest = np.abs(poses[:, :3, 3]).max() + _longest_ray(episode, config.depth_range[1])
    if farthest > fused.reach:
        raise OccGenError(
            f"{episode.id}: a camera may see {farthest:.0f} m from the world's origin, beyond the "
            f"{fused.reach:.0f} m that can be fused; subtract an offset from the source's poses or "
            "set a larger fusion_voxel_size."
        )

    def measured(t: int) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
        points, pixels = unproject(
            read_depth(t), intrinsics[t], config.depth_range, config.depth_edge
        )
        return transform(poses[t], points), episode.read_rgb(t).reshape(-1, 3)[pixels]

    for points, colors in ahead(measured, range(0, episode.length, config.interval)):
        fused.add(points, colors)
        progress(1)
    return Reconstruction("rgbd", fused.cloud(), poses, intrinsics)


def _longest_ray(episode: Episode, depth: float) -> float:
    """Metres to where a corner of the image is at a depth, over all frames."""
    assert episode.intrinsics is not None
    K, size = episode.intrinsics, np.asarray(episode.image_size)
    centre, focal = K[:, :2, 2], K[:, [0, 1], [0, 1]]
    slope = np.maximum(np.abs(centre), np.abs(size - centre)) / focal
    return depth * float(np.sqrt(1 + (slope**2).sum(axis=1)).max())
