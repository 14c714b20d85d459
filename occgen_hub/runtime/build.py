"""Building one shard of a job, or the whole job."""

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
    """Build the episodes of a job in `workers` processes, then write the files of the dataset.

    A failed episode does not stop the others. Failures are listed in failures.jsonl, which is
    absent when there are none, and the next run tries them again. The result is the same for any
    number of workers, and after any interruption.

    Raises UsageError if another build is running, and OccGenError if a file of the whole dataset
    cannot be read or written.
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
    """Build one shard of a job. `finalize` completes the dataset when all shards are built.

    Other shards of the same job may run at the same time. Raises UsageError if another build, or
    the same shard of this one, is running.
    """
    plan, listener, summary = make_plan(job, shard.count), listener or Listener(), Summary()
    start = time.perf_counter()
    with (
        output_lock(job.out, lambda exclusive: join_build(job.out, plan, exclusive=exclusive)),
        recording(job.out, shard.index, executor, overwrite=job.settings.overwrite) as record,
    ):
        # The plan on disk, which all shards of this build read.
        own = set((read_plan(job.out) or plan).shards[shard.index])
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
                    continue  # Its scene is built again, since the first process died.
                done.add(result.id)
                # Before the result is recorded: this call may stop the build, and failures that
                # the stop itself caused must not be recorded.
                listener.finished(result)
                summary.add(result)
                record(result)
        finally:
            results.close()  # On an interruption, also stops the episodes under way.
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
    """Peak resident memory, in bytes, of this process or of the largest one that it started."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10
    # For this process, getrusage may report the peak of the process it was forked from.
    status = Path("/proc/self/status").read_text()
    return max(children, int(status.split("VmHWM:")[1].split()[0]) << 10)
