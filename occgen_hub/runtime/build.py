"""Building: one shard of a job, or all of it."""

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
    absent when there are none, and are tried again by the next run. The result does not depend on
    the number of workers, nor on whether an earlier run was interrupted.
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
    """Build one shard of a job, beside others perhaps; `finalize` does the rest when all ended.

    publisher: takes the scenes that are finished; those that it has already are not built.

    Raises UsageError where another build, or the same shard of this one, is running.
    """
    plan, listener, summary = make_plan(job, shard.count), listener or Listener(), Summary()
    start = time.perf_counter()
    with (
        output_lock(job.out, lambda alone: join_build(job.out, plan, alone=alone)),
        recording(job.out, shard.index, executor, overwrite=job.settings.overwrite) as record,
        _closing(publisher),
    ):
        own = set((read_plan(job.out) or plan).shards[shard.index])  # As all shards have it.
        refs = [ref for ref in job.refs if ref.id in own]
        present = publisher.begin(job, refs, shard.index) if publisher else {}
        refs = [ref for ref in refs if ref.id not in present]
        done, scenes = set[str](), _Scenes(refs)

        def note(result: Result) -> None:
            done.add(result.id)
            listener.finished(result)  # It may stop the build, whose failures are none then.
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
                    continue  # Of a scene that is built again, since its process died.
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
    """What becomes of episodes and scenes, built here or in processes."""
    if min(workers, len(refs)) > 1:
        return build_in_workers(job, refs, min(workers, len(refs)), listener.frames)
    return build_refs(job, refs, listener.frames)


@contextmanager
def _closing(publisher: Publisher | None) -> Iterator[None]:
    """Stop a publisher at the end of the block, however it ends."""
    try:
        yield
    finally:
        if publisher is not None:
            publisher.stop()


class _Scenes:
    """Which scenes are finished, from results as they come. failed: those with a failure."""

    def __init__(self, refs: Sequence[EpisodeRef | SceneRef]) -> None:
        self._left = Counter(_scene(ref.id) for ref in refs if isinstance(ref, EpisodeRef))
        self.failed: set[str] = set()

    def finished_by(self, result: Result | SceneResult) -> str | None:
        """The scene of which this was the last result; None if there is none."""
        if isinstance(result, SceneResult):
            return result.id
        scene = _scene(result.id)
        if isinstance(result, Failure):
            self.failed |= {scene, result.id}
        if scene in self._left:
            self._left[scene] -= 1
            return None if self._left[scene] else scene
        return None


def _scene(episode: str) -> str:
    """The scene of an episode, as the index has it."""
    return episode.rpartition("/")[0]


def _peak_memory() -> int:
    """Bytes that this process, or one that it started, had in memory at most."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10
    # Of this process, getrusage may tell what was there before it was this one.
    status = Path("/proc/self/status").read_text()
    return max(children, int(status.split("VmHWM:")[1].split()[0]) << 10)
