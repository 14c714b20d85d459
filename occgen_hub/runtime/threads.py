"""The share of the cores that each process uses, set in the variables that libraries read."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from occgen_hub.prefetch import GPU_SHARED_BY

LIMITS = ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def gpus() -> int:
    """The number of CUDA GPUs."""
    import torch

    return torch.cuda.device_count()


def cores_each(processes: int) -> int:
    """The number of cores for each of `processes` processes on this machine, at least one."""
    return max(1, cores() // processes)


@contextmanager
def limited_children(processes: int, per_gpu: int) -> Iterator[None]:
    """Give each process that is started in the block its share of the cores.

    processes: their number; per_gpu: how many share a GPU. The block must do nothing else, because
    numba reads these variables whenever it compiles, also in this process.
    """
    before = {name: os.environ.get(name) for name in (*LIMITS, GPU_SHARED_BY)}
    os.environ.update(dict.fromkeys(LIMITS, str(cores_each(processes))))
    os.environ[GPU_SHARED_BY] = str(per_gpu)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def limit(count: int, per_gpu: int = 1) -> None:
    """Use at most `count` cores in this process. per_gpu: how many processes share its GPU."""
    os.environ.update(dict.fromkeys(LIMITS, str(count)))
    os.environ[GPU_SHARED_BY] = str(per_gpu)
    numba = sys.modules.get("numba")
    if numba is None:
        return
    try:
        numba.config.reload_config()
    except RuntimeError:  # The threads run already, and numba does not change their number.
        os.environ["NUMBA_NUM_THREADS"] = str(numba.config.NUMBA_NUM_THREADS)
        numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))
