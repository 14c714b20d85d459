"""Read frames from the shards and folders of a dataset, by decoding whole row groups."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from occgen_hub.errors import DatasetError
from occgen_hub.files import plain
from occgen_hub.geometry.poses import RIGID, rigidity_error
from occgen_hub.loading import REBUILD, SCHEMA, Trajectory
from occgen_hub.media import SeekingVideo, decode_depth, decode_rgb, fitted, read_depth, read_rgb
from occgen_hub.occupancy.states import SceneStates
from occgen_hub.schema import load_schema
from occgen_hub.shards import FEATURES
from occgen_hub.taxonomy import UNLABELLED
from occgen_hub.training.selection import FrameIndex
from occgen_hub.training.shard_file import open_group, open_shard, reading, states_of
from occgen_hub.training.source import place

CACHED_GROUPS = {
    **{"occupied": 64, "dynamic": 64, "labels": 64, "observed": 16, "camera": 64},
    **{"image": 8, "depth": 8, "task": 64},
}
"""How many row groups' columns a process keeps decoded: those that a history reaches over.

Of the mask that is 80 MB at the seed's grid."""

MAX_FILES = 64
MAX_VIDEOS = 4
"""Numbers of files that a process keeps open."""

MAX_SCENES = 16
"""Number of episodes for which a process caches the states of the scene, about 4 MB each."""

MAX_EPISODES = 4096
"""Number of episodes for which a process caches tasks, and of row groups cached as checked."""

Size = tuple[int, int]


class FrameReader(ABC):
    """Reads the columns of frames by their numbers. Not thread-safe.

    Subclasses provide decoded row groups. Errors name the shard or file.
    """

    def __init__(self, index: FrameIndex) -> None:
        self.index = index
        self._tasks = lru_cache(MAX_EPISODES)(self._read_tasks)
        self._video = lru_cache(MAX_VIDEOS)(self._open_video)

    @abstractmethod
    def states(self, number: int) -> SceneStates:
        """The states of the cells of the scene of item `number`."""

    @abstractmethod
    def _decoded(self, name: str, group: int) -> Any:
        """The columns `name` of a row group, decoded by `COLUMNS[name]`."""

    def occupied(self, number: int) -> NDArray[np.int32]:
        """(n,) int32 flat numbers of the occupied visible cells of item `number`, ascending."""
        return self._cells("occupied", number)

    def dynamic(self, number: int) -> NDArray[np.int32]:
        """(n,) int32 flat numbers of the occupied cells with moving objects, ascending."""
        return self._cells("dynamic", number)

    def classes(self, number: int) -> NDArray[np.uint8] | None:
        """(n,) uint8 classes of the occupied cells of item `number`; None without labels."""
        if self.index.taxonomy is None:
            return None
        count = len(self.occupied(number))
        with self._row("labels", number) as (found, row):
            if found is None:
                return np.full(count, UNLABELLED, np.uint8)
            ends, values = found
            classes: NDArray[np.uint8] = values[ends[row] : ends[row + 1]]
            if len(classes) != count:
                raise ValueError("labels do not match the occupied cells")
            return classes

    def observed(self, number: int) -> NDArray[np.uint8]:
        """(ceil(cells / 8),) uint8 packed mask of item `number`."""
        with self._row("observed", number) as (packed, row):
            mask: NDArray[np.uint8] = packed[row]
            return mask

    def camera(self, number: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(4, 4) float32 world_from_camera and (3, 3) float32 intrinsics of item `number`."""
        with self._row("camera", number) as ((poses, intrinsics), row):
            return poses[row], intrinsics[row]

    def image(self, number: int, size: Size | None = None) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 RGB of item `number`, resized to `size` (width, height) if given."""
        stored, episode, frame = self._recorded(number)
        if "image" in self.index.in_shards:
            return decode_rgb(self._file_of("image", number), self._path(number), stored, size)
        path = place(self.index.source.root, self.index.episodes[episode], "rgb", frame)
        if path.parent.is_dir():  # With images, a missing frame is an error.
            return read_rgb(path, stored, size)
        return fitted(self._video(episode)(frame), size)

    def depth(self, number: int, size: Size | None = None) -> NDArray[np.float32]:
        """(H, W) float32 metres of item `number`; resized, each pixel has one stored value."""
        stored, episode, frame = self._recorded(number)
        if "depth" in self.index.in_shards:
            units = decode_depth(self._file_of("depth", number), self._path(number), stored)
        else:
            name = self.index.episodes[episode]
            units = read_depth(place(self.index.source.root, name, "depth", frame), stored)
        if size is not None and size != stored:
            rows, columns = (
                ((np.arange(n) + 0.5) * (old / n)).astype(np.int64)
                for n, old in zip(size[::-1], stored[::-1], strict=True)
            )
            units = units[rows[:, None], columns]
        return (units / load_schema(SCHEMA).depth_units_per_metre).astype(np.float32)

    def task(self, number: int) -> str:
        """The instruction of item `number`, in words."""
        if "task" in self.index.in_shards:
            with self._row("task", number) as (texts, row):
                return str(texts[row])
        _, episode, frame = self._recorded(number)
        tasks, index = self._tasks(episode)
        if not (frame < len(index) and 0 <= index[frame] < len(tasks)):
            path = place(self.index.source.root, self.index.episodes[episode], "tasks")
            raise DatasetError(path, f"has no task of frame {frame}", REBUILD)
        return tasks[index[frame]]

    def _file_of(self, name: str, number: int) -> bytes:
        """The content of the file of an image or depth of item `number` in the shards."""
        with self._row(name, number) as (files, row):
            content = files[row]
        if content is None:
            episode, frame = self.index.located(number)
            problem = f"has no {name} of frame {frame} of {self.index.episodes[episode]}"
            raise DatasetError(self._path(number), problem, f"leave {name!r} out of keys")
        return bytes(content)

    def _recorded(self, number: int) -> tuple[Size, int, int]:
        """The size of the recorded image of item `number`, its episode and frame."""
        episode, frame = self.index.located(number)
        return self.index.image_size(episode), episode, frame

    def _path(self, number: int) -> Path:
        """The shard with item `number`, for messages."""
        shard = int(self.index.groups[self.index.group_of(number), 0])
        return Path(self.index.source.path(self.index.shards[shard]))

    def _cells(self, name: str, number: int) -> NDArray[np.int32]:
        """A row of a column of cells. Raises if they are not sorted or outside the grid."""
        with self._row(name, number) as ((ends, cells), row):
            found: NDArray[np.int32] = cells[ends[row] : ends[row + 1]]
            inside = not len(found) or 0 <= found[0] <= found[-1] < self.index.grid.cells
            if not (inside and (found[1:] > found[:-1]).all()):
                raise ValueError(f"{name} cells are out of order or outside the grid")
            return found

    @contextmanager
    def _row(self, name: str, number: int) -> Iterator[tuple[Any, int]]:
        """The decoded columns of the row group with item `number`, and its row there."""
        index = self.index
        group = index.group_of(number)
        with reading(index.source.path(index.shards[index.groups[group, 0]])):
            yield self._decoded(name, group), number - int(index.group_starts[group])

    def _read_tasks(self, episode: int) -> tuple[list[str], list[int]]:
        trajectory = Trajectory.open(self.index.source.root / self.index.episodes[episode])
        return trajectory.tasks(), trajectory.column("task_index").tolist()

    def _open_video(self, episode: int) -> SeekingVideo:
        path = place(self.index.source.root, self.index.episodes[episode], "video")
        return SeekingVideo(path, self.index.image_size(episode))


class RandomReader(FrameReader):
    """Reads any frame, and keeps a bounded number of files open and row groups decoded."""

    def __init__(self, index: FrameIndex) -> None:
        super().__init__(index)
        self._file = lru_cache(MAX_FILES)(self._open_file)
        self._states = lru_cache(MAX_SCENES)(self._read_states)
        self._is_checked = lru_cache(MAX_EPISODES)(self._check_group)
        self._held = {
            name: lru_cache(count)(lambda group, name=name: self._decode(name, group))
            for name, count in CACHED_GROUPS.items()
        }
        _keep_freed_memory(4 * index.grid.cells)

    def states(self, number: int) -> SceneStates:
        """See `FrameReader`."""
        return self._states(self.index.located(number)[0])

    def _read_states(self, episode: int) -> SceneStates:
        return states_of(self.index.source, self.index.episodes[episode])

    def _decoded(self, name: str, group: int) -> Any:
        self._is_checked(group)
        return self._held[name](group)

    def _decode(self, name: str, group: int) -> Any:
        shard, number = self.index.groups[group].tolist()
        return COLUMNS[name](RowGroup(self.index, self._file(shard), group, number))

    def _check_group(self, group: int) -> bool:
        shard, number = self.index.groups[group].tolist()
        check_frames(RowGroup(self.index, self._file(shard), group, number))
        return True

    def _open_file(self, shard: int) -> pq.ParquetFile:
        return open_shard(self.index.source, self.index.shards[shard])


class UnitReader(FrameReader):
    """Reads the frames of a few row groups, with all columns decoded in advance."""

    def __init__(self, index: FrameIndex, states: SceneStates | None = None) -> None:
        """states: of the frames' scene, if needed."""
        super().__init__(index)
        self._states = states
        self._groups: dict[tuple[str, int], Any] = {}

    def load(self, shard: pq.ParquetFile, group: int, names: Iterable[str]) -> None:
        """Decode the columns of a row group of an open shard."""
        index = self.index
        number, within = index.groups[group].tolist()
        name = index.shards[number]
        with reading(index.source.path(name)):
            file = open_group(index.source, name, shard, within)
            row_group = RowGroup(index, file, group, within)
            check_frames(row_group)
            for column in names:
                self._groups[column, group] = COLUMNS[column](row_group)

    def states(self, number: int) -> SceneStates:
        """See `FrameReader`."""
        assert self._states is not None
        return self._states

    def _decoded(self, name: str, group: int) -> Any:
        return self._groups[name, group]


# Row groups


class RowGroup:
    """A row group: number `group` of the index, number `within` of its file."""

    def __init__(self, index: FrameIndex, file: pq.ParquetFile, group: int, within: int) -> None:
        self.index, self.file, self.within = index, file, within
        self.first, self.stop = index.group_starts[group : group + 2].tolist()
        if within >= file.num_row_groups:
            raise ValueError(f"it lacks row group {within}, which is in the index")

    def __len__(self) -> int:
        return int(self.stop - self.first)

    def columns(self, *names: str) -> list[pa.Array]:
        """The columns, each as one array. Raises ValueError if a value is missing."""
        table = plain(self.file.read_row_group(self.within, [*names], use_threads=False))
        arrays = [table[name].combine_chunks() for name in names]
        if table.num_rows != len(self) or any(array.null_count for array in arrays):
            raise ValueError(f"row group {self.within} is not whole")
        return arrays


def check_frames(group: RowGroup) -> None:
    """Raise ValueError unless a row group has the frames that the index lists."""
    index = group.index
    episode, frame = index.located(group.first)
    names = ["episode", "frame_index"]
    table = group.file.read_row_group(group.within, names, use_threads=False).to_pydict()
    frames = [*range(frame, frame + len(group))]
    if table != {"episode": [index.episodes[episode]] * len(frames), "frame_index": frames}:
        name = index.episodes[episode][:80]
        problem = f"row group {group.within} is not of frames {frame} to {frames[-1]} of {name}"
        raise ValueError(f"{problem}, as in the index")


def _read_occupied(group: RowGroup) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    (lists,) = group.columns("occupied")
    return lists.offsets.to_numpy(), lists.values.to_numpy()


def _read_dynamic(group: RowGroup) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    if "dynamic" not in group.file.schema_arrow.names:
        return np.zeros(len(group) + 1, np.int32), np.zeros(0, np.int32)
    (lists,) = group.columns("dynamic")
    return lists.offsets.to_numpy(), lists.values.to_numpy()


def _read_labels(group: RowGroup) -> tuple[NDArray[np.int32], NDArray[np.uint8]] | None:
    if "labels" not in group.file.schema_arrow.names:
        return None
    (lists,) = group.columns("labels")
    values = lists.values.to_numpy()
    if len(values) and not (values.min() > 0 and values.max() <= UNLABELLED):
        raise ValueError("a cell has an invalid class")
    return lists.offsets.to_numpy(), values


def _read_observed(group: RowGroup) -> NDArray[np.uint8]:
    (masks,) = group.columns("observed")
    _, offsets, content = masks.buffers()
    ends = np.frombuffer(offsets, np.int32)[masks.offset : masks.offset + len(group) + 1]
    width = -(-group.index.grid.cells // 8)
    if not (np.diff(ends) == width).all():
        raise ValueError(f"a mask is not of the grid's {group.index.grid.cells} cells")
    return np.frombuffer(content, np.uint8)[ends[0] : ends[-1]].reshape(len(group), width)


def _read_camera(group: RowGroup) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    names = ("camera_extrinsic", "camera_intrinsic")
    arrays = group.columns(*names)
    poses, K = (FEATURES[n].to_numpy(a) for n, a in zip(names, arrays, strict=True))
    if not (np.isfinite(poses).all() and np.isfinite(K).all()):
        raise ValueError("a pose or its intrinsics are not finite")
    if rigidity_error(poses).max() > RIGID:
        raise ValueError("a pose is not rigid")
    return poses, K


def _read_files(name: str) -> Callable[[RowGroup], list[bytes | None]]:
    def read(group: RowGroup) -> list[bytes | None]:
        table = group.file.read_row_group(group.within, [name], use_threads=False)
        if table.num_rows != len(group):
            raise ValueError(f"row group {group.within} is not whole")
        return [None if file is None else file["bytes"] for file in table[name].to_pylist()]

    return read


def _read_task(group: RowGroup) -> list[str]:
    (texts,) = group.columns("task")
    found: list[str] = texts.to_pylist()
    return found


COLUMNS: dict[str, Callable[[RowGroup], Any]] = {
    "occupied": _read_occupied,
    "dynamic": _read_dynamic,
    "labels": _read_labels,
    "observed": _read_observed,
    "camera": _read_camera,
    "image": _read_files("image"),
    "depth": _read_files("depth"),
    "task": _read_task,
}
"""Functions that decode columns of a row group. They raise ValueError if it is invalid."""


def _keep_freed_memory(size: int) -> None:
    """Make the C library keep about `size` bytes of freed memory for the next item.

    glibc returns freed memory to the system above a threshold, which is twice the largest block
    freed so far, up to 32 MB. Allocating it again for each dense item takes a third of the time.
    """
    block = np.empty(min(size, 31 << 20), np.uint8)
    del block
