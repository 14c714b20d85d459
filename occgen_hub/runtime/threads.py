"""Each process's share of the cores: set where the libraries look as they load."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from occgen_hub.prefetch import GPU_SHARED_BY

LIMITS = ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def share(processes: int) -> int:
    """Cores for each of so many processes on this machine, one at least."""
    return max(1, len(os.sched_getaffinity(0)) // processes)


@contextmanager
def shared(processes: int) -> Iterator[None]:
    """For processes that are started in the block: each with its share of the cores.

    Nothing else is to happen in it: numba looks again whenever it compiles, in this process too.
    """
    before = {name: os.environ.get(name) for name in (*LIMITS, GPU_SHARED_BY)}
    os.environ.update(dict.fromkeys(LIMITS, str(share(processes))))
    os.environ[GPU_SHARED_BY] = str(processes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def limit(count: int, on_a_gpu: int = 1) -> None:
    """For this process: use so many cores, and no more. on_a_gpu: processes that share its GPU."""
    os.environ.update(dict.fromkeys(LIMITS, str(count)))
    os.environ[GPU_SHARED_BY] = str(on_a_gpu)
    numba = sys.modules.get("numba")
    if numba is None:
        return
    try:
        numba.config.reload_config()
    except RuntimeError:  # Its threads are there already, and it insists on that number being set.
        os.environ["NUMBA_NUM_THREADS"] = str(numba.config.NUMBA_NUM_THREADS)
        numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))
