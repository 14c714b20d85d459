"""Atomic writing: files and folders appear complete or not at all, also after a power failure.

Data is written under a unique hidden name beside the final path, flushed to disk, and renamed. The
next process that writes to the same path removes what a killed process left behind.
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
from functools import lru_cache
from pathlib import Path

from occgen_hub.files import Version, version

_FLUSHES = 16
"""Number of files flushed at a time."""

_NAME_BYTES = 200
"""Bytes of the path's name in a hidden name. File systems allow 255 with the suffix."""

_STALE = 24 * 3600.0
"""Age in seconds from which a leftover counts as abandoned on a file system without locks."""

_MADE = 2.0
"""Seconds within which a process locks a file or folder that it has created."""

_TRIES = 8
"""Number of tries to rename or create a folder, if other processes interfere."""


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a new, empty file beside `path`, which replaces `path` if the block succeeds.

    Its name is unique, links are not followed, and it is flushed to disk before. If several
    processes write to a path at a time, one of their files remains, complete. Raises OSError.
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
    path: Path, *, flushing: Callable[[], AbstractContextManager[object]] = nullcontext
) -> Iterator[Path]:
    """Yield a new, empty folder beside `path`, which replaces `path` if the block succeeds.

    The old content of `path` is then moved aside and removed; if a process is killed in between,
    the next one moves it back. The folder's files and its parents are flushed to disk before.
    Missing parents are created, and removed again if the block fails. Raises OSError.

    flushing: creates a context entered while waiting for the disk, for example a stopwatch.
    """
    clear_leftovers(path)
    token = secrets.token_hex(8)
    partial, old = _beside(path, token, "partial"), _beside(path, token, "old")
    missing = [parent for parent in path.parents if not parent.exists()]
    handle = None
    try:  # Starts before the folder exists, because an interruption may come right after.
        _make(partial)
        with suppress(OSError):
            handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            _lock(handle)
        yield partial
        with flushing():
            flush_tree(partial)
        _exchange(partial, path, old)
        with flushing():
            flush({path.parent, *(parent.parent for parent in missing)})
    except BaseException:
        _remove(partial)
        if os.path.lexists(old) and not os.path.lexists(path):
            old.rename(path)
        with suppress(OSError):  # Stops at a folder that is not empty.
            for parent in missing:
                parent.rmdir()
        raise
    finally:
        if handle is not None:
            os.close(handle)
    _remove(old)


def clear_leftovers(path: Path, *, exclusive: bool = False) -> None:
    """Remove files that killed processes left beside `path` while writing to it.

    Old content that they moved aside is moved back if `path` does not exist. Files of running
    processes, on this machine or another, are kept. exclusive: whether the caller holds a lock that
    excludes other writers, so that all leftovers are from killed processes.
    """
    leftovers = list(_leftovers(path))
    alive = {
        token
        for token, kind, leftover in leftovers
        if kind == "partial" and not exclusive and not _is_abandoned(leftover)
    }
    for token, kind, leftover in leftovers:
        if token in alive:
            continue
        if kind == "old" and not os.path.lexists(path):
            with suppress(OSError):
                leftover.rename(path)
                continue
        _remove(leftover)


def clear_all_leftovers(folder: Path) -> None:
    """Call `clear_leftovers` for every path in a folder to which no other process writes.

    This also removes leftovers of paths that are not written again, such as a trajectory with a
    deleted source.
    """
    named = re.compile(rb"\.(.+?)(?:\.[0-9a-f]{16})?\.(?:partial|old)")
    names = set()
    with suppress(OSError), os.scandir(folder) as entries:
        names = {
            match[1] for entry in entries if (match := named.fullmatch(os.fsencode(entry.name)))
        }
    for name in sorted(names):
        clear_leftovers(folder / os.fsdecode(name), exclusive=True)


def _leftovers(path: Path) -> Iterator[tuple[str, str, Path]]:
    """Token, kind and path of each leftover. Leftovers of earlier versions have no token."""
    stem = re.escape(os.fsencode(_stem(path)))
    named = re.compile(rb"\." + stem + rb"(?:\.([0-9a-f]{16}))?\.(partial|old)")
    with suppress(OSError):
        for name in _hidden_names(path.parent, version(path.parent)):
            if match := named.fullmatch(os.fsencode(name)):
                yield (match[1] or b"").decode(), match[2].decode(), path.parent / name


@lru_cache(maxsize=8)
def _hidden_names(folder: Path, version: Version) -> tuple[str, ...]:
    """The hidden names in a folder, listed once until it changes: it may have 10,000 episodes."""
    with os.scandir(folder) as entries:
        return tuple(entry.name for entry in entries if entry.name.startswith("."))


def _beside(path: Path, token: str, kind: str) -> Path:
    return path.with_name(f".{_stem(path)}.{token}.{kind}")


def _stem(path: Path) -> str:
    """The part of a hidden name that identifies its path."""
    return os.fsdecode(os.fsencode(path.name)[:_NAME_BYTES])


def _lock(handle: int) -> None:
    """Lock a file or folder until it is closed, if the file system has locks.

    Waits for processes that test the lock at this moment.
    """
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX)


def _is_abandoned(path: Path) -> bool:
    """Whether no process is writing to a path. A writing process holds a lock on it."""
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
    except OSError:  # No locks on this file system: decide by age.
        with suppress(OSError):
            return time.time() - path.lstat().st_mtime > _STALE
        return False


def _is_just_made(path: Path) -> bool:
    """Whether a file or folder is new and empty, so that its process may not have locked it yet."""
    stat = path.lstat()
    empty = not any(path.iterdir()) if path.is_dir() else stat.st_size == 0
    return empty and time.time() - stat.st_mtime < _MADE


def _exchange(partial: Path, path: Path, old: Path) -> None:
    """Move a folder to its path, and the old folder aside, while others may do the same."""
    for _ in range(_TRIES):
        with suppress(FileNotFoundError):
            path.rename(old)
        try:
            partial.rename(path)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
                raise
            _remove(old)  # Another process was faster, and its folder is newer.
    partial.rename(path)


def _make(folder: Path) -> None:
    """Create a folder and its parents, while other processes may remove empty parents."""
    for _ in range(_TRIES):
        with suppress(FileNotFoundError):
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            return
    folder.mkdir(parents=True)


def _remove(path: Path) -> None:
    """Remove a file, a link, or a folder with its content. Errors are left to the next run."""
    with suppress(OSError):
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path, ignore_errors=True)


def flush(paths: Iterable[Path]) -> None:
    """Wait until files, or the entries of folders, are on disk. Raises OSError."""
    # In parallel, because file systems write their journal once for many waiting files.
    with ThreadPoolExecutor(_FLUSHES) as pool:
        for _ in pool.map(_flush, paths):
            pass


def flush_tree(folder: Path) -> None:
    """Wait until a folder and its content are on disk. Raises OSError."""
    paths = [Path(parent, name) for parent, _, names in os.walk(folder) for name in names]
    flush(path for path in paths if not path.is_symlink())
    flush(Path(parent) for parent, _, _ in os.walk(folder))


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # The file system has no fsync.
            raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(handle)
