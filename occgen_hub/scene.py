"""From what an engine found to what is written: in the source's world, as a surface if asked."""

from __future__ import annotations

import numpy as np

from occgen_hub.config import Config
from occgen_hub.episode import Episode, Note, Reconstruction, Scene
from occgen_hub.errors import OccGenError
from occgen_hub.geometry.alignment import Alignment, align_poses
from occgen_hub.geometry.cloud import Cloud, VoxelDownsample

CHUNK = 1 << 20
"""Points that are moved at a time."""


def settle(episode: Episode, found: Reconstruction, config: Config) -> Scene:
    """The scene of an episode, from what an engine found.

    Cameras that an engine found in a world of its own are aligned to the source's, where it has
    any, by one Sim3, and everything goes with them. Raises OccGenError where that leaves the
    cloud beyond what can be fused.
    """
    cloud, poses, alignment = found.cloud, found.world_from_camera, None
    notes = list(found.notes)
    if not found.in_source_world and episode.world_from_camera is not None:
        frames = np.arange(episode.length) if found.frames is None else found.frames
        alignment = align_poses(poses[frames], episode.world_from_camera[frames])
        if alignment.problem is not None:
            notes.append(Note("alignment", f"the alignment {alignment.problem}"))
        cloud = _moved(cloud, alignment, config.fusion_size, episode.id)
        poses = alignment.sim3.poses(poses)
    if config.mesh:
        from occgen_hub.geometry.surface import poisson_surface

        cloud = poisson_surface(cloud, poses[:, :3, 3], config.voxel_size, config.mesh_density_cut)
    return Scene(
        cloud=cloud,
        world_from_camera=poses,
        intrinsics=found.intrinsics,
        scale=1.0 if alignment is None else alignment.sim3.scale,
        alignment=alignment,
        notes=tuple(notes),
    )


def _moved(cloud: Cloud, alignment: Alignment, voxel_size: float, episode: str) -> Cloud:
    """The cloud in the source's world, with one point for each voxel there."""
    fused = VoxelDownsample(voxel_size)
    for start in range(0, len(cloud), CHUNK):
        points = alignment.sim3.points(cloud.points[start : start + CHUNK].astype(np.float64))
        near = (np.abs(points) < fused.reach).all(axis=1)
        fused.add(points[near], cloud.colors[start : start + CHUNK][near])
    moved = fused.cloud()
    if len(cloud) and not len(moved):
        raise OccGenError(
            f"{episode}: its points lie beyond the {fused.reach:.0f} m from the world's origin "
            "that can be fused; subtract an offset from the source's poses or set a larger "
            "fusion_voxel_size."
        )
    return moved
