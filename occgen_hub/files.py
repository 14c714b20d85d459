"""Files: read at a bounded cost, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from occgen_hub.errors import SourceError

MAX_DOCUMENT_BYTES = 64 << 20
"""Far above any real meta file: a line a trajectory, some kilobytes each."""


def read_bytes(path: Path, limit: int = MAX_DOCUMENT_BYTES) -> bytes:
    """A whole file of at most `limit` bytes; raises SourceError when it cannot be had."""
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        raise SourceError(path, "is missing", "restore it from the source") from None
    except OSError as error:
        raise SourceError(
            path, f"cannot be read ({error.strerror})", "check the path and its permissions"
        ) from error
    if len(data) > limit:
        raise SourceError(
            path, f"is larger than {limit >> 20} MB", "check that it is the right file"
        )
    return data


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises SourceError when the file is not one."""
    return _parse_object(read_bytes(path), path, "")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """A JSON object a line, blank lines left out; raises SourceError naming the bad line."""
    lines = read_bytes(path).splitlines()
    return [
        _parse_object(line, path, f"line {number}: ")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]


def _parse_object(text: bytes, path: Path, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise SourceError(path, f"{where}is not valid JSON", "restore it from the source") from None
    if not isinstance(value, dict):
        raise SourceError(path, f"{where}is not a JSON object", "restore it from the source")
    return value


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_under(folder: Path) -> Iterator[Path]:
    """Every regular file below `folder`, sorted by its path; links are not followed."""
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(parent, name)
            if path.is_file() and not path.is_symlink():
                yield path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to, and moves it there when the block ends well."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def dump_json(value: Any, *, indent: int | None = None) -> str:
    """JSON as text: readable letters, no NaN, keys in the order given."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
