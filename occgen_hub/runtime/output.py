"""Whose an output is: one build's at a time, though that may be many processes' on many hosts."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from occgen_hub.errors import OccGenError, UsageError
from occgen_hub.files import hold, read_bytes
from occgen_hub.runtime.report import LOCK, LOGS

_PAUSES = (0, 0.01, 0.05, 0.2)
"""Seconds before each try to hold an output."""

CURRENT = "current"
"""Among the logs: the run that may write, and a digest of what it was asked for."""


def make_current(out: Path, name: str, choices: str) -> None:
    """Have a run take the place of earlier ones, of which tasks may still be waiting somewhere.

    choices: a digest of what it was asked for. To be called while the output is held, as whoever
    reads it does, so that it is written in place: a file of another inode under the same name is
    seen late over NFS. Raises OccGenError where that cannot be written.
    """
    path = out / LOGS / CURRENT
    try:
        path.write_text(f"{name}\n{choices}\n", encoding="utf-8")
    except OSError as error:
        raise OccGenError(
            f"{path}: cannot be written ({error.strerror}); mend that and run again."
        ) from error


def current(out: Path) -> list[str]:
    """The run that may write, and the digest of its choices; none of them if nobody said."""
    try:
        return read_bytes(out / LOGS / CURRENT).decode(errors="replace").split()
    except OccGenError:
        return []


def check_current(out: Path, name: str) -> None:
    """Raise OccGenError where a run is not, or is no more, the one that may write."""
    if current(out)[:1] != [name]:
        raise OccGenError(
            f"{out / LOGS / CURRENT}: a newer build into {out} took this one's place; cancel this "
            "one."
        )


@contextmanager
def sole_use(out: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the output folder, so that two builds do not write the same trajectory at once.

    shared: beside others that hold it so, as the tasks of one build do. Raises UsageError where
    the folder cannot be made, or is held.
    """
    with ExitStack() as opened:
        try:
            out.mkdir(parents=True, exist_ok=True)
            handles = _lockable(out)
        except OSError as error:
            raise UsageError(
                f"{out}: cannot be made or opened ({error.strerror}); choose another --output."
            ) from error
        for handle in handles:
            opened.callback(os.close, handle)
        for handle in handles:
            _held(handle, out, shared=shared)
        yield


def _held(handle: int, out: Path, *, shared: bool) -> None:
    """Hold it, if need be after a moment, for which others look whether it is held."""
    for pause in _PAUSES:
        time.sleep(pause)
        if hold(handle, shared=shared):
            return
    raise UsageError(
        f"{out}: another build is writing here; wait for it or choose another --output."
    )


def _lockable(out: Path) -> list[int]:
    """Handles of what stands for the folder: itself, and a file in it.

    The file is open for writing, as NFS asks of a lock that other hosts see (flock(2)); of another
    user's it is open for reading, which is as good on a disk of this machine. Where there can be no
    file, the folder has to do.
    """
    handles, path = [os.open(out, os.O_RDONLY | os.O_CLOEXEC)], out / LOGS / LOCK
    with suppress(OSError):
        path.parent.mkdir(exist_ok=True)
    for mode in (os.O_RDWR | os.O_CREAT, os.O_RDONLY):
        with suppress(OSError):
            handles.append(os.open(path, mode | os.O_CLOEXEC | os.O_NONBLOCK, 0o666))
            break
    return handles
