"""Episodes in several processes on this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from occgen_hub.builder import EpisodeRef
from occgen_hub.episode_build import Progress
from occgen_hub.job import Job
from occgen_hub.runtime import threads
from occgen_hub.runtime.results import Failure, Result, SceneResult
from occgen_hub.runtime.scenes import build_refs
from occgen_hub.scenes import SceneRef


@dataclass
class _Worker:
    """A process. episodes: those, or the scenes, that it was given and has not finished, at most
    two.
    """

    number: int
    process: SpawnProcess
    episodes: deque[EpisodeRef | SceneRef] = field(default_factory=deque)


def build_in_workers(
    job: Job, refs: Sequence[EpisodeRef | SceneRef], workers: int, progress: Progress
) -> Generator[Result | SceneResult, None, None]:
    """Build episodes in `workers` processes, the largest first, each given to whoever is free.

    A scene that has to be fetched is given to one process, which gives the results of its episodes.

    An episode whose process died is tried once more, alone in its process, when the others are
    done. If that process dies too, the episode has failed.
    """
    waiting = deque(sorted(refs, key=job.work, reverse=True))
    network = job.settings.engine.uses_device()
    # So that a GPU does not wait until an episode is written, nor for what is downloaded.
    at_once = 2 if network or job.hub is not None else 1
    gpus = threads.gpus() if network and job.device in (None, "cuda") else 0
    suspects = set[str]()
    running: dict[Connection[Any, Any], _Worker] = {}

    def start(number: int) -> None:
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        own = f"cuda:{number % gpus}" if gpus else None
        process = context.Process(target=_work, args=(there, job.part(workers), own), daemon=True)

        def begin() -> None:
            # Blocked signals are inherited: the workers leave Ctrl-C to this process. Starting the
            # resource tracker, which the first process would do, unblocks them again.
            resource_tracker.ensure_running()
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            on_a_gpu = -(-workers // max(gpus, 1))
            with threads.limited_children(workers, on_a_gpu):
                process.start()
            running[here] = _Worker(number, process)

        # In a thread, which no signal's handler interrupts while a process is half started.
        beginning = threading.Thread(target=begin)
        beginning.start()
        beginning.join()
        there.close()
        hand_out(here)

    def hand_out(connection: Connection[Any, Any]) -> None:
        episodes = running[connection].episodes
        with suppress(OSError):  # If the worker has died, receiving says so.
            while waiting and len(episodes) < at_once:
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
                hand_out(connection)
    finally:
        # On Ctrl-C, episodes under way are not waited for; the next run clears what they leave.
        for worker in running.values():
            worker.process.terminate()


def _killed(ref: EpisodeRef | SceneRef) -> Failure:
    reason = "its process was killed twice, perhaps for want of memory; free some and run again"
    return Failure(ref.id, f"{ref.path}: {reason}.")


def _work(connection: Connection[Any, Any], job: Job, device: str | None) -> None:
    """In a worker: build the episodes that come, until None comes or the parent ends.

    device: its own, None for the job's.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    turn = threading.Lock()  # Frames are counted in two threads.

    def tell(message: Result | SceneResult | tuple[str, int]) -> None:
        with turn:
            connection.send(message)

    refs = iter(connection.recv, None)
    job = job if device is None else job.on(device)
    with suppress(BrokenPipeError, EOFError):  # The parent has ended.
        for result in build_refs(job, refs, lambda *n: tell(n)):
            tell(result)


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
