"""Episodes in a pool of processes on this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from pathlib import Path

from occgen_hub.builder import DatasetBuilder, EpisodeRef, Settings, Stage
from occgen_hub.runtime.results import Failure, Listener, Result
from occgen_hub.runtime.threads import shared
from occgen_hub.runtime.work import build_one

type Counts = Connection[tuple[Stage, int] | None, tuple[Stage, int] | None]
_frames_done: Counts | None = None


@dataclass(frozen=True)
class Order:
    """What every process is told besides the episode. failed: see `work.build_one`; workers: how
    many processes share the cores.
    """

    builder: DatasetBuilder
    out: Path
    settings: Settings
    failed: Mapping[str, Failure]
    workers: int

    def submit(self, pool: ProcessPoolExecutor, ref: EpisodeRef) -> Future[Result]:
        """Give an episode to the pool, which starts its processes now: they leave Ctrl-C to the
        parent.

        They inherit what is blocked here, so not even one that is still importing is interrupted.
        """
        failed = self.failed.get(ref.id)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with shared(self.workers):
                return pool.submit(_task, self.builder, ref, self.out, self.settings, failed)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def killed(self, ref: EpisodeRef) -> Failure:
        """The failure of an episode that killed its process even when it was alone."""
        reason = f"{ref.path}: its process was killed twice, perhaps for want of memory"
        state = self.builder.state(ref, self.settings)
        remedy = "free some and run again with --retry-failed"
        return Failure(ref.id, f"{reason}; {remedy}.", state=state)


def in_processes(
    order: Order, refs: Sequence[EpisodeRef], listener: Listener
) -> Generator[Result, None, None]:
    """Episodes in a pool of processes; those that a dying process takes along are tried alone.

    The largest go first, so that none is left to one process when the others are done.
    """
    context = multiprocessing.get_context("spawn")
    # A pipe and no queue: its small writes are whole without a lock, which a killed process keeps.
    counts, done = context.Pipe(duplex=False)
    reader = threading.Thread(target=_drain, args=(counts, listener), daemon=True)
    reader.start()
    waiting = deque(sorted(refs, key=order.builder.work, reverse=True))
    suspects = list[EpisodeRef]()
    try:
        while waiting:
            with _pool(order.workers, context, done) as pool:
                yield from _feed(pool, waiting, suspects, order)
        while suspects:
            with _pool(1, context, done) as pool:
                yield from _alone(pool, suspects, order)
    finally:
        done.send(None)
        reader.join(timeout=5)
        done.close()
        counts.close()


def _feed(
    pool: ProcessPoolExecutor,
    waiting: deque[EpisodeRef],
    suspects: list[EpisodeRef],
    order: Order,
) -> Generator[Result, None, None]:
    """Keep the pool busy until nothing waits or it breaks; then what it held becomes suspect."""
    running: dict[Future[Result], EpisodeRef] = {}
    try:
        while waiting or running:
            while waiting and len(running) < order.workers + 1:
                running[order.submit(pool, waiting[0])] = waiting[0]
                waiting.popleft()  # Only now: a broken pool takes no more.
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                result = future.result()
                del running[future]
                yield result
    except BrokenProcessPool:
        for future, ref in running.items():
            if future.done() and not future.cancelled() and future.exception() is None:
                yield future.result()
            else:
                suspects.append(ref)


def _alone(pool: ProcessPoolExecutor, suspects: list[EpisodeRef], order: Order) -> Iterator[Result]:
    """One after the other, until none is left or the pool breaks: then it is known by which."""
    while suspects:
        ref = suspects.pop(0)
        try:
            result = order.submit(pool, ref).result()
        except BrokenProcessPool:
            yield order.killed(ref)
            return
        yield result


@contextmanager
def _pool(workers: int, context, done) -> Iterator[ProcessPoolExecutor]:  # type: ignore[no-untyped-def]  # multiprocessing's own
    pool = ProcessPoolExecutor(workers, context, _start, (done,))
    try:
        yield pool
        pool.shutdown()
    except BaseException:
        # Ctrl-C: do not wait for episodes under way; the next run clears what they leave.
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def _start(done: Counts) -> None:
    """In each worker: end when the parent does."""
    global _frames_done
    _frames_done = done
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait_for([sentinel])
    os._exit(1)


def _task(
    builder: DatasetBuilder,
    ref: EpisodeRef,
    out: Path,
    settings: Settings,
    failed: Failure | None,
) -> Result:
    assert _frames_done is not None
    done = _frames_done
    return build_one(builder, ref, out, settings, lambda *count: done.send(count), failed)


def _drain(counts: Counts, listener: Listener) -> None:
    while (count := counts.recv()) is not None:
        listener.frames(*count)
