"""A built dataset for PyTorch: any frame by its number, decoded alone.

The index says where each frame is. Occupancy comes from the Parquet shards, whose row groups hold a
few frames each; images, depth and tasks come from the trajectories' folders. Needs torch.
"""

from __future__ import annotations

import operator
import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, default_collate

from occgen_hub.config import MAX_CELLS
from occgen_hub.errors import DatasetError, SourceError, UsageError
from occgen_hub.files import opened, plain
from occgen_hub.geometry.poses import RIGID, rigidity_error
from occgen_hub.hub_token import check_sendable
from occgen_hub.index import FINALIZE, INDEX, read_index
from occgen_hub.loading import EXPORT, REBUILD, SCHEMA, Trajectory
from occgen_hub.media import SeekingVideo, read_depth, read_rgb
from occgen_hub.occupancy.grid import Grid
from occgen_hub.occupancy.history import moved, past_frames
from occgen_hub.schema import load_schema
from occgen_hub.shards import FEATURES, FOLDER, REMAKE

KEYS = (
    *("occupancy", "mask", "dynamic", "pose", "intrinsics", "image", "depth", "history"),
    *("task", "episode", "frame_index"),
)
"""What an item may hold."""

DEFAULT_KEYS = tuple(key for key in KEYS if key not in ("depth", "dynamic"))

TYPES = {name: feature.arrow_type() for name, feature in FEATURES.items()} | {
    "episode": pa.dictionary(pa.int32(), pa.string()),  # As it is read.
    "occupied": pa.list_(pa.int32()),
    "observed": pa.binary(),
}
"""Of the shards' columns."""

MAX_SHARD_ROWS = 1 << 22
MAX_GROUP_BYTES = 1 << 30
MAX_GROUP_ROWS = 1 << 12
"""Of a row group, which is decoded whole: ours have 8 rows and 6 MB."""

DYNAMIC = pa.list_(pa.int32())
"""Of the column `dynamic`, which shards of earlier versions lack."""

HELD = {"occupied": 8, "dynamic": 2, "observed": 2, "camera": 64}
"""How many row groups' columns a process keeps decoded: those that a history reaches over."""

MAX_FILES = 64
MAX_VIDEOS = 4
"""What a process keeps open."""

MAX_EPISODES = 4096
"""Of how many episodes a process keeps the tasks and the size of images."""


class OccupancyDataset(Dataset[dict[str, Any]]):
    """The frames of a built dataset, in the order of its trajectories' names and of time.

    source: the dataset's folder, or its name on the Hub, "org/name", of which `revision` is
    fetched into the Hub's cache, as far as `keys` need it. Opening reads the index alone, an item
    one row group of occupancy, and of media the one image asked for. Of a dataset that is only
    partly in the folder, there are the episodes whose shards and, if `keys` need it, folders are.
    Processes of a DataLoader, forked or spawned, open the files each for itself.

    An item is a dict of those of `keys` that were asked for, all but dynamic and depth by default:

    - "occupancy": occupied and visible cells of the grid in the camera's frame (OpenCV axes).
      dense: (nx, ny, nz) bool; else (n, 3) int32, cells (i, j, k), ascending
    - "dynamic": those cells of "occupancy" that hold something that moves, in the same forms. None
      in shards of earlier versions, which did not tell
    - "mask": observed cells, free and occupied alike. dense: (nx, ny, nz) bool; else
      (ceil(nx * ny * nz / 8),) uint8, as `np.packbits` has them
    - "pose": (4, 4) float32, world_from_camera, OpenCV axes, metres
    - "intrinsics": (3, 3) float32, pixels of the image
    - "image": (3, H, W) uint8 RGB, from the images or, where there are none, from the video
    - "depth": (H, W) float32, metres along the optical axis, 0 for none
    - "history": occupancy of `history_len` past frames, number h being the one at
      `(h + 1) * history_step` frames before. dense: (history_len, nx, ny, nz) bool; else (n, 4)
      int32, rows (h, i, j, k). In the grids of the past cameras or, if `align_history`, the
      centres of their cells moved into the grid of the current one, those that leave it left out
    - "history_valid", with "history": (history_len,) bool, whether there is such a frame; one
      from before the episode's beginning is empty
    - "history_pose", with "history": (history_len, 4, 4) float32, current_from_past, metres, the
      identity where there is no such frame
    - "task": the instruction, in words
    - "episode": "<group>/<scene>/<trajectory>"; "frame_index": its number in the episode

    The default collate_fn of a DataLoader stacks dense items; sparse ones need `collate`. Images
    are as large as they were recorded: those of different sizes go into no batch.

    Attributes: root, the folder; grid, of all frames; episodes, their ids in order; starts,
    (episodes + 1,) int64, the number of each one's first item.

    Raises UsageError when there is no such dataset, when it has no shards, or no images and they
    are asked for; DatasetError when a file of it is damaged, here or when an item is asked for.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        history_len: int = 10,
        history_step: int = 2,
        align_history: bool = False,
        dense: bool = True,
        keys: Sequence[str] = DEFAULT_KEYS,
        revision: str | None = None,
    ) -> None:
        if isinstance(keys, str) or (unknown := sorted({*keys} - {*KEYS})):
            wrong = keys if isinstance(keys, str) else ", ".join(unknown)
            raise UsageError(f"keys: {wrong} is not a list of some of {', '.join(KEYS)}.")
        if history_len < 0 or history_step < 1:
            raise UsageError("history_len must be 0 or more, and history_step 1 or more.")
        self.keys, self.dense = tuple(keys), dense
        self.history_len, self.history_step = history_len, history_step
        self.align_history = align_history
        self.root = _folder(source, self.keys, revision)
        self._index = _indexed(self.root, media=not {"image", "depth", "task"}.isdisjoint(keys))
        self.grid, self.episodes = self._index.grid, self._index.episodes
        self.starts = self._index.starts
        self._held: tuple[int, _Reader] | None = None
        self._check_media()

    def __len__(self) -> int:
        """How many frames there are."""
        return int(self.starts[-1])

    def __getitem__(self, number: int) -> dict[str, Any]:
        """One frame, as the class says; raises IndexError where there is none."""
        number = operator.index(number)  # TypeError for a slice: see torch.utils.data.Subset
        if not -len(self) <= number < len(self):
            raise IndexError(f"frame {number} of a dataset of {len(self)}")
        number %= len(self)
        episode = bisect_right(self.starts, number) - 1
        frame = number - int(self.starts[episode])
        reader = self._reader
        item: dict[str, Any] = {}
        for key in self.keys:
            if key == "history":
                item |= self._history(reader, number, frame)
            elif key in ("episode", "frame_index"):
                item[key] = self.episodes[episode] if key == "episode" else frame
            elif key in ("image", "depth", "task"):
                item[key] = getattr(reader, key)(self.episodes[episode], frame)
            else:
                item[key] = self._camera(reader, key, number)
        return item

    def __getstate__(self) -> dict[str, Any]:
        """Without open files, which are of this process."""
        return {**self.__dict__, "_held": None}

    @property
    def _reader(self) -> _Reader:
        """What this process has open: one that was forked shares nothing with its parent."""
        if self._held is None or self._held[0] != os.getpid():
            self._held = os.getpid(), _Reader(self._index)
        return self._held[1]

    def _check_media(self) -> None:
        """Whether there are images and depth where they are asked for, by the first frame."""
        asked = [key for key in ("image", "depth", "task") if key in self.keys]
        if asked and (self.root / EXPORT).exists():
            raise UsageError(
                f"{self.root}: is an export, of which LeRobotOccupancyDataset reads images, depth "
                f"and tasks; take that one, or leave {', '.join(asked)} out of keys."
            )
        for key, files in {"image": ("rgb", "video"), "depth": ("depth",)}.items():
            places = [_place(self.root, self.episodes[0], file, 0) for file in files]
            if key in self.keys and not any(place.is_file() for place in places):
                raise UsageError(
                    f"{self.root}: has no {key} of {self.episodes[0]}; build it with --media copy "
                    f"from a source that has them, or leave {key!r} out of keys."
                )

    def _camera(self, reader: _Reader, key: str, number: int) -> torch.Tensor:
        """What the shards hold of a frame."""
        shape, cells = self.grid.shape, self.grid.cells
        if key in ("occupancy", "dynamic"):
            found = reader.occupied(number) if key == "occupancy" else reader.dynamic(number)
            if not self.dense:
                return torch.from_numpy(_indices(found, shape))
            dense = np.zeros(cells, bool)
            dense[found] = True
            return torch.from_numpy(dense.reshape(shape))
        if key == "mask":
            packed = reader.observed(number)
            if not self.dense:
                return torch.from_numpy(packed.copy())
            return torch.from_numpy(np.unpackbits(packed, count=cells).view(bool).reshape(shape))
        pose, intrinsics = reader.camera(number)
        return torch.from_numpy((pose if key == "pose" else intrinsics).copy())

    def _history(self, reader: _Reader, number: int, frame: int) -> dict[str, torch.Tensor]:
        """The past frames, nearest first, whichever of them there are."""
        count, shape, step = self.history_len, self.grid.shape, self.history_step
        before = past_frames(frame, count, step)
        poses = np.tile(np.eye(4, dtype=np.float32), (count, 1, 1))
        past = []
        if before:
            camera_from_world = np.linalg.inv(reader.camera(number)[0].astype(np.float64))
        for h, past_frame in enumerate(before):
            item = number - frame + past_frame
            motion = camera_from_world @ reader.camera(item)[0]
            cells = reader.occupied(item)
            past.append(moved(cells, motion, self.grid) if self.align_history else cells)
            poses[h] = motion
        if self.dense:
            history = np.zeros((count, self.grid.cells), bool)
            for dense, cells in zip(history, past, strict=False):
                dense[cells] = True
            stacked = torch.from_numpy(history.reshape(count, *shape))
        else:
            numbered = [
                np.insert(_indices(cells, shape), 0, h, axis=1) for h, cells in enumerate(past)
            ]
            stacked = torch.from_numpy(np.concatenate([np.zeros((0, 4), np.int32), *numbered]))
        return {
            "history": stacked,
            "history_valid": torch.arange(count) < len(before),
            "history_pose": torch.from_numpy(poses),
        }


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch of sparse items, for a DataLoader's `collate_fn`; dense ones it stacks as usual.

    Sparse "occupancy" and "dynamic" become (n, 4) int32, rows (b, i, j, k) of item b, and "history"
    (n, 5), rows (b, h, i, j, k), as libraries of sparse convolution take them. So do the cells of
    LeRobotOccupancyDataset, by the names that they have there.
    """
    named = [load_schema(SCHEMA).folder(file) for file in ("visible", "dynamic")]
    batch, sparse = {}, ("occupancy", "dynamic", "history", *named)
    for key in items[0]:
        values = [item[key] for item in items]
        if key in sparse and values[0].ndim == 2:
            numbered = [
                torch.nn.functional.pad(rows, (1, 0), value=b) for b, rows in enumerate(values)
            ]
            batch[key] = torch.cat(numbered)
        else:
            batch[key] = default_collate(values)
    return batch


def _indices(cells: NDArray[np.int32], shape: tuple[int, int, int]) -> NDArray[np.int32]:
    """(n,) flat numbers to (n, 3) cells (i, j, k)."""
    return np.stack(np.unravel_index(cells, shape), axis=-1).astype(np.int32)


# Where the dataset is


def _folder(source: str | Path, keys: Sequence[str], revision: str | None) -> Path:
    """The dataset's folder, fetched where `source` is a name on the Hub."""
    if Path(source).is_dir():
        return Path(source)
    if isinstance(source, str) and re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
        return _fetched(source, keys, revision)
    raise UsageError(
        f"{source}: is not a folder; give the one that occgen-hub build wrote, or a dataset on the "
        "Hub as org/name."
    )


def _fetched(repo_id: str, keys: Sequence[str], revision: str | None) -> Path:
    """A dataset on the Hub in its cache, as far as `keys` need it."""
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    check_sendable()
    patterns = [f"{INDEX}/*.parquet", f"{FOLDER}/*.parquet"]
    patterns += [*(_pattern(file) for key in keys for file in _files(key))]
    try:
        folder = snapshot_download(
            repo_id, repo_type="dataset", revision=revision, allow_patterns=patterns
        )
    except (httpx.HTTPError, OSError, HFValidationError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:160].rstrip(".")
        raise UsageError(
            f"{repo_id}: is no folder here, and cannot be had from the Hub ({said}); check the "
            "name, the revision and the network."
        ) from error
    return Path(folder)


def _files(key: str) -> tuple[str, ...]:
    """The schema's files, besides the shards, that a key of an item is read from."""
    needed = {"image": ("record", "rgb", "video"), "depth": ("record", "depth")}
    return {**needed, "task": ("record", "tasks", "frames")}.get(key, ())


def _pattern(file: str) -> str:
    """All of a file of the schema, for the Hub."""
    schema = load_schema(SCHEMA)
    path = schema.files[file].path
    return "*/" + path.format(chunk=schema.chunk, episode_index=schema.episode_index, frame="*")


def _place(root: Path, episode: str, file: str, frame: int | None = None) -> Path:
    return root / episode / load_schema(SCHEMA).path(file, frame)


# What is in it


@dataclass(frozen=True)
class _Index:
    """Where each frame is. Item n is in the last row group that starts at or before it.

    group_starts: (groups + 1,) int64; groups: (groups, 2) int32, the number of the shard and of the
    row group in it; the others as OccupancyDataset has them.
    """

    root: Path
    shards: tuple[Path, ...]
    grid: Grid
    episodes: tuple[str, ...]
    starts: NDArray[np.int64]
    group_starts: NDArray[np.int64]
    groups: NDArray[np.int32]


def _indexed(root: Path, media: bool) -> _Index:
    """Read the index, and no other file. Of a dataset that is partly here, the episodes that are.

    media: whether the folders of the episodes have to be here as well.
    """
    columns = ["episode", "scene", "frames", "shape", "voxel_size", "pc_range", "group_rows"]
    columns += ["shards", "shard_starts", "row_groups"]
    table = read_index(root, columns)
    if not table.num_rows:
        raise UsageError(
            f"{root}: has no index; run occgen-hub finalize on it, or occgen-hub build into it "
            "again."
        )
    table = table.filter(pc.greater(table["group_rows"], 0))
    if not table.num_rows:
        raise UsageError(
            f"{root}: has no occupancy as Parquet; run occgen-hub build into it again, without "
            "--no-parquet-occupancy."
        )
    table = table.filter(pa.array(_are_here(root, table, media))).combine_chunks()
    if not table.num_rows:
        raise UsageError(
            f"{root}: has an index, but the files of no episode are here; fetch them or, where it "
            "was built, run occgen-hub finalize on it."
        )
    grid = _grid(root, table)
    frames = table["frames"].to_numpy()
    try:
        names, groups, sizes = _row_groups(table, frames)
    except ValueError as error:
        raise DatasetError(root / INDEX, str(error), FINALIZE) from None
    episodes = tuple(table["episode"].to_pylist())
    starts, group_starts = (np.cumsum([0, *v], dtype=np.int64) for v in (frames, sizes))
    paths = tuple(root / name for name in names)
    return _Index(root, paths, grid, episodes, starts, group_starts, groups)


def _are_here(root: Path, table: pa.Table, media: bool) -> list[bool]:
    """Whether each episode's shards are on disk and, with `media`, its folder is."""
    lists = table["shards"].to_pylist()
    there = {name: (root / name).exists() for name in {name for names in lists for name in names}}
    here = [all(there[name] for name in names) for names in lists]
    if media:
        scenes = {scene: _folders(root / scene) for scene in set(table["scene"].to_pylist())}
        for n, row in enumerate(table["episode"].to_pylist()):
            scene, _, name = row.rpartition("/")
            here[n] = here[n] and name in scenes[scene]
    return here


def _folders(folder: Path) -> frozenset[str]:
    try:
        return frozenset(path.name for path in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return frozenset()


def _row_groups(
    table: pa.Table, frames: NDArray[np.int64]
) -> tuple[list[str], NDArray[np.int32], NDArray[np.int64]]:
    """The shards; (groups, 2) int32, the shard and its row group of each; (groups,) their rows.

    Raises ValueError where frames are not all in row groups.
    """
    lists = table["shards"].combine_chunks()
    pieces = np.diff(lists.offsets.to_numpy())  # Of each episode.
    names, numbers = np.unique(
        lists.flatten().to_numpy(zero_copy_only=False).astype(str), return_inverse=True
    )
    columns = [table[name].combine_chunks() for name in ("shard_starts", "row_groups")]
    if not all(np.array_equal(np.diff(c.offsets.to_numpy()), pieces) for c in columns):
        raise ValueError("its lists of shards and row groups are of unequal length")
    starts, first = (column.flatten().to_numpy() for column in columns)
    ends = np.cumsum(pieces)
    if (pieces < 1).any() or (frames < 1).any() or starts[ends - pieces].any() or (first < 0).any():
        raise ValueError("it has an episode without frames")
    stops = np.append(starts[1:], 0)
    stops[ends - 1] = frames
    per_group = np.repeat(table["group_rows"].to_numpy(), pieces)
    if (stops <= starts).any() or (stops - starts > MAX_SHARD_ROWS).any():
        raise ValueError("its frames are not in order")
    counts = -(-(stops - starts) // per_group)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    groups = np.stack(
        [np.repeat(numbers.reshape(-1), counts), np.repeat(first, counts) + within], 1
    )
    sizes = np.repeat(per_group, counts)
    last = np.cumsum(counts) - 1
    sizes[last] = stops - starts - (counts - 1) * per_group
    if sizes.max() > MAX_GROUP_ROWS:
        raise ValueError("it has row groups larger than any of ours")
    return names.tolist(), groups.astype(np.int32), sizes


def _grid(root: Path, table: pa.Table) -> Grid:
    """The grid of all episodes; raises DatasetError where it is none, or they have several."""
    columns = [table[name].to_pylist() for name in ("shape", "voxel_size", "pc_range")]
    first, *others = {(*shape, size, *low) for shape, size, low in zip(*columns, strict=True)}
    if others:
        problem = "has episodes of several grids, which no batch can hold together"
        raise DatasetError(root / INDEX, problem, "build the whole dataset with one configuration")
    shape, (size, *low) = first[:3], first[3:]
    sound = len(first) == 10 and np.isfinite([size, *low]).all() and size > 0 and min(shape) > 0
    if not sound:
        raise DatasetError(root / INDEX, "does not describe a grid", FINALIZE)
    grid = Grid((*low[:3],), size, tuple(int(n) for n in shape))  # type: ignore[arg-type]  # three
    if grid.cells > MAX_CELLS:
        problem = f"has a grid of more than {MAX_CELLS} cells"
        raise DatasetError(root / INDEX, problem, FINALIZE)
    return grid


def _open(path: Path) -> pq.ParquetFile:
    """A shard, its columns looked at; raises ValueError and what Arrow does when it is none."""
    with opened(path):  # No pipe, which would block.
        try:
            file = pq.ParquetFile(path, read_dictionary=["episode"])
        except KeyError as error:
            raise ValueError("it has no column episode") from error
    if file.metadata.num_rows > MAX_SHARD_ROWS:
        raise ValueError(f"it claims {file.metadata.num_rows} rows")
    types = plain(file.schema_arrow.empty_table()).schema
    for name, kind in TYPES.items():
        if name not in types.names or types.field(name).type != kind:
            raise ValueError(f"it has no column {name} of {kind}")
    if "dynamic" in types.names and types.field("dynamic").type != DYNAMIC:
        raise ValueError(f"its column dynamic is not of {DYNAMIC}")
    # Raises where asking damaged metadata would abort.
    file.scan_contents(["episode", "frame_index"])
    for n in range(file.num_row_groups):
        group = file.metadata.row_group(n)
        if group.num_rows > MAX_GROUP_ROWS or group.total_byte_size > MAX_GROUP_BYTES:
            raise ValueError(f"row group {n} is larger than any of ours")
    return file


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Has what goes wrong in reading a shard name it."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        text = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        problem = f"is not a shard that can be read ({text.rstrip('.')})"
        raise DatasetError(path, problem, f"fetch it again, or {REMAKE}") from None
    except DatasetError:
        raise
    except SourceError as error:
        raise DatasetError(path, error.problem, f"fetch it again, or {REMAKE}") from None


class _Reader:
    """What one process has open and decoded, a bounded number of each; not for threads."""

    def __init__(self, index: _Index) -> None:
        self._index = index
        self._file = lru_cache(MAX_FILES)(_open)
        self._held = {
            name: lru_cache(count)(getattr(self, f"_read_{name}")) for name, count in HELD.items()
        }
        self._is_checked = lru_cache(MAX_EPISODES)(self._check_group)
        self._tasks = lru_cache(MAX_EPISODES)(self._read_tasks)
        self._image_size = lru_cache(MAX_EPISODES)(self._read_image_size)
        self._video = lru_cache(MAX_VIDEOS)(self._open_video)
        _keep_freed_memory(4 * index.grid.cells)

    def occupied(self, number: int) -> NDArray[np.int32]:
        """(n,) int32 flat numbers of the occupied visible cells of item `number`, ascending."""
        with self._row("occupied", number) as (lists, row):
            return self._cells("occupied", lists, row)

    def dynamic(self, number: int) -> NDArray[np.int32]:
        """(n,) int32 flat numbers of those of them that hold something that moves, ascending."""
        with self._row("dynamic", number) as (lists, row):
            return self._cells("dynamic", lists, row)

    def _cells(
        self, name: str, lists: tuple[NDArray[np.int32], NDArray[np.int32]], row: int
    ) -> NDArray[np.int32]:
        """A row of a column of cells; raises ValueError where they are not sorted or outside."""
        ends, cells = lists
        found = cells[ends[row] : ends[row + 1]]
        inside = not len(found) or 0 <= found[0] <= found[-1] < self._index.grid.cells
        if not (inside and (found[1:] > found[:-1]).all()):
            raise ValueError(f"{name} cells are out of order or outside the grid")
        return found

    def observed(self, number: int) -> NDArray[np.uint8]:
        """(ceil(cells / 8),) uint8 packed mask of item `number`."""
        with self._row("observed", number) as (packed, row):
            mask: NDArray[np.uint8] = packed[row]
            return mask

    def camera(self, number: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(4, 4) float32 world_from_camera and (3, 3) float32 intrinsics of item `number`."""
        with self._row("camera", number) as ((poses, intrinsics), row):
            return poses[row], intrinsics[row]

    def image(self, episode: str, frame: int) -> torch.Tensor:
        """(3, H, W) uint8 RGB."""
        path = _place(self._index.root, episode, "rgb", frame)
        if path.parent.is_dir():  # Then a frame that is missing is a fault.
            pixels = read_rgb(path, self._image_size(episode))
        else:
            pixels = self._video(episode)(frame)
        return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))

    def depth(self, episode: str, frame: int) -> torch.Tensor:
        """(H, W) float32 metres."""
        path = _place(self._index.root, episode, "depth", frame)
        units = read_depth(path, self._image_size(episode))
        return torch.from_numpy((units / 10_000).astype(np.float32))

    def task(self, episode: str, frame: int) -> str:
        """The instruction in words."""
        tasks, index = self._tasks(episode)
        if not (frame < len(index) and 0 <= index[frame] < len(tasks)):
            path = _place(self._index.root, episode, "tasks")
            raise DatasetError(path, f"has no task of frame {frame}", REBUILD)
        return tasks[index[frame]]

    @contextmanager
    def _row(self, name: str, number: int) -> Iterator[tuple[Any, int]]:
        """The decoded columns of the row group that item `number` is in, and its row there."""
        index = self._index
        group = bisect_right(index.group_starts, number) - 1
        shard, place = index.groups[group].tolist()
        with _reading(index.shards[shard]):
            rows = int(index.group_starts[group + 1] - index.group_starts[group])
            self._is_checked(group)
            yield self._held[name](shard, place, rows), number - int(index.group_starts[group])

    def _check_group(self, group: int) -> bool:
        """Raise ValueError unless a row group has the frames that the index says."""
        index = self._index
        shard, place = index.groups[group].tolist()
        first, end = index.group_starts[group : group + 2].tolist()
        episode = bisect_right(index.starts, first) - 1
        file = self._file(index.shards[shard])
        names = ["episode", "frame_index"]
        if place >= file.num_row_groups:
            raise ValueError(f"it has no row group {place}, as the index says")
        table = file.read_row_group(place, names, use_threads=False).to_pydict()
        frame = first - int(index.starts[episode])
        frames = [*range(frame, frame + end - first)]
        if table != {"episode": [index.episodes[episode]] * len(frames), "frame_index": frames}:
            name = index.episodes[episode][:80]
            problem = f"row group {place} is not of frames {frame} to {frames[-1]} of {name}"
            raise ValueError(f"{problem}, as the index says")
        return True

    def _columns(self, shard: int, group: int, rows: int, names: list[str]) -> list[pa.Array]:
        """Columns of a row group, each in one piece; raises ValueError where a value is missing."""
        table = plain(
            self._file(self._index.shards[shard]).read_row_group(group, names, use_threads=False)
        )
        arrays = [table[name].combine_chunks() for name in names]
        if table.num_rows != rows or any(array.null_count for array in arrays):
            raise ValueError(f"row group {group} is not whole")
        return arrays

    def _read_occupied(
        self, shard: int, group: int, rows: int
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        (lists,) = self._columns(shard, group, rows, ["occupied"])
        return lists.offsets.to_numpy(), lists.values.to_numpy()

    def _read_dynamic(
        self, shard: int, group: int, rows: int
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        if "dynamic" not in self._file(self._index.shards[shard]).schema_arrow.names:
            return np.zeros(rows + 1, np.int32), np.zeros(0, np.int32)
        (lists,) = self._columns(shard, group, rows, ["dynamic"])
        return lists.offsets.to_numpy(), lists.values.to_numpy()

    def _read_observed(self, shard: int, group: int, rows: int) -> NDArray[np.uint8]:
        (masks,) = self._columns(shard, group, rows, ["observed"])
        _, offsets, content = masks.buffers()
        ends = np.frombuffer(offsets, np.int32)[masks.offset : masks.offset + rows + 1]
        width = -(-self._index.grid.cells // 8)
        if not (np.diff(ends) == width).all():
            raise ValueError(f"a mask is not of the grid's {self._index.grid.cells} cells")
        return np.frombuffer(content, np.uint8)[ends[0] : ends[-1]].reshape(rows, width)

    def _read_camera(
        self, shard: int, group: int, rows: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        names = ["camera_extrinsic", "camera_intrinsic"]
        arrays = self._columns(shard, group, rows, names)
        poses, K = (FEATURES[n].to_numpy(a) for n, a in zip(names, arrays, strict=True))
        if not (np.isfinite(poses).all() and np.isfinite(K).all()):
            raise ValueError("a pose or its intrinsics are not finite")
        if rigidity_error(poses).max() > RIGID:
            raise ValueError("a pose is not rigid")
        return poses, K

    def _read_tasks(self, episode: str) -> tuple[list[str], list[int]]:
        trajectory = Trajectory.open(self._index.root / episode)
        return trajectory.tasks(), trajectory.column("task_index").tolist()

    def _read_image_size(self, episode: str) -> tuple[int, int]:
        return Trajectory.open(self._index.root / episode).image_size

    def _open_video(self, episode: str) -> SeekingVideo:
        path = _place(self._index.root, episode, "video")
        return SeekingVideo(path, self._image_size(episode))


def _keep_freed_memory(size: int) -> None:
    """Have the C library keep some `size` bytes that are freed, for the next item.

    glibc gives freed memory back to the system from twice the largest block on that it saw freed,
    up to 32 MB; to have it anew for each dense item takes a third of the item's time.
    """
    block = np.empty(min(size, 31 << 20), np.uint8)
    del block
