"""Describe a built dataset in text and in an image."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occgen_hub.atomic import atomic_file
from occgen_hub.errors import SourceError, UsageError
from occgen_hub.files import files_under
from occgen_hub.loading import Trajectory, built, npz_array
from occgen_hub.quality import Quality
from occgen_hub.visual.heights import up_axis, world_up
from occgen_hub.visual.preview import preview

SHOWN = 20


def describe(root: Path, trajectory: str | None = None) -> Iterator[str]:
    """Yield lines about a dataset: its size, its trajectories, and one (the first) in detail.

    Raises UsageError if there is no trajectory, SourceError if that one cannot be read.
    """
    found = built(root)
    path = _select(root, found, trajectory)
    opened = Trajectory.open(path)
    grid, record = opened.grid, opened.record
    low = np.array(record["grid"]["pc_range"][:3])
    high = low + grid.voxel_size * np.array(grid.shape)
    size = sum(file.stat().st_size for file in files_under(root))
    ending = "y" if len(found) == 1 else "ies"
    yield f"{root}: {len(found)} trajector{ending}, {size / 1e6:.1f} MB"
    for each in found[:SHOWN]:
        yield _line(each, root) + _moving(each)
    if len(found) > SHOWN:
        yield f"  and {len(found) - SHOWN} more"
    yield f"{_relative_name(path, root)}:"
    yield (
        f"  built by occgen-hub {record.get('version')}, source {record['source'].get('builder')}, "
        f"engine {record.get('engine')}, schema {record['schema'].get('name')}"
    )
    yield (
        f"  grid: {' x '.join(map(str, grid.shape))} cells of {grid.voxel_size} m, "
        f"from {_numbers(low)} to {_numbers(high)} m in the camera's frame (x right, y down, z "
        "forward)"
    )
    cells, poses = opened.scene_cells(), opened.world_from_camera()
    below, share = grid.share_below(cells, poses), _observed_share(opened)
    yield (
        f"  world: up is {_up(cells, poses)}; a frame observes {share:.0%} of its cells (5 to 40% "
        f"is usual); {below:.0%} of the surface ahead is below the grid"
    )
    yield from _origin(record)
    yield from _agreement(record)
    yield from (f"  note: {note}" for note in record["notes"])
    yield from (f"  task: {task}" for task in opened.tasks())


def _up(cells: NDArray[np.float32], poses: NDArray[np.float64]) -> str:
    """The world axis that points up, or the vector if the world is tilted."""
    axis, sign = up_axis(poses)
    up = world_up(cells, poses)
    name = f"{'-' if sign < 0 else ''}{'xyz'[axis]}"
    if (tilt := float(np.degrees(np.arccos(np.clip(sign * up[axis], -1, 1))))) < 1:
        return name
    vector = ", ".join(f"{value:.2f}" for value in up)
    return f"({vector}), {tilt:.0f} degrees from {name} (usual with SLAM)"


def _observed_share(trajectory: Trajectory, frames: int = 200) -> float:
    """The mean share of observed cells in the first frames."""
    rows = list(islice(trajectory.observed_packed(), frames))
    count = sum(int(np.bitwise_count(row).sum(dtype=np.int64)) for row in rows)
    return count / max(1, len(rows) * trajectory.grid.cells)


def _numbers(values: NDArray[np.float64]) -> str:
    return f"({', '.join(f'{value:g}' for value in values)})"


def _origin(record: dict[str, Any]) -> Iterator[str]:
    """Lines about the network, and the alignment of its cameras to the source's."""
    if weights := record.get("weights"):
        yield (
            f"  weights: {weights['network']}, licence {weights['license']}, "
            f"SHA-256 {weights['sha256'][:12]}..."
        )
    if fit := record["scene"].get("alignment"):
        yield (
            f"  aligned to the source's cameras: scale {record['scene']['scale']:.4g}, off by "
            f"{fit['translation_rmse']:.3g} m (RMSE) and {fit['rotation_error']:.2g} degrees (mean)"
            f", {fit['inliers']} of {fit['frames']} frames agree"
        )


def _agreement(record: dict[str, Any]) -> Iterator[str]:
    """Lines about how well the frames agree, if it is recorded."""
    quality = Quality.from_record(record)
    if quality is None:
        return
    noise = " / ".join(f"{1000 * value:.1f}" for value in quality.sigma)
    half = 500 * record["grid"]["voxel_size"]
    yield (
        f"  frames: {quality.contradicted:.1%} of the measured points contradicted by other frames "
        "(below 30% is fine)"
    )
    yield (
        f"  depth: noise {noise} mm at 1 / 2 / 4 m (up to 10 / 20 / 60 is usual for sensors); each "
        f"point of the scene seen by {quality.supports:.0f} frames"
    )
    yield (
        f"  medians: points {1000 * quality.residual:.1f} mm off the depth, frames "
        f"{1000 * quality.shift:.1f} mm and {quality.turn:.2f} degrees off the scene (below "
        f"{half:g} mm, half a cell, is fine)"
    )


def _moving(path: Path) -> str:
    """The number of moving cells per frame, for a trajectory's line; empty if there are none."""
    try:
        trajectory = Trajectory.open(path)
        if not trajectory.has_dynamic():
            return ""
        ends = trajectory.row_ends("dynamic")
    except SourceError as error:
        return f"; moving cells cannot be read: {error}"
    return f", {int(ends[-1]) / max(len(ends) - 1, 1):,.0f} of them moving"


def picture(
    root: Path, place: Path, trajectory: str | None = None, frame: int | None = None
) -> None:
    """Write a PNG of one frame. trajectory: its path below `root`, or None for the first one."""
    path = _select(root, built(root), trajectory)
    opened = Trajectory.open(path)
    length = _frames(opened)
    if frame is not None and frame >= length:
        raise UsageError(f"--frame {frame}: {path} has {length} frames, numbered from 0.")
    if place.suffix.lower() != ".png":
        raise UsageError(f"--preview {place}: give a name that ends in .png.")
    image = preview(opened, frame)
    try:
        with atomic_file(place) as partial:
            image.save(partial, "PNG")
    except OSError as error:
        raise UsageError(
            f"--preview {place}: cannot be written ({error.strerror}); choose another path."
        ) from error


def _frames(trajectory: Trajectory) -> int:
    return npz_array(trajectory.file("observed"), "data").check("u", None, None).shape[0]


def _select(root: Path, found: list[Path], name: str | None) -> Path:
    """The trajectory whose path below `root` is or ends in `name`."""
    if name is None:
        return found[0]
    ends = [
        path
        for path in found
        if path == root / name or _relative_name(path, root).endswith(f"/{name}")
    ]
    if len(ends) != 1:
        names = ", ".join(_relative_name(path, root) for path in (ends or found)[:3])
        problem = "several have this name" if ends else "was not found"
        raise UsageError(f"--trajectory {name}: {problem}; give one such as {names}.")
    return ends[0]


def _relative_name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path != root else path.resolve().name


def _line(path: Path, root: Path) -> str:
    try:
        trajectory = Trajectory.open(path)
        width, height = trajectory.image_size
        length, ends = _frames(trajectory), trajectory.row_ends("visible")
    except SourceError as error:
        return f"  {_relative_name(path, root)}: cannot be read: {error}"
    mean = int(ends[-1]) / max(length, 1)
    return (
        f"  {_relative_name(path, root)}: {length} frames of {width} x {height}, "
        f"{mean:,.0f} visible occupied cells per frame"
    )
