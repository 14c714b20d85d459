"""Building: one shard of a job, or all of it."""

from __future__ import annotations

import resource
import socket
import time
from pathlib import Path

from occgen_hub.episode_build import Built
from occgen_hub.job import Job
from occgen_hub.runtime.finalize import finalize
from occgen_hub.runtime.lock import output_lock
from occgen_hub.runtime.records import join_build, make_plan, read_plan, recording
from occgen_hub.runtime.results import Listener, Process, SceneResult, Summary
from occgen_hub.runtime.scenes import build_refs
from occgen_hub.runtime.shard import Shard
from occgen_hub.runtime.workers import build_in_workers


def build_dataset(job: Job, workers: int = 1, listener: Listener | None = None) -> Summary:
    """Build the episodes of a job, with `workers` processes, and then the files of the dataset.

    A failed episode does not stop the others. Failures are listed in failures.jsonl, which is
    absent when there are none, and are tried again by the next run. The result does not depend on
    the number of workers, nor on whether an earlier run was interrupted.
    """
    build_shard(job, Shard(0, 1), workers, listener, "local")
    return finalize(job.out, workers)


def build_shard(
    job: Job,
    shard: Shard,
    workers: int = 1,
    listener: Listener | None = None,
    executor: str = "shard",
) -> Summary:
    """Build one shard of a job, beside others perhaps; `finalize` does the rest when all ended.

    Raises UsageError where another build, or the same shard of this one, is running.
    """
    plan, listener, summary = make_plan(job, shard.count), listener or Listener(), Summary()
    start = time.perf_counter()
    with (
        output_lock(job.out, lambda alone: join_build(job.out, plan, alone=alone)),
        recording(job.out, shard.index, executor, overwrite=job.settings.overwrite) as record,
    ):
        own = set((read_plan(job.out) or plan).shards[shard.index])  # As all shards have it.
        refs = [ref for ref in job.refs if ref.id in own]
        if min(workers, len(refs)) > 1:
            results = build_in_workers(job, refs, min(workers, len(refs)), listener.frames)
        else:
            results = build_refs(job, refs, listener.frames)
        done = set[str]()
        try:
            for result in results:
                if isinstance(result, SceneResult):
                    record(result)
                    continue
                if result.id in done and isinstance(result, Built):
                    continue  # Of a scene that is built again, since its process died.
                done.add(result.id)
                listener.finished(result)  # It may stop the build, whose failures are none then.
                summary.add(result)
                record(result)
        finally:
            results.close()  # So that an interruption stops what is under way as well.
        summary.seconds = time.perf_counter() - start
        process = Process(
            host=socket.gethostname(),
            device=job.device_name(),
            episodes=summary.built,
            frames=summary.frames,
            seconds=round(summary.seconds, 3),
            peak_memory=_peak_memory(),
        )
        record(process)
    summary.processes.append(process)
    return summary


def _peak_memory() -> int:
    """Bytes that this process, or one that it started, had in memory at most."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10
    # Of this process, getrusage may tell what was there before it was this one.
    status = Path("/proc/self/status").read_text()
    return max(children, int(status.split("VmHWM:")[1].split()[0]) << 10)
