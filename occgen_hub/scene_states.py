"""The three states of a dataset's scenes as Parquet: a file for each scene, a row for each block.

`scene_states/BB/SCENE.parquet`, where BB is the scene's bucket (see `index`), has the same states
as the `all_occ.npz` of its trajectories, for readers that have only the Parquet files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from occgen_hub.atomic import atomic_file
from occgen_hub.errors import DatasetError
from occgen_hub.files import (
    PARQUET_DAMAGE,
    check_written_by_us,
    dataset_files,
    dump_json,
    parquet_file,
    parquet_problem,
    parquet_sources,
    plain,
    plain_schema,
    remove_bucket_files,
)
from occgen_hub.index import bucket, file_stem
from occgen_hub.loading import Trajectory, have_labels
from occgen_hub.occupancy.states import BLOCK_BYTES, SceneStates
from occgen_hub.schema import plain_arrow, plain_numpy, plain_texts
from occgen_hub.taxonomy import UNLABELLED

FOLDER = "scene_states"
REMAKE = "remove it and run occgen-hub finalize on the dataset"
GROUP_BLOCKS = 1024
"""Maximum blocks in a row group: 8 MB of bits. A row group belongs to one trajectory."""

MAX_BLOCKS = 1 << 18
"""Maximum blocks of a trajectory: 2 GB of bits, 69,000 cubic metres with cells of 2 cm."""

COLUMNS = {
    "episode": pa.string(),
    "voxel_size": pa.float64(),
    "block": pa.list_(pa.int32()),
    "occupied": pa.binary(),
    "free": pa.binary(),
}

LABELS = "labels"
"""A binary column that exists if an episode of the scene has labels: the classes of the occupied
cells of a block, a byte each, in the order of their bits."""

_KEY = b"occgen_states"
_FORMAT = 1

Scenes = Mapping[str, Sequence[tuple[str, Path]]]
"""The ids and folders of the trajectories of each scene, in the order of their ids."""


def states_file(scene: str) -> str:
    """The file of a scene's states, relative to the dataset."""
    return f"{FOLDER}/{bucket(scene)}/{file_stem(scene)}.parquet"


def write_states(
    out: Path,
    scenes: Scenes,
    kept: Collection[str],
    workers: int = 1,
    *,
    overwrite: bool = False,
) -> int:
    """Update `out`/scene_states from the trajectories of these scenes.

    Up-to-date files are kept. The result has the same bytes as a fresh start. kept: scenes with
    trajectories elsewhere, which keep their files; workers: files written in parallel; overwrite:
    whether to write up-to-date files too. Returns the number of files written. Raises DatasetError
    for an invalid trajectory, or a file that occgen-hub did not write, and OSError.
    """
    there, wanted = {*states_files(out)}, {}
    check_written_by_us(sorted(there), _KEY, "a scene's states")
    for scene, found in scenes.items():
        place, pieces = out / states_file(scene), _pieces(found)
        if overwrite or place not in there or parquet_sources(place, _KEY) != pieces:
            wanted[place] = (found, pieces)
    with ThreadPoolExecutor(workers) as pool:
        running = [pool.submit(_write, place, *what) for place, what in wanted.items()]
        for future in running:
            future.result()
    needed = {out / states_file(scene) for scene in (*scenes, *kept)}
    remove_bucket_files(there - needed, out / FOLDER)
    return len(wanted)


def states_files(root: Path) -> list[Path]:
    """The sorted files of scene states on disk. Raises the errors of `dataset_files`."""
    return dataset_files(root, FOLDER)


def read_states(file: pq.ParquetFile, episode: str) -> SceneStates:
    """The states of an episode, from the open file of its scene. Raises ValueError if invalid."""
    types = plain_schema(file.schema_arrow)
    for name, kind in COLUMNS.items():
        if name not in types.names or types.field(name).type != kind:
            raise ValueError(f"it has no column {name} of {kind}")
    tables, count = [], 0
    for n in range(file.num_row_groups):
        rows = file.metadata.row_group(n).num_rows
        if rows > GROUP_BLOCKS or rows < 1:
            raise ValueError(f"row group {n} has {rows} rows, expected 1 to {GROUP_BLOCKS}")
        if file.read_row_group(n, ["episode"], use_threads=False)["episode"][0].as_py() == episode:
            tables.append(plain(file.read_row_group(n, use_threads=False)))
            count += rows
        if count > MAX_BLOCKS:
            raise ValueError(f"{episode[:80]} has more than {MAX_BLOCKS:,} blocks")
    if not tables:
        raise ValueError(f"it has no rows of {episode[:80]}")
    table = pa.concat_tables(tables).combine_chunks()
    if any(column.null_count for column in table.columns):
        raise ValueError("a value is missing")
    if table["episode"].unique().to_pylist() != [episode]:
        raise ValueError("it has a row group of several episodes")
    sizes = table["voxel_size"].unique().to_pylist()
    if len(sizes) != 1 or not 0 < sizes[0] < float("inf"):
        raise ValueError("it has no valid voxel_size")
    blocks = table["block"].combine_chunks()
    if not (np.diff(plain_numpy(blocks.offsets)) == 3).all():
        raise ValueError("a block does not have three numbers")
    numbers = plain_numpy(blocks.flatten()).reshape(-1, 3)
    states = SceneStates.from_packed(
        sizes[0], numbers, *(_bits(table, k) for k in ("occupied", "free"))
    )
    if LABELS not in table.column_names:
        return states
    column = table[LABELS].combine_chunks()
    if column.type != pa.binary():
        raise ValueError(f"its column {LABELS} is not of type {pa.binary()}")
    ends, content = _contents(column)
    if not np.array_equal(ends - ends[0], states.class_ends()):
        raise ValueError("the classes of a block do not match its occupied cells")
    if len(content) and not (content.min() > 0 and content.max() <= UNLABELLED):
        raise ValueError("a cell has an invalid class")
    return replace(states, classes=content)


def check_states(root: Path, scenes: Scenes, known: Collection[str]) -> Iterator[DatasetError]:
    """Yield errors of the files of scene states, compared with the trajectories here.

    known: the scenes of the index with occupancy as Parquet.
    """
    wanted = {root / states_file(scene): scene for scene in known}
    there = states_files(root)
    for path in sorted({*there} - {*wanted}):
        yield DatasetError(path, "belongs to a scene that is not in the index", REMAKE)
    for path, scene in sorted(wanted.items()):
        if path not in there:
            if scene in scenes:
                yield DatasetError(path, "is missing", "run occgen-hub finalize on the dataset")
            continue
        found = scenes.get(scene, ())
        labels = have_labels(folder for _, folder in found)
        for episode, folder in found:
            expected = _states_of(folder, labels)
            try:
                with parquet_file(path) as file:
                    states = read_states(file, episode)
            except PARQUET_DAMAGE as error:
                yield DatasetError(path, parquet_problem(error), REMAKE)
                break
            if not states.equals(expected):
                problem = f"the states of {episode} differ from its trajectory"
                yield DatasetError(path, problem, REMAKE)
                break


def _pieces(found: Sequence[tuple[str, Path]]) -> dict[str, Any]:
    """The sources of a scene's file, as stored in its metadata."""
    pieces, labels = [], have_labels(path for _, path in found)
    for episode, path in found:
        trajectory = Trajectory.open(path)
        name = trajectory.schema.path("scene_occupancy")
        made_of = [trajectory.record["files"].get(name), trajectory.record["grid"]]
        if labels:
            made_of.append(trajectory.taxonomy)
        digest = hashlib.sha256(dump_json(made_of).encode()).hexdigest()
        pieces.append({"episode": episode, "sha256": digest})
    return {"format": _FORMAT, "pieces": pieces}


def _states_of(path: Path, labels: bool) -> SceneStates:
    """The states of a trajectory. With `labels`, UNLABELLED if the trajectory has no labels."""
    return Trajectory.open(path).states().labelled(labels)


def _write(place: Path, found: Sequence[tuple[str, Path]], pieces: dict[str, Any]) -> None:
    """Write the file of a scene. Each row group belongs to one trajectory."""
    place.parent.mkdir(parents=True, exist_ok=True)
    described = {
        "episode": {"dtype": "string", "_type": "Value"},
        "voxel_size": {"dtype": "float64", "_type": "Value"},
        "block": {"feature": {"dtype": "int32", "_type": "Value"}, "length": 3, "_type": "List"},
        **{k: {"dtype": "binary", "_type": "Value"} for k in ("occupied", "free")},
    }
    columns, labels = dict(COLUMNS), have_labels(path for _, path in found)
    if labels:
        columns[LABELS] = pa.binary()
        described[LABELS] = {"dtype": "binary", "_type": "Value"}
    schema = pa.schema(
        list(columns.items()), {"huggingface": json.dumps({"info": {"features": described}})}
    )
    how: dict[str, Any] = {
        "compression": "zstd",
        "compression_level": 9,
        "use_dictionary": ["episode", "voxel_size"],
        "write_statistics": ["episode"],
    }
    with (
        atomic_file(place) as partial,
        pa.OSFile(os.fsencode(partial), "wb") as file,  # A path may look like a URI.
        pq.ParquetWriter(file, schema, **how) as writer,
    ):
        writer.add_key_value_metadata({_KEY: dump_json(pieces).encode()})
        for episode, path in found:
            states = _states_of(path, labels)
            for start in range(0, max(len(states.blocks), 1), GROUP_BLOCKS):
                writer.write_table(_table(episode, states, start, schema))


def _table(episode: str, states: SceneStates, start: int, schema: pa.Schema) -> pa.Table:
    part = states.part(start, start + GROUP_BLOCKS)
    count = len(part.blocks)
    ends = np.arange(0, 3 * count + 1, 3, dtype=np.int32)
    numbers = plain_arrow(np.ascontiguousarray(part.blocks, np.int32).reshape(-1))
    bits = (plain_texts(pa.binary(), [row.tobytes() for row in rows]) for rows in part.packed())
    columns = [
        plain_texts(pa.string(), [episode.encode()] * count),
        plain_arrow(np.full(count, states.voxel_size)),
        pa.ListArray.from_arrays(plain_arrow(ends), numbers),
        *bits,
    ]
    if part.classes is not None:
        pieces = (part.classes[a:b].tobytes() for a, b in pairwise(part.class_ends().tolist()))
        columns.append(plain_texts(pa.binary(), [*pieces]))
    return pa.Table.from_arrays(columns, schema=schema)


def _bits(table: pa.Table, name: str) -> Any:
    """(B, 4096) uint8 of a column of bits."""
    ends, content = _contents(table[name].combine_chunks())
    if not (np.diff(ends) == BLOCK_BYTES).all():
        raise ValueError(f"{name} does not have blocks of 32 x 32 x 32 cells")
    return content.reshape(-1, BLOCK_BYTES)


def _contents(column: pa.Array) -> tuple[Any, Any]:
    """The offsets of the values in a binary column, and all their bytes, uint8."""
    _, offsets, content = column.buffers()
    ends = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1]
    if content is None:
        return ends, np.zeros(0, np.uint8)
    return ends, np.frombuffer(content, np.uint8)[ends[0] : ends[-1]]
