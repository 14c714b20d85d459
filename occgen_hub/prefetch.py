"""Work in threads: computing the next results early, and finishing the last ones late."""

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
"""Environment variable: how many processes share this process's GPU. Set by OccGen Hub."""


def own_threads() -> int:
    """This process's share of the cores: NUMBA_NUM_THREADS, where it is set."""
    return int(os.environ.get("NUMBA_NUM_THREADS") or len(os.sched_getaffinity(0)))


def prefetch[Item, Result](
    work: Callable[[Item], Result],
    items: Iterable[Item],
    threads: int | None = None,
    ready: int | None = None,
) -> Generator[Result]:
    """`map(work, items)`, in order, with results ready ahead.

    threads: `own_threads()` if not given; with one, items are worked on in order. ready: how many
    results, as many as there are threads if not given. For work that lets go of the interpreter, as
    decoding does. An error comes out where its result would. When the generator is closed, what was
    begun ends and no more is begun.
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
    """A function that hands items to `work`, done in order in a thread, at most `depth` waiting.

    For work that lets go of the interpreter, as compressing does. When the block ends, all is done.
    An error of `work` comes out of the next call, or of the end of the block.
    """
    waiting: queue.Queue[object] = queue.Queue(depth)
    errors: list[BaseException] = []

    def take() -> None:
        while (item := waiting.get()) is not _END:
            if errors:
                continue  # Keep emptying the queue, so that nobody waits for ever.
            try:
                work(item)  # type: ignore[arg-type]  # _END apart, only Items are put in
            except BaseException as error:
                errors.append(error)

    def hand(item: Item) -> None:
        if errors:
            raise errors[0]
        waiting.put(item)

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    try:
        yield hand
    except BaseException:
        errors.append(InterruptedError())  # Skip what is still queued.
        raise
    finally:
        with hold_stops():  # The caller goes on to close what `work` uses.
            waiting.put(_END)
            thread.join()
    if errors:
        raise errors[0]
