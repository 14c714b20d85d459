"""Write the files that belong to the whole dataset, after its shards are built."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from occgen_hub.atomic import clear_all_leftovers
from occgen_hub.card import is_own, write_card
from occgen_hub.errors import OccGenError, UsageError
from occgen_hub.index import parts
from occgen_hub.loading import trajectories
from occgen_hub.runtime.lock import LOGS, is_locked, output_lock
from occgen_hub.runtime.records import PLAN, Plan, Record, read_plan, read_record, records_digest
from occgen_hub.runtime.report import (
    FAILURES,
    read_failures,
    report_digest,
    write_failures,
    write_report,
)
from occgen_hub.runtime.results import Failure, Summary
from occgen_hub.scenes import scene_of
from occgen_hub.shards import remove_shards, write_shards


def finalize(out: Path, workers: int = 1) -> Summary:
    """Write the files of the whole dataset, from the records of the last build's shards.

    These are the Parquet occupancy, the index, the card, failures.jsonl and report.json. It may be
    called at any time when no shard is running, and again: a second call changes no byte. Episodes
    that a shard did not finish count as failed. workers: threads that write Parquet.

    Raises UsageError if there is no build or one is running, and OccGenError if a file cannot be
    read or written.
    """
    if read_plan(out) is None:
        raise UsageError(
            f"{out}: has no {LOGS}/{PLAN} of a build; give the --output of occgen-hub build."
        )
    began = time.perf_counter()
    with output_lock(out):
        plan = read_plan(out)
        assert plan is not None
        for folder in (out, *sorted(out.glob("*/")), *sorted(out.glob("*/*/"))):
            clear_all_leftovers(folder)
            for scratch in folder.glob(".*.scratch"):
                shutil.rmtree(scratch, ignore_errors=True)
        records = [read_record(out, shard) for shard in range(len(plan.shards))]
        summary = summarize(plan, records)
        try:
            write_failures(out, [*summary.failures, *_other_failures(out, plan)])
            if trajectories(out) or parts(out):
                if plan.parquet_occupancy:
                    overwrite = any(record.began.get("overwrite") for record in records)
                    write_shards(out, workers, overwrite=overwrite, images=plan.parquet_images)
                else:
                    remove_shards(out)
                if not is_own(card := write_card(out)):
                    summary.remarks.append(
                        f"{card} was not written by occgen-hub and is left unchanged; move it away "
                        "to get a generated card"
                    )
            spent = time.perf_counter() - began
            if summary.built:
                summary.stages["finalize"] += spent  # type: ignore[assignment]  # a Counter adds up floats as well
            summary.seconds += spent
            run = {**_times_and_executor(records), **plan.settings}
            write_report(out, summary, run, records_digest(out, plan))
        except OSError as error:
            path, reason = error.filename or out, error.strerror or str(error)
            raise OccGenError(
                f"{path}: cannot be read or written ({reason}); fix that and run again."
            ) from error
    return summary


def summarize(plan: Plan, records: Sequence[Record]) -> Summary:
    """Add up the results of all shards. Episodes that a shard did not finish count as failed."""
    summary, end = Summary(), 0.0
    for number, (ids, record) in enumerate(zip(plan.shards, records, strict=True)):
        unfinished = f"shard {number}/{len(plan.shards)} did not finish; run the same build again."
        for name in ids:
            if name in record.results:
                summary.add(record.results[name])
            elif name not in record.scenes:
                summary.add(Failure(name, f"{name}: {unfinished}"))
        for name in sorted(set(record.results).difference(ids)):  # Episodes of fetched scenes.
            summary.add(record.results[name])
    summary.failures.sort(key=lambda failure: failure.id)
    ended = [record for record in records if record.began and record.ended]
    processes = [record.ended["process"] for record in ended]
    summary.processes = [process for process in processes if process.seconds]  # See record_present.
    # The time during which at least one shard ran. Shards may overlap or follow one another.
    times = [[part["time"].timestamp() for part in (r.began, r.ended)] for r in ended]
    for start, stop in sorted(times):
        summary.seconds += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return summary


def _times_and_executor(records: Sequence[Record]) -> dict[str, Any]:
    times = [part["time"] for record in records for part in (record.began, record.ended) if part]
    executors = sorted({str(record.began.get("executor")) for record in records if record.began})
    finished = max(times).isoformat(timespec="seconds") if times else ""
    return {"finished": finished, "executor": " ".join(executors)}


def _other_failures(out: Path, plan: Plan) -> list[Failure]:
    """Failures of earlier builds in episodes that this build, with a limit, does not include."""
    if not plan.limited:
        return []
    included = {name for ids in plan.shards for name in ids}
    return [
        f
        for f in read_failures(out)
        if included.isdisjoint((f.id, scene_of(f.id))) and not (out / f.id).exists()
    ]


def unfinished(out: Path) -> list[str]:
    """Reasons why a dataset may be incomplete, according to the records of its last build.

    Empty for a complete dataset, and for one without these records.
    """
    if is_locked(out):
        return ["a build is writing to it now"]
    if (plan := read_plan(out)) is not None:
        count = len(plan.shards)
        if undone := sum(not read_record(out, shard).ended for shard in range(count)):
            return [f"the last build did not finish ({undone} of {count} shards); run it again"]
        if report_digest(out) != records_digest(out, plan):
            return [f"the last build is not finalized; run occgen-hub finalize {out}"]
    if count := len(read_failures(out)):
        s = "" if count == 1 else "s"
        return [f"{count} episode{s} failed; see {out / FAILURES}"]
    return []
