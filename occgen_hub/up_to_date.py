"""Whether a trajectory is what a build would make from its source, so that it can be skipped."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from occgen_hub.atomic import atomic_file
from occgen_hub.builder import DatasetBuilder, EpisodeRef
from occgen_hub.config import Config
from occgen_hub.errors import SourceError, UsageError
from occgen_hub.files import MAX_RECORD_BYTES, dump_json, read_json
from occgen_hub.lerobot.writer import Provenance
from occgen_hub.schema import Schema, load_schema

MISSING = "does not exist"
"""The reason to build a new episode."""


def outdated(
    builder: DatasetBuilder, ref: EpisodeRef, out: Path, provenance: Provenance
) -> tuple[str | None, int]:
    """Why `out / ref.id` has to be built, according to its record, and the stamp of its sources.

    provenance: of the new build. The reason is None if it is up to date, and `MISSING` if it does
    not exist. The stamp (see `remember`) is 0 if it was not needed. Sources are read only if sizes
    and times do not show that they are unchanged.
    """
    place, schema = out / ref.id, load_schema(builder.schema)
    if not place.exists():
        return MISSING, 0
    try:
        record = read_json(place / schema.path("record"), MAX_RECORD_BYTES)
        recorded = str(record["source"]["fingerprint"])
        files = list(record["files"])
    except (SourceError, KeyError, TypeError):
        return "has no usable record", 0
    # An old record without a setting, or without the builder's version, means the default.
    record["config"] = {**Config().model_dump(mode="json"), **record["config"]}
    record["source"] = {"builder_version": DatasetBuilder.version, **record["source"]}
    record["source"].pop("license", None)
    expected = provenance.record(schema, ref.id, recorded)
    for key, value in {"weights": None, "segmenter": None, **expected}.items():
        if record.get(key) != value:
            return f"was built with another {key}{_difference(record.get(key), value)}", 0
    if not all((place / name).is_file() for name in files):
        return "lacks files", 0
    sources = builder.sources(ref)
    stamp = source_stamp(sources)
    if stamp == place.stat().st_mtime_ns or builder.fingerprint(sources) == recorded:
        return None, stamp
    return "was built from a source that has changed", 0


def _difference(was: object, now: object) -> str:
    """The difference between two values or mappings of a record, in brackets."""
    if not isinstance(was, dict) or not isinstance(now, dict):
        return f" ({was}, now {now})"
    parts = [f"{k} {was.get(k)}, now {v}" for k, v in now.items() if was.get(k) != v]
    return f" ({'; '.join(parts)[:200]})" if parts else ""


def check_replaceable(place: Path, schema: Schema) -> None:
    """Raise UsageError if something at a trajectory's path was not written by a build.

    A build writes a record, which may be damaged. An empty folder may be replaced too.
    """
    if not os.path.lexists(place) or os.path.lexists(place / schema.path("record")):
        return
    with suppress(OSError):
        if not place.is_symlink() and not any(place.iterdir()):
            return
    kind = "folder" if place.is_dir() else "file"
    raise UsageError(
        f"{place}: is a {kind} that occgen-hub did not build (it has no {schema.path('record')}), "
        "and is not changed; choose another --output, or move it away."
    )


def record_license(place: Path, schema: Schema, license: str | None) -> None:
    """Record the licence that the source of an up-to-date trajectory states now, if it does.

    Raises SourceError if the record cannot be read, and OSError.
    """
    if license is None:
        return
    path = place / schema.path("record")
    record = read_json(path, MAX_RECORD_BYTES)
    if record["source"].get("license") == license:
        return
    record["source"]["license"] = license
    with atomic_file(path) as partial:
        partial.write_text(dump_json(record, indent=1) + "\n", encoding="utf-8")


def remember(place: Path, stamp: int) -> None:
    """Set the modification time of a trajectory's folder to the stamp of its sources.

    If it is equal in a later run, the sources are unchanged and are not read. Otherwise, their
    contents decide.
    """
    with suppress(OSError):
        if place.stat().st_mtime_ns != stamp:
            os.utime(place, ns=(stamp, stamp))


def sizes_and_times(paths: Iterable[Path]) -> list[tuple[int, int]]:
    """Size and change time of each file. Raises SourceError if one cannot be read."""
    with _named_errors():
        return [(stat.st_size, stat.st_mtime_ns) for stat in (path.stat() for path in paths)]


def source_stamp(paths: Iterable[Path]) -> int:
    """A time in nanoseconds that depends on the names, sizes and times of files.

    Its seconds are the time of the latest change. The nanoseconds are a checksum over all files and
    their folders, because the latest time alone would hide changes if it is in the future. The
    checksum includes change times, which programs cannot set back.
    """
    files = list(paths)
    shared = os.path.commonpath([path.parent for path in files])
    digest, newest = hashlib.sha256(), 0
    with _named_errors():
        for path in (*files, *sorted({path.parent for path in files})):
            stat = path.stat()
            facts = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
            below = os.fspath(path)[len(shared) :].lstrip("/") or "."
            digest.update(os.fsencode(below) + repr(facts).encode())
            newest = max(newest, *facts[1:])
    seconds = min(newest // 10**9, _LAST_SECOND)
    return seconds * 10**9 + int.from_bytes(digest.digest()[:8]) % 10**9


_LAST_SECOND = (1 << 31) - 1
"""The latest time that all file systems support."""


@contextmanager
def _named_errors() -> Iterator[None]:
    try:
        yield
    except ValueError:  # A null character in a name.
        raise SourceError(
            "a source file", "has no possible name", "restore the list of it"
        ) from None
    except OSError as error:
        raise SourceError(
            error.filename or "a source file", f"cannot be read ({error.strerror})", "restore it"
        ) from error
