"""InternData-N1: a tree of groups, scenes and trajectories of RGB-D frames with poses.

Two layouts are read. In the older one each trajectory is a folder with a dataset of its own; in
the newer one a scene's folder holds many episodes, whose frames share one image folder, and
`image_index` in meta/episodes_stats.jsonl says which are whose.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from occgen_hub.builder import DatasetBuilder, EpisodeRef
from occgen_hub.episode import Column, Episode, MediaFile, Note, Task
from occgen_hub.errors import SourceError
from occgen_hub.files import read_json, read_jsonl
from occgen_hub.geometry.camera import intrinsics_problem, scale_intrinsics
from occgen_hub.geometry.poses import from_opengl, rigidity_error
from occgen_hub.media import (
    RESTORE,
    VideoFacts,
    VideoReader,
    image_size,
    read_depth,
    read_rgb,
    video_facts,
)
from occgen_hub.schema import feature_of

DEPTH_UNITS = 10_000
"""Units of the depth PNGs in a metre."""

MAX_ROWS = 1 << 20
MAX_PARQUET_BYTES = 1 << 30
RIGID = 1e-3
"""How far a pose may be from a rigid transform; float32 rounding gives under 1e-6."""

POSE = "action"
INTRINSIC = "observation.camera_intrinsic"
LEROBOT = ("timestamp", "frame_index", "episode_index", "index", "task_index")


@dataclass(frozen=True)
class Files:
    """Where an episode's parts are. rgb, depth: one path a frame, or empty where there are none."""

    info: Path
    tasks: Path
    episodes: Path
    stats: Path
    parquet: Path
    rgb: tuple[Path, ...]
    depth: tuple[Path, ...]
    video: Path | None
    cloud: Path | None

    def all(self) -> list[Path]:
        """Every file that there is, in a fixed order."""
        meta = [path for path in (self.tasks, self.episodes, self.stats) if path.is_file()]
        extra = [path for path in (self.video, self.cloud) if path is not None]
        return [self.info, *meta, self.parquet, *self.rgb, *self.depth, *extra]


class InternNavBuilder(DatasetBuilder):
    """Reads InternData-N1; its depth and poses go to the engine `rgbd`."""

    name = "internnav"
    engine = "rgbd"

    def episodes(self) -> Iterator[EpisodeRef]:
        """Every trajectory folder, or every episode of a scene's folder, sorted."""
        for folder in _dataset_folders(self.root):
            parquets = _parquets(folder)
            if _is_scene(folder, parquets):
                parts = _name(self.root, folder, 2)
                for index, path in sorted(parquets.items()):
                    yield EpisodeRef("/".join([*parts, path.stem]), folder, index)
            else:
                index = min(parquets, default=0)
                yield EpisodeRef("/".join(_name(self.root, folder, 3)), folder, index)

    def sources(self, ref: EpisodeRef) -> list[Path]:
        """The tables, images and videos of one episode."""
        return _locate(ref).all()

    def read(self, ref: EpisodeRef) -> Episode:
        """One episode, with what is wrong in its files noted or, if it matters, raised."""
        files = _locate(ref)
        info = read_json(files.info)
        table = _read_table(files.parquet)
        length = table.num_rows
        columns, column_notes = _columns(table, files.parquet)
        notes = [*column_notes, *_count_notes(files, info, columns, ref, length)]

        rgb, depth = _frames(files.rgb, length, "jpg"), _frames(files.depth, length, "png")
        video = video_facts(files.video) if files.video and files.video.is_file() else None
        if not rgb and video is None:
            raise SourceError(
                ref.path / "videos", "holds neither RGB images nor an RGB video", RESTORE
            )
        intrinsics = _intrinsics(columns, files.parquet)
        size, intrinsics, frame_notes = _image_size(rgb, depth, video, files.video, intrinsics)
        fps, rate_notes = _rate(info, video, length, files)
        tasks, task_index, task_notes = _tasks(files, columns, ref, length)
        usable = video is not None and files.video is not None and video.frames == length
        return Episode(
            id=ref.id,
            length=length,
            fps=fps,
            robot_type=str(info.get("robot_type", "unknown")),
            image_size=size,
            read_rgb=_rgb_reader(rgb, files.video, size),
            read_depth=_depth_reader(depth, size) if depth else None,
            world_from_camera=_poses(columns, files.parquet),
            intrinsics=intrinsics,
            tasks=tasks,
            task_index=task_index,
            columns={name: c for name, c in columns.items() if name not in LEROBOT},
            media=tuple(_media(files, rgb, depth, with_video=usable)),
            fingerprint=self.fingerprint(files.all()),
            notes=(*notes, *frame_notes, *rate_notes, *task_notes),
        )


# Finding the files


def _dataset_folders(root: Path) -> Iterator[Path]:
    """Folders with `data` and with `meta` or `videos`, sorted; nothing is sought below them."""
    for parent, folders, _ in os.walk(root):
        if "data" in folders and ("meta" in folders or "videos" in folders):
            folders.clear()
            yield Path(parent)
        else:
            folders[:] = sorted(name for name in folders if not name.startswith("."))


def _name(root: Path, folder: Path, least: int) -> tuple[str, ...]:
    """A folder's path below the root, or as much of its own path as makes `least` parts."""
    parts = folder.relative_to(root).parts
    return parts if len(parts) >= least else folder.resolve().parts[1:][-least:]


def _parquets(folder: Path) -> dict[int, Path]:
    found = {}
    for path in sorted((folder / "data").glob("chunk-*/episode_*.parquet")):
        digits = path.stem.removeprefix("episode_")
        if digits.isdecimal() and len(digits) < 10:
            found[int(digits)] = path
    return found


def _is_scene(folder: Path, parquets: dict[int, Path]) -> bool:
    """Whether the folder is in the newer layout, of many episodes that share an image folder."""
    return len(parquets) > 1 or (folder / "meta" / "pointcloud.ply").is_file()


def _locate(ref: EpisodeRef) -> Files:
    parquets = _parquets(ref.path)
    meta = ref.path / "meta"
    parquet = parquets.get(ref.index, ref.path / f"data/chunk-000/episode_{ref.index:06d}.parquet")
    if not parquet.is_file():
        raise SourceError(parquet, "is missing", RESTORE)
    videos = ref.path / "videos" / parquet.parent.name
    rgb = _numbered(videos / "observation.images.rgb", ("jpg", "jpeg"))
    depth = _numbered(videos / "observation.images.depth", ("png",))
    clouds = [parquet.parent / "path.ply"]
    if _is_scene(ref.path, parquets):
        chosen = _image_range(meta / "episodes_stats.jsonl", ref.index, parquets)
        rgb = {number: path for number, path in rgb.items() if number in chosen}
        depth = {number: path for number, path in depth.items() if number in chosen}
        clouds = [meta / "pointcloud.ply"]
    video = videos / "observation.video.trajectory" / f"{parquet.stem}.mp4"
    return Files(
        info=meta / "info.json",
        tasks=meta / "tasks.jsonl",
        episodes=meta / "episodes.jsonl",
        stats=meta / "episodes_stats.jsonl",
        parquet=parquet,
        rgb=tuple(path for _, path in sorted(rgb.items())),
        depth=tuple(path for _, path in sorted(depth.items())),
        video=video if video.is_file() else None,
        cloud=next((path for path in clouds if path.is_file()), None),
    )


def _numbered(folder: Path, suffixes: tuple[str, ...]) -> dict[int, Path]:
    """Files named by a number, by that number: 10.jpg comes after 9.jpg."""
    if not folder.is_dir():
        return {}
    found = {}
    for path in folder.iterdir():
        stem, _, suffix = path.name.partition(".")
        if suffix.lower() in suffixes and stem.isdecimal() and len(stem) < 10:
            found[int(stem)] = path
    return found


def _image_range(stats: Path, index: int, parquets: dict[int, Path]) -> range:
    """The numbers of an episode's frames in the image folder that it shares.

    From `image_index` in its line of episodes_stats.jsonl; without it, from the lengths of the
    episodes before it.
    """
    rows = read_jsonl(stats) if stats.is_file() else []
    line = sorted(parquets).index(index)
    row = next((row for row in rows if row.get("episode_index") == index), None)
    if row is None:
        row = rows[line] if line < len(rows) else {}
    stated = row.get("image_index") or _mapping(row.get("stats")).get("image_index")
    if stated is not None:
        first, last = (_number(_mapping(stated).get(key)) for key in ("min", "max"))
        if first is None or last is None or not 0 <= first <= last < MAX_ROWS * 1024:
            raise SourceError(stats, f"has no usable image_index for episode {index}", RESTORE)
        return range(first, last + 1)
    lengths = [_rows(path) for number, path in sorted(parquets.items()) if number < index]
    return range(sum(lengths), sum(lengths) + _rows(parquets[index]))


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> int | None:
    """A whole number, also one wrapped in lists as statistics are."""
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        return None
    return int(value)


# The table


def _rows(parquet: Path) -> int:
    with _parquet_errors(parquet):
        return int(pq.read_metadata(parquet).num_rows)


@contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    """Turns Arrow's errors into one sentence about the file."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        text = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        problem = f"is not a parquet file that can be read ({text.rstrip('.')})"
        raise SourceError(path, problem, RESTORE) from None


def _read_table(path: Path) -> pa.Table:
    with _parquet_errors(path):
        file = pq.ParquetFile(path)
        metadata = file.metadata
        sizes = (metadata.row_group(n).total_byte_size for n in range(metadata.num_row_groups))
        if metadata.num_rows > MAX_ROWS or sum(sizes) > MAX_PARQUET_BYTES:
            raise SourceError(
                path, f"claims {metadata.num_rows} rows, more than an episode has", RESTORE
            )
        table = file.read()
    if table.num_rows == 0:
        raise SourceError(path, "holds no frames", "leave this trajectory out")
    return table


def _columns(table: pa.Table, path: Path) -> tuple[dict[str, Column], list[Note]]:
    """The table's columns as arrays; those that features cannot describe are left out, and said."""
    columns: dict[str, Column] = {}
    left_out = []
    for field, column in zip(table.schema, table.columns, strict=True):
        feature = feature_of(field, column[0].as_py())
        if feature is None:
            left_out.append(field.name)
            continue
        try:
            values = column.to_pylist() if feature.dtype == "string" else feature.to_numpy(column)
        except ValueError as error:
            raise SourceError(path, f"column {field.name}: {error}", RESTORE) from None
        columns[field.name] = Column(feature, values)
    notes = []
    if left_out:
        text = (
            f"{path.name}: columns {', '.join(left_out)} are of no type that LeRobot has: left out"
        )
        notes.append(Note("left out", text))
    return columns, notes


def _matrices(columns: dict[str, Column], name: str, n: int, path: Path) -> NDArray[np.float64]:
    column = columns.get(name)
    if column is None:
        raise SourceError(path, f"has no column {name}", RESTORE)
    if column.feature.shape != (n, n) or column.feature.dtype not in ("float32", "float64"):
        raise SourceError(
            path,
            f"column {name} does not hold {n} x {n} matrices of floating-point numbers",
            RESTORE,
        )
    return np.asarray(column.values, np.float64)


def _poses(columns: dict[str, Column], path: Path) -> NDArray[np.float64]:
    poses = _matrices(columns, POSE, 4, path)
    bad = np.flatnonzero(~(rigidity_error(poses) <= RIGID))
    if len(bad):
        what = "is not a rigid transform" if np.isfinite(poses[bad[0]]).all() else "is not finite"
        raise SourceError(path, f"the pose of frame {bad[0]} in column {POSE} {what}", RESTORE)
    return from_opengl(poses)


def _intrinsics(columns: dict[str, Column], path: Path) -> NDArray[np.float64]:
    intrinsics = _matrices(columns, INTRINSIC, 3, path)
    for frame, K in enumerate(intrinsics):
        if problem := intrinsics_problem(K):
            raise SourceError(
                path, f"the matrix of frame {frame} in column {INTRINSIC} {problem}", RESTORE
            )
    return intrinsics


# The frames


def _frames(paths: tuple[Path, ...], length: int, suffix: str) -> tuple[Path, ...]:
    """The images of an episode of `length` frames; raises SourceError when one is missing."""
    if not paths or len(paths) == length:
        return paths
    if len(paths) < length:
        first = int(paths[0].name.split(".")[0])
        expected = range(0 if first < length else first, length + first)
        names = {int(path.name.split(".")[0]) for path in paths}
        missing = next(number for number in expected if number not in names)
        raise SourceError(paths[0].with_name(f"{missing}.{suffix}"), "is missing", RESTORE)
    raise SourceError(
        paths[0].parent,
        f"holds {len(paths)} images for the {length} frames of the parquet",
        "remove those that do not belong to it or leave this trajectory out",
    )


def _image_size(
    rgb: tuple[Path, ...],
    depth: tuple[Path, ...],
    video: VideoFacts | None,
    video_path: Path | None,
    intrinsics: NDArray[np.float64],
) -> tuple[tuple[int, int], NDArray[np.float64], list[Note]]:
    """The size of the frames in hand, and intrinsics and notes that go with it.

    The intrinsics are in pixels of the original images: those of the JPEGs, else of the depth
    images, else of an image whose centre is the principal point.
    """
    if rgb or depth:
        size = image_size((rgb or depth)[0])
        notes = []
        if video is not None and video.size != size:
            text = (
                f"{video_path.name if video_path else 'the video'} is {video.size[0]} x "
                f"{video.size[1]}, the images {size[0]} x {size[1]}: the images count"
            )
            notes.append(Note("video size", text))
        return size, intrinsics, notes
    assert video is not None
    original = 2 * intrinsics[0, :2, 2]
    factors = np.asarray(video.size) / original
    text = (
        f"there are no images, only {video_path.name if video_path else 'the video'} at "
        f"{video.size[0]} x {video.size[1]}: intrinsics are scaled to it"
    )
    scaled = scale_intrinsics(intrinsics, factors[0], factors[1])
    return video.size, scaled, [Note("video only", text)]


def _rgb_reader(
    rgb: tuple[Path, ...], video: Path | None, size: tuple[int, int]
) -> Callable[[int], NDArray[np.uint8]]:
    if rgb or video is None:
        return lambda t: read_rgb(rgb[t], size)
    return VideoReader(video, size)


def _depth_reader(
    depth: tuple[Path, ...], size: tuple[int, int]
) -> Callable[[int], NDArray[np.float64]]:
    return lambda t: read_depth(depth[t], size) / DEPTH_UNITS


def _media(
    files: Files, rgb: tuple[Path, ...], depth: tuple[Path, ...], *, with_video: bool
) -> Iterator[MediaFile]:
    for frame, path in enumerate(rgb):
        yield MediaFile("rgb", path, frame)
    for frame, path in enumerate(depth):
        yield MediaFile("depth", path, frame)
    if files.video is not None and with_video:
        yield MediaFile("video", files.video)
    if files.cloud is not None:
        yield MediaFile("source_cloud", files.cloud)


# What the meta files say


def _count_notes(
    files: Files, info: dict[str, Any], columns: dict[str, Column], ref: EpisodeRef, length: int
) -> list[Note]:
    """Where info.json and episodes.jsonl disagree with the table."""
    notes = []
    stated = []
    if info.get("total_episodes") == 1 and info.get("total_frames") not in (None, length):
        stated.append(f"info.json says {info['total_frames']} frames")
    if files.episodes.is_file():
        rows = [r for r in read_jsonl(files.episodes) if r.get("episode_index") == ref.index]
        if rows and rows[0].get("length") not in (None, length):
            stated.append(f"episodes.jsonl says length {rows[0]['length']}")
    if stated:
        text = f"{' and '.join(stated)}, the parquet holds {length}: the parquet counts"
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
        text = f"info.json declares {', '.join(absent)}, which the parquet lacks:"
        text += (
            " worked out anew" if worked_out and not lost else " not declared in what is written"
        )
        notes.append(Note("declared columns", text))
    return notes


def _rate(
    info: dict[str, Any], video: VideoFacts | None, length: int, files: Files
) -> tuple[float, list[Note]]:
    """Frames a second: the video's, where it has the same frames, since timestamps seek in it."""
    stated = info.get("fps")
    if isinstance(stated, bool) or not isinstance(stated, int | float) or not 0 < stated < 1e4:
        stated = None
    if video is not None and video.frames != length:
        name = files.video.name if files.video else "the video"
        text = f"{name} has {video.frames} frames, the parquet {length}: the video is made anew"
        return float(stated or 30.0), [Note("video length", text)]
    if video is not None and 0 < video.fps < 1e4:
        fps = round(video.fps, 6)
        if stated is not None and abs(stated - fps) > 1e-3:
            text = f"info.json says {stated:g} fps, the video {fps:g}: the video counts"
            return fps, [Note("fps", text)]
        return fps, []
    return float(stated or 30.0), []


def _tasks(
    files: Files, columns: dict[str, Column], ref: EpisodeRef, length: int
) -> tuple[tuple[Task, ...], NDArray[np.int64], list[Note]]:
    """The episode's instructions and, for each frame, the first that covers it.

    An instruction may be JSON inside a JSON string, an object such as {"sum_instruction": ...,
    "sum_indexes": [first, last]}: then its words are taken out and the object is kept beside them.
    """
    texts = _task_texts(files, ref)
    tasks, wrapped = [], False
    for text in texts:
        source = _inner_object(text)
        wrapped |= bool(source)
        tasks.append(Task(_words(source) or text, source))
    notes = []
    if wrapped:
        text = "tasks.jsonl holds JSON inside strings: the instruction in words is taken out of it"
        notes.append(Note("task json", text))
    if not tasks:
        tasks = [Task("navigate")]
        notes.append(Note("no task", "there is no instruction: the task is called 'navigate'"))
    index = np.zeros(length, np.int64)
    given = columns.get("task_index")
    if (
        given is not None
        and given.feature.scalar
        and given.feature.dtype.startswith(("int", "uint"))
    ):
        values = np.asarray(given.values, np.int64)
        if len(values) and values.min() >= 0 and values.max() < len(tasks):
            return tuple(tasks), values, notes
    for number in reversed(range(len(tasks))):
        first, last = _span(tasks[number].source, length)
        index[first : last + 1] = number
    return tuple(tasks), index, notes


def _task_texts(files: Files, ref: EpisodeRef) -> list[str]:
    """The tasks that episodes.jsonl gives the episode, else all that tasks.jsonl lists."""
    if files.episodes.is_file():
        for row in read_jsonl(files.episodes):
            given = row.get("tasks")
            if row.get("episode_index") == ref.index and isinstance(given, list) and given:
                return [text for text in given if isinstance(text, str)]
    if files.tasks.is_file():
        rows = [row for row in read_jsonl(files.tasks) if isinstance(row.get("task"), str)]
        return [str(row["task"]) for row in rows]
    return []


def _inner_object(text: str) -> dict[str, Any]:
    if not text.lstrip().startswith("{"):
        return {}
    try:
        return _mapping(json.loads(text))
    except (ValueError, RecursionError):
        return {}


def _words(source: dict[str, Any]) -> str | None:
    """The value whose key ends in `instruction`, a revised one only where there is no other."""
    keys = sorted(
        (key for key in source if key.endswith("instruction")), key=lambda k: ("revised" in k, k)
    )
    words = (source[key] for key in keys)
    return next((text for text in words if isinstance(text, str) and text.strip()), None)


def _span(source: dict[str, Any], length: int) -> tuple[int, int]:
    """First and last frame of an instruction, both included; all frames if it does not say."""
    for key, value in source.items():
        if re.search(r"index(es)?$", key) and isinstance(value, list) and len(value) == 2:
            first, last = _number(value[0]), _number(value[1])
            if first is not None and last is not None and 0 <= first <= last:
                return min(first, length), min(last, length - 1)
    return 0, length - 1
