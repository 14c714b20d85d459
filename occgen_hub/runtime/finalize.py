"""What belongs to a dataset as a whole, written when its shards have been built."""

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
from occgen_hub.runtime.lock import LOGS, is_held, output_lock
from occgen_hub.runtime.records import PLAN, Plan, Record, read_plan, read_record, records_digest
from occgen_hub.runtime.report import (
    FAILURES,
    made_from,
    read_failures,
    write_failures,
    write_report,
)
from occgen_hub.runtime.results import Failure, Summary
from occgen_hub.scenes import scene_of
from occgen_hub.shards import remove_shards, write_shards


def finalize(out: Path, workers: int = 1) -> Summary:
    """Write the files of the whole dataset, from what the shards of its last build recorded.

    They are the Parquet occupancy, the card, failures.jsonl and report.json. Anybody may call it at
    any time when no shard is running; a second call changes no byte. An episode that its shard has
    not finished counts as failed. workers: threads that write Parquet.

    Raises UsageError where there is no build or one is running, and OccGenError where a file cannot
    be read or written.
    """
    if read_plan(out) is None:
        raise UsageError(
            f"{out}: holds no {LOGS}/{PLAN} of a build; give the --output of occgen-hub build."
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
                        f"{card} is not occgen-hub's, and was left as it was; move it away to have "
                        "a card made"
                    )
            spent = time.perf_counter() - began
            if summary.built:
                summary.stages["finalize"] += spent  # type: ignore[assignment]  # a Counter adds up floats as well
            summary.seconds += spent
            run = {**_times_and_executor(records), **plan.asked}
            write_report(out, summary, run, records_digest(out, plan))
        except OSError as error:
            place, reason = error.filename or out, error.strerror or str(error)
            raise OccGenError(
                f"{place}: cannot be read or written ({reason}); mend that and run again."
            ) from error
    return summary


def summarize(plan: Plan, records: Sequence[Record]) -> Summary:
    """What the shards did. What a shard has not finished has failed."""
    summary, end = Summary(), 0.0
    for number, (ids, record) in enumerate(zip(plan.shards, records, strict=True)):
        undone = f"shard {number}/{len(plan.shards)} did not end; run the same build again."
        for name in ids:
            if name in record.results:
                summary.add(record.results[name])
            elif name not in record.scenes:
                summary.add(Failure(name, f"{name}: {undone}"))
        of_scenes = set(record.results).difference(ids)
        for name in sorted(of_scenes):
            summary.add(record.results[name])
    summary.failures.sort(key=lambda failure: failure.id)
    ended = [record for record in records if record.began and record.ended]
    processes = [record.ended["process"] for record in ended]
    summary.processes = [process for process in processes if process.seconds]  # See record_present.
    # The time in which some shard ran: they may run beside one another or one after the other.
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
    """Failures of earlier builds, of episodes that this one, with a limit, is not about."""
    if not plan.limited:
        return []
    about = {name for ids in plan.shards for name in ids}
    return [
        f
        for f in read_failures(out)
        if about.isdisjoint((f.id, scene_of(f.id))) and not (out / f.id).exists()
    ]


def unfinished(out: Path) -> list[str]:
    """Why a dataset may not be all that was to be built, according to its last build's records.

    Nothing of a dataset that came from elsewhere, without them.
    """
    if is_held(out):
        return ["a build is writing here just now"]
    if (plan := read_plan(out)) is not None:
        count = len(plan.shards)
        if undone := sum(not read_record(out, shard).ended for shard in range(count)):
            return [f"the last build has not ended ({undone} of {count} shards); run it again"]
        if made_from(out) != records_digest(out, plan):
            return [f"the last build is not finalized; run occgen-hub finalize {out}"]
    if count := len(read_failures(out)):
        s = "" if count == 1 else "s"
        return [f"{count} episode{s} failed: {out / FAILURES} says why"]
    return []
