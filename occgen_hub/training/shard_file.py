"""Open a shard for reading: from disk, or row group by row group from the Hub."""

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
"""Types of the columns of all shards."""

OPTIONAL_TYPES = {
    "dynamic": pa.list_(pa.int32()),
    "labels": pa.list_(pa.uint8()),
    "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    "depth": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    "task": pa.string(),
}
"""Types of optional columns."""

MAX_SHARD_ROWS = 1 << 22
MAX_GROUP_BYTES = 1 << 30
MAX_GROUP_ROWS = 1 << 12
"""Limits of a row group, which is decoded as a whole. Ours have 8 rows and 6 MB."""

UNREADABLE = f"open the dataset again if it was changed since, fetch it again, or {REMAKE}"
"""The remedy for a shard that does not match the index."""

FOOTER_BYTES = 1 << 17
"""Bytes at the end of a file on the Hub to read first: metadata of about 50 row groups."""

MAX_FOOTER_BYTES = 1 << 28

MAX_STATES_BYTES = 1 << 31
"""Limit of the file of a scene's states. That of a house of the sample has 0.1 MB."""


def open_shard(source: Source, name: str) -> pq.ParquetFile:
    """Open a shard and check its columns. Raises DatasetError if it cannot be read."""
    path = source.path(name)
    with reading(path):
        if source.address is not None:
            return _checked(_RemoteShard(f"{source.address}/{name}").whole())
        return _open(source.root / name)


def open_group(source: Source, name: str, shard: pq.ParquetFile, group: int) -> pq.ParquetFile:
    """The shard with the bytes of a row group. On the Hub, this is one request."""
    if source.address is None:
        return shard
    with reading(source.path(name)):
        return _RemoteShard(f"{source.address}/{name}", shard.metadata).with_group(group)


def _open(path: Path) -> pq.ParquetFile:
    with opened(path):  # Rejects a pipe, which would block.
        try:
            file = pq.ParquetFile(path, read_dictionary=["episode"])
        except KeyError as error:
            raise ValueError("it has no column episode") from error
    _check_columns(file)
    file.scan_contents(["episode", "frame_index"])  # Raises for damaged metadata that would abort.
    return _checked(file)


def _check_columns(file: pq.ParquetFile) -> None:
    if file.metadata.num_rows > MAX_SHARD_ROWS:
        raise ValueError(f"it claims {file.metadata.num_rows} rows")
    check_column_names(file)
    types = plain_schema(file.schema_arrow)
    for name, kind in TYPES.items():
        if name not in types.names or types.field(name).type != kind:
            raise ValueError(f"it has no column {name} of {kind}")
    for name, kind in OPTIONAL_TYPES.items():
        if name in types.names and types.field(name).type != kind:
            raise ValueError(f"its column {name} is not of {kind}")


def _checked(file: pq.ParquetFile) -> pq.ParquetFile:
    _check_columns(file)
    for n in range(file.num_row_groups):
        group = file.metadata.row_group(n)
        if group.num_rows > MAX_GROUP_ROWS or group.total_byte_size > MAX_GROUP_BYTES:
            raise ValueError(f"row group {n} is too large")
    return file


class _RemoteShard:
    """A shard at an address of fsspec. Arrow gets only the parts that it needs, in memory.

    They are put into an array as large as the file, of which only these parts use memory. Arrow
    reads it without calling Python, so none of its threads remain if a process ends early.
    """

    def __init__(self, address: str, metadata: pq.FileMetaData | None = None) -> None:
        self.address, self.metadata = address, metadata

    def whole(self) -> pq.ParquetFile:
        """The file with only its metadata."""
        size = remote_size(self.address)
        start = max(0, size - FOOTER_BYTES)
        tail = read_range(self.address, start, size)
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if tail[-4:] != b"PAR1" or length > min(size, MAX_FOOTER_BYTES):
            raise ValueError("it has no Parquet footer")
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
            raise ValueError(f"row group {group} is too large")
        return self._file(end, {start: read_range(self.address, start, end)})

    def _file(self, size: int, parts: dict[int, bytes]) -> pq.ParquetFile:
        content = np.zeros(size, np.uint8)
        for start, part in parts.items():
            if len(part) != len(content[start : start + len(part)]):
                raise ValueError("its length has changed")
            content[start : start + len(part)] = np.frombuffer(part, np.uint8)
        return pq.ParquetFile(
            pa.BufferReader(pa.py_buffer(content)),
            metadata=self.metadata,
            read_dictionary=["episode"],
        )


def states_of(source: Source, episode: str) -> SceneStates:
    """The states of an episode's scene. Raises DatasetError if they cannot be read."""
    name = states_file(episode.rpartition("/")[0])
    with reading(source.path(name)):
        if source.address is None:
            with parquet_file(source.root / name) as file:
                return read_states(file, episode)
        address = f"{source.address}/{name}"
        if (size := remote_size(address)) > MAX_STATES_BYTES:
            raise ValueError(f"it has more than {MAX_STATES_BYTES} bytes")
        content = pa.BufferReader(pa.py_buffer(read_range(address, 0, size)))
        return read_states(pq.ParquetFile(content), episode)


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Turn errors of reading a shard into DatasetErrors that name it."""
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
