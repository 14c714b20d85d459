"""The files of a build in the hidden folder `.logs`: its plan, and a record for each shard.

A shard appends a line to its own record for each finished episode, so `finalize` knows what was
done even if processes were killed.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from occgen_hub.episode_build import Built
from occgen_hub.errors import OccGenError
from occgen_hub.files import dump_json, is_file, parse_json, read_bytes, try_lock
from occgen_hub.job import Job
from occgen_hub.runtime.lock import LOGS, locked_error
from occgen_hub.runtime.results import Process, Result, SceneResult
from occgen_hub.runtime.shard import share_out
from occgen_hub.scenes import scene_of

PLAN = "build.json"
RECORD = "shard-{}.jsonl"

MAX_BYTES = 1 << 30
"""Maximum size of a plan or a record. Millions of episodes need less."""

_RESULT: TypeAdapter[Result] = TypeAdapter(Result)


@dataclass(frozen=True)
class Plan:
    """The settings of a build, and the ids of the episodes in each of its shards.

    For archives and scenes on the Hub, whose episodes are not known yet, these are ids of scenes.

    digest: SHA-256 of the episodes, the settings and the number of shards, which is the same for
    all shards of a build; settings: copied into the report; limited: whether the source has more
    episodes.
    """

    digest: str
    settings: dict[str, Any]
    limited: bool
    parquet_occupancy: bool
    shards: list[list[str]]
    parquet_images: bool = False


_PLAN = TypeAdapter(Plan)


def make_plan(job: Job, count: int) -> Plan:
    """Distribute the episodes of a job over `count` shards. The same job gives the same plan."""
    ids = [ref.id for ref in job.refs]
    identity = dump_json(
        [ids, job.choices, count, job.limited, job.parquet_occupancy, job.parquet_images]
        + ([True] if job.whole_scenes else [])
    )
    digest = hashlib.sha256(identity.encode()).hexdigest()
    known = read_plan(job.out)
    if known is not None and _is_plan(known, digest, ids, count):
        return known  # Saves reading the headers of all episodes again.
    groups: dict[str, list[int]] = {}
    for number, name in enumerate(ids):
        groups.setdefault(scene_of(name) if job.whole_scenes else name, []).append(number)
    costs = [sum(job.work(job.refs[number]) for number in group) for group in groups.values()]
    members = list(groups.values())
    shards = [sorted(n for group in share for n in members[group])
              for share in share_out(costs, count)]  # fmt: skip
    named = [[ids[number] for number in numbers] for numbers in shards]
    described, parquet = job.described(), job.parquet_occupancy
    return Plan(digest, described, job.limited, parquet, named, job.parquet_images)


def _is_plan(known: Plan, digest: str, ids: Iterable[str], count: int) -> bool:
    """Whether a recorded plan is that of these episodes. Its file may have been changed."""
    episodes = sorted(chain.from_iterable(known.shards))
    return known.digest == digest and len(known.shards) == count and episodes == sorted(ids)


def read_plan(out: Path) -> Plan | None:
    """The plan of the last build, or None if there is no readable one."""
    try:
        return _PLAN.validate_python(parse_json(read_bytes(out / LOGS / PLAN, MAX_BYTES)))
    except (OccGenError, ValueError):
        return None


def join_build(out: Path, plan: Plan, *, exclusive: bool) -> bool:
    """Return whether the recorded plan is `plan`, or record it if the lock is held exclusively.

    Recording a plan removes the shard records of an earlier build. The file is overwritten in
    place, because other hosts may see a renamed file late over NFS. Raises OccGenError if it cannot
    be written.
    """
    known, ids = read_plan(out), chain.from_iterable(plan.shards)
    same = known is not None and _is_plan(known, plan.digest, ids, len(plan.shards))
    if same or not exclusive:
        return same
    path = out / LOGS / PLAN
    try:
        for record in path.parent.glob(RECORD.format("*")):
            record.unlink()
        if not is_file(path):  # Writing to a pipe would wait for a reader.
            path.unlink(missing_ok=True)
        path.write_text(dump_json(asdict(plan)), encoding="utf-8")
    except OSError as error:
        raise _unwritable(path, error) from error
    return True


@dataclass
class Record:
    """The last run of a shard.

    began: `time` (a datetime), `executor`, `overwrite`; results: by episode id; scenes: ids of
    scenes whose episodes were all tried; ended: `time` and `process`, empty if the run did not end.
    """

    began: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Result] = field(default_factory=dict)
    scenes: set[str] = field(default_factory=set)
    ended: dict[str, Any] = field(default_factory=dict)


@contextmanager
def recording(
    out: Path, shard: int, executor: str, *, overwrite: bool = False
) -> Iterator[Callable[[Result | SceneResult | Process], None]]:
    """Start a run in a shard's record. Yields a function that appends results and the process.

    Rows that do not fit on a full disk are written together with the next one. Raises UsageError if
    another process builds the same shard, and OccGenError if the record cannot be written.
    """
    path, pending = out / LOGS / RECORD.format(shard), b""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise _unwritable(path, error) from error

    def add(row: Result | SceneResult | Process | dict[str, Any]) -> None:
        nonlocal pending
        values = row if isinstance(row, dict) else asdict(row)
        if isinstance(row, Process):
            values = {"ended": {"time": _now(), "process": values}}
        if isinstance(row, SceneResult):
            values = {"scene": row.id}
        # The line break comes first, since the last row of a killed run may be incomplete.
        pending += f"\n{dump_json(values)}".encode()
        with suppress(OSError):
            pending = pending[os.write(handle, pending) :]

    try:
        if not try_lock(handle):
            raise locked_error(out)
        add({"began": {"time": _now(), "executor": executor, "overwrite": overwrite}})
        yield add
    finally:
        os.close(handle)


def record_present(out: Path, shard: int, executor: str, ids: list[str]) -> None:
    """Record a run of a shard whose episodes are all present already."""
    with recording(out, shard, executor) as record:
        for name in ids:
            record(Built(name, "present", 0))
        record(Process(socket.gethostname(), "cpu", 0, 0, 0.0, 0))


def read_record(out: Path, shard: int) -> Record:
    """The record of a shard's last run; empty if there is none. Malformed lines are ignored."""
    record = Record()
    for line in _lines(out, shard):
        with suppress(ValueError, TypeError, KeyError, AttributeError):
            row = parse_json(line)
            if "began" in row:
                record = Record(_with_time(row["began"]))
            elif "ended" in row:
                process = Process(**row["ended"]["process"])
                record.ended = {**_with_time(row["ended"]), "process": process}
            elif "scene" in row:
                record.scenes.add(str(row["scene"]))
            else:
                record.results[row["id"]] = _RESULT.validate_python(row)
    return record


def count_finished(out: Path, shards: int) -> int:
    """The number of episodes that the last runs of shards 0 to `shards` - 1 finished."""
    runs = (b"\n".join(_lines(out, shard)).rpartition(b'{"began"')[2] for shard in range(shards))
    return sum(run.count(b'\n{"id"') for run in runs)


def records_digest(out: Path, plan: Plan) -> str:
    """SHA-256 of the plan and the present records, in hexadecimal."""
    parts = [_lines(out, shard) for shard in range(len(plan.shards))]
    return hashlib.sha256(repr((plan.digest, parts)).encode()).hexdigest()


def _lines(out: Path, shard: int) -> list[bytes]:
    try:
        return read_bytes(out / LOGS / RECORD.format(shard), MAX_BYTES).splitlines()
    except OccGenError:
        return []


def _with_time(values: dict[str, Any]) -> dict[str, Any]:
    return {**values, "time": datetime.fromisoformat(values["time"])}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _unwritable(path: Path, error: OSError) -> OccGenError:
    return OccGenError(f"{path}: cannot be written ({error.strerror}); fix that and run again.")
