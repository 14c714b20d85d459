"""Building one shard of a job, or the whole job."""

from __future__ import annotations

import resource
import socket
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from occgen_hub.builder import EpisodeRef
from occgen_hub.episode_build import Built
from occgen_hub.job import Job
from occgen_hub.runtime.finalize import finalize
from occgen_hub.runtime.lock import output_lock
from occgen_hub.runtime.records import join_build, make_plan, read_plan, recording
from occgen_hub.runtime.results import (
    Failure,
    Listener,
    Process,
    Publisher,
    Result,
    SceneResult,
    Summary,
)
from occgen_hub.runtime.scenes import build_refs
from occgen_hub.runtime.shard import Shard
from occgen_hub.runtime.workers import build_in_workers
from occgen_hub.scenes import SceneRef


def build_dataset(
    job: Job,
    workers: int = 1,
    listener: Listener | None = None,
    publisher: Publisher | None = None,
) -> Summary:
    """Build the episodes of a job, with `workers` processes, and then the files of the dataset.

    A failed episode does not stop the others. Failures are listed in failures.jsonl, which is
    absent when there are none, and the next run tries them again. The result is the same for any
    number of workers, and after any interruption.

    Raises UsageError if another build is running, and OccGenError if a file of the whole dataset
    cannot be read or written.
    """
    build_shard(job, Shard(0, 1), workers, listener, "local", publisher)
    return finalize(job.out, workers)


def build_shard(
    job: Job,
    shard: Shard,
    workers: int = 1,
    listener: Listener | None = None,
    executor: str = "shard",
    publisher: Publisher | None = None,
) -> Summary:
    """Build one shard of a job. `finalize` completes the dataset when all shards are built.

    Other shards of the same job may run at the same time. publisher: receives the finished scenes;
    scenes that it has published already are not built.

    Raises UsageError if another build, or the same shard of this one, is running.
    """
    plan, listener, summary = make_plan(job, shard.count), listener or Listener(), Summary()
    start = time.perf_counter()
    with (
        output_lock(job.out, lambda exclusive: join_build(job.out, plan, exclusive=exclusive)),
        recording(job.out, shard.index, executor, overwrite=job.settings.overwrite) as record,
        _closing(publisher),
    ):
        # The plan on disk, which all shards of this build read.
        own = set((read_plan(job.out) or plan).shards[shard.index])
        refs = [ref for ref in job.refs if ref.id in own]
        present = publisher.begin(job, refs, shard.index) if publisher else {}
        refs = [ref for ref in refs if ref.id not in present]
        done, scenes = set[str](), _SceneTracker(refs)

        def note(result: Result) -> None:
            done.add(result.id)
            # Before the result is recorded: this call may stop the build, and failures that the
            # stop itself caused must not be recorded.
            listener.finished(result)
            summary.add(result)
            record(result)

        for name, episodes in present.items():
            for episode in episodes:
                note(Built(episode, "present", 0))
            record(SceneResult(name))
        with closing(_results(job, refs, workers, listener)) as results:
            for result in results:
                if isinstance(result, SceneResult):
                    record(result)
                elif result.id in done and isinstance(result, Built):
                    continue  # Its scene is built again, since the first process died.
                else:
                    note(result)
                if publisher and (finished := scenes.finished_by(result)) is not None:
                    publisher.add(finished, whole=finished not in scenes.failed)
        for failure in publisher.end() if publisher else ():
            note(failure)
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


def _results(
    job: Job, refs: Sequence[EpisodeRef | SceneRef], workers: int, listener: Listener
) -> Generator[Result | SceneResult, None, None]:
    """Build episodes and scenes in this process or in workers, and yield their results."""
    if min(workers, len(refs)) > 1:
        return build_in_workers(job, refs, min(workers, len(refs)), listener.frames)
    return build_refs(job, refs, listener.frames)


@contextmanager
def _closing(publisher: Publisher | None) -> Iterator[None]:
    """Stop a publisher when the block ends, also by an exception."""
    try:
        yield
    finally:
        if publisher is not None:
            publisher.stop()


class _SceneTracker:
    """Tracks which scenes are finished. failed: scenes and episodes with a failure."""

    def __init__(self, refs: Sequence[EpisodeRef | SceneRef]) -> None:
        self._remaining = Counter(_scene(ref.id) for ref in refs if isinstance(ref, EpisodeRef))
        self.failed: set[str] = set()

    def finished_by(self, result: Result | SceneResult) -> str | None:
        """The scene that this result completes, or None."""
        if isinstance(result, SceneResult):
            return result.id
        scene = _scene(result.id)
        if isinstance(result, Failure):
            self.failed |= {scene, result.id}
        if scene in self._remaining:
            self._remaining[scene] -= 1
            return None if self._remaining[scene] else scene
        return None


def _scene(episode: str) -> str:
    """The scene of an episode, as in the index."""
    return episode.rpartition("/")[0]


def _peak_memory() -> int:
    """Peak resident memory, in bytes, of this process or of the largest one that it started."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10
    # For this process, getrusage may report the peak of the process it was forked from.
    status = Path("/proc/self/status").read_text()
    return max(children, int(status.split("VmHWM:")[1].split()[0]) << 10)
