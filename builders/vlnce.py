"""VLN-CE, the part of InternData-N1 for discrete navigation: its layout and tables.

A scene's folder has many episodes, each filmed by several cameras. The names of image folders and
columns have the height and pitch of a camera, such as 125cm_30deg; the name of an image has its
episode and frame. Each camera of an episode becomes a trajectory, such as
episode_000000.125cm_30deg. There are no intrinsics: the field of view is an option.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from occgen_hub.builder import EpisodeRef
from occgen_hub.episode import Note, Task
from occgen_hub.errors import SourceError
from occgen_hub.geometry.poses import RIGID, rigidity_error
from occgen_hub.media import RESTORE

DEPTH_UNITS = 1000
"""Units per metre of its depth PNGs."""

HFOV = 79.0
"""Horizontal field of view in degrees, from the evaluation configuration of the data."""

SEPARATOR = "<INSTRUCTION_SEP>"
RGB, DEPTH, POSE = "observation.images.rgb.", "observation.images.depth.", "pose."
CAMERA = re.compile(r"[0-9]+cm_-?[0-9]+deg")
PER_CHUNK = 1000


@dataclass(frozen=True)
class Camera:
    """A camera of an episode. rgb, depth: its images by row number."""

    name: str
    rgb: dict[int, Path]
    depth: dict[int, Path]


def cameras_of(folder: Path, kind: str = RGB) -> list[str]:
    """The sorted cameras with images in a scene's folder. Empty if it is not VLN-CE."""
    names = set()
    for path in folder.glob(f"videos/chunk-*/{kind}*"):
        if CAMERA.fullmatch(name := path.name.removeprefix(kind)):
            names.add(name)
    return sorted(names)


def refs(folder: Path, scene: str, episodes: Mapping[int, Path]) -> Iterator[EpisodeRef]:
    """Every camera with images of every episode, sorted by id."""
    filmed = {camera: set(_found(folder, RGB, camera)) for camera in cameras_of(folder)}
    for index, path in sorted(episodes.items()):
        for camera, numbers in filmed.items():
            if index in numbers:
                yield EpisodeRef(f"{scene}/{path.stem}.{camera}", folder, index)


def camera_name(ref: EpisodeRef) -> str | None:
    """The camera of a trajectory, from its id. None if it is not VLN-CE."""
    name = ref.id.rpartition(".")[2]
    return name if CAMERA.fullmatch(name) else None


def has_depth(ref: EpisodeRef, camera: str) -> bool:
    """Whether there is a depth image of a camera in an episode."""
    return ref.index in _found(ref.path, DEPTH, camera)


def camera(ref: EpisodeRef, name: str) -> Camera:
    """The images of a camera in an episode. Raises SourceError if a frame has two images."""
    return Camera(name, _images(ref, RGB, name), _images(ref, DEPTH, name))


def _images(ref: EpisodeRef, kind: str, camera: str) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for path in _found(ref.path, kind, camera).get(ref.index, ()):
        frame = int(path.stem.rpartition("_")[2])
        if (other := found.get(frame)) is not None:
            raise SourceError(path, f"is frame {frame}, like {other}", "remove one of them")
        found[frame] = path
    return dict(sorted(found.items()))


def _found(folder: Path, kind: str, camera: str) -> dict[int, list[Path]]:
    """The images of a camera in a scene, by episode number."""
    found: dict[int, list[Path]] = {}
    for place in sorted(folder.glob(f"videos/chunk-*/{kind}{camera}")):
        try:
            listed = _listed(place, "jpg|jpeg" if kind == RGB else "png", place.stat().st_mtime_ns)
        except NotADirectoryError:
            raise SourceError(place, "is not a folder", RESTORE) from None
        except OSError as error:
            problem = f"cannot be listed ({error.strerror})"
            raise SourceError(
                place, problem, "check its permissions, or move it out of the input"
            ) from error
        for number, paths in listed.items():
            found.setdefault(number, []).extend(paths)
    return found


@lru_cache(maxsize=16)
def _listed(place: Path, suffixes: str, _: int) -> dict[int, list[Path]]:
    """Like `_found`, for one folder, which has the images of all episodes of a scene.

    Cached until the folder's modification time changes.
    """
    form = re.compile(rf"episode_([0-9]{{1,9}})_[0-9]{{1,9}}\.(?:{suffixes})", re.IGNORECASE)
    found: dict[int, list[Path]] = {}
    with os.scandir(place) as entries:
        names = sorted(entry.name for entry in entries)
    for name in names:
        if match := form.fullmatch(name):
            found.setdefault(int(match[1]), []).append(place / name)
    return found


# The table


@dataclass(frozen=True)
class PosedRows:
    """The rows of a table with a pose of a camera.

    rows: (T,) row numbers; poses: (T, 4, 4) float64, world_from_camera, OpenCV axes, metres; table:
    these rows, without the columns of other cameras.
    """

    rows: list[int]
    poses: NDArray[np.float64]
    table: pa.Table
    notes: tuple[Note, ...]


def posed_rows(table: pa.Table, camera: str, path: Path) -> PosedRows:
    """The frames of one camera. Raises SourceError if it has no poses, or an invalid one."""
    name = f"{POSE}{camera}"
    if name not in table.column_names:
        raise SourceError(path, f"has no column {name}", RESTORE)
    rows, poses = [], []
    for number, value in enumerate(table[name].to_pylist()):
        if (pose := _pose(value, name, number, path)) is not None:
            rows.append(number)
            poses.append(pose)
    if not rows:
        raise SourceError(path, f"column {name} has no poses", "leave this camera out")
    notes: tuple[Note, ...] = ()
    if missing := table.num_rows - len(rows):
        text = (
            f"{path.name}: {missing} of {table.num_rows} rows have no {name}: their frames are "
            "left out"
        )
        notes = (Note("rows without pose", text),)
    kept = [
        column
        for column in table.column_names
        if (other := CAMERA.search(column)) is None or other[0] == camera
    ]
    return PosedRows(rows, np.stack(poses), table.select(kept).take(rows), notes)


def _pose(value: Any, name: str, row: int, path: Path) -> NDArray[np.float64] | None:
    """A row's pose. None if it is null, empty or all NaN."""
    if not value:
        return None
    try:
        pose = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        pose = np.empty(0)
    if pose.size and np.isnan(pose).all():
        return None
    if pose.shape != (4, 4) or not rigidity_error(pose[None])[0] <= RIGID:
        problem = f"the pose of row {row} in column {name} is not a rigid transform of 4 x 4"
        raise SourceError(path, problem, RESTORE)
    return pose


def intrinsics(
    size: tuple[int, int], frames: int, hfov: float | None
) -> tuple[NDArray[np.float64], tuple[Note, ...]]:
    """(T, 3, 3) for a horizontal field of view in degrees and images of `size` (width, height)."""
    width, height = size
    focal = width / 2 / np.tan(np.radians(HFOV if hfov is None else hfov) / 2)
    K = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    text = (
        f"the source has no intrinsics: a horizontal field of view of {HFOV:g} degrees is assumed, "
        "which --hfov sets"
    )
    notes = (Note("hfov", text),) if hfov is None else ()
    return np.tile(K, (frames, 1, 1)), notes


def instructions(rows: list[dict[str, Any]], index: int) -> tuple[Task, ...]:
    """The instructions of an episode, which are joined into one text in episodes.jsonl."""
    for row in rows:
        given = row.get("tasks")
        if row.get("episode_index") == index and isinstance(given, list):
            texts = [part.strip() for text in given if isinstance(text, str)
                     for part in text.split(SEPARATOR)]  # fmt: skip
            return tuple(Task(text) for text in dict.fromkeys(texts) if text)
    return ()
