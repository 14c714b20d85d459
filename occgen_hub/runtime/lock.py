"""The lock of an output folder: one build at a time, of which several shards may run at once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from occgen_hub.errors import OccGenError, UsageError
from occgen_hub.files import hold, opened

LOGS = ".logs"
"""Hidden, since a folder of any other name may be a group of the source."""

LOCK = "lock"
_PAUSES = (0, 0.01, 0.05, 0.2, 0.5, 1.0)
"""Seconds before each try. Somebody may hold the lock for a moment only, to see if it is held."""


@contextmanager
def output_lock(out: Path, join: Callable[[bool], bool] | None = None) -> Iterator[None]:
    """Hold an output folder: alone or, with `join`, together with other shards of the same build.

    join: whether the build that is on record is the caller's; called with whether nobody else holds
    the folder, so that the caller may put its own on record. Raises UsageError where the folder
    cannot be made, or another build holds it.
    """
    handle = _lock_handle(out)
    try:
        for pause in _PAUSES:
            time.sleep(pause)
            if join is None:
                if hold(handle):
                    break
            # The kind of a lock does not change at once: another build may come in between.
            elif join(hold(handle)) and hold(handle, shared=True) and join(False):
                break
        else:
            raise busy(out)
        yield
    finally:
        os.close(handle)


def busy(out: Path) -> UsageError:
    """The error that another build holds an output."""
    return UsageError(
        f"{out}: another build is writing here; wait for it or choose another --output."
    )


def is_held(out: Path) -> bool:
    """Whether a build is writing to a folder now; False where there is no lock file."""
    try:
        with opened(out / LOGS / LOCK) as file:
            return not hold(file.fileno())
    except (OSError, OccGenError):
        return False


def _lock_handle(out: Path) -> int:
    """The lock file, open for writing, since NFS shows other hosts no other locks (flock(2)).

    If it is another user's, it is open for reading, which is as good on a local disk.
    """
    path, flags = out / LOGS / LOCK, os.O_CLOEXEC | os.O_NONBLOCK
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(PermissionError):
            return os.open(path, flags | os.O_RDWR | os.O_CREAT, 0o666)
        return os.open(path, flags | os.O_RDONLY)
    except OSError as error:
        raise UsageError(
            f"{out}: cannot be made or written ({error.strerror}); choose another --output."
        ) from error
