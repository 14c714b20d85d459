"""Files and folders that appear whole or not at all, also where the power fails.

What is written goes to a hidden place beside the final one, under a name that nobody else has, and
is moved when it is on disk. What a dead process left there is cleared by the next that writes to
the same place.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

_FLUSHES = 16
"""Files that are waited for at once."""

_NAME_BYTES = 200
"""Of a hidden name; file systems allow 255, and what is added takes some."""

_STALE = 24 * 3600.0
"""Seconds after which a leftover is a dead process's where a file system has no locks."""

_MADE = 2.0
"""Seconds in which a process holds what it has made."""

_TRIES = 8
"""Of a move or a folder that other processes come between."""


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Gives a new, empty file beside `path` to write to; it becomes `path` if the block ends well.

    Its name is its own, and is made without following links. By then it is on disk. Whoever writes
    to one path at once gets one of the files whole. Raises OSError.
    """
    clear_leftovers(path)
    partial = _beside(path, secrets.token_hex(8), "partial")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    handle = None
    try:
        handle = os.open(partial, flags, 0o666)
        _lock(handle)
        yield partial
        flush([partial])
        partial.replace(path)
        flush([path.parent])
    finally:
        partial.unlink(missing_ok=True)
        if handle is not None:
            os.close(handle)


@contextmanager
def atomic_folder(
    place: Path, *, flushing: Callable[[], AbstractContextManager[object]] = nullcontext
) -> Iterator[Path]:
    """Gives a new, empty folder beside `place`; it becomes `place` if the block ends well.

    What is at `place` by then is moved aside and removed; where a process dies in between, the next
    one puts it back. By then all in the folder is on disk, and so are the folders that lead to it,
    which are made where they are missing, and removed again if the block fails. Raises OSError.

    flushing: what to be within while waiting for the disk, for instance a clock.
    """
    clear_leftovers(place)
    token = secrets.token_hex(8)
    partial, old = _beside(place, token, "partial"), _beside(place, token, "old")
    missing = [parent for parent in place.parents if not parent.exists()]
    handle = None
    try:  # From before the folder is there: an interruption may come as soon as it is.
        _make(partial)
        with suppress(OSError):
            handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            _lock(handle)
        yield partial
        with flushing():
            flush_tree(partial)
        _exchange(partial, place, old)
        with flushing():
            flush({place.parent, *(parent.parent for parent in missing)})
    except BaseException:
        _remove(partial)
        if os.path.lexists(old) and not os.path.lexists(place):
            old.rename(place)
        with suppress(OSError):  # One that has got something else in it stays.
            for parent in missing:
                parent.rmdir()
        raise
    finally:
        if handle is not None:
            os.close(handle)
    _remove(old)


def clear_leftovers(path: Path, *, alone: bool = False) -> None:
    """Undo what processes that died while writing to `path` left beside it.

    What was moved aside there is put back where nothing took its place. Leftovers of processes that
    are alive, on this machine or another, are left alone. alone: whether the caller holds a lock
    under which nobody else writes there, so that all leftovers are those of dead processes.
    """
    found = list(_leftovers(path))
    alive = {
        token
        for token, kind, there in found
        if kind == "partial" and not alone and not _is_dead(there)
    }
    for token, kind, there in found:
        if token in alive:
            continue
        if kind == "old" and not os.path.lexists(path):
            with suppress(OSError):
                there.rename(path)
                continue
        _remove(there)


def clear_all_leftovers(folder: Path) -> None:
    """`clear_leftovers` of all that was to be written into a folder, for one that holds it alone.

    For what no process begins again, as a trajectory whose source is gone.
    """
    named = re.compile(rb"\.(.+?)(?:\.[0-9a-f]{16})?\.(?:partial|old)")
    names = set()
    with suppress(OSError), os.scandir(folder) as entries:
        names = {
            match[1] for entry in entries if (match := named.fullmatch(os.fsencode(entry.name)))
        }
    for name in sorted(names):
        clear_leftovers(folder / os.fsdecode(name), alone=True)


def _leftovers(path: Path) -> Iterator[tuple[str, str, Path]]:
    """Token, kind and place of each; without a token where an earlier version left it."""
    stem = re.escape(os.fsencode(_stem(path)))
    named = re.compile(rb"\." + stem + rb"(?:\.([0-9a-f]{16}))?\.(partial|old)")
    with suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            if match := named.fullmatch(os.fsencode(entry.name)):
                yield (match[1] or b"").decode(), match[2].decode(), path.parent / entry.name


def _beside(path: Path, token: str, kind: str) -> Path:
    return path.with_name(f".{_stem(path)}.{token}.{kind}")


def _stem(path: Path) -> str:
    """The part of a hidden name that says whose it is."""
    return os.fsdecode(os.fsencode(path.name)[:_NAME_BYTES])


def _lock(handle: int) -> None:
    """Hold a file or folder until it is closed, where the file system can.

    It waits for those who are asking right now whether anybody holds it.
    """
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX)


def _is_dead(path: Path) -> bool:
    """Whether nobody is writing there any more: whoever is holds it."""
    try:
        if path.is_symlink():
            return True
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return not _is_just_made(path)
        except BlockingIOError:
            return False
        finally:
            os.close(handle)
    except OSError:  # No locks here: told by its age.
        with suppress(OSError):
            return time.time() - path.lstat().st_mtime > _STALE
        return False


def _is_just_made(path: Path) -> bool:
    """Whether a file or folder is new and empty: whoever made it may not hold it yet."""
    stat = path.lstat()
    empty = not any(path.iterdir()) if path.is_dir() else stat.st_size == 0
    return empty and time.time() - stat.st_mtime < _MADE


def _exchange(partial: Path, place: Path, old: Path) -> None:
    """Move a folder to its place, and what is there aside; others may be about the same."""
    for _ in range(_TRIES):
        with suppress(FileNotFoundError):
            place.rename(old)
        try:
            partial.rename(place)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
                raise
            _remove(old)  # Another was faster: what it put there is newer.
    partial.rename(place)


def _make(folder: Path) -> None:
    """Make a folder and those above it, of which another process may remove an empty one."""
    for _ in range(_TRIES):
        with suppress(FileNotFoundError):
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            return
    folder.mkdir(parents=True)


def _remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all in it; where that fails, the next run tries."""
    with suppress(OSError):
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path, ignore_errors=True)


def flush(paths: Iterable[Path]) -> None:
    """Wait until files, or the entries of folders, are on disk. Raises OSError where they fail."""
    # All at once: file systems write their journals once for many that wait.
    with ThreadPoolExecutor(_FLUSHES) as pool:
        for _ in pool.map(_flush, paths):
            pass


def flush_tree(folder: Path) -> None:
    """Wait until a folder is on disk, with all that is in it. Raises OSError where that fails."""
    paths = [Path(parent, name) for parent, _, names in os.walk(folder) for name in names]
    flush(path for path in paths if not path.is_symlink())
    flush(Path(parent) for parent, _, _ in os.walk(folder))


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # A file system that knows of none.
            raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(handle)
