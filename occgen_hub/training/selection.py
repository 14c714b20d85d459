"""The frames of a dataset and their locations, from its index only."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from occgen_hub.config import MAX_CELLS
from occgen_hub.errors import DatasetError, UsageError
from occgen_hub.index import FINALIZE, INDEX, read_index
from occgen_hub.loading import EXPORT, built
from occgen_hub.media import MAX_PIXELS
from occgen_hub.occupancy.grid import Grid
from occgen_hub.training.shard_file import MAX_GROUP_ROWS, MAX_SHARD_ROWS, open_shard
from occgen_hub.training.source import Source

SPLITS = ("train", "validation")

MEDIA = ("image", "depth", "task")
"""Keys of an item that are read from the trajectories' folders if the shards lack them."""


@dataclass(frozen=True)
class Selection:
    """The requested episodes of a dataset.

    episodes: their ids; scenes: ids of scenes; split: "train" or "validation", as in the index;
    min_quality: minimum share, 0 to 1, of an episode's measured points that no other frame saw
    through; episodes without that figure are left out then. None does not restrict.
    """

    episodes: Collection[str] | None = None
    scenes: Collection[str] | None = None
    split: str | None = None
    min_quality: float | None = None

    def __post_init__(self) -> None:
        for name in ("episodes", "scenes"):
            if isinstance(getattr(self, name), str):
                raise UsageError(f"{name}: {getattr(self, name)} is not a list of names.")
        if self.split not in (None, *SPLITS):
            raise UsageError(f"split: {self.split!r} is not a split; give {' or '.join(SPLITS)}.")
        if self.min_quality is not None and not 0 <= self.min_quality <= 1:
            raise UsageError(f"min_quality: {self.min_quality} is not between 0 and 1.")

    def of(self, table: pa.Table, root: Path) -> pa.Table:
        """The requested rows of an index. Raises UsageError if there are none."""
        keep = np.ones(table.num_rows, bool)
        for column, wanted in (("episode", self.episodes), ("scene", self.scenes)):
            if wanted is None:
                continue
            names = pa.array(sorted({str(name) for name in wanted}), pa.string())
            known = pc.is_in(names, value_set=table[column].combine_chunks())
            if unknown := names.filter(pc.invert(known)).to_pylist():
                raise UsageError(
                    f"{root}: has no {column} {unknown[0]}; give names as <group>/<scene>"
                    f"{'/<trajectory>' if column == 'episode' else ''}."
                )
            keep &= pc.is_in(table[column], value_set=names).to_numpy()
        if self.split is not None:
            keep &= pc.equal(table["split"], self.split).to_numpy()
        if self.min_quality is not None:
            quality = pc.fill_null(table["quality"], -1.0)
            keep &= pc.greater_equal(quality, self.min_quality).to_numpy()
        if table.num_rows and not keep.any():
            remedy = "choose others with episodes or scenes"
            if self.split is not None:
                remedy = (
                    f"each scene (there are {len(table['scene'].unique())}) is in one split only: "
                    "build more scenes, or hold out frames with torch.utils.data.Subset"
                )
            raise UsageError(
                f"{root}: none of its {table.num_rows} episodes is selected by "
                f"{self.described()}; {remedy}."
            )
        return table.filter(pa.array(keep))

    def described(self) -> str:
        """The selection in words."""
        parts = [f"{len(self.episodes)} episodes"] if self.episodes is not None else []
        parts += [f"{len(self.scenes)} scenes"] if self.scenes is not None else []
        parts += [f"split {self.split}"] if self.split is not None else []
        if self.min_quality is not None:
            parts.append(f"quality of {self.min_quality} or more")
        return ", ".join(parts)


@dataclass(frozen=True)
class FrameIndex:
    """The location of each frame. Item n is in the last row group that starts at or before it.

    shards: the names of the Parquet files; grid: of all frames; episodes: their ids; starts:
    (episodes + 1,) int64, the number of each one's first item; image_sizes: (episodes, 2) int64,
    width and height of the recorded images, pixels; group_starts: (groups + 1,) int64; groups:
    (groups, 2) int32, the number of the shard and of the row group in it; in_shards: which of MEDIA
    the shards have; taxonomy: of the labels, None without labels.
    """

    source: Source
    shards: tuple[str, ...]
    grid: Grid
    episodes: tuple[str, ...]
    starts: NDArray[np.int64]
    image_sizes: NDArray[np.int64]
    group_starts: NDArray[np.int64]
    groups: NDArray[np.int32]
    in_shards: frozenset[str]
    taxonomy: str | None = None

    def located(self, number: int) -> tuple[int, int]:
        """The number of the episode of item `number`, and its frame there."""
        episode = bisect_right(self.starts, number) - 1
        return episode, number - int(self.starts[episode])

    def group_of(self, number: int) -> int:
        """The row group with item `number`."""
        return bisect_right(self.group_starts, number) - 1

    def image_size(self, episode: int) -> tuple[int, int]:
        """(width, height) of an episode's recorded images, pixels."""
        width, height = self.image_sizes[episode].tolist()
        return width, height


def _remedy(root: Path) -> str:
    """What to do about a folder without an index. Raises UsageError if no build wrote it."""
    if built(root) == [root]:
        return f"it is one trajectory: give the whole dataset, {root.resolve().parents[2]}"
    return "run occgen-hub finalize on it, or occgen-hub build into it again"


def frame_index(source: Source, selection: Selection, keys: Sequence[str]) -> FrameIndex:
    """Read the index. If a dataset is only partly here, the result has only those episodes.

    keys: of the items; if the shards lack a requested image, depth or task, the folders of the
    episodes have to be here as well. Raises UsageError if there is nothing to read, and
    DatasetError if the index is damaged.
    """
    root = source.root
    columns = ["episode", "scene", "frames", "shape", "voxel_size", "pc_range", "group_rows"]
    columns += [
        "shards",
        "shard_starts",
        "row_groups",
        "image_size",
        "split",
        "quality",
        "taxonomy",
    ]
    table = read_index(root, columns)
    if not table.num_rows:
        raise UsageError(f"{root}: has no index; {_remedy(root)}.")
    table = table.filter(pc.greater(table["group_rows"], 0))
    if not table.num_rows:
        raise UsageError(
            f"{root}: has no occupancy as Parquet; run occgen-hub build into it again, without "
            "--no-parquet-occupancy."
        )
    table = selection.of(table, root).combine_chunks()
    here = _shards_here(source, table)
    table = table.filter(pa.array(here)).combine_chunks()
    in_shards: frozenset[str] = frozenset()
    media = [key for key in MEDIA if key in keys]
    if table.num_rows and media:
        shard = table["shards"][0].as_py()[0]
        in_shards = frozenset(MEDIA) & {*open_shard(source, shard).schema_arrow.names}
        folders = source.address is None and not (root / EXPORT).exists()
        if not in_shards.issuperset(media) and folders:
            table = table.filter(pa.array(_folders_here(root, table))).combine_chunks()
    if not table.num_rows:
        raise UsageError(
            f"{root}: has an index, but no files of its episodes; download them or, where it was "
            "built, run occgen-hub finalize on it."
        )
    frames = table["frames"].to_numpy()
    try:
        names, groups, sizes = _row_groups(table, frames)
        image_sizes = _image_sizes(table)
    except ValueError as error:
        raise DatasetError(root / INDEX, str(error), FINALIZE) from None
    starts, group_starts = (np.cumsum([0, *v], dtype=np.int64) for v in (frames, sizes))
    return FrameIndex(
        source,
        tuple(names),
        _grid(root, table),
        tuple(table["episode"].to_pylist()),
        starts,
        image_sizes,
        group_starts,
        groups,
        in_shards,
        _taxonomy(root, table),
    )


def _taxonomy(root: Path, table: pa.Table) -> str | None:
    """The taxonomy of the episodes with labels. Raises UsageError if there are several."""
    names = sorted(set(table["taxonomy"].to_pylist()) - {None})
    if len(names) > 1:
        raise UsageError(
            f"{root}: has labels of several taxonomies ({', '.join(names)}); choose episodes or "
            "scenes with one."
        )
    return names[0] if names else None


def _shards_here(source: Source, table: pa.Table) -> list[bool]:
    """Whether each episode's shards are available. On the Hub, all of them are."""
    if source.address is not None:
        return [True] * table.num_rows
    lists = table["shards"].to_pylist()
    names = {name for found in lists for name in found}
    there = {name: (source.root / name).exists() for name in names}
    return [all(there[name] for name in found) for found in lists]


def _folders_here(root: Path, table: pa.Table) -> list[bool]:
    """Whether each episode's folder is on disk."""
    scenes = {scene: _folders(root / scene) for scene in set(table["scene"].to_pylist())}
    rows = [row.rpartition("/") for row in table["episode"].to_pylist()]
    return [name in scenes[scene] for scene, _, name in rows]


def _image_sizes(table: pa.Table) -> NDArray[np.int64]:
    """(episodes, 2) width and height. Raises ValueError if they are invalid."""
    sizes = table["image_size"].to_pylist()
    if not all(len(s) == 2 and min(s) > 0 and s[0] * s[1] <= MAX_PIXELS for s in sizes):
        raise ValueError("it has an episode without a valid image_size")
    return np.array(sizes, np.int64)


def _folders(folder: Path) -> frozenset[str]:
    try:
        return frozenset(path.name for path in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return frozenset()


def _row_groups(
    table: pa.Table, frames: NDArray[np.int64]
) -> tuple[list[str], NDArray[np.int32], NDArray[np.int64]]:
    """The shards; (groups, 2) int32, the shard and row group of each; (groups,) their rows.

    Raises ValueError unless all frames are in row groups.
    """
    lists = table["shards"].combine_chunks()
    pieces = np.diff(lists.offsets.to_numpy())  # For each episode.
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
    if per_group.max() > MAX_GROUP_ROWS:
        raise ValueError(f"it has row groups of more than {MAX_GROUP_ROWS} rows")
    return names.tolist(), groups.astype(np.int32), sizes


def _grid(root: Path, table: pa.Table) -> Grid:
    """The grid of all episodes. Raises DatasetError if it is invalid, or there are several."""
    if not np.isfinite(table["voxel_size"].to_numpy()).all():
        raise DatasetError(root / INDEX, "does not describe a grid", FINALIZE)
    columns = [table[name].to_pylist() for name in ("shape", "voxel_size", "pc_range")]
    first, *others = {(*shape, size, *low) for shape, size, low in zip(*columns, strict=True)}
    for numbers in (first, *others):
        if not (len(numbers) == 10 and np.isfinite(numbers).all() and min(numbers[:4]) > 0):
            raise DatasetError(root / INDEX, "does not describe a grid", FINALIZE)
    if others:
        problem = "has episodes of several grids, which do not fit into one batch"
        raise DatasetError(root / INDEX, problem, "build the whole dataset with one configuration")
    shape, (size, *low) = first[:3], first[3:]
    grid = Grid((*low[:3],), size, tuple(int(n) for n in shape))  # type: ignore[arg-type]  # three
    if grid.cells > MAX_CELLS:
        problem = f"has a grid of more than {MAX_CELLS} cells"
        raise DatasetError(root / INDEX, problem, FINALIZE)
    return grid
