"""An exported dataset: known by its record, and checked against it and against itself."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pyarrow as pa

from occgen_hub.errors import DatasetError, SourceError
from occgen_hub.files import (
    MAX_BUILT_BYTES,
    PARQUET_DAMAGE,
    files_under,
    no_parquet,
    parquet_file,
    plain,
    read_json,
    sha256,
)
from occgen_hub.index import INDEX, read_index
from occgen_hub.lerobot.v30 import CODEBASE
from occgen_hub.loading import EXPORT, SCHEMA
from occgen_hub.media import video_facts
from occgen_hub.schema import load_schema
from occgen_hub.shards import FEATURES, FOLDER

RECORD = EXPORT
AGAIN = "export the dataset again, with --overwrite"
FOLDERS = ("data", "meta", "videos", FOLDER, INDEX)
"""What an export is made of, beside its card."""


def exported(root: Path) -> bool:
    """Whether a folder holds an export, told by its record."""
    return (root / RECORD).is_file()


def lengths(root: Path) -> dict[str, int]:
    """The frames of each episode of an export by its trajectory's id, in order.

    Raises DatasetError when the record does not say them.
    """
    return {str(row["episode"]): int(row["length"]) for row in _record(root)["episodes"]}


def check_export(root: Path) -> Iterator[DatasetError]:
    """Everything that is wrong with an export: nothing is raised.

    Its files are those of its record, by their SHA-256; for the rest see `check_content`.
    """
    try:
        yield from _files(root)
        yield from check_content(root)
    except DatasetError as error:
        yield error
    except SourceError as error:
        yield DatasetError(error.path, error.problem, AGAIN)


def check_content(root: Path) -> Iterator[DatasetError]:
    """What is wrong with what the files of an export hold.

    LeRobot's meta files, tables and videos have to have the frames that the record speaks of, and
    row n of the occupancy has to be of the same trajectory and frame, at the same pose, as row n of
    the tables. Raises SourceError for files that cannot be read.
    """
    frames = sum(lengths(root).values())
    yield from _counts(root, frames)
    yield from _rows(root, frames)


def _record(root: Path) -> dict[str, Any]:
    path = root / RECORD
    record = read_json(path)
    episodes, files = record.get("episodes"), record.get("files")
    sound = isinstance(episodes, list) and all(
        isinstance(row, dict)
        and isinstance(row.get("episode"), str)
        and isinstance(row.get("length"), int)
        and row["length"] > 0
        for row in episodes
    )
    if not sound or not isinstance(files, dict):
        raise DatasetError(path, "does not list its episodes and files", AGAIN)
    return record


def _files(root: Path) -> Iterator[DatasetError]:
    """Files that are missing, changed, or too many."""
    listed: dict[str, Any] = _record(root)["files"]
    there = {
        path.relative_to(root).as_posix()
        for folder in FOLDERS
        for path in files_under(root / folder)
    }
    for name in sorted(there - listed.keys() - {RECORD}):
        yield DatasetError(root / name, "is not a file of the export", "remove it")
    for name, digest in listed.items():
        if name.split("/")[0] not in FOLDERS:
            continue  # The card is for people to change.
        if name not in there:
            yield DatasetError(root / name, "is missing", AGAIN)
        elif sha256(root / name, MAX_BUILT_BYTES) != digest:
            yield DatasetError(root / name, "has changed since it was exported", AGAIN)


def _counts(root: Path, frames: int) -> Iterator[DatasetError]:
    """Where meta files or videos speak of another number of episodes or frames."""
    path = root / "meta/info.json"
    info = read_json(path)
    expected = {
        "codebase_version": CODEBASE,
        "total_episodes": len(lengths(root)),
        "total_frames": frames,
    }
    for key, value in expected.items():
        if info.get(key) != value:
            yield DatasetError(path, f"says {key} {info.get(key)}, which is {value}", AGAIN)
    features = info.get("features")
    for name, feature in (features if isinstance(features, dict) else {}).items():
        if not isinstance(feature, dict) or feature.get("dtype") != "video" or "/" in name:
            continue
        folder = root / "videos" / name
        held = sum(video_facts(video).frames for video in sorted(folder.glob("*/*.mp4")))
        if held != frames:
            yield DatasetError(folder, f"holds {held} frames of {frames}", AGAIN)


def _rows(root: Path, frames: int) -> Iterator[DatasetError]:
    """Where a row of the tables is not of the frame that it should be, nor of its occupancy's."""
    schema = load_schema(SCHEMA)
    pose = schema.features[schema.poses]
    tables = _read(
        sorted((root / "data").glob("*/*.parquet")),
        {"episode": pa.string(), "frame_index": pa.int64(), schema.poses: pose.arrow_type()},
    )
    occupancy = _read(
        [root / name for name in _shard_order(root)],
        {
            "episode": pa.string(),
            "frame_index": pa.int64(),
            "camera_extrinsic": FEATURES["camera_extrinsic"].arrow_type(),
        },
    )
    expected = ((name, n) for name, length in lengths(root).items() for n in range(length))
    for number, (row, table, shard) in enumerate(zip_longest(expected, tables, occupancy)):
        for found, what in ((table, root / "data"), (shard, root / FOLDER)):
            if row is None or found is None or found[:2] != row:
                problem = f"row {number} is not of the frame that it should be, of {frames} in all"
                yield DatasetError(what, problem, AGAIN)
                return
        if table[2] != shard[2]:
            problem = f"row {number} has another pose than the table"
            yield DatasetError(root / FOLDER, problem, AGAIN)
            return


def _shard_order(root: Path) -> list[str]:
    """The shards in the order of the episodes in them; a scene's follow one another."""
    rows = read_index(root, ["shards"])["shards"].to_pylist()
    return list(dict.fromkeys(name for names in rows for name in names))


def _read(paths: list[Path], columns: dict[str, pa.DataType]) -> Iterator[tuple[Any, ...]]:
    """The rows of these columns in several parquet files, some hundred in memory at a time."""
    for path in paths:
        try:
            with parquet_file(path) as file:
                types = plain(file.schema_arrow.empty_table()).schema
                for name, kind in columns.items():
                    if name not in types.names or types.field(name).type != kind:
                        raise DatasetError(path, f"has no column {name} of {kind}", AGAIN)
                file.scan_contents()  # Raises where asking damaged metadata would abort.
                for batch in file.iter_batches(batch_size=256, columns=list(columns)):
                    table = plain(pa.Table.from_batches([batch]))
                    yield from zip(*(table[name].to_pylist() for name in columns), strict=True)
        except PARQUET_DAMAGE as error:
            raise DatasetError(path, no_parquet(error), AGAIN) from None
