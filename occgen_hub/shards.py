"""A dataset's occupancy as Parquet: a row a frame, in a few large files that the Hub can stream.

What the npz files of the trajectories say, said again for readers that have only `datasets` or
pyarrow. The shards are made from those files alone, so they can be left out, and made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import batched, chain, islice, pairwise
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
    LINK_OUT,
    PARQUET_DAMAGE,
    PUT_FILE,
    dump_json,
    leads_out,
    no_parquet,
    opened,
    parquet_file,
    plain,
    printable,
)
from occgen_hub.loading import REBUILD, Trajectory, npz_array, trajectories
from occgen_hub.schema import Feature, plain_arrow, plain_texts

FOLDER = "occupancy"
NAME = "train-{:05d}-of-{:05d}.parquet"
PATTERN = "train-*-of-*.parquet"
REMAKE = "remove it and run the build again"

GROUP = 8
"""Rows of a row group, the least that is read to have one frame: 2 ms at the seed's grid."""

SHARD_BYTES = 1 << 30
"""Bytes of npz whose content goes into a shard, of which that makes 200 to 350 MB."""

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
"""The columns of fixed shape; `occupied`, `dynamic` and `observed` stand before `shape`."""

_KEY = b"occgen"
_FORMAT = 2
"""1 had no column `dynamic`."""


@dataclass(frozen=True)
class Piece:
    """Frames `start` to `stop` of a trajectory, which go into one shard.

    path: the trajectory's folder; npz: bytes of its files, this piece's share; sha256: of what the
    rows are made of, so that equal ones have equal rows.
    """

    path: Path
    episode: str
    start: int
    stop: int
    npz: int
    sha256: str


class Row(NamedTuple):
    """A frame, as a shard holds it."""

    episode: str
    grid: dict[str, Any]
    frame: int
    occupied: NDArray[np.integer]
    dynamic: NDArray[np.integer]
    observed: NDArray[np.uint8]
    extrinsic: NDArray[np.float32]
    intrinsic: NDArray[np.float32]


def shards(root: Path) -> list[Path]:
    """The shards of a dataset, sorted; none where they were left out.

    Raises DatasetError where one of them, or their folder, is a link out of the dataset.
    """
    folder = root / FOLDER
    found = sorted(folder.glob(PATTERN))
    for path in (folder, *found):
        if leads_out(path, root):
            raise DatasetError(path, LINK_OUT, PUT_FILE)
    return found


def _own_shards(root: Path) -> list[Path]:
    """`shards`, which may be replaced; raises DatasetError where a file is none that we wrote.

    One that cannot be read may be one of ours.
    """
    found = shards(root)
    for path in found:
        try:
            with opened(path) as file:
                ours = _KEY in (pq.read_metadata(file).metadata or {})
        except (SourceError, pa.ArrowException, OSError, ValueError):
            continue
        if not ours:
            problem = "stands in the place of a shard, and occgen-hub did not write it"
            raise DatasetError(path, problem, "move it away, and run the build again")
    return found


def write_shards(
    root: Path,
    workers: int = 1,
    *,
    out: Path | None = None,
    leave_out: Collection[Path] = (),
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Bring `out`/occupancy, `root`'s own if None, up to date with the trajectories below `root`.

    Shards that hold what they should are left alone; the bytes are those of a fresh start. Returns
    how many were written. Raises DatasetError for a trajectory that cannot be read, and OSError.

    workers: shards written at once; leave_out: folders of trajectories to go without; overwrite:
    whether those that are right are written as well; shard_bytes: of npz that go into one.
    """
    out = root if out is None else out
    folder = out / FOLDER
    for partial in folder.glob(".*.partial"):
        partial.unlink()
    plan = _plan(_pieces(root, shard_bytes, leave_out), shard_bytes)
    places = [folder / NAME.format(n, len(plan)) for n in range(len(plan))]
    there = {path: None if overwrite else _origin(path) for path in _own_shards(out)}
    missing = []
    for place, pieces in zip(places, plan, strict=True):
        origin = _describe(pieces)
        if there.get(place) == origin:
            continue
        moved = next((p for p, o in there.items() if o == origin and p not in places), None)
        if moved is None:
            missing.append((place, pieces))
        else:
            moved.replace(place)
            del there[moved]
    if missing:
        folder.mkdir(exist_ok=True)
        _write_all(missing, workers)
    for path in there.keys() - set(places):
        path.unlink()
    return len(missing)


def remove_shards(root: Path) -> None:
    """Remove the shards of a dataset, and their folder if nothing else is in it."""
    folder = root / FOLDER
    for path in (*_own_shards(root), *folder.glob(".*.partial")):
        path.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


# What goes where


def _pieces(root: Path, shard_bytes: int, leave_out: Collection[Path] = ()) -> Iterator[Piece]:
    """The trajectories in the order of their ids, those too long for one shard in equal parts."""
    found = (path for path in trajectories(root) if path not in leave_out)
    for episode, path in sorted((p.relative_to(root).as_posix(), p) for p in found):
        trajectory = Trajectory.open(path)
        record, schema = trajectory.record, trajectory.schema
        keys = ("visible", "dynamic", "observed", "frames")
        sources = [record["files"].get(schema.path(key)) for key in keys]
        digest = hashlib.sha256(dump_json([sources, record["grid"]]).encode()).hexdigest()
        files = trajectory.file("visible"), trajectory.file("observed")
        frames = npz_array(files[1], "data").check("u", None, None).shape[0]
        size = sum(file.stat().st_size for file in files)
        ends = np.linspace(0, frames, -(-size // shard_bytes) + 1).astype(int).tolist()
        for start, stop in pairwise(ends):
            share = size * (stop - start) // max(frames, 1)
            yield Piece(path, printable(episode), start, stop, share, digest)


def _plan(pieces: Iterable[Piece], shard_bytes: int) -> list[list[Piece]]:
    """The pieces of each shard: as many as fit, one at least."""
    plan: list[list[Piece]] = []
    size = 0
    for piece in pieces:
        if not plan or size + piece.npz > shard_bytes:
            plan.append([])
            size = 0
        plan[-1].append(piece)
        size += piece.npz
    return plan


def _describe(pieces: list[Piece]) -> dict[str, Any]:
    """What a shard is made of, as it says itself."""
    origins = [
        {"episode": piece.episode, "frames": [piece.start, piece.stop], "sha256": piece.sha256}
        for piece in pieces
    ]
    return {"format": _FORMAT, "pieces": origins}


def _origin(path: Path) -> Any:
    """What a shard says that it was made of; None where it cannot be read."""
    try:
        with opened(path) as file:
            return json.loads((pq.read_metadata(file).metadata or {})[_KEY])
    except (SourceError, pa.ArrowException, OSError, ValueError, KeyError):
        return None


# Rows


def _rows(piece: Piece) -> Iterator[Row]:
    """The frames of a piece; those before it are read past."""
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
    try:
        for row in islice(frames, piece.start, piece.stop):
            yield Row(piece.episode, grid, *row)
        if piece.stop == len(poses):
            next(frames, None)  # Files of unequal length show at their end.
    except ValueError:
        problem = f"has another number of frames than the {len(poses)} of the parquet"
        raise DatasetError(trajectory.file("visible"), problem, REBUILD) from None


def _schema() -> pa.Schema:
    """The shards' columns, with the types that `datasets` gives them."""
    fields = [feature.arrow_field(name) for name, feature in FEATURES.items()]
    described = {name: feature.datasets_type() for name, feature in FEATURES.items()}
    number, data = ({"dtype": name, "_type": "Value"} for name in ("int32", "binary"))
    cells = {"feature": number, "_type": "List"}
    described |= {"occupied": cells, "dynamic": cells, "observed": data}
    fields[3:3] = [pa.field(name, pa.list_(pa.int32())) for name in ("occupied", "dynamic")]
    fields[5:5] = [pa.field("observed", pa.binary())]
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
    schema = _schema()
    return pa.Table.from_arrays([arrays[name] for name in schema.names], schema=schema)


def _lists(cells: list[NDArray[np.integer]]) -> pa.ListArray:
    """A list of int32 for each frame."""
    ends = np.cumsum([0, *map(len, cells)]).astype(np.int32)
    values = np.concatenate(cells).astype(np.int32)
    return pa.ListArray.from_arrays(plain_arrow(ends), plain_arrow(values))


# Writing


def _write_all(missing: list[tuple[Path, list[Piece]]], workers: int) -> None:
    """In threads, since nearly all of it is compression; stopped within a row group."""
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
    """Write a shard, row group by row group."""
    # Ascending cell numbers shrink eightfold as differences; the rest is left to zstd, whose higher
    # levels take ten times as long for another tenth.
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
        pq.ParquetWriter(file, _schema(), **how) as writer,
    ):
        writer.add_key_value_metadata({_KEY: dump_json(_describe(pieces)).encode()})
        for rows in batched(chain.from_iterable(map(_rows, pieces)), GROUP):
            if stop.is_set():
                raise InterruptedError
            writer.write_table(_table(rows))


# Checking


def check_shards(root: Path) -> None:
    """Compare the shards of a dataset, if it has some, with the npz files they were made from.

    Raises DatasetError for the first thing that is wrong: a shard that is missing, unreadable or of
    other columns; a frame that is missing, out of place, or not what its trajectory holds.
    """
    found = shards(root)
    names = [NAME.format(n, len(found)) for n in range(len(found))]
    if wrong := next(
        (path for path, name in zip(found, names, strict=True) if path.name != name), None
    ):
        problem = f"is not one of {len(found)} shards that are numbered in order"
        raise DatasetError(wrong, problem, "remove the folder and run the build again")
    if not found:
        return
    expected = chain.from_iterable(map(_rows, _pieces(root, SHARD_BYTES)))
    for path in found:
        _check(path, expected)
    if row := next(expected, None):
        problem = f"end before frame {row.frame} of {row.episode}"
        raise DatasetError(root / FOLDER, f"the shards {problem}", "run the build again")


def _check(path: Path, expected: Iterator[Row]) -> None:
    """Raise DatasetError unless a shard holds the next of the expected rows."""
    place = 0
    for table in _groups(path):
        rows = tuple(islice(expected, table.num_rows))
        if len(rows) < table.num_rows:
            problem = f"row {place + len(rows)} is of no frame that the trajectories have"
            raise DatasetError(path, problem, REMAKE)
        wanted = plain(_table(rows))
        for n, row in enumerate(rows if not table.equals(wanted) else ()):
            for name in table.column_names:
                if not table[name].slice(n, 1).equals(wanted[name].slice(n, 1)):
                    frame = f"frame {row.frame} of {row.episode}"
                    problem = f"row {place + n}, {frame}: {name} is not what the trajectory holds"
                    raise DatasetError(path, problem, REMAKE)
        place += len(rows)


def _groups(path: Path) -> Iterator[pa.Table]:
    """The row groups of a shard, one in memory; raises DatasetError when it is none."""
    schema = plain(_schema().empty_table()).schema
    try:
        with parquet_file(path) as file:
            if not plain(file.schema_arrow.empty_table()).schema.equals(schema):
                raise DatasetError(path, "has other columns than a shard of occupancy", REMAKE)
            for n in range(file.num_row_groups):
                if file.metadata.row_group(n).num_rows > GROUP:
                    problem = f"has row groups of more than {GROUP} rows"
                    raise DatasetError(path, problem, REMAKE)
                table = plain(file.read_row_group(n))
                table.validate(full=True)
                yield table
    except PARQUET_DAMAGE as error:
        raise DatasetError(path, no_parquet(error), REMAKE) from None
    except SourceError as error:
        raise DatasetError(path, error.problem, REMAKE) from None
