"""An episode as it was recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from occgen_hub.errors import OccGenError
from occgen_hub.geometry.camera import intrinsics_problem
from occgen_hub.geometry.poses import RIGID, made_rigid, rigidity_error
from occgen_hub.schema import Feature, feature_of
from occgen_hub.taxonomy import Taxonomy, load_taxonomy, taxonomy_names


@dataclass(frozen=True)
class Note:
    """A remark for the user on a source. `code` names its kind, for counting."""

    code: str
    text: str


@dataclass(frozen=True)
class Task:
    """An instruction in words, and the source's object that it was extracted from."""

    text: str
    source: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Column:
    """A column of the source: its feature, and (T, *shape) values, (T,) for plain numbers."""

    feature: Feature
    values: Any


def column_of(field: pa.Field, values: pa.ChunkedArray, *, finite: bool = True) -> Column:
    """A column of a source's table. Raises ValueError if no feature describes it.

    finite: whether numbers have to be finite, which statistics require.
    """
    if values.null_count:
        raise ValueError("lacks the value of a frame")
    feature = feature_of(field, values[0].as_py())
    if feature is None:
        raise ValueError(f"is {str(field.type)[:80]}, which no feature of LeRobot describes")
    array = values.to_pylist() if feature.dtype == "string" else feature.to_numpy(values)
    if finite and feature.dtype.startswith("float"):
        with np.errstate(over="ignore"):
            if not np.isfinite(np.square(array, dtype=np.float64)).all():
                raise ValueError("holds a number that is not finite or too large")
    return Column(feature, array)


@dataclass(frozen=True)
class MediaFile:
    """A media file of the episode. `file` is its key in the schema.

    check: decodes an image, unless that was done already, and raises SourceError if it is damaged;
    None if the writer has to decode the image. read: returns the (H, W, 3) uint8 image to write, if
    the file itself is not that image.
    """

    file: str
    path: Path
    frame: int | None = None
    check: Callable[[], None] | None = None
    read: Callable[[], NDArray[Any]] | None = None


Unmeasured = Literal["unknown", "free"]
"""What missing depth says of the space on a ray, see `Episode`."""


@dataclass(frozen=True)
class Episode:
    """One recording of T frames. Frames are decoded on demand, by number from 0.

    id: "<group>/<scene>/<trajectory>"; length: T; fps: frames per second; robot_type: for
    info.json, in the source's words; tasks: the instructions; columns: further values of each
    frame, by name; media: the files to keep with the dataset; notes: for the user; image_size:
    (width, height) in pixels, the same for all frames; read_rgb(t): (H, W, 3) uint8; read_depth(t):
    (H, W) float64, metres along the optical axis, 0 for none; world_from_camera: (T, 4, 4) float64,
    OpenCV axes, metres, in the source's world; intrinsics: (T, 3, 3) float64, pixels; task_index:
    (T,) int64 into `tasks`; fingerprint: SHA-256 over the names and contents of the source's files,
    see `DatasetBuilder.fingerprint`; assumed_view: whether the intrinsics are not the source's, but
    computed from a field of view; beside: episodes of other depth cameras at the same times and in
    the same world, with depth to be fused with this one's; origin: the repo_id and revision on the
    Hub that it comes from, None if unknown; read_labels(t): (H, W) integers, the class of each
    pixel, ids of `taxonomy`, 0 for none; None without labels; taxonomy: a name in
    schemas/taxonomies.yaml; unmeasured: what missing depth says of the space on a ray: nothing
    ("unknown", sensors), or that no surface is in reach ("free", simulators).
    """

    id: str
    length: int
    fps: float
    robot_type: str
    image_size: tuple[int, int]
    read_rgb: Callable[[int], NDArray[np.uint8]]
    tasks: tuple[Task, ...]
    task_index: NDArray[np.int64]
    columns: dict[str, Column]
    media: tuple[MediaFile, ...]
    fingerprint: str
    read_depth: Callable[[int], NDArray[np.float64]] | None = None
    world_from_camera: NDArray[np.float64] | None = None
    intrinsics: NDArray[np.float64] | None = None
    notes: tuple[Note, ...] = ()
    assumed_view: bool = False
    beside: tuple[Episode, ...] = ()
    origin: dict[str, str] | None = None
    read_labels: Callable[[int], NDArray[Any]] | None = None
    taxonomy: str | None = None
    unmeasured: Unmeasured = "unknown"


FAR_FROM_ORIGIN = 1000.0
"""Coordinates above this are reduced by `near_origin`, metres. float32 resolves 0.06 mm there."""


def near_origin(episode: Episode) -> tuple[Episode, tuple[float, float, float]]:
    """An episode whose world has its origin near the cameras, and the metres that were subtracted.

    Positions such as UTM coordinates are too large for float32 and for the numbers of voxels. Of
    each axis on which the median position is farther than FAR_FROM_ORIGIN, the nearest multiple of
    1000 m is subtracted, so that episodes of one place usually get the same origin. The cameras in
    `beside` are moved too. Other episodes are returned as they are, with zeros.
    """
    cameras = [own.world_from_camera for own in (episode, *episode.beside)]
    positions = [poses[:, :3, 3] for poses in cameras if poses is not None]
    if not positions:
        return episode, (0.0, 0.0, 0.0)
    median = np.median(np.concatenate(positions), axis=0)
    origin = np.where(np.abs(median) > FAR_FROM_ORIGIN, np.round(median / 1000) * 1000, 0.0)
    if not origin.any():
        return episode, (0.0, 0.0, 0.0)

    def moved(own: Episode) -> Episode:
        if own.world_from_camera is None:
            return own
        poses = own.world_from_camera.copy()
        poses[:, :3, 3] -= origin
        return replace(own, world_from_camera=poses)

    found = replace(moved(episode), beside=tuple(map(moved, episode.beside)))
    x, y, z = map(float, origin)
    return found, (x, y, z)


def origin_notes(origin: tuple[float, float, float]) -> list[Note]:
    """The note on what `near_origin` subtracted, if anything."""
    if not any(origin):
        return []
    place = ", ".join(f"{value:.0f}" for value in origin)
    text = f"the world is far from its origin: ({place}) m are subtracted from all positions"
    return [Note("world origin", text)]


def check_episode(episode: Episode) -> Episode:
    """Check an episode, and return it with readers that check each frame. Raises OccGenError.

    Sources may come from other packages, so every field is checked: shapes, dtypes, rigid finite
    poses, intrinsics of a pinhole camera that fits the image, and the size and type of each frame.
    Depth has to be finite and at least 0, labels have to be ids of their taxonomy. The returned
    labels are uint8, and 0 for pixels without a class. Poses that are written with few digits are
    made rigid.
    """
    T, (width, height) = episode.length, episode.image_size
    wrong = partial(_source_error, episode.id)
    if T < 1:
        raise wrong("length", f"is {T}", "at least one frame")
    if not isinstance(episode.image_size, tuple) or width < 1 or height < 1:
        raise wrong("image_size", f"is {episode.image_size}", "a tuple (width, height) in pixels")
    if not (np.isfinite(episode.fps) and episode.fps > 0):
        raise wrong("fps", f"is {episode.fps}", "frames per second, over 0")
    if not episode.tasks:
        raise wrong("tasks", "is empty", "at least one instruction, for example Task('navigate')")
    for task in episode.tasks:
        if not isinstance(task, Task):
            raise wrong("tasks", f"has a {type(task).__name__}", "occgen_hub.episode.Task")
    index = np.asarray(episode.task_index)
    if (
        index.shape != (T,)
        or index.dtype.kind not in "iu"
        or index.min() < 0
        or index.max() >= len(episode.tasks)
    ):
        found = f"is {index.dtype} of shape {index.shape}, or out of range"
        raise wrong("task_index", found, f"({T},) whole numbers of the {len(episode.tasks)} tasks")
    for note in episode.notes:
        if not isinstance(note, Note):
            raise wrong("notes", f"has a {type(note).__name__}", "occgen_hub.episode.Note")
    if episode.unmeasured not in get_args(Unmeasured):
        raise wrong("unmeasured", f"is {episode.unmeasured!r}", " or ".join(get_args(Unmeasured)))
    columns: dict[str, Any] = episode.columns  # Of any kind, as far as is known.
    for name, column in columns.items():
        if not isinstance(column, Column):
            found = f"is a {type(column).__name__}"
            raise wrong(f"the column {name}", found, "occgen_hub.episode.Column")
        if len(column.values) != T:
            raise wrong(f"the column {name}", f"has {len(column.values)} rows", f"{T}, one a frame")
    numbered: dict[str, list[int]] = {}
    for item in episode.media:
        if item.frame is not None:
            numbered.setdefault(item.file, []).append(item.frame)
    for name, frames in numbered.items():
        if sorted(frames) != list(range(T)):
            found = f"has {len(frames)} images" if len(frames) != T else "has other frame numbers"
            raise wrong(f"the media {name}", found, f"one for each of the frames 0 to {T - 1}")
    if episode.world_from_camera is not None:
        _check_array(wrong, "world_from_camera", episode.world_from_camera, (T, 4, 4))
        bad = np.flatnonzero(~(rigidity_error(episode.world_from_camera) <= RIGID))
        if len(bad):
            raise wrong("world_from_camera", f"of frame {bad[0]} is not rigid and finite", "a pose")
        episode = replace(episode, world_from_camera=made_rigid(episode.world_from_camera))
    if episode.intrinsics is not None:
        _check_array(wrong, "intrinsics", episode.intrinsics, (T, 3, 3))
        for frame, K in enumerate(episode.intrinsics):
            problem = intrinsics_problem(K, (width, height))
            if problem is None and not (0 < K[0, 2] < width and 0 < K[1, 2] < height):
                problem = (
                    f"has its principal point ({K[0, 2]:g}, {K[1, 2]:g}) outside the image of "
                    f"{width} x {height} pixels"
                )
                if 0 < K[0, 2] < height and 0 < K[1, 2] < width:
                    problem += " (are width and height swapped?)"
            if problem is not None:
                wanted = f"a pinhole camera's for {width} x {height} pixels (see --intrinsics)"
                raise wrong("intrinsics", f"of frame {frame} {problem}", wanted)
    read_rgb, read_depth = episode.read_rgb, episode.read_depth
    read_labels = episode.read_labels
    if (read_labels is None) != (episode.taxonomy is None):
        raise wrong("read_labels or taxonomy", "is missing", "both, or neither")
    taxonomy = None if episode.taxonomy is None else _taxonomy(wrong, episode.taxonomy)

    def rgb(frame: int) -> NDArray[np.uint8]:
        image = np.asarray(read_rgb(frame))
        if image.dtype != np.uint8 or image.shape != (height, width, 3):
            found = _describe(image, width, height)
            raise wrong(f"read_rgb({frame})", found, f"uint8 {(height, width, 3)}")
        return image

    def depth(frame: int) -> NDArray[np.float64]:
        assert read_depth is not None
        metres = np.asarray(read_depth(frame))
        if metres.dtype.kind != "f" or metres.shape != (height, width):
            found = _describe(metres, width, height)
            raise wrong(f"read_depth({frame})", found, f"float metres {(height, width)}")
        if problem := depth_problem(metres):
            raise wrong(f"read_depth({frame})", problem, "finite metres, 0 for none")
        return metres

    def labels(frame: int) -> NDArray[np.uint8]:
        assert read_labels is not None and taxonomy is not None  # noqa: PT018  # for mypy
        image = np.asarray(read_labels(frame))
        if image.shape != (height, width):
            found = _describe(image, width, height)
            raise wrong(f"read_labels({frame})", found, f"classes {(height, width)}")
        try:
            return taxonomy.checked(image)
        except ValueError as error:
            raise wrong(f"read_labels({frame})", str(error), "ids of its taxonomy") from None

    return replace(
        episode,
        read_rgb=rgb,
        read_depth=None if read_depth is None else depth,
        read_labels=None if read_labels is None else labels,
    )


def depth_problem(depth: NDArray[np.floating]) -> str | None:
    """Why the values of a depth map cannot be used. None if they are finite and at least 0."""
    # NaN is in both the smallest and the largest value if there is one.
    least, most = depth.min(initial=0), depth.max(initial=0)
    if np.isnan(least):
        return "has NaN"
    if np.isinf(least) or np.isinf(most):
        return "has infinite values"
    return "has negative values" if least < 0 else None


def _taxonomy(wrong: Callable[[str, str, str], OccGenError], name: str) -> Taxonomy:
    if name not in taxonomy_names():
        raise wrong("taxonomy", f"is {name[:80]!r}", f"one of {', '.join(taxonomy_names())}")
    return load_taxonomy(name)


def _source_error(episode: str, name: str, found: str, expected: str) -> OccGenError:
    return OccGenError(f"{episode}: {name} {found}; the source has to give {expected}.")


def _check_array(
    wrong: Callable[[str, str, str], OccGenError],
    name: str,
    array: NDArray[Any],
    shape: tuple[int, ...],
) -> None:
    if not isinstance(array, np.ndarray):
        raise wrong(name, f"is a {type(array).__name__}", f"a float64 array of shape {shape}")
    if array.shape != shape or array.dtype != np.float64:
        raise wrong(name, f"is {array.dtype} of shape {array.shape}", f"float64 of shape {shape}")


def _describe(image: NDArray[Any], width: int, height: int) -> str:
    """Describe an image, and what may be wrong with its size."""
    found = f"gives {image.dtype} of shape {image.shape}"
    if image.shape[:2] == (width, height) and width != height:
        return f"{found} (are width and height of image_size swapped?)"
    if image.ndim >= 2 and 0 not in image.shape and image.shape[:2] != (height, width):
        factor = (height / image.shape[0], width / image.shape[1])
        if factor[0] == factor[1]:
            return f"{found}, 1/{factor[0]:g} of the image's size"
    return found
