"""A shard, open for reading: from disk, or row group by row group from the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from occgen_hub.errors import DatasetError, SourceError, UsageError
from occgen_hub.files import check_column_names, opened, parquet_file, plain_schema
from occgen_hub.occupancy.states import SceneStates
from occgen_hub.scene_states import read_states, states_file
from occgen_hub.shards import FEATURES, REMAKE
from occgen_hub.training.source import Source, read_range, remote_size

TYPES = {name: feature.arrow_type() for name, feature in FEATURES.items()} | {
    "episode": pa.dictionary(pa.int32(), pa.string()),  # As it is read.
    "occupied": pa.list_(pa.int32()),
    "observed": pa.binary(),
}
"""Of the shards' columns."""

FURTHER_TYPES = {
    "dynamic": pa.list_(pa.int32()),
    "labels": pa.list_(pa.uint8()),
    "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    "depth": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    "task": pa.string(),
}
"""Of columns that a shard may lack."""

MAX_SHARD_ROWS = 1 << 22
MAX_GROUP_BYTES = 1 << 30
MAX_GROUP_ROWS = 1 << 12
"""Of a row group, which is decoded whole: ours have 8 rows and 6 MB."""

UNREADABLE = f"open the dataset again if it was changed since, fetch it again, or {REMAKE}"
"""What to do about a shard that is not as the index says."""

FOOTER_BYTES = 1 << 17
"""Of a file on the Hub that are read first: they hold the metadata of some 50 row groups."""

MAX_FOOTER_BYTES = 1 << 28

MAX_STATES_BYTES = 1 << 31
"""Of the file of a scene's states; that of a house of the sample has 0.1 MB."""


def open_shard(source: Source, name: str) -> pq.ParquetFile:
    """A shard, its columns looked at; raises DatasetError where it cannot be read."""
    path = source.path(name)
    with reading(path):
        if source.address is not None:
            return _checked(_RemoteShard(f"{source.address}/{name}").whole())
        return _open(source.root / name)


def open_group(source: Source, name: str, shard: pq.ParquetFile, group: int) -> pq.ParquetFile:
    """The shard with the bytes of a row group at hand: one request where it is on the Hub."""
    if source.address is None:
        return shard
    with reading(source.path(name)):
        return _RemoteShard(f"{source.address}/{name}", shard.metadata).with_group(group)


def _open(path: Path) -> pq.ParquetFile:
    with opened(path):  # No pipe, which would block.
        try:
            file = pq.ParquetFile(path, read_dictionary=["episode"])
        except KeyError as error:
            raise ValueError("it has no column episode") from error
    _check_columns(file)
    file.scan_contents(["episode", "frame_index"])  # Raises where damaged metadata would abort.
    return _checked(file)


def _check_columns(file: pq.ParquetFile) -> None:
    if file.metadata.num_rows > MAX_SHARD_ROWS:
        raise ValueError(f"it claims {file.metadata.num_rows} rows")
    check_column_names(file)
    types = plain_schema(file.schema_arrow)
    for name, kind in TYPES.items():
        if name not in types.names or types.field(name).type != kind:
            raise ValueError(f"it has no column {name} of {kind}")
    for name, kind in FURTHER_TYPES.items():
        if name in types.names and types.field(name).type != kind:
            raise ValueError(f"its column {name} is not of {kind}")


def _checked(file: pq.ParquetFile) -> pq.ParquetFile:
    _check_columns(file)
    for n in range(file.num_row_groups):
        group = file.metadata.row_group(n)
        if group.num_rows > MAX_GROUP_ROWS or group.total_byte_size > MAX_GROUP_BYTES:
            raise ValueError(f"row group {n} is larger than any of ours")
    return file


class _RemoteShard:
    """A shard at an address of fsspec's, of which Arrow gets the parts that it needs in memory.

    They stand in an array as large as the file, of which only these parts take up memory. Arrow
    reads from it without calling Python, so no thread of its own is left behind when a process ends
    early.
    """

    def __init__(self, address: str, metadata: pq.FileMetaData | None = None) -> None:
        self.address, self.metadata = address, metadata

    def whole(self) -> pq.ParquetFile:
        """The file with its metadata alone."""
        size = remote_size(self.address)
        start = max(0, size - FOOTER_BYTES)
        tail = read_range(self.address, start, size)
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if tail[-4:] != b"PAR1" or length > min(size, MAX_FOOTER_BYTES):
            raise ValueError("it does not end as Parquet does")
        if length > len(tail):
            start = size - length
            tail = read_range(self.address, start, size)
        return self._file(size, {start: tail})

    def with_group(self, group: int) -> pq.ParquetFile:
        """The file with the bytes of a row group."""
        assert self.metadata is not None
        row_group = self.metadata.row_group(group)
        columns = [row_group.column(n) for n in range(row_group.num_columns)]
        starts = [c.dictionary_page_offset or c.data_page_offset for c in columns]
        ends = [s + c.total_compressed_size for s, c in zip(starts, columns, strict=True)]
        start, end = min(starts), max(ends)
        if not 0 <= start < end <= start + MAX_GROUP_BYTES:
            raise ValueError(f"row group {group} is larger than any of ours")
        return self._file(end, {start: read_range(self.address, start, end)})

    def _file(self, size: int, parts: dict[int, bytes]) -> pq.ParquetFile:
        content = np.zeros(size, np.uint8)
        for start, part in parts.items():
            if len(part) != len(content[start : start + len(part)]):
                raise ValueError("it is not as long as it was")
            content[start : start + len(part)] = np.frombuffer(part, np.uint8)
        return pq.ParquetFile(
            pa.BufferReader(pa.py_buffer(content)),
            metadata=self.metadata,
            read_dictionary=["episode"],
        )


def states_of(source: Source, episode: str) -> SceneStates:
    """The states of an episode's scene; raises DatasetError where they cannot be read."""
    name = states_file(episode.rpartition("/")[0])
    with reading(source.path(name)):
        if source.address is None:
            with parquet_file(source.root / name) as file:
                return read_states(file, episode)
        address = f"{source.address}/{name}"
        if (size := remote_size(address)) > MAX_STATES_BYTES:
            raise ValueError("it is larger than any of ours")
        content = pa.BufferReader(pa.py_buffer(read_range(address, 0, size)))
        return read_states(pq.ParquetFile(content), episode)


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Has what goes wrong in reading a shard name it."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        text = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        problem = f"is not a shard that can be read ({text.rstrip('.')})"
        raise DatasetError(path, problem, UNREADABLE) from None
    except (DatasetError, UsageError):
        raise
    except SourceError as error:
        raise DatasetError(path, error.problem, UNREADABLE) from None
