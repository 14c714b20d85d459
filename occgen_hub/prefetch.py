"""Doing the next few items in threads while the present one is used."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor


def own_threads() -> int:
    """This process's share of the cores: NUMBA_NUM_THREADS, where it is set."""
    return int(os.environ.get("NUMBA_NUM_THREADS") or len(os.sched_getaffinity(0)))


def ahead[Item, Result](work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`map(work, items)`, in order, with as many results ready ahead as there are threads.

    For work that lets go of the interpreter, as decoding does. There are `own_threads()` threads.
    An error comes out where its result would.
    """
    threads = own_threads()
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[Future[Result]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(work, item))
                if len(pending) > threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
