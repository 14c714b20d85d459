"""A dataset's occupancy as Parquet: a row per frame, in files that the Hub can stream.

They have the content of the trajectories' npz files, for readers with only `datasets` or pyarrow. A
shard belongs to one scene: `occupancy/BB/SCENE-NNN.parquet`, where BB is the scene's bucket (see
`index`). It depends only on the trajectories of that scene, so a dataset can grow scene by scene
without changing existing shards.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from itertools import batched, islice, pairwise, repeat
from math import prod
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from occgen_hub.atomic import atomic_file
from occgen_hub.errors import DatasetError, SourceError
from occgen_hub.files import (
    MAX_BUILT_BYTES,
    PARQUET_DAMAGE,
    check_written_by_us,
    dataset_files,
    dump_json,
    has_content,
    parquet_file,
    parquet_problem,
    parquet_sources,
    plain,
    plain_schema,
    printable,
    read_bytes,
    remove_bucket_files,
    sha256,
)
from occgen_hub.index import (
    INDEX,
    Entry,
    bucket,
    describe,
    entries,
    file_stem,
    part_bytes,
    parts,
    read_entries,
    read_index,
    read_part,
    write_index,
)
from occgen_hub.loading import REBUILD, Trajectory, have_labels, npz_array, trajectories
from occgen_hub.media import encode_jpeg
from occgen_hub.scene_states import FOLDER as STATES
from occgen_hub.scene_states import check_states, states_file, states_files, write_states
from occgen_hub.schema import Feature, plain_arrow, plain_texts
from occgen_hub.taxonomy import UNLABELLED

FOLDER = "occupancy"
OLD_PATTERN = "train-*-of-*.parquet"
"""The shards of earlier versions, which `write_shards` replaces."""
REMAKE = "remove it and run the build again"

GROUP_BYTES = 5_000_000
GROUP_ROWS = 32
"""Limits of a row group: bytes of packed masks, and frames. Reading one frame reads its whole row
group: 8 frames at the default grid, in 2 ms."""

RUN_FINALIZE = "run occgen-hub finalize on the dataset"

SHARD_BYTES = 1 << 30
"""Bytes of npz files per shard. They make a shard of 200 to 350 MB."""

FEATURES = {
    "episode": Feature(dtype="string", shape=(1,)),
    "scene": Feature(dtype="string", shape=(1,)),
    "frame_index": Feature(dtype="int64", shape=(1,)),
    "shape": Feature(dtype="int32", shape=(3,)),
    "voxel_size": Feature(dtype="float64", shape=(1,)),
    "pc_range": Feature(dtype="float64", shape=(6,)),
    "camera_extrinsic": Feature(dtype="float32", shape=(4, 4)),
    "camera_intrinsic": Feature(dtype="float32", shape=(3, 3)),
}
"""The columns of fixed shape. `occupied`, `dynamic` and `observed` come before `shape`."""

_KEY = b"occgen"
_FORMAT = 3
"""Format 1 had no column `dynamic`. Row groups of format 2 could span two episodes."""


@dataclass(frozen=True)
class Piece:
    """Frames `start` to `stop` of a trajectory, all in one shard.

    path: the trajectory's folder; npz: bytes of its npz files for these frames; group_rows: frames
    per row group; sha256: digest of the sources of the rows; images: whether there are columns of
    images, depth and tasks; labels: whether there are classes.
    """

    path: Path
    episode: str
    start: int
    stop: int
    npz: int
    group_rows: int
    sha256: str
    images: bool = False
    labels: bool = False


class Row(NamedTuple):
    """A row of a shard: a frame."""

    episode: str
    grid: dict[str, Any]
    frame: int
    occupied: NDArray[np.integer]
    dynamic: NDArray[np.integer]
    observed: NDArray[np.uint8]
    extrinsic: NDArray[np.float32]
    intrinsic: NDArray[np.float32]
    media: tuple[bytes | None, bytes | None, str] | None = None
    """The image (JPEG) and depth (PNG), or None, and the task as text."""
    labels: NDArray[np.uint8] | None = None
    """The classes of the occupied cells, if the shard has any."""


@dataclass(frozen=True)
class Shard:
    """A Parquet file of one scene: its path in the dataset and its pieces."""

    name: str
    pieces: list[Piece]


def shards(root: Path) -> list[Path]:
    """The sorted shards of a dataset on disk.

    Raises DatasetError if one of them, or their folder, is a link out of the dataset.
    """
    return dataset_files(root, FOLDER)


def _own_shards(root: Path) -> list[Path]:
    """Shards that may be replaced, including those of earlier versions.

    Raises DatasetError for a file that occgen-hub did not write. Unreadable files may be its own.
    """
    found = [*shards(root), *sorted((root / FOLDER).glob(OLD_PATTERN))]
    check_written_by_us(found, _KEY, "a shard")
    return found


def write_shards(
    root: Path,
    workers: int = 1,
    *,
    out: Path | None = None,
    leave_out: Collection[Path] = (),
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    drop_missing: bool = False,
    images: bool = False,
    only: Collection[str] | None = None,
) -> int:
    """Update occupancy, index and scene_states below `out`, or `root`, from the trajectories.

    The shards of a scene depend only on the trajectories of that scene. Shards that are up to date
    are kept; the result has the same bytes as a fresh start. Scenes of the index without
    trajectories below `root` are taken to be elsewhere, and keep their rows and shards. Returns
    the number of shards written. Raises DatasetError for a trajectory that cannot be read, and
    OSError.

    workers: shards written in parallel; leave_out: folders of trajectories to leave out; overwrite:
    whether to write shards that are up to date, too; shard_bytes: bytes of npz files per shard;
    drop_missing: whether to remove scenes without trajectories here from the index, with their
    shards; images: whether shards have columns of images, depth and tasks; only: the scenes to
    update, None for all.
    """
    out = root if out is None else out
    folder = out / FOLDER
    for partial in folder.rglob(".*.partial"):
        partial.unlink()
    known, trusted = _existing_entries(out)
    scenes = _scenes(root, leave_out, only)
    plan = [
        shard
        for scene, found in scenes.items()
        for shard in _plan(scene, _pieces(found, shard_bytes, images), shard_bytes)
    ]
    missing, digests = [], _digests(trusted)
    there = set(_own_shards(out))
    for shard in plan:
        place = out / shard.name
        if (
            overwrite
            or place not in there
            or parquet_sources(place, _KEY) != _describe(shard.pieces)
        ):
            missing.append((place, shard.pieces))
            digests.pop(shard.name, None)
    _write_all(missing, workers)
    kept = [] if drop_missing else _entries_of_other_scenes(known, scenes)
    rows = [
        describe(episode, path, trusted.get(episode))
        for found in scenes.values()
        for episode, path in found
    ]
    write_index(out, [*kept, *_with_shards(out, rows, plan, digests)])
    needed = {out / shard.name for shard in plan} | {out / n for row in kept for n in row.shards}
    remove_bucket_files(there - needed, folder)
    others = {row.scene for row in kept if row.shards}
    write_states(out, scenes, others, workers, overwrite=overwrite)
    return len(missing)


def remove_shards(root: Path) -> None:
    """Remove the shards of the scenes that are here, and update the index."""
    folder = root / FOLDER
    known, trusted = _existing_entries(root)
    scenes = _scenes(root, ())
    rows = [
        describe(episode, path, trusted.get(episode)).without_shards()
        for found in scenes.values()
        for episode, path in found
    ]
    kept = _entries_of_other_scenes(known, scenes)
    for path in folder.rglob(".*.partial"):
        path.unlink()
    own = set(_own_shards(root))
    write_index(root, [*kept, *rows])
    remove_bucket_files(own - {root / name for row in kept for name in row.shards}, folder)
    others = {root / states_file(row.scene) for row in kept}
    remove_bucket_files({*states_files(root)} - others, root / STATES)


def _existing_entries(out: Path) -> tuple[dict[str, Entry], dict[str, Entry]]:
    """All entries of the index, and the entries of parts that are byte for byte as written.

    Damaged parts are ignored. They are written again.
    """
    known: dict[str, Entry] = {}
    trusted: dict[str, Entry] = {}
    for path in parts(out):
        with suppress(DatasetError):
            rows = {row.episode: row for row in entries(read_part(path))}
            known |= rows
            trusted |= rows if has_content(path, part_bytes(rows.values())) else {}
    return known, trusted


def _entries_of_other_scenes(known: dict[str, Entry], scenes: Collection[str]) -> list[Entry]:
    """The entries of scenes without trajectories here."""
    return [row for row in known.values() if row.scene not in scenes]


def _digests(known: dict[str, Entry]) -> dict[str, str]:
    """The SHA-256 of each shard in the index."""
    return {
        name: digest
        for row in known.values()
        for name, digest in zip(row.shards, row.shard_sha256, strict=True)
    }


def _with_shards(
    out: Path, rows: Iterable[Entry], plan: Iterable[Shard], digests: dict[str, str]
) -> Iterator[Entry]:
    """The entries with the shards of their frames. digests: of shards that were not written."""
    places: dict[str, list[tuple[str, str, int, int]]] = {}
    for shard in plan:
        digest = digests.get(shard.name) or sha256(out / shard.name)
        group = 0
        for piece in shard.pieces:
            places.setdefault(piece.episode, []).append((shard.name, digest, piece.start, group))
            group += -(-(piece.stop - piece.start) // piece.group_rows)
    for row in rows:
        names, sums, starts, groups = zip(*places[row.episode], strict=True)
        yield replace(
            row,
            shards=names,
            shard_sha256=sums,
            shard_starts=starts,
            row_groups=groups,
            group_rows=group_rows(row.shape),
        )


def group_rows(shape: Sequence[int]) -> int:
    """The number of frames in a row group, for a grid of this shape."""
    return min(GROUP_ROWS, max(1, GROUP_BYTES // -(-prod(shape) // 8)))


# Planning


def _scenes(
    root: Path, leave_out: Collection[Path], only: Collection[str] | None = None
) -> dict[str, list[tuple[str, Path]]]:
    """The ids and folders of the trajectories of each scene, sorted."""
    places = [root] if only is None else [root / name for name in only]
    found = [path for place in places for path in trajectories(place) if path not in leave_out]
    scenes: dict[str, list[tuple[str, Path]]] = {}
    for name, path in sorted((p.relative_to(root).as_posix(), p) for p in found):
        episode = printable(name)
        scenes.setdefault(episode.rpartition("/")[0], []).append((episode, path))
    return dict(sorted(scenes.items()))


def _pieces(found: Sequence[tuple[str, Path]], shard_bytes: int, images: bool) -> Iterator[Piece]:
    """The trajectories of a scene, cut into equal pieces if they are too long for one shard."""
    labels = have_labels(path for _, path in found)
    for episode, path in found:
        trajectory = Trajectory.open(path)
        record, schema = trajectory.record, trajectory.schema
        keys = ("visible", "dynamic", "observed", "frames")
        sources = [record["files"].get(schema.path(key)) for key in keys]
        made_of = [sources, record["grid"]]
        if images:
            made_of += [record["files"], record["scene"]]
        if labels:
            made_of += [record["files"].get(schema.path("labels"))]
        digest = hashlib.sha256(dump_json(made_of).encode()).hexdigest()
        files = trajectory.file("visible"), trajectory.file("observed")
        frames = npz_array(files[1], "data").check("u", None, None).shape[0]
        size = sum(file.stat().st_size for file in files)
        ends = np.linspace(0, frames, -(-size // shard_bytes) + 1).astype(int).tolist()
        for start, stop in pairwise(ends):
            share = size * (stop - start) // max(frames, 1)
            rows = group_rows(trajectory.grid.shape)
            yield Piece(path, episode, start, stop, share, rows, digest, images, labels)


def _plan(scene: str, pieces: Iterable[Piece], shard_bytes: int) -> list[Shard]:
    """The shards of a scene. Each has as many pieces as fit, and at least one."""
    plan: list[list[Piece]] = []
    size = 0
    for piece in pieces:
        if not plan or size + piece.npz > shard_bytes:
            plan.append([])
            size = 0
        plan[-1].append(piece)
        size += piece.npz
    stem = f"{FOLDER}/{bucket(scene)}/{file_stem(scene)}"
    return [Shard(f"{stem}-{n:03d}.parquet", part) for n, part in enumerate(plan)]


def _describe(pieces: list[Piece]) -> dict[str, Any]:
    """The sources of a shard, as stored in its metadata."""
    origins = [
        {"episode": piece.episode, "frames": [piece.start, piece.stop], "sha256": piece.sha256}
        for piece in pieces
    ]
    return {"format": _FORMAT, "pieces": origins}


# Rows


def _rows(piece: Piece) -> Iterator[Row]:
    """The frames of a piece. Frames before it are skipped."""
    trajectory = Trajectory.open(piece.path)
    grid = trajectory.record["grid"]
    poses = trajectory.column(trajectory.schema.poses)
    intrinsics = trajectory.column(trajectory.schema.intrinsics)
    frames = zip(
        range(len(poses)),
        trajectory.visible_frames(),
        trajectory.dynamic_frames(),
        trajectory.observed_packed(),
        poses,
        intrinsics,
        strict=True,
    )
    media = _media(trajectory) if piece.images else None
    has_labels = piece.labels and trajectory.taxonomy is not None
    classes = islice(trajectory.label_frames(), piece.start, None) if has_labels else repeat(None)
    try:
        for row in islice(frames, piece.start, piece.stop):
            found = None if media is None else media(row[0])
            labels = next(classes)
            if piece.labels and labels is None:
                labels = np.full(len(row[1]), UNLABELLED, np.uint8)
            yield Row(piece.episode, grid, *row)._replace(media=found, labels=labels)
        if piece.stop == len(poses):
            next(frames, None)  # Detects files of unequal length.
    except ValueError:
        problem = f"does not have the {len(poses)} frames of the table"
        raise DatasetError(trajectory.file("visible"), problem, REBUILD) from None


def _media(trajectory: Trajectory) -> Callable[[int], tuple[bytes | None, bytes | None, str]]:
    """A function that returns a frame's image and depth as file contents, and its task as text."""
    images, has_depth = trajectory.images(), trajectory.file("depth", 0).parent.is_dir()
    has_images = trajectory.file("rgb", 0).parent.is_dir()
    tasks, index = trajectory.tasks(), trajectory.column("task_index")

    def read(frame: int) -> tuple[bytes | None, bytes | None, str]:
        if has_images:
            image: bytes | None = read_bytes(trajectory.file("rgb", frame))
        else:
            pixels = images(frame)
            image = None if pixels is None else encode_jpeg(pixels)
        depth = read_bytes(trajectory.file("depth", frame)) if has_depth else None
        if not 0 <= index[frame] < len(tasks):
            raise DatasetError(trajectory.file("tasks"), f"has no task of frame {frame}", REBUILD)
        return image, depth, printable(tasks[index[frame]])

    return read


IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
"""The type of the columns `image` and `depth`: images as `datasets` stores them."""


def column_names(*, images: bool, labels: bool) -> list[str]:
    """The columns of a shard with or without images and labels."""
    return list(_schema(images, labels).names)


def _schema(images: bool, labels: bool) -> pa.Schema:
    """The shards' columns, with the types that `datasets` gives them."""
    fields = [feature.arrow_field(name) for name, feature in FEATURES.items()]
    described = {name: feature.datasets_type() for name, feature in FEATURES.items()}
    number, data = ({"dtype": name, "_type": "Value"} for name in ("int32", "binary"))
    cells = {"feature": number, "_type": "List"}
    described |= {"occupied": cells, "dynamic": cells, "observed": data}
    fields[3:3] = [pa.field(name, pa.list_(pa.int32())) for name in ("occupied", "dynamic")]
    fields[5:5] = [pa.field("observed", pa.binary())]
    if labels:
        fields[6:6] = [pa.field("labels", pa.list_(pa.uint8()))]
        described["labels"] = {"feature": {"dtype": "uint8", "_type": "Value"}, "_type": "List"}
    if images:
        fields += [
            pa.field("image", IMAGE),
            pa.field("depth", IMAGE),
            pa.field("task", pa.string()),
        ]
        described |= {name: {"_type": "Image"} for name in ("image", "depth")}
        described["task"] = {"dtype": "string", "_type": "Value"}
    ordered = {field.name: described[field.name] for field in fields}
    return pa.schema(fields, {"huggingface": json.dumps({"info": {"features": ordered}})})


def _table(rows: tuple[Row, ...]) -> pa.Table:
    """A few frames as a table of the shards' schema."""
    columns: dict[str, Any] = {
        "episode": [row.episode for row in rows],
        "scene": [row.episode.rpartition("/")[0] for row in rows],
        "frame_index": [row.frame for row in rows],
        **{name: [row.grid[name] for row in rows] for name in ("shape", "voxel_size", "pc_range")},
        "camera_extrinsic": [row.extrinsic for row in rows],
        "camera_intrinsic": [row.intrinsic for row in rows],
    }
    arrays = {name: FEATURES[name].to_arrow(values) for name, values in columns.items()}
    arrays["occupied"] = _lists([row.occupied for row in rows])
    arrays["dynamic"] = _lists([row.dynamic for row in rows])
    arrays["observed"] = plain_texts(pa.binary(), [row.observed.tobytes() for row in rows])
    images = rows[0].media is not None
    if images:
        media = [row.media for row in rows if row.media is not None]
        pictures, depths, tasks = zip(*media, strict=True)
        arrays |= {"image": _files(pictures), "depth": _files(depths)}
        arrays["task"] = plain_texts(pa.string(), [task.encode() for task in tasks])
    labels = [row.labels for row in rows if row.labels is not None]
    if labels:
        arrays["labels"] = _lists(labels, np.uint8)
    schema = _schema(images, bool(labels))
    return pa.Table.from_arrays([arrays[name] for name in schema.names], schema=schema)


def _files(contents: Sequence[bytes | None]) -> pa.Array:
    """File contents as `datasets` stores images, null for None."""
    stored = [None if content is None else {"bytes": content} for content in contents]
    return pa.array(stored, IMAGE)


def _lists(cells: Sequence[NDArray[np.integer]], kind: type[np.integer] = np.int32) -> pa.ListArray:
    """A list of numbers for each frame."""
    ends = np.cumsum([0, *map(len, cells)]).astype(np.int32)
    values = np.concatenate(cells).astype(kind)
    return pa.ListArray.from_arrays(plain_arrow(ends), plain_arrow(values))


# Writing


def _write_all(missing: list[tuple[Path, list[Piece]]], workers: int) -> None:
    """Write shards in threads, since most of the time is compression. Stops within a row group."""
    stop = Event()
    with ThreadPoolExecutor(workers) as pool:
        running = [pool.submit(_write, place, pieces, stop) for place, pieces in missing]
        try:
            for future in running:
                future.result()
        except BaseException:
            stop.set()
            raise


def _write(place: Path, pieces: list[Piece], stop: Event) -> None:
    """Write a shard by row groups of one episode each."""
    place.parent.mkdir(parents=True, exist_ok=True)
    # Storing differences makes ascending cell numbers eight times smaller. Higher levels of zstd
    # take ten times as long and save another tenth.
    how: dict[str, Any] = {
        "compression": "zstd",
        "compression_level": 9,
        "use_dictionary": ["episode", "scene"],
        "write_statistics": ["episode", "scene", "frame_index"],
        "column_encoding": {
            f"{name}.list.element": "DELTA_BINARY_PACKED" for name in ("occupied", "dynamic")
        },
    }
    with (
        atomic_file(place) as partial,
        pa.OSFile(os.fsencode(partial), "wb") as file,  # A path may look like a URI.
        pq.ParquetWriter(file, _schema(pieces[0].images, pieces[0].labels), **how) as writer,
    ):
        writer.add_key_value_metadata({_KEY: dump_json(_describe(pieces)).encode()})
        for piece in pieces:
            for rows in batched(_rows(piece), piece.group_rows):
                if stop.is_set():
                    raise InterruptedError
                writer.write_table(_table(rows))


# Checking


def missing_shards(root: Path) -> tuple[list[str], int]:
    """The sorted shards of the index that are not on disk, and the number of all its shards."""
    column = read_index(root, ["shards"])["shards"].combine_chunks()
    names = set(column.flatten().to_pylist())
    return sorted(name for name in names if not (root / name).exists()), len(names)


def check_shards(root: Path) -> Iterator[DatasetError]:
    """Compare the index and the shards that are here with the trajectories.

    Yields errors of the index (an episode is missing or differs) and the first error of each shard:
    it is unreadable, has other columns, or a frame differs from its trajectory. A shard without
    trajectories here is compared with its SHA-256 in the index. Raises DatasetError for an index
    that cannot be read.
    """
    known = read_entries(root)
    scenes = _scenes(root, ())
    if scenes.keys() == {""}:  # A trajectory by itself.
        return
    if not known and not shards(root) and not any((root / FOLDER).glob(OLD_PATTERN)):
        return  # Not finalized yet. The build reports that.
    here = {episode: path for found in scenes.values() for episode, path in found}
    for path in sorted((root / FOLDER).glob(OLD_PATTERN)):
        yield DatasetError(path, "is a shard of an earlier version", RUN_FINALIZE)
    for episode, path in here.items():
        try:
            yield from _check_entry(root, path, describe(episode, path), known.get(episode))
        except DatasetError as error:
            yield error
    rows: dict[str, list[Entry]] = {}
    for row in known.values():
        for name in row.shards:
            rows.setdefault(name, []).append(row)
    found = {path.relative_to(root).as_posix(): path for path in shards(root)}
    for name in sorted(found.keys() - rows.keys()):
        yield DatasetError(found[name], "is a shard that is not in the index", RUN_FINALIZE)
    for name in sorted(found.keys() & rows.keys()):
        try:
            _check(root, name, rows[name], here)
        except SourceError as error:
            yield DatasetError(error.path, error.problem, error.remedy)
    with_shards = {row.scene for row in known.values() if row.shards}
    yield from check_states(root, scenes, with_shards)


def _check_entry(
    root: Path, path: Path, found: Entry, known: Entry | None
) -> Iterator[DatasetError]:
    """Differences between the index and a trajectory."""
    part = root / INDEX / f"{bucket(found.scene)}.parquet"
    if known is None:
        yield DatasetError(part, f"has no row of {found.episode}", RUN_FINALIZE)
    elif (known := replace(known.without_shards(), scene_state=None)) != found:
        named = (f.name for f in fields(Entry) if getattr(known, f.name) != getattr(found, f.name))
        problem = f"{next(named)} of {found.episode} differs from {path}"
        yield DatasetError(part, problem, RUN_FINALIZE)


def _check(root: Path, name: str, rows: list[Entry], here: dict[str, Path]) -> None:
    """Raise DatasetError unless a shard matches the index and the trajectories here.

    rows: the entries of its episodes.
    """
    path = root / name
    ordered = sorted(rows, key=lambda row: row.row_groups[row.shards.index(name)])
    if not all(row.episode in here for row in ordered):
        if sha256(path, MAX_BUILT_BYTES) != rows[0].shard_sha256[rows[0].shards.index(name)]:
            raise DatasetError(path, "has another SHA-256 than in the index", "download it again")
        return
    pieces, images, labels = [], _has_column(path, "image"), _has_column(path, "labels")
    if not labels and have_labels(here[row.episode] for row in rows):
        raise DatasetError(path, "has no column labels, which its trajectories have", REMAKE)
    for row in ordered:
        at = row.shards.index(name)
        stop = row.shard_starts[at + 1] if at + 1 < len(row.shards) else row.frames
        start, group = row.shard_starts[at], group_rows(row.shape)
        place = here[row.episode]
        pieces.append(Piece(place, row.episode, start, stop, 0, group, "", images, labels))
    at = 0
    tables = _groups(path)
    for expected in (part for piece in pieces for part in batched(_rows(piece), piece.group_rows)):
        table = next(tables, None)
        if table is None:
            problem = f"ends before frame {expected[0].frame} of {expected[0].episode}"
            raise DatasetError(path, problem, REMAKE)
        _compare(path, table, expected, at)
        at += table.num_rows
    if next(tables, None) is not None:
        problem = f"row {at} belongs to no frame of the trajectories"
        raise DatasetError(path, problem, REMAKE)


def _compare(path: Path, table: pa.Table, rows: tuple[Row, ...], place: int) -> None:
    """Raise DatasetError unless a row group has these rows. place: the number of its first row."""
    wanted = plain(_table(rows))
    if table.equals(wanted):
        return
    for n, row in enumerate(rows[: table.num_rows]):
        for name in table.column_names:
            if not table[name].slice(n, 1).equals(wanted[name].slice(n, 1)):
                frame = f"frame {row.frame} of {row.episode}"
                problem = f"row {place + n}, {frame}: {name} differs from the trajectory"
                raise DatasetError(path, problem, REMAKE)
    problem = f"has {table.num_rows} rows in the row group at row {place}, expected {len(rows)}"
    raise DatasetError(path, problem, REMAKE)


def _has_column(path: Path, name: str) -> bool:
    """Whether a shard has a column. False if it cannot be read."""
    try:
        with parquet_file(path) as file:
            return name in file.schema_arrow.names
    except (*PARQUET_DAMAGE, SourceError):
        return False


def _groups(path: Path) -> Iterator[pa.Table]:
    """The row groups of a shard, one in memory at a time. Raises DatasetError if it is not one."""
    columns = (_has_column(path, name) for name in ("image", "labels"))
    schema = plain_schema(_schema(*columns))
    try:
        with parquet_file(path) as file:
            if not plain_schema(file.schema_arrow).equals(schema):
                raise DatasetError(path, "has other columns than a shard of occupancy", REMAKE)
            for n in range(file.num_row_groups):
                if file.metadata.row_group(n).num_rows > GROUP_ROWS:
                    problem = f"has row groups of more than {GROUP_ROWS} rows"
                    raise DatasetError(path, problem, REMAKE)
                table = plain(file.read_row_group(n))
                table.validate(full=True)
                yield table
    except PARQUET_DAMAGE as error:
        raise DatasetError(path, parquet_problem(error), REMAKE) from None
    except SourceError as error:
        raise DatasetError(path, error.problem, REMAKE) from None
