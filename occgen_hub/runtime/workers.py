"""Build episodes in several processes on this machine."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from occgen_hub.builder import EpisodeRef
from occgen_hub.episode_build import Progress
from occgen_hub.errors import UsageError
from occgen_hub.job import Job
from occgen_hub.runtime import threads
from occgen_hub.runtime.results import Failure, Result, SceneResult
from occgen_hub.runtime.scenes import build_refs
from occgen_hub.scenes import SceneRef
from occgen_hub.stopping import hold_stops


@dataclass
class _Worker:
    """A process. episodes: the episodes or scenes assigned to it and not finished, at most two."""

    number: int
    process: SpawnProcess
    episodes: deque[EpisodeRef | SceneRef] = field(default_factory=deque)


def build_in_workers(
    job: Job, refs: Sequence[EpisodeRef | SceneRef], workers: int, progress: Progress
) -> Generator[Result | SceneResult, None, None]:
    """Build episodes in `workers` processes, the largest first, each in the next free process.

    A scene that is fetched is built in one process, which returns the results of its episodes.

    An episode whose process died is tried once more, after the others and in a process with no
    other episode. If that process dies too, the episode has failed.

    Raises UsageError if the job cannot be pickled.
    """
    try:
        pickle.dumps(job.part(workers))
    except Exception as error:  # Sources and engines may come from other packages.
        raise UsageError(
            f"--workers {workers}: the source {job.builder.name} or the engine "
            f"{job.settings.engine.name} cannot be sent to other processes ({error}); keep open "
            "files and local functions out of it, or give --workers 1."
        ) from error
    waiting = deque(sorted(refs, key=job.work, reverse=True))
    network = job.settings.engine.uses_device()
    # With two, a GPU waits neither for an episode to be written nor for a download.
    per_worker = 2 if network or job.hub is not None else 1
    gpus = threads.gpus() if network and job.device in (None, "cuda") else 0
    suspects = set[str]()
    running: dict[Connection[Any, Any], _Worker] = {}

    def start(number: int) -> None:
        context = multiprocessing.get_context("spawn")
        parent_end, child_end = context.Pipe()
        device = f"cuda:{number % gpus}" if gpus else None
        arguments = (child_end, job.part(workers), device)
        process = context.Process(target=_run_worker, args=arguments, daemon=True)

        # Workers inherit blocked signals, so Ctrl-C reaches only this process. The resource tracker
        # starts first, because starting it unblocks the signals. A stop is held, because a worker
        # that is sent only a part of its arguments prints a traceback.
        resource_tracker.ensure_running()
        limits = threads.limited_children(workers, -(-workers // max(gpus, 1)))
        with hold_stops(), _blocked(signal.SIGINT), limits:
            process.start()
            running[parent_end] = _Worker(number, process)
        child_end.close()
        assign(parent_end)

    def assign(connection: Connection[Any, Any]) -> None:
        episodes = running[connection].episodes
        with suppress(OSError):  # The worker died; the main loop finds out when it receives.
            while waiting and len(episodes) < per_worker:
                if episodes and suspects & {waiting[0].id, *(ref.id for ref in episodes)}:
                    return
                episodes.append(waiting.popleft())
                connection.send(episodes[-1])
            if not episodes:
                connection.send(None)

    try:
        for number in range(workers):
            start(number)
        while running:
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                worker = running[connection]
                try:
                    message = connection.recv()
                except (EOFError, OSError):
                    del running[connection]
                    worker.process.join()
                    for ref in worker.episodes:
                        if ref.id in suspects:
                            yield _killed(ref)
                        else:
                            suspects.add(ref.id)
                            waiting.append(ref)
                    if waiting:
                        start(worker.number)
                    continue
                if isinstance(message, tuple):
                    progress(*message)
                    continue
                if isinstance(worker.episodes[0], SceneRef) != isinstance(message, SceneResult):
                    yield message
                    continue
                worker.episodes.popleft()
                yield message
                assign(connection)
    finally:
        # On Ctrl-C, unfinished episodes are dropped; the next run removes their temporary files.
        for worker in running.values():
            worker.process.terminate()


@contextmanager
def _blocked(number: signal.Signals) -> Iterator[None]:
    """Block a signal in this thread, and in processes that it starts."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _killed(ref: EpisodeRef | SceneRef) -> Failure:
    reason = "its process was killed twice, perhaps out of memory; free some and run again"
    return Failure(ref.id, f"{ref.path}: {reason}.")


def _run_worker(connection: Connection[Any, Any], job: Job, device: str | None) -> None:
    """In a worker: build the episodes received, until None is received or the parent ends.

    device: for networks; None takes the job's.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_exit_with_parent, args=(parent.sentinel,), daemon=True).start()
    lock = threading.Lock()  # Two threads report frames.

    def send(message: Result | SceneResult | tuple[str, int]) -> None:
        with lock:
            connection.send(message)

    refs = iter(connection.recv, None)
    job = job if device is None else job.on(device)
    with suppress(BrokenPipeError, EOFError):  # The parent has ended.
        for result in build_refs(job, refs, lambda *n: send(n)):
            send(result)


def _exit_with_parent(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
