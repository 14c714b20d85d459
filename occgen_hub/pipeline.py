"""One episode, step by step: reconstruct, align, fuse, observe.

    episode = source.read(ref)                     # what was recorded
    views   = engine.reconstruct(episode, config)  # per frame: depth, confidence, pose, intrinsics
    views   = align(views, episode)                # into the source's world, metres
    scene   = fuse(views, config)                  # what several frames agree on; what moves
    frames  = observe(scene, episode, grid)        # occupied and observed cells of every frame

The result depends only on the episode and the configuration, not on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from occgen_hub.config import Config
from occgen_hub.engines import Engine
from occgen_hub.episode import Episode, Note, check_episode, near_origin, origin_notes
from occgen_hub.fusion.conventions import STATIC, check_conventions, stands_still
from occgen_hub.fusion.fuse import check_reach, fuse
from occgen_hub.fusion.joined import JoinedMovingPoints, joined_views
from occgen_hub.fusion.moving import MovingPoints
from occgen_hub.fusion.registration import registration_notes
from occgen_hub.geometry.alignment import Alignment, align_poses
from occgen_hub.geometry.surface import poisson_surface
from occgen_hub.occupancy.classes import PointLabels, nearest_classes
from occgen_hub.occupancy.frames import observe_frames
from occgen_hub.occupancy.grid import Grid
from occgen_hub.occupancy.states import FreeSpace
from occgen_hub.occupancy.visibility import FrameOccupancy
from occgen_hub.scene import Scene
from occgen_hub.views import Views, check_views

MIN_SCENE_POINTS = 100
"""If a scene has fewer points, a note says that hardly anything was measured."""

Progress = Callable[[int], None]
"""Called with the number of frames done since the last call."""


def reconstruct(
    episode: Episode,
    engine: Engine,
    config: Config,
    scratch: Path,
    progress: Progress = lambda _: None,
) -> Scene:
    """The scene of an episode, in the source's world, less `world_origin`, if there are poses.

    scratch: a folder that the engine may create, needed as long as the scene is used. Raises
    OccGenError if the episode cannot be reconstructed, or its units, axes or poses are wrong.
    """
    episode, origin = near_origin(check_episode(episode))
    views = check_views(engine.reconstruct(episode, config, scratch, progress), episode)
    views, alignment = align(replace(views, read_labels=episode.read_labels), episode)
    convention_notes = check_conventions(
        views, episode.id, config, fps=episode.fps, assumed_view=episode.assumed_view
    )
    seen, own, cameras = views, 0, 1
    if not engine.uses_device() and episode.unmeasured == "unknown":  # Not simulated.
        convention_notes += registration_notes(episode)
    if episode.beside and not engine.uses_device():
        seen, own, cameras = _with_others(episode, views, engine, config, scratch)
        convention_notes += check_conventions(seen, episode.id, config, shifts=False)
    check_reach(seen, config, episode.id)
    # Progress counts the network's frames or, with sensor depth, the frames decoded in fusion.
    counted = engine.uses_device() or cameras > 1
    fused = fuse(seen, config, (lambda _: None) if counted else progress)
    if cameras > 1:
        progress(len(views.frames))
    cloud, poses, classes = fused.cloud, fused.views.world_from_camera, fused.classes
    moving: MovingPoints | JoinedMovingPoints | None = fused.moving
    if fused.moving is not None and cameras > 1:
        moving = JoinedMovingPoints(fused.moving, cameras)
    moving_labels = None if moving is None else moving.labelled
    if config.mesh:
        centres = poses[:, :3, 3]
        cloud = poisson_surface(cloud, centres, config.voxel_size, config.mesh_density_cut)
        if classes is not None:
            classes = nearest_classes(fused.cloud.points, classes, cloud.points)
    notes = [*views.notes, *origin_notes(origin), *convention_notes, *fused.notes]
    notes += _notes(alignment, len(cloud))
    views = replace(views, world_from_camera=poses[own::cameras])
    unmeasured = episode.unmeasured if config.unmeasured == "auto" else config.unmeasured
    if engine.uses_device():  # A network estimates depth everywhere.
        unmeasured = "free"
    if config.hfov is not None and not episode.assumed_view:
        notes.append(Note("hfov", "--hfov is not used by this source"))
    if cameras == 1 and stands_still(poses, cloud):
        notes.append(STATIC)
    return Scene(
        cloud=cloud,
        world_from_camera=views.world_from_camera,
        intrinsics=views.intrinsics,
        moving=moving,
        scale=1.0 if alignment is None else alignment.sim3.scale,
        alignment=alignment,
        quality=fused.quality,
        windows=views.windows,
        notes=tuple(notes),
        world_origin=origin,
        labels=None if classes is None else PointLabels(classes, moving_labels),
        read_depth=episode.read_depth if unmeasured == "unknown" else None,
    )


def _with_others(
    episode: Episode, views: Views, engine: Engine, config: Config, scratch: Path
) -> tuple[Views, int, int]:
    """The joined views of all cameras of an episode, its own camera's index, and their number."""
    found = {episode.id: views}
    for other in map(check_episode, episode.beside):
        own = check_views(engine.reconstruct(other, config, scratch), other)
        found[other.id] = replace(own, read_labels=other.read_labels)
    names = sorted(found)  # The same order for each camera, so the scene is the same.
    return joined_views([found[n] for n in names]), names.index(episode.id), len(names)


def align(views: Views, episode: Episode) -> tuple[Views, Alignment | None]:
    """Transform an engine's views into the source's world, if the source has poses."""
    if views.in_source_world or episode.world_from_camera is None:
        return views, None
    frames = views.frames
    alignment = align_poses(views.world_from_camera[frames], episode.world_from_camera[frames])
    return views.moved(alignment.sim3), alignment


def observe(
    scene: Scene, episode: Episode, grid: Grid, free: FreeSpace | None = None
) -> Iterator[FrameOccupancy]:
    """Occupancy and visibility of each frame, in order. free: collects their free space."""
    # Intrinsics as they will be written, so that a reader who traces the rays gets the same cells.
    intrinsics = scene.intrinsics.astype(np.float32).astype(np.float64)
    size, read_depth = episode.image_size, scene.read_depth

    def unmeasured(frame: int) -> NDArray[np.bool_] | None:
        if read_depth is None:
            return None
        return read_depth(frame) < grid.exit_depths(intrinsics[frame], size)

    return observe_frames(
        grid, scene.cloud.points, scene.world_from_camera, intrinsics, size, scene.moving, free,
        scene.labels, unmeasured,
    )  # fmt: skip


def _notes(alignment: Alignment | None, points: int) -> list[Note]:
    notes = []
    if alignment is not None and alignment.problem is not None:
        notes.append(Note("alignment", f"the alignment {alignment.problem}"))
    if points < MIN_SCENE_POINTS:
        text = (
            f"the scene has {points or 'no'} points: depth is missing, outside depth_range or in "
            "another unit, or no two frames agree; do not use it, even its free space is wrong"
        )
        notes.append(Note("empty scene", text))
    return notes
