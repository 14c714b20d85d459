"""Run work in threads: compute results ahead of their use, or in the background."""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from occgen_hub.stopping import hold_stops

_END = object()


GPU_SHARED_BY = "OCCGEN_GPU_SHARED_BY"
"""Environment variable with the number of processes that share a GPU. Set by OccGen Hub."""


def own_threads() -> int:
    """The number of threads of this process: NUMBA_NUM_THREADS, or else the number of cores."""
    return int(os.environ.get("NUMBA_NUM_THREADS") or len(os.sched_getaffinity(0)))


def prefetch[Item, Result](
    work: Callable[[Item], Result],
    items: Iterable[Item],
    threads: int | None = None,
    ready: int | None = None,
) -> Generator[Result]:
    """Like `map(work, items)`, in order, with results computed ahead in threads.

    threads: `own_threads()` by default; with one, items are processed in order. ready: number of
    results ahead, that of the threads by default. Useful for work that releases the GIL, such as
    decoding. An error is raised in place of its result. When the generator is closed, running items
    are finished and no further ones are started.
    """
    threads = threads or own_threads()
    ready = ready or threads
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[Future[Result]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(work, item))
                if len(pending) > ready:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


@contextmanager
def background[Item](
    work: Callable[[Item], object], depth: int = 4
) -> Iterator[Callable[[Item], None]]:
    """Yield a function that queues an item for `work`, which runs in order in one thread.

    depth: the length of the queue. Useful for work that releases the GIL, such as compressing. All
    items are done when the block ends. An error of `work` is raised by the next call, or at the end
    of the block.
    """
    waiting: queue.Queue[object] = queue.Queue(depth)
    errors: list[BaseException] = []

    def run() -> None:
        while (item := waiting.get()) is not _END:
            if errors:
                continue  # Empty the queue, so that nothing waits forever.
            try:
                work(item)  # type: ignore[arg-type]  # apart from _END, the queue has only Items
            except BaseException as error:
                errors.append(error)

    def submit(item: Item) -> None:
        if errors:
            raise errors[0]
        waiting.put(item)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield submit
    except BaseException:
        errors.append(InterruptedError())  # Skip what is still queued.
        raise
    finally:
        with hold_stops():  # The caller will close objects that `work` uses.
            waiting.put(_END)
            thread.join()
    if errors:
        raise errors[0]
