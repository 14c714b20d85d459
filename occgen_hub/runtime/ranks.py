"""Processes started by accelerate launch or torchrun: each rank builds one shard.

The ranks wait for one another when their shards are built. If one dies, its launcher stops the
other ranks of its host; on other hosts the wait fails or the launcher's timeout stops them. The
same command then builds the rest.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING

from occgen_hub.errors import OccGenError, UsageError

if TYPE_CHECKING:
    from accelerate import PartialState

TIMEOUT = timedelta(days=7)
"""How long ranks wait for one another. Shards may take days, and unequally long."""


def launched() -> int:
    """The number of processes that a launcher started on this host; 0 without a launcher."""
    known = {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys()
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])) if known else 0


@contextmanager
def process_group(device: str | None = None) -> Iterator[PartialState]:
    """Connect to the other ranks, and wait for them when the block ends.

    device: "cpu" to use no GPU; others are not accepted, since accelerate gives each rank its own.
    Raises UsageError for another device, or if the launcher's environment is wrong.
    """
    import torch
    from accelerate import PartialState

    if device not in (None, "cpu", "cuda"):
        raise UsageError(
            f"--device {device}: accelerate gives each process its own device; leave it out."
        )
    if launched() == int(os.environ["WORLD_SIZE"]):  # One host: listen on the loopback only.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        cpu = device == "cpu" or not torch.cuda.is_available()
        state = PartialState(cpu=cpu, timeout=TIMEOUT)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UsageError(
            "--executor accelerate: the processes cannot connect to one another "
            f"({_first_line(error)}); start them with accelerate launch or torchrun."
        ) from error
    try:
        yield state
        with suppress(RuntimeError):  # A launcher reports ranks of other hosts that leave earlier.
            state.wait_for_everyone()
    finally:
        with suppress(RuntimeError, ValueError):
            state.destroy_process_group()


def on_all_ranks(state: PartialState, action: Callable[[], None]) -> None:
    """Run an action in this rank, and wait until all ranks have run it.

    If it failed in any rank, the first rank raises the first error and the others exit with 0: as
    soon as one rank exits with another code, a launcher stops all of them, including the one that
    prints the error.
    """
    from accelerate.utils import gather_object

    error = None
    try:
        action()
    except OccGenError as problem:
        error = problem
    try:
        errors = [problem for problem in gather_object([error]) if problem is not None]
    except RuntimeError as lost:  # torch raises it for a broken connection.
        raise OccGenError(
            f"--executor accelerate: a process was lost ({_first_line(lost)}); see the output of "
            "the others and run the same build again."
        ) from lost
    if errors and state.is_main_process:
        raise errors[0]
    if errors:
        sys.exit(0)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200].rstrip(".")
