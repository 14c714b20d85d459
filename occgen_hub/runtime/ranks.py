"""Processes that accelerate launch or torchrun started: each rank builds one shard.

Ranks meet when their shards are built. If one dies, its launcher ends the others of its host; on
other hosts the meeting fails, or the launcher's own timeouts end them. Then the same command builds
what is left.
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
"""How long ranks wait for one another: shards may take days, and unequally long."""


def launched() -> int:
    """How many processes a launcher started on this host; 0 if it started none."""
    known = {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys()
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])) if known else 0


@contextmanager
def joined(device: str | None = None) -> Iterator[PartialState]:
    """Meet the other ranks, and wait for them when the block ends.

    device: "cpu" to leave GPUs alone; no other may be named, as each rank has its own. Raises
    UsageError where that, or the launcher's environment, is wrong.
    """
    import torch
    from accelerate import PartialState

    if device not in (None, "cpu", "cuda"):
        raise UsageError(
            f"--device {device}: accelerate gives each process a device of its own; leave it out."
        )
    if launched() == int(os.environ["WORLD_SIZE"]):  # All on this host: listen nowhere else.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        cpu = device == "cpu" or not torch.cuda.is_available()
        state = PartialState(cpu=cpu, timeout=TIMEOUT)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UsageError(
            f"--executor accelerate: the processes do not find one another ({_first_line(error)}); "
            "start them with accelerate launch or torchrun."
        ) from error
    try:
        yield state
        with suppress(RuntimeError):  # A launcher complains if another host's leaves earlier.
            state.wait_for_everyone()
    finally:
        with suppress(RuntimeError, ValueError):
            state.destroy_process_group()


def on_all_ranks(state: PartialState, action: Callable[[], None]) -> None:
    """Run an action in this rank, and wait until it has ended in all of them.

    If it failed in some, the first rank raises the first error, and the others exit with 0, since a
    launcher stops all ranks, also the one that says what is wrong, as soon as one ends otherwise.
    """
    from accelerate.utils import gather_object

    error = None
    try:
        action()
    except OccGenError as problem:
        error = problem
    try:
        errors = [problem for problem in gather_object([error]) if problem is not None]
    except RuntimeError as lost:  # torch's, of a connection that broke.
        raise OccGenError(
            f"--executor accelerate: a process was lost ({_first_line(lost)}); see what the others "
            "say and run the same build again."
        ) from lost
    if errors and state.is_main_process:
        raise errors[0]
    if errors:
        sys.exit(0)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200].rstrip(".")
