"""Fuse the views of a recording to a static surface and moving points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from occgen_hub.config import Config
from occgen_hub.episode import Note
from occgen_hub.errors import OccGenError
from occgen_hub.fusion.depth_map import DepthMaps
from occgen_hub.fusion.evidence import Tolerance, gather_evidence
from occgen_hub.fusion.moving import MovingPoints
from occgen_hub.fusion.noise import noise_model
from occgen_hub.fusion.quality import Agreement, assess
from occgen_hub.fusion.refine import refine_poses
from occgen_hub.fusion.votes import point_classes
from occgen_hub.geometry.camera import unproject_trusted
from occgen_hub.geometry.cloud import Cloud, VoxelDownsample, voxel_downsample
from occgen_hub.geometry.poses import transform
from occgen_hub.occupancy.point_blocks import PointBlocks, into_blocks, sorted_into_blocks
from occgen_hub.prefetch import prefetch
from occgen_hub.quality import Quality
from occgen_hub.views import Views

ROUNDS = 2
"""Number of rounds in which points are moved to where frames agree, and doubtful ones removed."""

CONTRADICTED = 0.25
"""A point is removed if more frames saw through it than this share of those that saw it."""

MIN_SURE = 0.2
"""A point is kept if, of the frames that saw a surface there or an edge next to it, this share saw
the surface. Points between two surfaces are next to an edge from every viewpoint."""

CONVERGED = 0.1
"""Share of a cell's edge. If most points moved less than this, no further round follows."""

REFINEMENTS = (0.02, 0.01, 0.005, 0.0)
"""Width of the robust kernel beyond the noise, in metres, for each refinement of the poses, after
which the surface is fused again."""

MAX_RESIDUAL_RATIO = 0.95
"""Refined poses are kept if the residual falls to this share or less. Less may be chance."""

MAX_CONTRADICTED_RATIO = 1.1
"""Refined poses are kept if the share of contradicted points grows at most by this factor."""

MIN_SEEN_RATIO = 0.97
"""Refined poses are kept if the share of the compared frames that see a point is at least this
share of its value before."""

Progress = Callable[[int], None]
"""Called with the number of frames done since the last call."""


@dataclass(frozen=True)
class Fused:
    """The result of fusion.

    cloud: the static surface, about one point for each voxel of `Config.fusion_size`, world metres;
    views: as given, with refined poses if requested; moving: a function from a frame to its own
    points, (n, 3) float32 world metres, None if they were not searched; quality: figures; notes:
    for the user; classes: (n,) uint8 of the points of the cloud, see `point_classes`, None without
    labels.
    """

    cloud: Cloud
    views: Views
    moving: MovingPoints | None
    quality: Quality | None
    notes: tuple[Note, ...] = ()
    classes: NDArray[np.uint8] | None = None


def fuse(views: Views, config: Config, progress: Progress = lambda _: None) -> Fused:
    """Fuse views to a static surface and moving points.

    A point is kept if the number of frames that saw through it is at most `CONTRADICTED` of the
    number that measured a surface there. It is moved along their rays to the mean of their
    measurements, weighted by the inverse variance of the noise. Points that other frames contradict
    but that are connected in their own frame are moving, and belong to that frame only. With
    `fusion: union`, every measured point is kept unchanged.

    The result does not depend on the number of threads. Call `check_reach` first.
    """
    maps = DepthMaps(views, config.confidence, config.depth_edge)
    measured = union(maps, config, progress)
    if config.fusion == "union" or not len(measured):
        classes = _classes(measured, maps, config)
        return Fused(measured, views, None, None, classes=classes)
    recorded = found = _fused(measured, maps, config)
    # A network estimates poses and depth together, so their errors are correlated.
    doubtful = views.edges == "sensor" and found.quality.poses_are_off(config.voxel_size)
    if config.refine_poses is True or (config.refine_poses == "auto" and doubtful):
        aligned = _aligned(measured, maps, config)
        refined = _fused(union(aligned, config), aligned, config, refined=True)
        if config.refine_poses is True or refined.better_than(found):
            found = refined
    moving = MovingPoints(
        found.static, found.agreement.seen_through, found.maps, found.tolerance,
        config.fusion_size, config.depth_range,
    )  # fmt: skip
    cloud = found.agreement.cloud
    moving = replace(moving, only=moving.frames_that_move())
    if moving.only and (attached := moving.attached()).any():
        cloud, moving = _without_attached(attached, cloud.colors[found.order], moving)
    notes = tuple(found.quality.notes(config.refine_poses))
    if found.quality.refined:
        notes += (_refined_note(recorded, found),)
    classes = _classes(cloud, found.maps, config, found.tolerance)
    return Fused(cloud, found.maps.views, moving, found.quality, notes, classes)


def _refined_note(recorded: _Fusion, refined: _Fusion) -> Note:
    """A note about how far poses were moved, and whether fewer points are contradicted."""
    before, after = (found.maps.views.world_from_camera for found in (recorded, refined))
    shift = np.linalg.norm(after[:, :3, 3] - before[:, :3, 3], axis=1)
    turns = Rotation.from_matrix(before[:, :3, :3].mT @ after[:, :3, :3]).magnitude()
    text = (
        f"poses were refined, they moved by {1000 * np.median(shift):.1f} mm and "
        f"{np.degrees(np.median(turns)):.2f} degrees (median): other frames contradict "
        f"{refined.quality.contradicted:.1%} of the measured points instead of "
        f"{recorded.quality.contradicted:.1%}; --set refine_poses=false keeps yours"
    )
    return Note("refined poses", text)


def _classes(
    cloud: Cloud, maps: DepthMaps, config: Config, tolerance: Tolerance | None = None
) -> NDArray[np.uint8] | None:
    """The classes of the points of a cloud; None without labels."""
    if maps.views.read_labels is None:
        return None
    if not len(cloud):
        return np.zeros(0, np.uint8)
    if tolerance is None:
        tolerance = Tolerance.of(noise_model(maps, config.noise), config.voxel_size)
    return point_classes(cloud.points, maps, tolerance)


def _without_attached(
    attached: NDArray[np.bool_], colors: NDArray[np.uint8], moving: MovingPoints
) -> tuple[Cloud, MovingPoints]:
    """The static surface without points of moving objects.

    attached: (n,) which points are removed; colors: (n, 3), both in the order of the static points.
    """
    static = moving.static.points
    gone = np.concatenate([moving.seen_through.points, static[attached]])
    cloud = Cloud(static[~attached], colors[~attached])
    static_left, seen_through = into_blocks(cloud.points), into_blocks(gone)
    # With less static surface, more points may be moving.
    return cloud, replace(moving, static=static_left, seen_through=seen_through, only=None)


@dataclass(frozen=True)
class _Fusion:
    """A surface, the depth and poses that it was fused from, and figures.

    static: its points; order: (n,) their places in the cloud.
    """

    maps: DepthMaps
    tolerance: Tolerance
    agreement: Agreement
    static: PointBlocks
    order: NDArray[np.int64]
    quality: Quality

    def better_than(self, other: _Fusion) -> bool:
        """Whether frames agree better than in another fusion of the same depth.

        Poses can compensate errors of the depth, such as a different scale in each frame. Surfaces
        then fit in their middle, but at their ends frames see through one another, or fewer frames
        see the same points.
        """
        seen, seen_before = (
            fusion.agreement.supports / fusion.tolerance.max_frames for fusion in (self, other)
        )
        return (
            self.quality.residual < MAX_RESIDUAL_RATIO * other.quality.residual
            and self.quality.contradicted <= MAX_CONTRADICTED_RATIO * other.quality.contradicted
            and seen >= MIN_SEEN_RATIO * seen_before
        )


def _fused(measured: Cloud, maps: DepthMaps, config: Config, *, refined: bool = False) -> _Fusion:
    tolerance = Tolerance.of(noise_model(maps, config.noise), config.voxel_size)
    agreement = agree(measured, maps, tolerance, config)
    static, order = sorted_into_blocks(agreement.cloud.points)
    quality = assess(static, maps, tolerance, agreement, refined=refined)
    return _Fusion(maps, tolerance, agreement, static, order, quality)


def _aligned(measured: Cloud, maps: DepthMaps, config: Config) -> DepthMaps:
    """The same depth with poses that are repeatedly aligned to its fused surface.

    Only points that two frames saw are used, because a frame's own points would keep it at a wrong
    position.
    """
    for n, width in enumerate(REFINEMENTS):
        tolerance = Tolerance.of(noise_model(maps, config.noise), config.voxel_size)
        cloud = union(maps, config) if n else measured
        surface = agree(cloud, maps, tolerance, config, supports=2).cloud
        refined = refine_poses(surface, maps, tolerance, width)
        maps = replace(maps, views=replace(maps.views, world_from_camera=refined))
    return maps


def union(maps: DepthMaps, config: Config, progress: Progress = lambda _: None) -> Cloud:
    """All trusted points of all frames, one for each voxel of `Config.fusion_size`."""
    fused = VoxelDownsample(config.fusion_size)
    measured = prefetch(partial(_measured, maps, config.depth_range), maps.frames.tolist())
    for points, colors in measured:
        fused.add(points, colors)
        progress(1)
    return fused.cloud()


def _measured(
    maps: DepthMaps, depth_range: tuple[float, float], frame: int
) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    """(n, 3) world points of a frame's trusted pixels, and their (n, 3) colours."""
    view = maps(frame)
    points, pixels = unproject_trusted(view.depth, view.trusted, view.K, depth_range)
    colors = maps.views.read_color(frame).reshape(-1, 3)[pixels]
    return transform(view.world_from_camera, points), colors


def agree(
    cloud: Cloud, maps: DepthMaps, tolerance: Tolerance, config: Config, *, supports: int = 1
) -> Agreement:
    """The points of a cloud that frames agree on, moved to where they measured them.

    supports: minimum number of frames that saw a point.
    """
    removed, contradicted = [], 0.0
    for number in range(ROUNDS):
        blocks, order = sorted_into_blocks(cloud.points)
        evidence = gather_evidence(blocks, maps, tolerance)
        seen = evidence.supports.astype(np.float32)
        seen_through = evidence.contradictions > CONTRADICTED * seen
        sure = (seen >= supports) & (seen >= MIN_SURE * (seen + evidence.doubts))
        kept = sure & ~seen_through
        removed.append(blocks.points[seen_through])
        if number == 0:
            contradicted = float(seen_through.mean())
        shift = evidence.displacement()[kept]
        cloud = Cloud(blocks.points[kept] + shift, cloud.colors[order][kept])
        still = np.abs(shift).max(axis=1, initial=0) < CONVERGED * config.voxel_size
        if not len(cloud) or still.mean() > 0.9:
            break
        cloud = voxel_downsample(cloud, config.fusion_size)
    median = float(np.median(evidence.supports))
    return Agreement(cloud, into_blocks(np.concatenate(removed)), median, contradicted)


def check_reach(views: Views, config: Config, episode: str) -> None:
    """Raise OccGenError if a camera may see beyond the range of voxel coordinates."""
    reach = VoxelDownsample(config.fusion_size).reach
    centres, K = np.abs(views.world_from_camera[:, :3, 3]).max(), views.intrinsics
    size = np.asarray(views.image_size)
    middle, focal = K[:, :2, 2], K[:, [0, 1], [0, 1]]
    slope = np.maximum(np.abs(middle), np.abs(size - middle)) / focal
    ray = config.depth_range[1] * float(np.sqrt(1 + (slope**2).sum(axis=1)).max())
    if centres + ray > reach:
        raise OccGenError(
            f"{episode}: a camera may see {centres + ray:.0f} m from the world's origin, beyond "
            f"the {reach:.0f} m that can be fused; cut the recording into parts or set a larger "
            "fusion_voxel_size."
        )
