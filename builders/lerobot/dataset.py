"""A LeRobot dataset on disk: its features, its episodes and their files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from occgen_hub.errors import SourceError
from occgen_hub.files import (
    MAX_TABLE_BYTES,
    MAX_TABLE_ROWS,
    PARQUET_DAMAGE,
    Version,
    is_file,
    parquet_file,
    parquet_problem,
    plain,
    read_json,
    read_jsonl,
    version,
)

INFO = "meta/info.json"
RESTORE = "restore it from the source"
MAX_EPISODES = 1 << 20
CONTAINERS = (".mp4", ".mkv")
"""Suffixes of videos. A file may have another one than the path template."""

LARGE = 1024
"""Size from which an array of two or more dimensions counts as an image."""


@dataclass(frozen=True)
class LeRobotFeature:
    """A feature of info.json. names: one for each of its numbers, or None."""

    dtype: str
    shape: tuple[int, ...]
    names: list[str] | None
    info: dict[str, Any]

    @property
    def video(self) -> bool:
        """Whether it is stored in videos."""
        return self.dtype == "video"

    @property
    def visual(self) -> bool:
        """Whether it has images: videos, or a column of encoded images or large arrays."""
        large = len(self.shape) > 1 and prod(self.shape) >= LARGE
        return self.dtype in ("video", "image") or large

    @property
    def depth_map(self) -> bool:
        """Whether LeRobot marks it as depth."""
        return bool(self.info.get("is_depth_map") or self.info.get("video.is_depth_map"))

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of its images, from the shape. (0, 0) if unknown."""
        shape = self.shape
        if len(shape) == 3 and shape[0] in (1, 3, 4) and shape[2] not in (1, 3, 4):
            shape = (*shape[1:], shape[0])
        return (shape[1], shape[0]) if len(shape) in (2, 3) else (0, 0)


@dataclass(frozen=True)
class Info:
    """meta/info.json. data_path, video_path: templates of paths below the root."""

    path: Path
    version: str
    fps: float
    robot_type: str
    features: dict[str, LeRobotFeature]
    data_path: str
    video_path: str
    chunks_size: int

    @property
    def joined(self) -> bool:
        """Whether files have many episodes, as in v3.0."""
        return not self.version.startswith("v2")


@dataclass(frozen=True)
class VideoPart:
    """An episode's video: a path below the root, and the start time in seconds."""

    path: str
    start: float


@dataclass(frozen=True)
class EpisodeEntry:
    """An episode. listed: the file that lists it; data: its table, below the root."""

    index: int
    length: int
    tasks: tuple[str, ...]
    listed: Path
    data: str
    videos: dict[str, VideoPart]


def read_info(root: Path) -> Info:
    """Read meta/info.json. Raises SourceError if it is invalid or its version is not supported."""
    path = root / INFO
    return _read_info(path, _stamp(path))


@lru_cache(maxsize=16)
def _read_info(path: Path, _: Version) -> Info:
    info = read_json(path)
    number = str(info.get("codebase_version"))
    if not re.fullmatch(r"v(2\.[01]|3\.[0-9]+)", number):
        problem = f"has the version {number[:20]}, but only v2.0, v2.1 and v3.0 are supported"
        raise SourceError(path, problem, "convert it with LeRobot's own scripts")
    features, fps = info.get("features"), info.get("fps")
    known = isinstance(fps, int | float) and not isinstance(fps, bool) and 0 < fps < 1e6
    if not isinstance(features, dict) or not known:
        raise SourceError(path, "has no features or no fps", RESTORE)
    chunks_size = info.get("chunks_size", 1000)
    if not isinstance(chunks_size, int) or chunks_size < 1:
        raise SourceError(path, f"has the invalid chunks_size {str(chunks_size)[:20]}", RESTORE)
    return Info(
        path=path,
        version=number,
        fps=float(str(fps)),
        robot_type=str(info.get("robot_type") or "unknown"),
        features={name: _feature(value, name, path) for name, value in features.items()},
        data_path=str(info.get("data_path") or ""),
        video_path=str(info.get("video_path") or ""),
        chunks_size=chunks_size,
    )


def _feature(value: Any, name: str, path: Path) -> LeRobotFeature:
    shape = value.get("shape") if isinstance(value, dict) else None
    if not isinstance(shape, list) or not all(isinstance(n, int) and n > 0 for n in shape):
        raise SourceError(path, f"does not describe the feature {name[:60]}", RESTORE)
    names, count = _names(value.get("names")), prod(shape)
    info = {**_object(value.get("video_info")), **_object(value.get("info"))}
    dtype = str(value.get("dtype"))
    kept = names if names is not None and len(names) == count and len(set(names)) == count else None
    return LeRobotFeature(dtype, tuple(shape), kept, info)


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _names(value: Any) -> list[str] | None:
    """The names of numbers, from a list or from lists by kind."""
    if isinstance(value, dict):
        parts = list(value.values())
        listed = bool(parts) and all(isinstance(part, list) for part in parts)
        value = [n for part in parts for n in part] if listed else list(value)
    return value if isinstance(value, list) and all(isinstance(n, str) for n in value) else None


# Episodes


def read_episodes(root: Path, info: Info) -> dict[int, EpisodeEntry]:
    """The episodes by number, ascending. Raises SourceError if there are none."""
    if info.joined:
        places = sorted((root / "meta/episodes").glob("*/*.parquet"))
        if not places:
            raise SourceError(root / "meta/episodes", "has no table of episodes", RESTORE)
    else:
        places = [root / "meta/episodes.jsonl"]
    stamps = tuple((path, _stamp(path)) for path in places)
    return _read_episodes(root, info.path, _stamp(info.path), stamps)


@lru_cache(maxsize=4)
def _read_episodes(
    root: Path, path: Path, stamp: Version, stamps: tuple[tuple[Path, Version], ...]
) -> dict[int, EpisodeEntry]:
    info = _read_info(path, stamp)
    rows = _joined_entries if info.joined else _separate_entries
    found = {entry.index: entry for place, _ in stamps for entry in rows(place, info)}
    if not found:
        raise SourceError(root / INFO, "belongs to a dataset without episodes", RESTORE)
    return dict(sorted(found.items()))


def _separate_entries(path: Path, info: Info) -> Iterator[EpisodeEntry]:
    """v2: a line for each episode, which has its own files."""
    for number, row in enumerate(read_jsonl(path), 1):
        index, length = _counts(row)
        if length < 1:
            problem = f"line {number}: has no episode_index and length"
            raise SourceError(path, problem, RESTORE)
        fields = {"episode_chunk": index // info.chunks_size, "episode_index": index}
        videos = {
            key: VideoPart(_filled(info.video_path, {**fields, "video_key": key}, info), 0.0)
            for key, feature in info.features.items()
            if feature.video
        }
        data = _filled(info.data_path, fields, info)
        yield EpisodeEntry(index, length, _texts(row.get("tasks")), path, data, videos)


def _joined_entries(path: Path, info: Info) -> Iterator[EpisodeEntry]:
    """v3: a row for each episode, with its files and its position in them."""
    keys = [key for key, feature in info.features.items() if feature.video]
    parts = ("chunk_index", "file_index")
    names = [
        *("episode_index", "length", "tasks"),
        *(f"data/{part}" for part in parts),
        *(f"videos/{key}/{part}" for key in keys for part in (*parts, "from_timestamp")),
    ]
    with opened_table(path) as file:
        held = set(file.schema_arrow.names)
        if missing := [name for name in names if name not in held and name != "tasks"]:
            raise SourceError(path, f"has no column {missing[0]}", RESTORE)
        if file.metadata.num_rows > MAX_EPISODES:
            raise SourceError(path, f"claims {file.metadata.num_rows} episodes", RESTORE)
        table = file.read(columns=[name for name in names if name in held])
    for row in table.select([name for name in names if name in held]).to_pylist():
        index, length = _counts(row)
        places = [value for name, value in row.items() if name != "tasks"]
        if length < 1 or None in places:
            raise SourceError(path, "has a row without episode_index, length or file", RESTORE)
        videos = {}
        for key in keys:
            fields = {part: row[f"videos/{key}/{part}"] for part in parts} | {"video_key": key}
            start = float(row[f"videos/{key}/from_timestamp"])
            if not np.isfinite(start):
                raise SourceError(path, f"has no from_timestamp of {key[:60]}", RESTORE)
            videos[key] = VideoPart(_filled(info.video_path, fields, info), start)
        data = _filled(info.data_path, {part: row[f"data/{part}"] for part in parts}, info)
        yield EpisodeEntry(index, length, _texts(row.get("tasks")), path, data, videos)


def _counts(row: dict[str, Any]) -> tuple[int, int]:
    """The number and the length of an episode. The length is 0 if they are invalid."""
    index, length = row.get("episode_index"), row.get("length")
    if not (isinstance(index, int) and isinstance(length, int)) or isinstance(index, bool):
        return 0, 0
    return (index, length) if 0 <= index < 1 << 40 and length <= MAX_TABLE_ROWS else (0, 0)


def _texts(value: Any) -> tuple[str, ...]:
    texts = value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(text for text in texts if isinstance(text, str) and text))


def _filled(template: str, fields: dict[str, Any], info: Info) -> str:
    """Fill in the fields of a path template, such as {episode_index:06d}.

    Raises SourceError for other fields, or if the path leads out of the dataset.
    """

    def value(match: re.Match[str]) -> str:
        if match[1] not in fields:
            raise _bad_template(template, info)
        text = str(fields[match[1]])
        return text.zfill(int(match[2] or 0))

    path = re.sub(r"\{(\w+)(?::0?([0-9]{1,2})d)?\}", value, template)
    parts = PurePosixPath(path)
    if not path or parts.is_absolute() or ".." in parts.parts or set(path) & set("{}\0"):
        raise _bad_template(template, info)
    return path


def _bad_template(template: str, info: Info) -> SourceError:
    problem = f"has a path template that cannot be filled in ({template[:100]!r})"
    return SourceError(info.path, problem, RESTORE)


def read_tasks(root: Path, info: Info) -> tuple[Path | None, dict[int, str]]:
    """The file of the tasks, or None, and the tasks by number."""
    path = root / ("meta/tasks.parquet" if info.joined else "meta/tasks.jsonl")
    if not is_file(path):
        return None, {}
    return path, _read_tasks(path, _stamp(path))


@lru_cache(maxsize=16)
def _read_tasks(path: Path, _: Version) -> dict[int, str]:
    if path.suffix == ".jsonl":
        rows = read_jsonl(path)
    else:
        with opened_table(path) as file:  # The text is the index of a pandas table.
            table = file.read()
        texts = [field.name for field in table.schema if _is_text(field.type)]
        if "task_index" not in table.column_names or len(texts) != 1:
            raise SourceError(path, "has no columns of tasks and their numbers", RESTORE)
        numbers = table["task_index"].to_pylist()
        named = zip(numbers, table[texts[0]].to_pylist(), strict=True)
        rows = [{"task_index": number, "task": text} for number, text in named]
    return {
        row["task_index"]: str(row["task"])
        for row in rows
        if isinstance(row.get("task_index"), int) and row.get("task")
    }


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


# Tables


@contextmanager
def opened_table(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a parquet file. Arrow's errors for a damaged file become SourceErrors."""
    try:
        with parquet_file(path) as file:
            yield file
    except PARQUET_DAMAGE as error:
        raise SourceError(path, parquet_problem(error), RESTORE) from None


def read_rows(path: Path, episode: int, leave_out: set[str]) -> pa.Table:
    """The rows of an episode in a file of many, without the columns `leave_out`.

    Raises SourceError if there are none, or more than fit into memory.
    """
    with opened_table(path) as file:
        names = [name for name in file.schema_arrow.names if name not in leave_out]
        batches, rows, size = [], 0, 0
        for batch in episode_batches(file, episode, names):
            batches.append(batch)
            rows, size = rows + batch.num_rows, size + batch.nbytes
            if rows > MAX_TABLE_ROWS or size > MAX_TABLE_BYTES:
                problem = f"has more of episode {episode} than fits into memory"
                raise SourceError(path, problem, "cut the episode into parts")
        if not rows:
            raise SourceError(path, f"has no rows of episode {episode}", RESTORE)
        table = plain(pa.Table.from_batches(batches))
        table.validate(full=True)
    if len(set(table.column_names)) < table.num_columns:
        raise SourceError(path, "has two columns with the same name", RESTORE)
    return table


def episode_batches(
    file: pq.ParquetFile, episode: int, names: list[str], rows: int = 1024
) -> Iterator[pa.RecordBatch]:
    """The rows of an episode in an open file, in batches; all rows if it has no episode_index."""
    alone = "episode_index" not in file.schema_arrow.names
    asked = list(dict.fromkeys([*names, *(() if alone else ("episode_index",))]))
    groups = [
        n
        for n in range(file.metadata.num_row_groups)
        if alone or _has_episode(file.read_row_group(n, columns=["episode_index"]), episode)
    ]
    for batch in file.iter_batches(batch_size=rows, row_groups=groups, columns=asked):
        if not alone:
            own = np.asarray(batch.column("episode_index").to_numpy(zero_copy_only=False))
            batch = batch.filter(pa.array(own == episode))
        if batch.num_rows:
            yield batch.select(names)


def _has_episode(table: pa.Table, episode: int) -> bool:
    numbers: NDArray[Any] = table["episode_index"].to_numpy()
    return bool((numbers == episode).any())


def _stamp(path: Path) -> Version:
    try:
        return version(path)
    except OSError as error:
        raise SourceError(path, f"cannot be read ({error.strerror})", RESTORE) from None
