"""InternData-N1: a tree of groups, scenes and trajectories of RGB-D frames with poses.

Two layouts of VLN-N1 are supported, and the layout of VLN-CE (see `vlnce`). In the older one, each
trajectory is a folder with its own dataset. In the newer one, a scene's folder has many episodes
with one image folder, and `image_index` in meta/episodes_stats.jsonl states the images of each.
"""

from __future__ import annotations

import errno
import os
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from occgen_hub.builder import DatasetBuilder, EpisodeRef
from occgen_hub.episode import Column, Episode, MediaFile, Note, Task, column_of
from occgen_hub.errors import OccGenError, SourceError
from occgen_hub.files import (
    Version,
    is_file,
    opened,
    parse_json,
    read_bytes,
    read_json,
    read_jsonl,
    read_parquet,
    version,
)
from occgen_hub.geometry.camera import intrinsics_problem, scale_intrinsics
from occgen_hub.geometry.ply import check_ply
from occgen_hub.geometry.poses import RIGID, from_opengl, rigidity_error
from occgen_hub.kinds import check_not_lerobot, lerobot_kind
from occgen_hub.media import (
    RESTORE,
    ImageSequence,
    VideoFacts,
    VideoReader,
    image_size,
    is_jpeg,
    read_depth,
    read_labels,
    read_rgb,
    stated_pixels,
    video_facts,
)
from occgen_hub.schema import Feature, load_schema
from occgen_hub.taxonomy import load_taxonomy, taxonomy_names

from . import vlnce

DEPTH_UNITS = 10_000
"""Units per metre of the depth PNGs."""

MAX_WAYS = 16
"""Limit of the number of paths, through links, to the same folder."""

MAX_IMAGES = 1 << 30
"""Limit of the images in a folder, far above practical numbers."""

WIDEST = 0.01
"""Smallest focal length relative to the width or height: a field of view of 178 degrees."""

FPS = (0.01, 1000.0)
"""Range of plausible frame rates."""

POSE = "action"
INTRINSIC = "observation.camera_intrinsic"
SCENES = 2
"""Number of scenes whose tables and folders a process caches. Episodes are read by scene."""

TAXONOMY = "taxonomy.txt"
"""In the folder of label images: the name of their taxonomy."""

STATS = "episodes_stats.jsonl"
META = ("info.json", "tasks.jsonl", "episodes.jsonl", STATS)
LEROBOT = ("timestamp", "frame_index", "episode_index", "index", "task_index")


@dataclass(frozen=True)
class Files:
    """The files of an episode.

    rgb, depth, labels: images by number; first: the number of the first image, if it is stated;
    taxonomy: the file with the name of the labels' taxonomy, which may be missing without labels.
    """

    info: Path
    tasks: Path
    episodes: Path
    stats: Path
    parquet: Path
    rgb: dict[int, Path]
    depth: dict[int, Path]
    first: int | None
    video: Path | None
    cloud: Path | None
    labels: dict[int, Path]
    taxonomy: Path

    def all(self) -> list[Path]:
        """All files, in a fixed order."""
        meta = list(dict.fromkeys((self.info, self.tasks, self.episodes, self.stats)))
        extra = [path for path in (self.video, self.cloud) if path is not None]
        if self.labels:
            extra += [*self.labels.values(), self.taxonomy]
        return [*meta, self.parquet, *self.rgb.values(), *self.depth.values(), *extra]


class InternNavBuilder(DatasetBuilder):
    """Reads InternData-N1: RGB with poses, and depth if there is any."""

    name = "internnav"
    takes_archives = True
    about = (
        "The source `internnav` reads "
        "[InternData-N1](https://huggingface.co/datasets/InternRobotics/InternData-N1) and "
        "recordings in its layouts. The card of InternData-N1 states its licence. Its scenes come "
        "from other datasets, such as Matterport3D, which have licences of their own."
    )

    def episodes(self) -> Iterator[EpisodeRef]:
        """Every trajectory folder, or every episode of a scene's folder, sorted."""
        for folder in _dataset_folders(self.root, self.skip_unlisted):
            check_not_lerobot(folder, [folder])
            parquets = _parquets(folder)
            if vlnce.cameras_of(folder):
                yield from vlnce.refs(folder, "/".join(_name(self.root, folder, 2)), parquets)
            elif _is_scene(folder, parquets):
                parts = _name(self.root, folder, 2)
                for index, path in sorted(parquets.items()):
                    yield EpisodeRef("/".join([*parts, path.stem]), folder, index)
            else:
                index = min(parquets, default=0)
                yield EpisodeRef("/".join(_name(self.root, folder, 3)), folder, index)

    @classmethod
    def recognise(cls, root: Path) -> str | None:
        """Recognise it by the first dataset folder."""
        found = next(_dataset_folders(root, lambda *_: None), None)
        return None if found is None or lerobot_kind(found) else "a tree of InternData-N1"

    def has_depth(self, ref: EpisodeRef) -> bool:
        """Whether there is a depth image; in a scene's folder, for a frame of this episode.

        Also True if the depth folder is unreadable, so that `read` reports the error.
        """
        if (camera := vlnce.camera_name(ref)) is not None:
            return vlnce.has_depth(ref, camera)
        if not _is_scene(ref.path, _parquets(ref.path)):
            depth = ref.path.glob("videos/chunk-*/observation.images.depth")
            return any(map(_may_have_depth, depth))
        try:
            return bool(_scene_depth(ref))
        except (OccGenError, KeyError):
            return True  # `read` reports the error.

    def work(self, ref: EpisodeRef) -> float:
        """Images times the pixels of the first one or, without images, pixels of the video."""
        try:
            files = _locate(ref)
            if images := [*files.rgb.values()] or [*files.depth.values()]:
                return float(len(images) * prod(image_size(images[0])))
            return 0.0 if files.video is None else stated_pixels(files.video)
        except OccGenError:
            return 0.0

    def footage(self, ref: EpisodeRef) -> tuple[int, tuple[int, int]] | None:
        """Number of images and size of the first; without images, from the video's packets."""
        try:
            files = _locate(ref)
            if images := [*files.rgb.values()]:
                return len(images), image_size(images[0])
            if files.video is None:
                return None
            facts = video_facts(files.video)
            return facts.frames, facts.size
        except OccGenError:
            return None

    def sources(self, ref: EpisodeRef) -> list[Path]:
        """The tables, images and videos of one episode."""
        return _locate(ref).all()

    def read(self, ref: EpisodeRef) -> Episode:
        """Read an episode. Errors in its files become notes, or are raised if they matter."""
        files = _locate(ref)
        if (camera := vlnce.camera_name(ref)) is not None:
            return self._read_camera(ref, files, camera)
        sources = files.all()
        info = read_json(files.info)
        _rows(files.stats)  # Not used, but if it is damaged, the rest may be too.
        table = read_parquet(files.parquet)
        length = table.num_rows
        if length == 0:
            raise SourceError(
                files.parquet, "has no frames", "move this trajectory out of the input"
            )
        columns, left_out = _columns(table, load_schema(self.schema).features)
        notes = [*_left_out(left_out, files), *_count_notes(files, info, columns, ref, length)]

        rgb, depth, label_images = _frames(files, length)
        video, video_notes = _video(files, rgb, length)
        K = _intrinsics(columns, left_out, files.parquet)
        size, K, size_notes = _image_size(rgb, depth, video, files, K)
        _check_view(K, size, files.parquet)
        images, metres, media = _pictures(rgb, depth, size, DEPTH_UNITS)
        labels, taxonomy = _labels(label_images, size, files.taxonomy)
        fps, rate_notes = _rate(info, video, files)
        tasks, task_index, task_notes = _tasks(files, columns, ref, length)
        cloud, cloud_notes = _cloud(files)
        files = replace(files, video=files.video if video else None, cloud=cloud)
        return Episode(
            id=ref.id,
            length=length,
            fps=fps,
            robot_type=_text(info.get("robot_type")) or "unknown",
            image_size=size,
            read_rgb=images if rgb or files.video is None else VideoReader(files.video, size),
            read_depth=metres,
            unmeasured="free",  # Simulated: beyond the range of 16 bits.
            world_from_camera=_poses(columns, left_out, files.parquet),
            intrinsics=K,
            tasks=tasks,
            task_index=task_index,
            columns={name: c for name, c in columns.items() if name not in LEROBOT},
            media=(*media, *_other_media(files)),
            fingerprint=self.fingerprint(sources),
            read_labels=labels,
            taxonomy=taxonomy,
            notes=(
                *notes,
                *video_notes,
                *size_notes,
                *_format_notes(rgb),
                *rate_notes,
                *task_notes,
                *cloud_notes,
            ),
        )

    def _read_camera(self, ref: EpisodeRef, files: Files, camera: str) -> Episode:
        """Read one camera of an episode of VLN-CE. Rows without its pose are left out."""
        info = read_json(files.info)
        whole = read_parquet(files.parquet)
        if whole.num_rows == 0:
            raise SourceError(
                files.parquet, "has no frames", "move this trajectory out of the input"
            )
        posed = vlnce.posed_rows(whole, camera, files.parquet)
        length = len(posed.rows)
        known = load_schema(self.schema).features
        known = {name: feature for name, feature in known.items() if name != POSE}
        columns, left_out = _columns(posed.table, known)
        rgb, depth = (
            _images_of_rows(found, posed.rows, whole.num_rows) for found in (files.rgb, files.depth)
        )
        if not rgb:
            raise SourceError(files.parquet, f"has no images of the camera {camera}", RESTORE)
        size = image_size(rgb[0])
        images, metres, media = _pictures(rgb, depth, size, vlnce.DEPTH_UNITS)
        K, view_notes = vlnce.intrinsics(size, length, self.hfov)
        fps, rate_notes = _rate(info, None, files)
        tasks = vlnce.instructions(read_jsonl(files.episodes), ref.index)
        task_notes = []
        if not tasks:
            tasks = (Task("navigate"),)
            text = f"{files.episodes.name} has no instruction: the task is named 'navigate'"
            task_notes = [Note("no task", text)]
        return Episode(
            id=ref.id,
            length=length,
            fps=fps,
            robot_type=_text(info.get("robot_type")) or "unknown",
            image_size=size,
            read_rgb=images,
            read_depth=metres,
            unmeasured="free",  # Simulated: beyond the range of 16 bits.
            world_from_camera=posed.poses,
            intrinsics=K,
            assumed_view=True,
            tasks=tasks,
            task_index=np.zeros(length, np.int64),
            columns={name: c for name, c in columns.items() if name not in LEROBOT},
            media=media,
            fingerprint=self.fingerprint(files.all()),
            notes=(
                *posed.notes,
                *_left_out(left_out, files),
                *view_notes,
                *_format_notes(rgb),
                *rate_notes,
                *task_notes,
            ),
        )


# Finding the files


def _may_have_depth(folder: Path) -> bool:
    try:
        return any(path.suffix == ".png" for path in folder.iterdir())
    except OSError:
        return True


def _dataset_folders(root: Path, skip_unlisted: Callable[[Path, OSError], None]) -> Iterator[Path]:
    """Sorted folders with two of `data`, `meta` and `videos`. They are not searched further.

    Links to folders are followed, but not to a folder above, and at most MAX_WAYS times to the same
    folder, since a few links to one another give endless paths. Folders that cannot be listed are
    passed to `skip_unlisted`.
    """
    Place = tuple[int, int]  # Device and inode.
    waiting: list[tuple[Path, tuple[Place, ...]]] = [(root, ())]
    ways: Counter[Place] = Counter()
    while waiting:
        folder, above = waiting.pop()
        try:
            stat = folder.stat()
            here = (stat.st_dev, stat.st_ino)
            if here in above:
                continue
            ways[here] += 1
            if ways[here] > MAX_WAYS:
                raise OSError(errno.ELOOP, f"more than {MAX_WAYS} links lead to it")
            names = _folders_in(folder, skip_unlisted)
        except OSError as error:
            skip_unlisted(folder, error)
            continue
        if len({"data", "meta", "videos"} & set(names)) >= 2:
            yield folder
        else:
            waiting += [(folder / name, (*above, here)) for name in sorted(names, reverse=True)]


def _folders_in(folder: Path, skip_unlisted: Callable[[Path, OSError], None]) -> list[str]:
    """Names of the folders in a folder and of links to folders, without hidden ones."""
    names = []
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                if entry.is_dir() and not entry.name.startswith("."):
                    names.append(entry.name)
            except OSError as error:  # For example a link to itself.
                skip_unlisted(Path(entry.path), error)
    return names


def _name(root: Path, folder: Path, count: int) -> tuple[str, ...]:
    """The last `count` parts of a folder's path below the root, or of its full path if too short.

    Folders above a group, such as `vln_n1/traj_data` in InternData-N1, are not part of an id.
    """
    parts = folder.relative_to(root).parts
    parts = (parts if len(parts) >= count else folder.resolve().parts[1:])[-count:]
    # A built dataset has no trajectories in hidden folders.
    return tuple(f"_{part[1:]}" if part.startswith(".") else part for part in parts)


def _parquets(folder: Path) -> Mapping[int, Path]:
    """The episodes' tables by number, sorted."""
    versions = []
    for place in (folder / "data", *sorted(folder.glob("data/chunk-*"))):
        with suppress(OSError):
            versions.append(version(place))
    return _parquets_of(folder, tuple(versions))


@lru_cache(maxsize=SCENES)
def _parquets_of(folder: Path, versions: tuple[Version, ...]) -> Mapping[int, Path]:
    found = {}
    for path in sorted((folder / "data").glob("chunk-*/episode_*.parquet")):
        digits = path.stem.removeprefix("episode_")
        if digits.isdecimal() and len(digits) < 10:
            found[int(digits)] = path
    return MappingProxyType(dict(sorted(found.items())))


def _is_scene(folder: Path, parquets: Mapping[int, Path]) -> bool:
    """Whether the folder is in the newer layout: many episodes that share an image folder."""
    return len(parquets) > 1 or is_file(folder / "meta" / "pointcloud.ply")


def _locate(ref: EpisodeRef) -> Files:
    parquets = _parquets(ref.path)
    if (camera := vlnce.camera_name(ref)) is not None:
        return _locate_camera(ref, parquets, camera)
    meta = ref.path / "meta"
    parquet = parquets.get(ref.index, ref.path / f"data/chunk-000/episode_{ref.index:06d}.parquet")
    for path in (parquet, *(meta / name for name in META)):
        opened(path).close()
    videos = ref.path / "videos" / parquet.parent.name
    clouds, first, chosen = [parquet.parent / "path.ply"], None, range(MAX_IMAGES)
    if _is_scene(ref.path, parquets):
        chosen = _image_range(meta / STATS, ref.index, parquets)
        clouds, first = [meta / "pointcloud.ply"], chosen.start
    video = videos / "observation.video.trajectory" / f"{parquet.stem}.mp4"
    labels = videos / "observation.images.labels"
    return Files(
        info=meta / "info.json",
        tasks=meta / "tasks.jsonl",
        episodes=meta / "episodes.jsonl",
        stats=meta / STATS,
        parquet=parquet,
        rgb=_images(videos / "observation.images.rgb", ("jpg", "jpeg"), chosen),
        depth=_images(videos / "observation.images.depth", ("png",), chosen),
        first=first,
        video=video if is_file(video) else None,
        cloud=next((path for path in clouds if is_file(path)), None),
        labels=_images(labels, ("png",), chosen),
        taxonomy=labels / TAXONOMY,
    )


def _scene_depth(ref: EpisodeRef) -> dict[int, Path]:
    """The depth images of an episode in a scene's folder, as in `_locate`.

    Raises KeyError if its table is missing.
    """
    parquets = _parquets(ref.path)
    folder = ref.path / "videos" / parquets[ref.index].parent.name / "observation.images.depth"
    chosen = _image_range(ref.path / "meta/episodes_stats.jsonl", ref.index, parquets)
    return _images(folder, ("png",), chosen)


def _locate_camera(ref: EpisodeRef, parquets: Mapping[int, Path], name: str) -> Files:
    """The files of one camera of an episode of VLN-CE. Only two meta files are required."""
    meta, camera = ref.path / "meta", vlnce.camera(ref, name)
    chunk = f"data/chunk-{ref.index // vlnce.PER_CHUNK:03d}"
    parquet = parquets.get(ref.index, ref.path / f"{chunk}/episode_{ref.index:06d}.parquet")
    info, episodes = meta / "info.json", meta / "episodes.jsonl"
    for path in (parquet, info, episodes):
        opened(path).close()
    return Files(
        info=info,
        tasks=episodes,
        episodes=episodes,
        stats=episodes,
        parquet=parquet,
        rgb=camera.rgb,
        depth=camera.depth,
        first=0,
        video=None,
        cloud=None,
        labels={},
        taxonomy=meta / TAXONOMY,
    )


def _images_of_rows(found: dict[int, Path], rows: list[int], total: int) -> tuple[Path, ...]:
    """The images of some rows of a table with `total` rows, or () if there are no images at all.

    Raises SourceError if one is missing, or if there are images for rows beyond the table.
    """
    if not found:
        return ()
    path = next(iter(found.values()))
    for row in rows:
        if row not in found:
            stem = path.stem.rpartition("_")[0]
            raise SourceError(path.with_name(f"{stem}_{row}{path.suffix}"), "is missing", RESTORE)
    if (last := max(found)) >= total:
        problem = f"is frame {last}, but the parquet of the episode has {total} rows"
        raise SourceError(
            found[last], problem, "remove it, or move this trajectory out of the input"
        )
    return tuple(found[row] for row in rows)


def _images(folder: Path, suffixes: tuple[str, ...], chosen: range) -> dict[int, Path]:
    """Files with names that begin with a number in `chosen`, by number: 10.jpg after 9.jpg.

    Empty without the folder. Raises SourceError if it is not a folder or cannot be listed.
    """
    try:
        found = _numbered(folder, suffixes, version(folder))
    except FileNotFoundError:
        if not folder.is_symlink():
            return {}
        raise SourceError(folder, "is a broken link", RESTORE) from None
    except NotADirectoryError:
        if not os.path.lexists(folder):  # Something above it is a file.
            return {}
        raise SourceError(folder, "is not a folder", RESTORE) from None
    except OSError as error:
        problem = f"cannot be listed ({error.strerror})"
        raise SourceError(
            folder, problem, "check its permissions, or move it out of the input"
        ) from error
    numbers = found.numbers
    part = slice(bisect_left(numbers, chosen.start), bisect_left(numbers, chosen.stop))
    for number, other in found.twice.items():
        if number in chosen:
            problem = f"is frame {number}, like {found.names[numbers.index(number)]}"
            raise SourceError(folder / other, problem, "remove one of them")
    names = zip(numbers[part], found.names[part], strict=True)
    return {number: folder / name for number, name in names}


@dataclass(frozen=True)
class Numbered:
    """File names that begin with a number, sorted by number.

    twice: names of more files with the same number.
    """

    numbers: list[int]
    names: list[str]
    twice: dict[int, str]


@lru_cache(maxsize=2 * SCENES)
def _numbered(folder: Path, suffixes: tuple[str, ...], version: Version) -> Numbered:
    """The numbered files of a folder. Raises OSError if it cannot be listed."""
    found: dict[int, str] = {}
    twice: dict[int, str] = {}
    for name in sorted(path.name for path in folder.iterdir()):
        stem, _, suffix = name.partition(".")
        if suffix.lower() in suffixes and stem.isdecimal() and len(stem) <= 9:
            if int(stem) in found:
                twice[int(stem)] = name
            else:
                found[int(stem)] = name
    numbers = sorted(found)
    return Numbered(numbers, [found[number] for number in numbers], twice)


@dataclass(frozen=True)
class Rows:
    """The lines of a meta file, which are JSON objects."""

    lines: list[dict[str, Any]]

    def of(self, episode: int) -> dict[str, Any] | None:
        """The first line with this episode_index, or None."""
        return self._by_episode.get(episode)

    @cached_property
    def tasks(self) -> dict[int, str]:
        """The instructions by task_index."""
        return {
            number: row["task"]
            for row in self.lines
            if (number := _number(row.get("task_index"))) is not None and _text(row.get("task"))
        }

    @cached_property
    def _by_episode(self) -> dict[int, dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {}
        for line in self.lines:
            index = line.get("episode_index")
            if isinstance(index, int | float):
                found.setdefault(int(index) if index == index // 1 else -1, line)
        return found


def _rows(path: Path) -> Rows:
    """The lines of a meta file, cached for all episodes of a scene.

    Raises SourceError if it is damaged.
    """
    opened(path).close()  # Raises errors with a remedy.
    found = _rows_of(path, version(path))
    if isinstance(found, SourceError):
        raise SourceError(found.path, found.problem, found.remedy)
    return found


@lru_cache(maxsize=3 * SCENES)
def _rows_of(path: Path, version: Version) -> Rows | SourceError:
    try:
        # The statistics of scenes with thousands of episodes have millions of values.
        return Rows(read_jsonl(path, _images_of if path.name == STATS else None))
    except SourceError as error:
        return error.with_traceback(None)


def _images_of(row: dict[str, Any]) -> dict[str, Any]:
    """The episode and the range of its images, of a line of statistics."""
    stated = row.get("image_index") or _mapping(row.get("stats")).get("image_index")
    return {"episode_index": row.get("episode_index"), "image_index": stated}


@lru_cache(maxsize=1 << 16)
def _length(parquet: Path, version: Version) -> int:
    return len(read_parquet(parquet))


def _image_range(stats: Path, index: int, parquets: Mapping[int, Path]) -> range:
    """The numbers of an episode's frames in the shared image folder.

    Taken from `image_index` in its line of episodes_stats.jsonl or, without it, from the lengths of
    the episodes before it.
    """
    rows, numbers = _rows(stats), list(parquets)
    line = numbers.index(index)
    row = rows.of(index)
    if row is None:
        row = rows.lines[line] if line < len(rows.lines) else {}
    stated = row.get("image_index")
    if stated is not None:
        first, last = (_number(_mapping(stated).get(key)) for key in ("min", "max"))
        if first is None or last is None or not 0 <= first <= last < MAX_IMAGES:
            raise SourceError(stats, f"has no valid image_index for episode {index}", RESTORE)
        return range(first, last + 1)
    lengths = [_length(path, version(path)) for path in (*parquets.values(),)[: line + 1]]
    return range(sum(lengths[:-1]), sum(lengths))


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> int | None:
    """An integer, which may be wrapped in lists, as in statistics. None for other values."""
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        return None
    return int(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _listed(names: list[str]) -> str:
    """A list of names as text, shortened if it is long."""
    shown = ", ".join(name[:60] for name in names[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown


# The table


def _columns(
    table: pa.Table, known: dict[str, Feature]
) -> tuple[dict[str, Column], dict[str, str]]:
    """The table's columns as arrays, and for each of the others the reason why it is left out."""
    columns: dict[str, Column] = {}
    left_out: dict[str, str] = {}
    for field, values in zip(table.schema, table.columns, strict=True):
        try:
            columns[field.name] = _column(field, values, known.get(field.name))
        except ValueError as error:
            left_out[field.name] = str(error)
    return columns, left_out


def _column(field: pa.Field, values: pa.ChunkedArray, known: Feature | None) -> Column:
    """A column that can be written and has statistics. Raises ValueError for other columns."""
    # Poses and intrinsics are checked later, frame by frame, so that errors name the frame.
    column = column_of(field, values, finite=field.name not in (POSE, INTRINSIC))
    feature = column.feature
    if known is not None and (
        feature.shape != known.shape
        or (feature.dtype != known.dtype and feature.dtype in ("string", "bool"))
    ):
        kind = f"{feature.dtype} of shape {list(feature.shape)}"
        raise ValueError(f"has {kind}, expected {known.dtype} of shape {list(known.shape)}")
    return column


def _left_out(reasons: dict[str, str], files: Files) -> list[Note]:
    lost = [name for name in reasons if name not in (POSE, INTRINSIC, *LEROBOT)]
    if not lost:
        return []
    text = f"{files.parquet.name}: column {lost[0][:60]} {reasons[lost[0]]}: left out"
    if lost[1:]:
        text += f", also {_listed(lost[1:])} for similar reasons"
    return [Note("left out", text)]


def _matrices(
    columns: dict[str, Column], left_out: dict[str, str], name: str, n: int, path: Path
) -> NDArray[np.float64]:
    column = columns.get(name)
    if column is None:
        problem = f"column {name} {left_out[name]}" if name in left_out else f"has no column {name}"
        raise SourceError(path, problem, RESTORE)
    if column.feature.shape != (n, n) or not column.feature.dtype.startswith("float"):
        kind = f"{column.feature.dtype} of shape {list(column.feature.shape)}"
        problem = f"column {name} has {kind}, expected {n} x {n} floating-point matrices"
        raise SourceError(path, problem, RESTORE)
    return np.asarray(column.values, np.float64)


def _poses(columns: dict[str, Column], left_out: dict[str, str], path: Path) -> NDArray[np.float64]:
    poses = _matrices(columns, left_out, POSE, 4, path)
    bad = np.flatnonzero(~(rigidity_error(poses) <= RIGID))
    if len(bad):
        what = "is not a rigid transform" if np.isfinite(poses[bad[0]]).all() else "is not finite"
        raise SourceError(path, f"the pose of frame {bad[0]} in column {POSE} {what}", RESTORE)
    return from_opengl(poses)


def _intrinsics(
    columns: dict[str, Column], left_out: dict[str, str], path: Path
) -> NDArray[np.float64]:
    intrinsics = _matrices(columns, left_out, INTRINSIC, 3, path)
    for frame, K in enumerate(intrinsics):
        if problem := intrinsics_problem(K):
            raise SourceError(
                path, f"the matrix of frame {frame} in column {INTRINSIC} {problem}", RESTORE
            )
        if not (K[:2, 2] > 0).all():
            x, y = K[:2, 2].tolist()
            text = f"the principal point of frame {frame} is ({x:g}, {y:g}), outside any image"
            raise SourceError(path, text, RESTORE)
    return intrinsics


def _check_view(K: NDArray[np.float64], size: tuple[int, int], path: Path) -> None:
    """Raise SourceError if intrinsics do not fit images of that size."""
    width, height = size
    outside = np.flatnonzero((K[:, :2, 2] >= size).any(axis=1))
    if len(outside):
        x, y = K[outside[0], :2, 2].tolist()
        problem = (
            f"the principal point of frame {outside[0]} is ({x:g}, {y:g}), outside its image of "
            f"{width} x {height} pixels"
        )
        raise SourceError(path, problem, "find the images and intrinsics that belong together")
    focal = np.stack([K[:, 0, 0] / width, K[:, 1, 1] / height])
    if focal.min() < WIDEST or focal.max() > 1 / WIDEST:
        frame = int(np.flatnonzero((focal < WIDEST).any(0) | (focal > 1 / WIDEST).any(0))[0])
        problem = (
            f"the focal length of frame {frame} is {K[frame, 0, 0]:g} by {K[frame, 1, 1]:g}, "
            f"impossible for an image of {width} x {height} pixels"
        )
        raise SourceError(path, problem, RESTORE)


# The frames


def _check_last(images: tuple[Path, ...], size: tuple[int, int]) -> None:
    """Raise SourceError if the last image has another size than the first, without decoding."""
    if images and (last := image_size(images[-1])) != size:
        problem = f"is {last[0]} x {last[1]} pixels, expected {size[0]} x {size[1]}"
        raise SourceError(images[-1], problem, RESTORE)


def _frames(
    files: Files, length: int
) -> tuple[tuple[Path, ...], tuple[Path, ...], tuple[Path, ...]]:
    """RGB, depth and label images of the frames. Each is empty if there are none.

    Raises SourceError if an image is missing or the two have different numbers.
    """
    kinds = [found for found in (files.rgb, files.depth, files.labels) if found]
    first = files.first
    if first is None:  # They begin with 0 or, if complete, with another number.
        lowest = min((min(found) for found in kinds), default=0)
        whole = range(lowest, lowest + length)
        first = lowest if all(list(found) == list(whole) for found in kinds) else 0
    for found in kinds:
        path = next(iter(found.values()))
        missing = (n for n in range(first, first + length) if n not in found)
        if (number := next(missing, None)) is not None:
            raise SourceError(path.with_name(f"{number}{path.suffix}"), "is missing", RESTORE)
        if len(found) > length:
            raise SourceError(
                path.parent,
                f"has {len(found)} images for the {length} frames of the parquet",
                "remove those that do not belong to it, or move this trajectory out of the input",
            )
    rgb, depth, labels = (tuple(found.values()) for found in (files.rgb, files.depth, files.labels))
    return rgb, depth, labels


def _labels(
    images: tuple[Path, ...], size: tuple[int, int], named: Path
) -> tuple[Callable[[int], NDArray[np.uint8]] | None, str | None]:
    """A reader of the labels and their taxonomy, both None if there are none.

    named: the file that names the taxonomy. Raises SourceError, also when an image that is read
    has ids that the taxonomy lacks.
    """
    if not images:
        return None, None
    known = ", ".join(taxonomy_names())
    remedy = f"write the name of the labels' taxonomy into it, one of {known}"
    name = read_bytes(named, 1 << 10).decode(errors="replace").strip() if is_file(named) else None
    if name not in taxonomy_names():
        problem = "is missing" if name is None else f"names an unknown taxonomy ({name[:40]})"
        raise SourceError(named, problem, remedy)
    taxonomy = load_taxonomy(name)

    def read(frame: int) -> NDArray[np.uint8]:
        try:
            return taxonomy.checked(read_labels(images[frame], size))
        except ValueError as error:
            problem, other = str(error), f"correct it, or name another taxonomy in {TAXONOMY}"
            raise SourceError(images[frame], problem, other) from None

    return read, name


def _video(
    files: Files, rgb: tuple[Path, ...], length: int
) -> tuple[VideoFacts | None, list[Note]]:
    """The facts of the RGB video if it shows the same frames, else None.

    Without images, raises SourceError if the video is missing or invalid.
    """
    if files.video is None:
        if rgb:
            return None, []
        folder = files.parquet.parents[2] / "videos"
        raise SourceError(folder, "has neither RGB images nor an RGB video", RESTORE)
    try:
        video = video_facts(files.video)
        if video.frames == length:
            return video, []
        problem = f"has {video.frames} frames, the parquet {length}"
    except SourceError as error:
        problem = error.problem
    if not rgb:
        raise SourceError(files.video, problem, RESTORE)
    text = f"{files.video.name} {problem}: a new video is encoded"
    return None, [Note("video", text)]


def _image_size(
    rgb: tuple[Path, ...],
    depth: tuple[Path, ...],
    video: VideoFacts | None,
    files: Files,
    intrinsics: NDArray[np.float64],
) -> tuple[tuple[int, int], NDArray[np.float64], list[Note]]:
    """The size of the available frames, with intrinsics for it, and notes.

    The source's intrinsics are in pixels of the original images: the JPEGs, else the depth images,
    else an image centred at the principal point.
    """
    name = files.video.name if files.video else ""
    if rgb or depth:
        size = image_size((rgb or depth)[0])
        if video is None or video.size == size:
            return size, intrinsics, []
        text = (
            f"{name} is {video.size[0]} x {video.size[1]}, the images {size[0]} x {size[1]}: "
            "the images count"
        )
        return size, intrinsics, [Note("video size", text)]
    assert video is not None
    factors = np.asarray(video.size) / (2 * intrinsics[0, :2, 2])
    text = (
        f"there are no images, only {name} at {video.size[0]} x {video.size[1]}: "
        "intrinsics are scaled to it"
    )
    return video.size, scale_intrinsics(intrinsics, *factors), [Note("video only", text)]


def _format_notes(rgb: tuple[Path, ...]) -> list[Note]:
    """A note if the images are not in the format of their suffix. Checks the first one."""
    if not rgb or is_jpeg(rgb[0]):
        return []
    text = f"{rgb[0].name} is a PNG despite its name: such images are stored as JPEG"
    return [Note("image format", text)]


def _cloud(files: Files) -> tuple[Path | None, list[Note]]:
    """The source's own scene cloud, if it is valid. It is copied, not used."""
    if files.cloud is not None:
        try:
            check_ply(files.cloud)
        except SourceError as error:
            return None, [Note("cloud", f"{files.cloud.name} {error.problem}: left out")]
    return files.cloud, []


def _pictures(
    rgb: tuple[Path, ...], depth: tuple[Path, ...], size: tuple[int, int], units: int
) -> tuple[
    ImageSequence[np.uint8], Callable[[int], NDArray[np.float64]] | None, tuple[MediaFile, ...]
]:
    """Readers of images and of depth in metres, each None without files, and their media files.

    units: depth units per metre. Raises SourceError if the last image has another size.
    """
    _check_last(rgb, size)
    _check_last(depth, size)
    images, depths = ImageSequence(rgb, size, read_rgb), ImageSequence(depth, size, read_depth)
    media = (*_image_media("rgb", rgb, images), *_image_media("depth", depth, depths))
    return images, (lambda t: depths(t) / units) if depth else None, media


def _image_media[Pixel: np.generic](
    file: str, paths: tuple[Path, ...], images: ImageSequence[Pixel]
) -> Iterator[MediaFile]:
    for frame, path in enumerate(paths):
        yield MediaFile(file, path, frame, partial(images.check, frame))


def _other_media(files: Files) -> Iterator[MediaFile]:
    if files.video is not None:
        yield MediaFile("video", files.video)
    if files.cloud is not None:
        yield MediaFile("source_cloud", files.cloud)


# Meta files


def _count_notes(
    files: Files, info: dict[str, Any], columns: dict[str, Column], ref: EpisodeRef, length: int
) -> list[Note]:
    """Notes on differences of info.json and episodes.jsonl from the table."""
    notes = []
    stated = []
    frames = _number(info.get("total_frames"))
    if info.get("total_episodes") == 1 and frames not in (None, length):
        stated.append(f"info.json says {frames} frames")
    frames = _number((_rows(files.episodes).of(ref.index) or {}).get("length"))
    if frames not in (None, length):
        stated.append(f"episodes.jsonl says length {frames}")
    if stated:
        text = f"{' and '.join(stated)}, the parquet has {length} frames: these are used"
        notes.append(Note("frame count", text))
    declared = info.get("features")
    absent = [
        name
        for name, feature in (declared.items() if isinstance(declared, dict) else ())
        if name not in columns and _mapping(feature).get("dtype") not in ("video", "image")
    ]
    if absent:
        worked_out = [name for name in absent if name in LEROBOT]
        lost = [name for name in absent if name not in LEROBOT]
        text = f"info.json declares {_listed(absent)}, which the parquet lacks:"
        text += " computed instead" if worked_out and not lost else " not declared in the output"
        notes.append(Note("declared columns", text))
    return notes


def _rate(info: dict[str, Any], video: VideoFacts | None, files: Files) -> tuple[float, list[Note]]:
    """Frames per second: those of the video, if it has the same frames, for its timestamps."""
    given = info.get("fps")
    stated = None
    if isinstance(given, int | float) and given is not True and FPS[0] <= given <= FPS[1]:
        stated = float(given)
    if video is None or files.video is None or not FPS[0] <= video.fps <= FPS[1]:
        if stated is None:
            return 30.0, [Note("fps", "info.json has no valid fps: 30 is assumed")]
        return stated, []
    fps = round(video.fps, 6)
    if stated is not None and abs(stated - fps) > 1e-3:
        text = f"info.json says {stated:g} fps, the video has {fps:g}, which is used"
        return fps, [Note("fps", text)]
    return fps, []


def _tasks(
    files: Files, columns: dict[str, Column], ref: EpisodeRef, length: int
) -> tuple[tuple[Task, ...], NDArray[np.int64], list[Note]]:
    """The episode's instructions and, for each frame, the first instruction that covers it.

    An instruction may be a JSON object inside a JSON string, such as {"sum_instruction": ...,
    "sum_indexes": [first, last]}. Then its text is extracted, and the object is kept as its source.
    """
    numbered, texts = _task_texts(files, ref)
    sources = [_parse_nested_json(text) for text in texts]
    tasks = [Task(_instruction(s) or text, s) for text, s in zip(texts, sources, strict=True)]
    notes = []
    if any(sources):
        text = "tasks.jsonl has JSON inside strings: the text of the instruction is extracted"
        notes.append(Note("task json", text))
    if not tasks:
        tasks = [Task("navigate")]
        text = f"{files.tasks.name} has no instruction: the task is named 'navigate'"
        notes.append(Note("no task", text))
    index = _given_tasks(columns.get("task_index"), numbered, texts)
    if index is None:
        index = np.zeros(length, np.int64)
        for number in reversed(range(len(tasks))):
            first, last = _frame_range(tasks[number].source, length)
            index[first : last + 1] = number
    return tuple(tasks), index, notes


def _task_texts(files: Files, ref: EpisodeRef) -> tuple[dict[int, str], list[str]]:
    """The tasks of tasks.jsonl by task_index, and the tasks of the episode in episodes.jsonl.

    If episodes.jsonl gives none, these are all tasks.
    """
    numbered = _rows(files.tasks).tasks
    given = (_rows(files.episodes).of(ref.index) or {}).get("tasks")
    texts = [text for text in given if _text(text)] if isinstance(given, list) else []
    return numbered, texts or list(numbered.values())


def _given_tasks(
    column: Column | None, numbered: dict[int, str], texts: list[str]
) -> NDArray[np.int64] | None:
    """The table's task_index, renumbered for the episode's own tasks. None if it does not fit."""
    if column is None or not column.feature.scalar or "int" not in column.feature.dtype:
        return None
    used, places = np.unique(column.values, return_inverse=True)
    names = [numbered.get(number) for number in used.tolist()]
    own = [texts.index(name) for name in names if name is not None and name in texts]
    return np.asarray(own, np.int64)[places] if len(own) == len(used) else None


def _parse_nested_json(text: str) -> dict[str, Any]:
    if not text.lstrip().startswith("{"):
        return {}
    try:
        return _mapping(parse_json(text))
    except ValueError:
        return {}


def _instruction(source: dict[str, Any]) -> str | None:
    """The value whose key ends in `instruction`. A revised one is used only without others."""
    keys = sorted(
        (key for key in source if key.endswith("instruction")), key=lambda k: ("revised" in k, k)
    )
    words = (source[key] for key in keys)
    return next((text for text in words if isinstance(text, str) and text.strip()), None)


def _frame_range(source: dict[str, Any], length: int) -> tuple[int, int]:
    """First and last frame of an instruction, both inclusive. All frames if not stated."""
    for key, value in source.items():
        if re.search(r"index(es)?$", key) and isinstance(value, list) and len(value) == 2:
            first, last = _number(value[0]), _number(value[1])
            if first is not None and last is not None and 0 <= first <= last:
                return min(first, length), min(last, length - 1)
    return 0, length - 1
