"""An exported dataset: known by its record, and checked against it and against itself."""

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
    *("data", "meta", "videos", FOLDER, INDEX, STATES),  # Of LeRobot's form,
    *("gathered_data", "posed_images"),  # of OccScanNet's,
    *("gts", "imgs"),  # of Occ3D's.
)
"""What an export is made of, beside its card."""


def exported(root: Path) -> bool:
    """Whether a folder holds an export, told by its record."""
    return (root / RECORD).is_file()


def lengths(root: Path) -> dict[str, int]:
    """The frames of each episode of an export by its trajectory's id, in order.

    Raises DatasetError when the record does not say them.
    """
    return {str(row["episode"]): int(row["length"]) for row in _record(root)["episodes"]}


def is_lerobot(root: Path) -> bool:
    """Whether an export is a LeRobot dataset; raises DatasetError when its record is damaged."""
    return str(_record(root).get("format", "")).startswith("lerobot-")


def check_export(root: Path) -> Iterator[DatasetError]:
    """Everything that is wrong with an export: nothing is raised.

    Its files are those of its record, by their SHA-256; for the rest of a LeRobot dataset see
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
    """Where a row is not of the frame that it should be, or has another pose than its occupancy.

    Tables are in the order of the episodes, the occupancy in that of their names.
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
                problem = f"row {number} is not of the frame that it should be, of {frames} in all"
                yield DatasetError(what, problem, AGAIN)
                return
            digests[wanted[0]].update(np.asarray(found[2], np.float32).tobytes())
        poses.append({name: digest.hexdigest() for name, digest in digests.items()})
    for name in order:
        if poses[0][name] != poses[1][name]:
            problem = f"has other poses of {name} than the tables"
            yield DatasetError(root / FOLDER, problem, AGAIN)
            return


def held_episodes(root: Path) -> list[tuple[str, int]]:
    """The trajectory of each episode of a LeRobot v3.0 dataset, and its frames.

    As the column "episode" of its tables has it. Raises DatasetError where that is not there, or
    where an episode is not one trajectory from its first frame on.
    """
    found: list[tuple[str, int]] = []
    before = None
    for path in sorted((root / "data").glob("*/*.parquet")):
        try:
            with parquet_file(path) as file:
                names = ["episode", "frame_index", "episode_index"]
                if not {*names} <= {*file.schema_arrow.names}:
                    raise DatasetError(path, "has no column episode any more", AGAIN)
                rows = plain(file.read(columns=names)).select(names).to_pylist()
        except PARQUET_DAMAGE as error:
            raise DatasetError(path, parquet_problem(error), AGAIN) from None
        for row in rows:
            name, frame, index = row["episode"], row["frame_index"], row["episode_index"]
            if index != before:
                found.append((str(name), 0))
                before = index
            if found[-1] != (name, frame):
                problem = f"has an episode {index} that is no trajectory from its first frame on"
                raise DatasetError(path, problem, AGAIN)
            found[-1] = (name, frame + 1)
    return found


def _shard_order(root: Path) -> list[str]:
    """The shards in the order of the episodes in them; a scene's follow one another."""
    rows = read_index(root, ["shards"])["shards"].to_pylist()
    return list(dict.fromkeys(name for names in rows for name in names))


def _read(paths: list[Path], poses: str) -> Iterator[tuple[str, int, list[float]]]:
    """The rows of parquet files, some hundred in memory at a time: episode, frame and pose.

    poses: the column of poses, matrices or their 16 numbers row after row.
    """
    columns = {"episode": pa.string(), "frame_index": pa.int64(), poses: pa.list_(pa.float32())}
    for path in paths:
        try:
            with parquet_file(path) as file:
                types = plain_schema(file.schema_arrow)
                for name, kind in columns.items():
                    if name not in types.names or _innermost(types.field(name).type) != kind:
                        raise DatasetError(path, f"has no column {name} of {kind}", AGAIN)
                file.scan_contents()  # Raises where asking damaged metadata would abort.
                for batch in file.iter_batches(batch_size=256, columns=list(columns)):
                    table = plain(pa.Table.from_batches([batch]))
                    rows = (table[name].to_pylist() for name in columns)
                    for episode, frame, pose in zip(*rows, strict=True):
                        yield episode, frame, np.ravel(pose).tolist()
        except PARQUET_DAMAGE as error:
            raise DatasetError(path, parquet_problem(error), AGAIN) from None


def _innermost(kind: pa.DataType) -> pa.DataType:
    """A type, of lists in lists the innermost list."""
    lists = (pa.types.is_list, pa.types.is_fixed_size_list)
    while any(is_list(kind) for is_list in lists):
        if not any(is_list(kind.value_type) for is_list in lists):
            return pa.list_(kind.value_type)
        kind = kind.value_type
    return kind
