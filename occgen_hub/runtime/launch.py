"""Whether a launcher started this process beside others, and starting such processes."""

from __future__ import annotations

import os
import sys
import uuid

from occgen_hub.errors import UsageError

ACCELERATE = "accelerate"

QUIET = "OCCGEN_HUB_LAUNCHED"
"""Set where this command started the process, and says itself that it was stopped."""


def peers() -> int:
    """How many processes accelerate or torchrun started on this host; 0 if they started none."""
    known = {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys()
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])) if known else 0


def executor_for(named: str | None, workers: int | None) -> str:
    """Who runs the episodes: the one that is named, else whoever started this process."""
    started = peers()
    chosen = named or (ACCELERATE if started else "local")
    if chosen != ACCELERATE and started:
        raise UsageError(
            f"--executor {chosen}: {started} processes were started beside one another, which only "
            f"--executor {ACCELERATE} shares the episodes among; leave the option out."
        )
    if started and workers not in (None, started):
        raise UsageError(
            f"--workers {workers}: {started} processes were started already; leave the option out."
        )
    return chosen


def processes() -> int:
    """How many there are without a number of them: one a GPU or, without GPUs, one a core."""
    import torch

    return torch.cuda.device_count() or len(os.sched_getaffinity(0))


def launch(count: int | None) -> int:
    """Run this very command in `count` processes on this host, and return its exit code.

    That is the number of a signal below zero, if one stopped it, of which the processes leave it to
    the caller to speak. They are started by torch's elastic launcher, which torchrun and
    accelerate's use.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count or processes(),
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    os.environ[QUIET] = "1"
    try:
        elastic_launch(config, sys.executable)("-m", "occgen_hub", *sys.argv[1:])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        return -int(error.sigval)
    finally:
        del os.environ[QUIET]
    return 0
