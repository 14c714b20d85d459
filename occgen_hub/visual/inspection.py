"""What is in a built dataset, in words and in a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from occgen_hub.errors import UsageError
from occgen_hub.files import files_under, written_whole
from occgen_hub.loading import Trajectory, npz_array, trajectories
from occgen_hub.visual.preview import preview

SHOWN = 20


def describe(root: Path) -> Iterator[str]:
    """Lines about a dataset: its size, how it was built, and its trajectories, the first in full.

    Raises UsageError when there is no trajectory, SourceError when one cannot be read.
    """
    found = _found(root)
    first = Trajectory.open(found[0])
    size = sum(path.stat().st_size for path in files_under(root))
    frames = [_frames(Trajectory.open(path)) for path in found]
    grid, record = first.grid, first.record
    low, high = record["grid"]["pc_range"][:3], record["grid"]["pc_range"][3:]
    source = record.get("source", {})
    yield f"{root}: {len(found)} trajectories, {sum(frames)} frames, {size / 1e6:.1f} MB"
    yield (
        f"built by occgen-hub {record.get('version')}, source {source.get('builder')}, "
        f"engine {record.get('engine')}, schema {record.get('schema', {}).get('name')}"
    )
    yield (
        f"grid: {' x '.join(map(str, grid.shape))} cells of {grid.voxel_size} m, "
        f"from {tuple(low)} to {tuple(high)} m in the camera's frame (x right, y down, z forward)"
    )
    for path, length in list(zip(found, frames, strict=True))[:SHOWN]:
        yield _line(path, root, length)
    if len(found) > SHOWN:
        yield f"  and {len(found) - SHOWN} more"
    yield from (f"note: {note}" for note in record.get("notes", []))
    yield from (f"task: {task}" for task in first.tasks())


def picture(
    root: Path, place: Path, trajectory: str | None = None, frame: int | None = None
) -> None:
    """Write a PNG of one frame of a trajectory (its path below `root`; the first if None)."""
    found = _found(root)
    path = found[0] if trajectory is None else root / trajectory
    if path not in found:
        names = ", ".join(p.relative_to(root).as_posix() for p in found[:3])
        raise UsageError(f"--trajectory {trajectory}: there is no such one; there are {names} ...")
    opened = Trajectory.open(path)
    length = _frames(opened)
    if frame is not None and frame >= length:
        raise UsageError(f"--frame {frame}: {path} has {length} frames, numbered from 0.")
    if place.suffix.lower() != ".png":
        raise UsageError(f"--preview {place}: give a name that ends in .png.")
    image = preview(opened, frame)
    try:
        with written_whole(place) as partial:
            image.save(partial, "PNG")
    except OSError as error:
        raise UsageError(
            f"--preview {place}: cannot be written ({error.strerror}); choose another place."
        ) from error


def _found(root: Path) -> list[Path]:
    found = trajectories(root)
    if not found:
        raise UsageError(
            f"{root}: holds no trajectory; give the folder that occgen-hub build wrote."
        )
    return found


def _frames(trajectory: Trajectory) -> int:
    return npz_array(trajectory.file("observed"), "data").check("u", None, None).shape[0]


def _line(path: Path, root: Path, length: int) -> str:
    trajectory = Trajectory.open(path)
    width, height = trajectory.image_size
    ends, _ = trajectory.visible()
    name = path.relative_to(root).as_posix()
    mean = int(ends[-1]) // max(length, 1)
    return (
        f"  {name if name != '.' else path.name}: {length} frames of {width} x {height}, "
        f"{mean:,} visible occupied cells a frame"
    )
