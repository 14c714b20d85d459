"""Reading files with bounded time and memory, locks, links and checksums."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from occgen_hub.errors import DatasetError, MachineError, SourceError, shorten_message

MAX_DOCUMENT_BYTES = 64 << 20
"""Limit of a JSON file. Real ones have a few kilobytes per trajectory."""

VALUE_BYTES = 32
"""Smallest mean size of a value in real JSON files, which limits the number of values."""

TOO_MANY = "has more values than any file of its kind"
CHECK_FILE = "check that it is the right file"

MAX_RECORD_BYTES = 1 << 28
"""Limit of a trajectory's record, which has 120 bytes per image: enough for MAX_TABLE_ROWS frames
with depth."""

ABSENT = "restore it from the source or, if a build wrote it, run the same build again"
"""The remedy for a missing file."""

MACHINE_FAULTS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE)
"""Errors of opening a file or folder that are not caused by it."""

IN_BUCKETS = "[0-9a-f][0-9a-f]/*.parquet"
"""Parquet files of scenes, in the folders of their buckets."""

MAX_DEPTH = 64
"""Limit of nesting in JSON. Real documents have seven levels."""

MAX_TABLE_BYTES = 1 << 28
MAX_TABLE_ROWS = 1 << 20
"""Limit of an episode's frames: ten hours, with about 200 MB of matrices."""

MAX_BUILT_BYTES = 1 << 36
"""Limit of a file of a dataset or an export. A sparse file may be larger than the disk."""

MAX_SOURCE_BYTES = 1 << 39
"""Limit of a file of a recording. Bags and videos may be large."""


def opened(path: Path) -> BufferedReader:
    """Open a regular file for reading. Raises SourceError, also for a pipe, which would block, and
    MachineError for a fault of the machine.
    """
    try:
        file = open(path, "rb", opener=_open_nonblocking)  # noqa: SIM115  # the caller closes it
        kind = os.fstat(file.fileno()).st_mode
    except FileNotFoundError:
        raise SourceError(path, "is missing", ABSENT) from None
    except IsADirectoryError:
        raise SourceError(path, "is a folder", "put the file in its place") from None
    except ValueError:  # A null character, from a damaged list of names.
        raise SourceError(path, "is no possible name of a file", "restore the list of it") from None
    except OSError as error:
        if error.errno in MACHINE_FAULTS:
            raise MachineError(
                f"{path}: cannot be read ({error.strerror}); fix that and run again."
            ) from error
        raise SourceError(
            path, f"cannot be read ({error.strerror})", "check the path and its permissions"
        ) from error
    if not stat.S_ISREG(kind):
        file.close()
        raise SourceError(path, "is not a regular file", "put the file itself in its place")
    return file


def _open_nonblocking(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def is_file(path: Path) -> bool:
    """Like Path.is_file, but False instead of an OSError."""
    try:
        return path.is_file()
    except OSError:
        return False


Version = tuple[int, ...]


def version(path: Path) -> Version:
    """Numbers that change with a file's content, or with the names in a folder, for caches.

    Clocks of file systems have coarse ticks: a file that changed a moment ago may change again
    within the same tick, so its version differs in each call. Raises OSError.
    """
    stat = path.stat()
    times = stat.st_mtime_ns, stat.st_ctime_ns
    now = time.time_ns()
    moment = 0 if max(times) < now - TICK or min(times) > now else time.monotonic_ns()
    return stat.st_dev, stat.st_ino, stat.st_size, *times, moment


TICK = 100_000_000
"""Nanoseconds. Clocks of local file systems have ticks of at most 10 ms."""


def read_bytes(path: Path, limit: int = MAX_DOCUMENT_BYTES) -> bytes:
    """Read a whole file of at most `limit` bytes. Raises SourceError."""
    with opened(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            data = file.read(limit + 1) if size <= limit else b""
        except OSError as error:
            raise SourceError(
                path, f"cannot be read ({error.strerror})", "restore it from the source"
            ) from error
    if max(size, len(data)) > limit:
        raise SourceError(
            path, f"is larger than {limit >> 10} kB", "check that it is the right file"
        )
    return data


def has_content(path: Path, content: bytes) -> bool:
    """Whether a regular file has exactly this content. It is read only if it has that size."""
    return is_file(path) and path.stat().st_size == len(content) and path.read_bytes() == content


def read_json(path: Path, limit: int = MAX_DOCUMENT_BYTES) -> dict[str, Any]:
    """Read a JSON object of at most `limit` bytes. Raises SourceError."""
    return _parse_object(_read_text(path, limit), path, "")


def read_jsonl(
    path: Path, keep: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """Read a file with a JSON object per line. Blank lines are skipped. Raises SourceError.

    keep: selects a few values of an object; then the number of values is limited in each line, and
    not in the file.
    """
    text = read_bytes(path)
    if keep is None:
        _check_values(text, path)
    elif text.count(b"\n") + text.count(b"\r") > MAX_DOCUMENT_BYTES // VALUE_BYTES:
        raise SourceError(path, TOO_MANY, CHECK_FILE)
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            if keep is not None:
                _check_values(line, path)
            row = _parse_object(line, path, f"line {number}: ")
            found.append(row if keep is None else keep(row))
    return found


def _read_text(path: Path, limit: int) -> bytes:
    text = read_bytes(path, limit)
    _check_values(text, path, limit)
    return text


def _check_values(text: bytes, path: Path, limit: int = MAX_DOCUMENT_BYTES) -> None:
    """Raise SourceError if JSON text has many values, since three bytes may take 100 in memory.

    Values are counted by punctuation, which strings may contain too. Real files have more than
    VALUE_BYTES bytes per value.
    """
    weights = {b",": 1, b":": 1, b"\n": 1, b"[": 2, b"{": 3}
    if sum(weight * text.count(mark) for mark, weight in weights.items()) > limit // VALUE_BYTES:
        raise SourceError(path, TOO_MANY, CHECK_FILE)


def _parse_object(text: bytes, path: Path, where: str) -> dict[str, Any]:
    try:
        value = parse_json(text)
    except ValueError:
        raise SourceError(path, f"{where}is not valid JSON", "restore it from the source") from None
    if not isinstance(value, dict):
        raise SourceError(path, f"{where}is not a JSON object", "restore it from the source")
    return value


def parse_json(text: bytes | str) -> Any:
    """Parse JSON strictly: no NaN, no infinity, at most MAX_DEPTH levels. Raises ValueError."""
    try:
        value = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = [list(item.values()) if isinstance(item, dict) else item for item in level]
        level = [part for item in inner if isinstance(item, list) for part in item]
        if not level:
            return value
    raise ValueError("nested too deeply")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not finite")
    return number


def read_parquet(path: Path) -> pa.Table:
    """Read the table of an episode. Raises SourceError if it is damaged or too large.

    It is read in batches with a limit, since a small file may decompress to terabytes.
    """
    try:
        with parquet_file(path) as file:
            if file.metadata.num_rows > MAX_TABLE_ROWS:
                problem = f"claims {file.metadata.num_rows} rows, more than an episode has"
                raise SourceError(path, problem, "check that it is the right file")
            file.scan_contents()  # Raises for damaged metadata that would abort the process below.
            _check_size(file.metadata, path)
            batches, size = [], 0
            for batch in file.iter_batches(batch_size=1024):
                batches.append(batch)
                size += batch.nbytes
                if size > MAX_TABLE_BYTES:
                    raise _too_large(path)
            table = plain(pa.Table.from_batches(batches, file.schema_arrow))
            table.validate(full=True)
    except PARQUET_DAMAGE as error:
        raise SourceError(path, parquet_problem(error), "restore it from the source") from None
    return table


@contextmanager
def parquet_file(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file for reading. Raises the errors of `opened`, and PARQUET_DAMAGE.

    Arrow opens the file itself. With a Python file, Arrow's threads may hold Python objects when
    the interpreter ends, which aborts the process.
    """
    with opened(path), pa.OSFile(os.fsencode(path)) as file:
        found = pq.ParquetFile(file)
        check_column_names(found)
        yield found


def check_column_names(file: pq.ParquetFile) -> None:
    """Raise ValueError if two columns share a name, since Arrow cannot look them up."""
    names = file.schema_arrow.names
    if len(set(names)) < len(names):
        raise ValueError("it has two columns with the same name")


PARQUET_DAMAGE = (pa.ArrowException, OSError, ValueError, MemoryError)
"""The exceptions that Arrow raises for a damaged file."""


def parquet_problem(error: BaseException) -> str:
    """The problem of a file for which Arrow raised one of PARQUET_DAMAGE."""
    message = shorten_message(str(error) or type(error).__name__, 120)
    return f"is not a readable Parquet file ({message})"


def dataset_files(root: Path, folder: str, pattern: str = IN_BUCKETS) -> list[Path]:
    """The sorted files of a pattern below a folder of a dataset. None if the folder is absent.

    Raises DatasetError if one of them, or the folder, is a link out of the dataset.
    """
    found = sorted((root / folder).glob(pattern))
    for path in (root / folder, *found):
        if leaves_folder(path, root):
            raise DatasetError(path, LINK_OUT, PUT_FILE)
    return found


def remove_bucket_files(paths: Iterable[Path], folder: Path) -> None:
    """Remove files of `dataset_files` in buckets, and folders that become empty."""
    for path in paths:
        path.unlink(missing_ok=True)
    for empty in (*folder.glob("[0-9a-f][0-9a-f]"), folder):
        if empty.is_dir() and not any(empty.iterdir()):
            empty.rmdir()


def parquet_sources(path: Path, key: bytes) -> Any:
    """The JSON under `key` in the metadata of one of our Parquet files: the file's sources.

    None if the file cannot be read or has none.
    """
    try:
        with opened(path) as file:
            return json.loads((pq.read_metadata(file).metadata or {})[key])
    except (SourceError, *PARQUET_DAMAGE, KeyError):
        return None


def check_written_by_us(paths: Iterable[Path], key: bytes, what: str) -> None:
    """Raise DatasetError for a Parquet file without `key` in its metadata: it is not one of ours.

    A file that cannot be read may be one of ours. what: what should be there, for the error.
    """
    for path in paths:
        try:
            with opened(path) as file:
                ours = key in (pq.read_metadata(file).metadata or {})
        except (SourceError, *PARQUET_DAMAGE):
            continue
        if not ours:
            problem = f"is in the place of {what}, but occgen-hub did not write it"
            raise DatasetError(path, problem, "move it away, and run the build again")


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """The schema of a table after `plain`, without the metadata of its fields.

    Does not create an empty table, because pyarrow imports pandas to create arrays.
    """
    stored = (
        field.with_type(field.type.storage_type)
        if isinstance(field.type, pa.BaseExtensionType)
        else field
        for field in schema
    )
    return pa.schema(list(stored), metadata=schema.metadata)


def plain(table: pa.Table) -> pa.Table:
    """Convert extension types, such as those of `datasets` for matrices, to their storage types."""
    for n, column in enumerate(table.columns):
        if isinstance(column.type, pa.BaseExtensionType):
            stored = pa.chunked_array(
                [chunk.storage for chunk in column.chunks], column.type.storage_type
            )
            table = table.set_column(n, table.column_names[n], stored)
    return table


def _check_size(metadata: pq.FileMetaData, path: Path) -> None:
    """Raise SourceError if a table is too large according to its metadata."""
    groups = [metadata.row_group(n) for n in range(metadata.num_row_groups)]
    values = sum(g.column(n).num_values for g in groups for n in range(g.num_columns))
    if values * 4 > MAX_TABLE_BYTES or sum(g.total_byte_size for g in groups) > MAX_TABLE_BYTES:
        raise _too_large(path)


def _too_large(path: Path) -> SourceError:
    problem = f"has more than {MAX_TABLE_BYTES >> 20} MB of values, the limit of an episode"
    return SourceError(path, problem, "check that it is the right file")


def sha256(path: Path, limit: int | None = None) -> str:
    """The SHA-256 of a file's content in hexadecimal.

    Raises SourceError, also for a file of more than `limit` bytes.
    """
    with opened(path) as file:
        if limit is not None and os.fstat(file.fileno()).st_size > limit:
            problem = f"has more than {limit >> 30} GB, the limit of such a file"
            raise SourceError(path, problem, "restore it from a copy")
        return hashlib.file_digest(file, "sha256").hexdigest()


def leaves_folder(path: Path, folder: Path) -> bool:
    """Whether `path`, which is below `folder`, is or is below a symbolic link out of it.

    This rule applies to everything that reads, copies or uploads a dataset: a link is followed if
    its target is in the folder. In a snapshot of the Hub's cache, whose files are links, the target
    may also be among the blobs of the same repository.
    """
    between = (path, *path.parents[: len(path.parts) - len(folder.parts) - 1])
    if not any(place.is_symlink() for place in between):
        return False
    target, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    return not any(target.is_relative_to(allowed) for allowed in (home, *_blobs(home)))


def _blobs(folder: Path) -> Iterator[Path]:
    """The folder of blobs if `folder` is in a snapshot of the Hub's cache.

    A repository in the cache is datasets--ORG--NAME/, with snapshots/COMMIT/ and blobs/.
    """
    for snapshot in (folder, *folder.parents):
        repository = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and repository.name.startswith("datasets--"):
            yield repository / "blobs"


def links_leaving_folder(root: Path) -> Iterator[Path]:
    """The visible links below `root` that lead out of it (see `leaves_folder`), sorted."""
    for parent, folders, names in os.walk(root):
        for name in sorted((*folders, *names)):
            path = Path(parent, name)
            if not name.startswith(".") and path.is_symlink() and leaves_folder(path, root):
                yield path
        folders[:] = sorted(name for name in folders if not name.startswith("."))


LINK_OUT = "is a link that leads out of the dataset"
"""The problem of a file for which `leaves_folder` is true."""

PUT_FILE = "replace it with the file itself, or remove the link"
"""The remedy for such a link."""


def natural_key(name: str) -> tuple[list[str | int], str]:
    """A sort key for names in which digits count as numbers, so that 10 comes after 9."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if n % 2 else part for n, part in enumerate(parts)], name


def files_under(folder: Path) -> Iterator[Path]:
    """Every regular file below `folder`, sorted by its path.

    Links to files are included, except those that lead out of `folder` (see `leaves_folder`). Links
    to folders are not followed.
    """
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(parent, name)
            if path.is_file() and not (path.is_symlink() and leaves_folder(path, folder)):
                yield path


def try_lock(handle: int, *, shared: bool = False) -> bool:
    """Lock an open file or folder until it is closed. False if another process has the lock.

    shared: a lock that several processes may have. On a file system without locks, always True.
    """
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def dump_json(value: Any, *, indent: int | None = None) -> str:
    """Serialise to JSON: letters unescaped, no NaN, keys in the given order.

    Lone surrogates, as in file names that are not UTF-8, are escaped.
    """
    return printable(json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent))


def printable(name: str) -> str:
    """A file's name as text, with bytes that are not UTF-8 escaped."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")
