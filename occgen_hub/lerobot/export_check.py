"""Recognize an exported dataset by its record, and check its files and content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from occgen_hub.errors import DatasetError, SourceError
from occgen_hub.files import (
    MAX_BUILT_BYTES,
    PARQUET_DAMAGE,
    files_under,
    parquet_file,
    parquet_problem,
    plain,
    plain_schema,
    read_json,
    sha256,
)
from occgen_hub.index import INDEX, read_index
from occgen_hub.lerobot.v30 import CODEBASE
from occgen_hub.loading import EXPORT, SCHEMA
from occgen_hub.media import video_facts
from occgen_hub.scene_states import FOLDER as STATES
from occgen_hub.schema import load_schema
from occgen_hub.shards import FOLDER

RECORD = EXPORT
AGAIN = (
    "export the dataset again, with --overwrite, or with --update where LeRobot's tools changed it"
)
FOLDERS = (
    *("data", "meta", "videos", FOLDER, INDEX, STATES),  # LeRobot
    *("gathered_data", "posed_images"),  # OccScanNet
    *("gts", "imgs"),  # Occ3D
)
"""The folders of an export, in any of the formats."""


def exported(root: Path) -> bool:
    """Whether a folder holds an export, that is, has its record."""
    return (root / RECORD).is_file()


def lengths(root: Path) -> dict[str, int]:
    """The number of frames of each episode of an export, by trajectory id, in order.

    Raises DatasetError if the record does not list them.
    """
    return {str(row["episode"]): int(row["length"]) for row in _record(root)["episodes"]}


def is_lerobot(root: Path) -> bool:
    """Whether an export is a LeRobot dataset; raises DatasetError when its record is damaged."""
    return str(_record(root).get("format", "")).startswith("lerobot-")


def check_export(root: Path) -> Iterator[DatasetError]:
    """Yield the errors of an export instead of raising them.

    Compares the files with the record by SHA-256. A LeRobot dataset also goes through
    `check_content`.
    """
    try:
        yield from _files(root)
        if is_lerobot(root):
            yield from check_content(root)
    except DatasetError as error:
        yield error
    except SourceError as error:
        yield DatasetError(error.path, error.problem, AGAIN)


def check_content(root: Path) -> Iterator[DatasetError]:
    """Yield the errors in the content of an export's files.

    LeRobot's meta files, tables and videos must have the frames that the record lists. The
    occupancy must have the same trajectories, frames and poses as the tables. Raises SourceError
    for files that cannot be read.
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
    """Files that are missing, changed or unexpected."""
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
            continue  # Users may edit the card.
        if name not in there:
            yield DatasetError(root / name, "is missing", AGAIN)
        elif sha256(root / name, MAX_BUILT_BYTES) != digest:
            yield DatasetError(root / name, "has changed since it was exported", AGAIN)


def _counts(root: Path, frames: int) -> Iterator[DatasetError]:
    """Meta files or videos with a wrong number of episodes or frames."""
    path = root / "meta/info.json"
    info = read_json(path)
    expected = {
        "codebase_version": CODEBASE,
        "total_episodes": len(lengths(root)),
        "total_frames": frames,
    }
    for key, value in expected.items():
        if info.get(key) != value:
            yield DatasetError(path, f"has {key} {info.get(key)} instead of {value}", AGAIN)
    features = info.get("features")
    for name, feature in (features if isinstance(features, dict) else {}).items():
        if not isinstance(feature, dict) or feature.get("dtype") != "video" or "/" in name:
            continue
        folder = root / "videos" / name
        held = sum(video_facts(video).frames for video in sorted(folder.glob("*/*.mp4")))
        if held != frames:
            yield DatasetError(folder, f"has {held} frames instead of {frames}", AGAIN)


def _rows(root: Path, frames: int) -> Iterator[DatasetError]:
    """Rows of the wrong frame, or with another pose than their occupancy.

    Tables are in the order of the episodes, the occupancy is in the order of their names.
    """
    schema = load_schema(SCHEMA)
    tables = _read(sorted((root / "data").glob("*/*.parquet")), schema.poses)
    occupancy = _read([root / name for name in _shard_order(root)], "camera_extrinsic")
    order = lengths(root)
    poses: list[dict[str, str]] = []
    for rows, names, what in (
        (tables, list(order), root / "data"),
        (occupancy, sorted(order), root / FOLDER),
    ):
        expected = ((name, n) for name in names for n in range(order[name]))
        digests = {name: hashlib.sha256() for name in names}
        for number, (wanted, found) in enumerate(zip_longest(expected, rows)):
            if wanted is None or found is None or found[:2] != wanted:
                problem = f"row {number} of {frames} does not belong to the expected frame"
                yield DatasetError(what, problem, AGAIN)
                return
            digests[wanted[0]].update(np.asarray(found[2], np.float32).tobytes())
        poses.append({name: digest.hexdigest() for name, digest in digests.items()})
    for name in order:
        if poses[0][name] != poses[1][name]:
            problem = f"has other poses of {name} than the tables"
            yield DatasetError(root / FOLDER, problem, AGAIN)
            return


def read_exported_episodes(root: Path) -> list[tuple[str, int]]:
    """The trajectory and the number of frames of each episode of a LeRobot v3.0 dataset.

    Read from the column "episode" of its tables. Raises DatasetError if the column is missing, or
    if an episode is not one trajectory that starts at its first frame.
    """
    found: list[tuple[str, int]] = []
    before = None
    for path in sorted((root / "data").glob("*/*.parquet")):
        try:
            with parquet_file(path) as file:
                names = ["episode", "frame_index", "episode_index"]
                if not {*names} <= {*file.schema_arrow.names}:
                    raise DatasetError(path, "no longer has the column episode", AGAIN)
                rows = plain(file.read(columns=names)).select(names).to_pylist()
        except PARQUET_DAMAGE as error:
            raise DatasetError(path, parquet_problem(error), AGAIN) from None
        for row in rows:
            name, frame, index = row["episode"], row["frame_index"], row["episode_index"]
            if index != before:
                found.append((str(name), 0))
                before = index
            if found[-1] != (name, frame):
                problem = f"episode {index} is not one trajectory that starts at its first frame"
                raise DatasetError(path, problem, AGAIN)
            found[-1] = (name, frame + 1)
    return found


def _shard_order(root: Path) -> list[str]:
    """The shards in the order of their episodes. The shards of a scene are consecutive."""
    rows = read_index(root, ["shards"])["shards"].to_pylist()
    return list(dict.fromkeys(name for names in rows for name in names))


def _read(paths: list[Path], poses: str) -> Iterator[tuple[str, int, list[float]]]:
    """The episode, frame and pose of each row of parquet files, a few hundred at a time.

    poses: the column of poses, either matrices or their 16 numbers in row-major order.
    """
    columns = {"episode": pa.string(), "frame_index": pa.int64(), poses: pa.list_(pa.float32())}
    for path in paths:
        try:
            with parquet_file(path) as file:
                types = plain_schema(file.schema_arrow)
                for name, kind in columns.items():
                    if name not in types.names or _innermost(types.field(name).type) != kind:
                        raise DatasetError(path, f"has no column {name} of {kind}", AGAIN)
                file.scan_contents()  # Raises; asking damaged metadata aborts the process.
                for batch in file.iter_batches(batch_size=256, columns=list(columns)):
                    table = plain(pa.Table.from_batches([batch]))
                    rows = (table[name].to_pylist() for name in columns)
                    for episode, frame, pose in zip(*rows, strict=True):
                        yield episode, frame, np.ravel(pose).tolist()
        except PARQUET_DAMAGE as error:
            raise DatasetError(path, parquet_problem(error), AGAIN) from None


def _innermost(kind: pa.DataType) -> pa.DataType:
    """The innermost list of nested lists; other types as they are."""
    lists = (pa.types.is_list, pa.types.is_fixed_size_list)
    while any(is_list(kind) for is_list in lists):
        if not any(is_list(kind.value_type) for is_list in lists):
            return pa.list_(kind.value_type)
        kind = kind.value_type
    return kind
