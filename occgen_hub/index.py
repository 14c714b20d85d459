"""The index of a dataset: small Parquet files with a row per episode, read to open the dataset.

Scenes are spread over at most 256 buckets by a hash of their names. `index/BB.parquet` has the rows
of the scenes of bucket BB, sorted by episode, and `occupancy/BB/` has their shards. Adding a scene
changes only one part of the index. The order in which scenes are added does not matter.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from occgen_hub.atomic import atomic_file
from occgen_hub.errors import DatasetError, SourceError
from occgen_hub.files import (
    MAX_BUILT_BYTES,
    MAX_TABLE_ROWS,
    PARQUET_DAMAGE,
    dataset_files,
    dump_json,
    has_content,
    parquet_file,
    parquet_problem,
    plain,
    plain_schema,
    sha256,
)
from occgen_hub.loading import REBUILD, Trajectory
from occgen_hub.quality import Quality
from occgen_hub.schema import Feature

INDEX = "index"
PATTERN = "[0-9a-f][0-9a-f].parquet"
FINALIZE = "run occgen-hub finalize on the dataset, or fetch the file again"

VALIDATION = 0.1
"""Fraction of the scenes in the split "validation"."""

MAX_ROWS = 1 << 22
"""Limit of the episodes of a part: five times those of the whole InternData-N1."""

_SHARD = re.compile(r"occupancy/[0-9a-f]{2}/[\w.-]+\.parquet", re.ASCII)


@dataclass(frozen=True)
class Entry:
    """The row of an episode.

    episode, scene: `<group>/<scene>/<trajectory>` and `<group>/<scene>`; split: "train" or
    "validation", the same for all episodes of a scene; frames: their number; image_size: (width,
    height), pixels; fov: (horizontal, vertical), degrees, of the first frame; shape, voxel_size,
    pc_range: the camera grid, cells and metres; moving: whether it has moving cells.

    quality: 1 - contradicted, the fraction of its measured points that no other frame saw through;
    sigma, contradicted, supports, residual, shift, turn: see `fusion.quality.Quality`. All are
    None if the record has no figures.

    builder, engine, version, config (JSON), network and licence of its weights, source_licence:
    how it was built and from what; source_sha256: the fingerprint of its source; features: JSON of
    the columns in info.json.

    record_sha256: of meta/occgen.json, which has the SHA-256 of every other file; info_sha256: of
    meta/info.json; files: how many files it has.

    shards: the Parquet files with its occupancy, in order, relative to the dataset; shard_sha256:
    of each; shard_starts: its first frame in each; row_groups: the row group of that frame. From
    there on, each row group has `group_rows` frames of this episode, and the last one in a shard
    has the rest. Empty and 0 if the occupancy was not written as Parquet.

    scene_state: for a scene pushed during its build, a digest of its sources and settings (see
    `Job.source_state`). None for other scenes, and if an episode of the scene failed.

    taxonomy: of its labels, None without labels. Parts without any labels do not have this column.
    """

    episode: str
    scene: str
    split: str
    frames: int
    image_size: tuple[int, ...]
    fov: tuple[float, ...]
    shape: tuple[int, ...]
    voxel_size: float
    pc_range: tuple[float, ...]
    moving: bool
    quality: float | None
    sigma: tuple[float, ...] | None
    contradicted: float | None
    supports: float | None
    residual: float | None
    shift: float | None
    turn: float | None
    builder: str
    engine: str
    version: str
    config: str
    network: str | None
    licence: str | None
    source_licence: str | None
    source_sha256: str
    features: str
    record_sha256: str
    info_sha256: str
    files: int
    shards: tuple[str, ...] = ()
    shard_sha256: tuple[str, ...] = ()
    shard_starts: tuple[int, ...] = ()
    row_groups: tuple[int, ...] = ()
    group_rows: int = 0
    scene_state: str | None = None
    taxonomy: str | None = None

    @property
    def agreement(self) -> Quality | None:
        """How well its frames agree. None if its record has no figures."""
        if self.sigma is None:
            return None
        names = ("sigma", "contradicted", "supports", "residual", "shift", "turn")
        return Quality.from_record({"quality": {name: getattr(self, name) for name in names}})

    def without_shards(self) -> Entry:
        """The entry without shards."""
        return replace(
            self, shards=(), shard_sha256=(), shard_starts=(), row_groups=(), group_rows=0
        )


def _arrow_type(annotation: str) -> pa.DataType:
    kinds = {"str": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}
    kind = annotation.removesuffix(" | None")
    if kind.startswith("tuple["):
        return pa.list_(kinds[kind.removeprefix("tuple[").removesuffix(", ...]")])
    return kinds[kind]


SCHEMA = pa.schema([(field.name, _arrow_type(str(field.type))) for field in fields(Entry)])
"""The columns of the index, from `Entry`."""

OPTIONAL = "taxonomy"
"""A column that is missing in parts where it would be all null."""


def bucket(scene: str) -> str:
    """The two hexadecimal digits that name the part of the index and the folder of a scene."""
    return _digest(scene)[:2]


def split(scene: str) -> str:
    """The split of a scene, "train" or "validation", by a hash of its name only."""
    share = int(_digest(f"split {scene}")[:8], 16) / 16**8
    return "validation" if share < VALIDATION else "train"


def file_stem(scene: str) -> str:
    """The prefix of the names of a scene's shards: unique, and valid on any file system."""
    safe = re.sub(r"[^A-Za-z0-9_.-]+", "_", scene.replace("/", "-")).strip(".-_")
    return f"{safe[:80] or 'scene'}-{_digest(scene)[:8]}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


# Entries from trajectories


def describe(episode: str, path: Path, known: Entry | None = None) -> Entry:
    """The entry of the trajectory in a folder, without its shards. Raises DatasetError.

    known: an earlier entry, which is returned if the trajectory's record has not changed.
    """
    trajectory = Trajectory.open(path)
    files = trajectory.file("record"), trajectory.file("info")
    digests = [sha256(file, MAX_BUILT_BYTES) if file.is_file() else "" for file in files]
    if known is not None and [known.record_sha256, known.info_sha256] == digests:
        return known
    record, grid, scene = trajectory.record, trajectory.grid, episode.rpartition("/")[0]
    features, frames = _declared(trajectory)
    quality = Quality.from_record(record)
    weights = record.get("weights")
    weights = weights if isinstance(weights, dict) else {}
    width, height = trajectory.image_size
    return Entry(
        episode=episode,
        scene=scene,
        split=split(scene),
        frames=frames,
        image_size=(width, height),
        fov=_fov(trajectory, width, height),
        shape=grid.shape,
        voxel_size=grid.voxel_size,
        pc_range=tuple(float(value) for value in record["grid"]["pc_range"]),
        moving=trajectory.has_dynamic(),
        quality=None if quality is None else round(1 - quality.contradicted, 6),
        sigma=None if quality is None else quality.sigma,
        contradicted=None if quality is None else quality.contradicted,
        supports=None if quality is None else quality.supports,
        residual=None if quality is None else quality.residual,
        shift=None if quality is None else quality.shift,
        turn=None if quality is None else quality.turn,
        builder=str(record["source"].get("builder", "")),
        engine=str(record.get("engine", "")),
        version=str(record.get("version", "")),
        config=dump_json(record.get("config")),
        network=None if not weights else str(weights.get("network")),
        licence=None if not weights else str(weights.get("license")),
        source_licence=_text(record["source"].get("license")),
        source_sha256=str(record["source"].get("fingerprint", "")),
        features=features,
        record_sha256=digests[0],
        info_sha256=digests[1],
        files=len(record["files"]) + 1,
        taxonomy=trajectory.taxonomy,
    )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _declared(trajectory: Trajectory) -> tuple[str, int]:
    """The features, as JSON, and the number of frames in a trajectory's info.json."""
    try:
        info = trajectory.info()
        features = dict(info["features"])
        for value in features.values():
            Feature.model_validate(value)
        frames = int(info["total_frames"])
        if not 0 <= frames <= MAX_TABLE_ROWS:
            raise ValueError
        return dump_json(features), frames
    except (KeyError, TypeError, ValueError):
        problem = "does not state its features and frames"
        raise DatasetError(trajectory.file("info"), problem, REBUILD) from None


def _fov(trajectory: Trajectory, width: int, height: int) -> tuple[float, float]:
    """(horizontal, vertical) degrees between the image's outer edges, in the first frame."""
    K = trajectory.intrinsics()[0]
    sides = ((width, K[0, 0], K[0, 2]), (height, K[1, 1], K[1, 2]))
    angles = [math.atan2(c, f) + math.atan2(size - c, f) for size, f, c in sides]
    return round(math.degrees(angles[0]), 3), round(math.degrees(angles[1]), 3)


# Files


def parts(root: Path) -> list[Path]:
    """The sorted parts of a dataset's index. Raises DatasetError for links out of the dataset."""
    return dataset_files(root, INDEX, PATTERN)


def read_index(root: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of all parts, sorted by episode, with `columns` or all columns of SCHEMA.

    A dataset without an index has no rows. Raises DatasetError for damaged parts, and for rows
    with invalid names of episodes or files.
    """
    names = list(SCHEMA.names if columns is None else columns)
    needed = list(dict.fromkeys(["episode", "scene", "shards", *names]))
    tables = [read_part(path, needed) for path in parts(root)]
    schema = pa.schema([SCHEMA.field(name) for name in needed])
    table = pa.concat_tables(tables or [schema.empty_table()]).combine_chunks()
    return table.sort_by("episode").select(names)


def read_entries(root: Path) -> dict[str, Entry]:
    """The entries of `read_index` by episode, sorted."""
    return {row.episode: row for row in entries(read_index(root))}


def entries(table: pa.Table) -> Iterable[Entry]:
    """The rows of a table of SCHEMA as entries."""
    for row in table.to_pylist():
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
        yield Entry(**values)


def read_part(path: Path, columns: Sequence[str] = tuple(SCHEMA.names)) -> pa.Table:
    """A part of the index with these columns. Raises DatasetError if it is damaged."""
    columns = list(columns)
    try:
        with parquet_file(path) as file:
            types = plain_schema(file.schema_arrow)
            absent = [OPTIONAL] if OPTIONAL in columns and OPTIONAL not in types.names else []
            for name in columns:
                if name in absent:
                    continue
                if name not in types.names or types.field(name).type != SCHEMA.field(name).type:
                    problem = f"has no column {name} of {SCHEMA.field(name).type}"
                    raise DatasetError(path, problem, FINALIZE)
            if file.metadata.num_rows > MAX_ROWS:
                problem = f"claims {file.metadata.num_rows} rows"
                raise DatasetError(path, problem, FINALIZE)
            file.scan_contents(["episode"])  # Raises; asking damaged metadata aborts the process.
            there = [name for name in columns if name not in absent]
            table = plain(file.read(there, use_threads=False)).replace_schema_metadata(None)
            table.validate(full=True)
            for name in absent:
                table = table.append_column(name, pa.nulls(table.num_rows, pa.string()))
            table = table.select(columns)
    except PARQUET_DAMAGE as error:
        raise DatasetError(path, parquet_problem(error), FINALIZE) from None
    except SourceError as error:
        raise DatasetError(path, error.problem, FINALIZE) from None
    _check_names(path, table)
    return table.cast(pa.schema([SCHEMA.field(name) for name in columns]))


def _check_names(path: Path, table: pa.Table) -> None:
    """Raise DatasetError unless rows have valid names of this part, and each episode once."""
    for name in table.column_names:
        missing = table[name].null_count
        if missing and "None" not in str(Entry.__dataclass_fields__[name].type):
            raise DatasetError(path, f"lacks a value of {name}", FINALIZE)
    episodes = table["episode"].to_pylist()
    if len(set(episodes)) < len(episodes):
        raise DatasetError(path, "has an episode twice", FINALIZE)
    scenes = table["scene"].to_pylist()
    for episode, scene in zip(episodes, scenes, strict=True):
        unsafe = {"", ".", ".."} & {*episode.split("/")} or "\0" in episode
        if unsafe or episode.rpartition("/")[0] != scene:
            raise DatasetError(path, f"{episode[:80]!r} is not a valid episode name", FINALIZE)
    for scene in set(scenes):
        if bucket(scene) != path.stem:
            raise DatasetError(
                path, f"has the scene {scene[:80]!r}, which belongs to another part", FINALIZE
            )
    for shard in set(table["shards"].combine_chunks().flatten().to_pylist()):
        if shard is None or not _SHARD.fullmatch(shard):
            raise DatasetError(path, f"{str(shard)[:80]!r} is not a valid shard name", FINALIZE)


def table_of(rows: Iterable[Entry]) -> pa.Table:
    """Entries as a table of SCHEMA, sorted by episode."""
    ordered = sorted(rows, key=lambda row: row.episode)
    return pa.Table.from_pylist([asdict(row) for row in ordered], SCHEMA)


def write_index(root: Path, rows: Iterable[Entry]) -> int:
    """Write the index of a dataset with exactly these rows. Unchanged parts are not written.

    Returns the number of parts written or removed. Raises OSError.
    """
    by_part: dict[str, list[Entry]] = {}
    for row in rows:
        by_part.setdefault(f"{bucket(row.scene)}.parquet", []).append(row)
    there = {path.name: path for path in parts(root)}
    changed = 0
    for name, part in sorted(by_part.items()):
        content = part_bytes(part)
        place = root / INDEX / name
        if name in there and has_content(place, content):
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(place) as partial:
            partial.write_bytes(content)
        changed += 1
    for name in there.keys() - by_part.keys():
        there[name].unlink()
        changed += 1
    return changed


def part_bytes(rows: Iterable[Entry]) -> bytes:
    """The content of a part. It does not depend on the order of the rows."""
    sink, table = pa.BufferOutputStream(), table_of(rows)
    if table[OPTIONAL].null_count == table.num_rows:
        table = table.drop_columns([OPTIONAL])
    pq.write_table(table, sink, compression="zstd", compression_level=9)
    return bytes(sink.getvalue())
