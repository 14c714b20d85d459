"""Output lock: one build per folder at a time, possibly with many shards."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from occgen_hub.errors import OccGenError, UsageError
from occgen_hub.files import opened, try_lock

LOGS = ".logs"
"""A hidden folder, since a group of the source may have any other name."""

LOCK = "lock"
_PAUSES = (0, 0.01, 0.05, 0.2, 0.5, 1.0)
"""Seconds before each try. Another process may hold the lock briefly, only to test it."""


@contextmanager
def output_lock(out: Path, join: Callable[[bool], bool] | None = None) -> Iterator[None]:
    """Lock an output folder: exclusively or, with `join`, shared with other shards of the build.

    join: called with whether the caller holds the lock exclusively, and may then record its build.
    It returns whether the recorded build is the caller's.

    Raises UsageError if the folder cannot be created or another build holds the lock.
    """
    handle = _lock_handle(out)
    try:
        for pause in _PAUSES:
            time.sleep(pause)
            if join is None:
                if try_lock(handle):
                    break
            # Changing an exclusive lock to a shared one is not atomic: another build may get the
            # lock in between, so the recorded build is checked again.
            elif join(try_lock(handle)) and try_lock(handle, shared=True) and join(False):
                break
        else:
            raise locked_error(out)
        yield
    finally:
        os.close(handle)


def locked_error(out: Path) -> UsageError:
    """The error that another build holds the lock of an output folder."""
    return UsageError(
        f"{out}: another build is writing here; wait for it or choose another --output."
    )


def is_locked(out: Path) -> bool:
    """Whether a build is writing to a folder now. False if there is no lock file."""
    try:
        with opened(out / LOGS / LOCK) as file:
            return not try_lock(file.fileno())
    except (OSError, OccGenError):
        return False


def _lock_handle(out: Path) -> int:
    """Open the lock file for writing: over NFS, other hosts see only such locks (flock(2)).

    A lock file of another user is opened for reading, which is sufficient on a local disk.
    """
    path, flags = out / LOGS / LOCK, os.O_CLOEXEC | os.O_NONBLOCK
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(PermissionError):
            return os.open(path, flags | os.O_RDWR | os.O_CREAT, 0o666)
        return os.open(path, flags | os.O_RDONLY)
    except OSError as error:
        raise UsageError(
            f"{out}: cannot be created or written ({error.strerror}); choose another --output."
        ) from error
