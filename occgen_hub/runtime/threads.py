"""Each process's share of the cores: set where the libraries look as they load."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from occgen_hub.prefetch import GPU_SHARED_BY

LIMITS = ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))


def gpus() -> int:
    """How many GPUs there are."""
    import torch

    return torch.cuda.device_count()


def cores_each(processes: int) -> int:
    """Cores for each of so many processes on this machine, one at least."""
    return max(1, cores() // processes)


@contextmanager
def limited_children(processes: int, on_a_gpu: int) -> Iterator[None]:
    """Give each process that is started in the block its share of the cores.

    processes: how many there are; on_a_gpu: how many share a GPU. Nothing else is to happen in the
    block: numba looks again whenever it compiles, in this process too.
    """
    before = {name: os.environ.get(name) for name in (*LIMITS, GPU_SHARED_BY)}
    os.environ.update(dict.fromkeys(LIMITS, str(cores_each(processes))))
    os.environ[GPU_SHARED_BY] = str(on_a_gpu)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def limit(count: int, on_a_gpu: int = 1) -> None:
    """Use at most `count` cores in this process. on_a_gpu: how many processes share its GPU."""
    os.environ.update(dict.fromkeys(LIMITS, str(count)))
    os.environ[GPU_SHARED_BY] = str(on_a_gpu)
    numba = sys.modules.get("numba")
    if numba is None:
        return
    try:
        numba.config.reload_config()
    except RuntimeError:  # Its threads are there already, and it insists on their number.
        os.environ["NUMBA_NUM_THREADS"] = str(numba.config.NUMBA_NUM_THREADS)
        numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))
