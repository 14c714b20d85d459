"""Scratch: a temporary folder of bounded size for downloaded and unpacked scenes."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from occgen_hub.errors import OccGenError, SourceError, UsageError
from occgen_hub.files import try_lock

PREFIX = "occgen-"
LOCK = ".occgen-lock"
MADE = b"made"
"""Content of the lock file if a build created the folder."""

ATTEMPTS = 5
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}

DEFAULT_LIMIT = 64 * 10**9


class ScratchClosedError(OccGenError):
    """The build was stopped while something was written to scratch."""


@dataclass(frozen=True)
class ScratchPlace:
    """The folder of scratch, and the bytes that one process may use there."""

    folder: Path
    limit: int = DEFAULT_LIMIT

    def shared(self, processes: int) -> ScratchPlace:
        """The share of each of `processes` processes."""
        return replace(self, limit=self.limit // processes)


def parse_bytes(text: str) -> int:
    """Parse a size such as 500MB or 64G, in powers of 1000. Raises UsageError below 1 MB."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([kmgt]?)b?", text.strip().lower())
    if match is None or (size := int(float(match[1]) * UNITS[match[2]])) < 1_000_000:
        raise UsageError(f"{text}: is not a size of 1 MB or more; give one such as 500MB or 64GB.")
    return size


class Scratch:
    """This process's folder in scratch. Its rooms together have at most `limit` bytes."""

    def __init__(self, place: ScratchPlace, folder: Path) -> None:
        self.place, self.folder = place, folder
        self._changed = threading.Condition()
        self._rooms: set[Room] = set()
        self._closed = False

    def room(self) -> Room:
        """Create an empty folder. Its content counts toward the limit until it is closed."""
        return Room(self, Path(tempfile.mkdtemp(dir=self.folder)))

    def close(self) -> None:
        """Make all further writing raise ScratchClosedError."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def fits(self, size: int) -> bool:
        """Whether this many bytes are free now."""
        with self._changed:
            return self._reserved() + size <= self.place.limit

    def _reserved(self) -> int:
        return sum(room.bytes for room in self._rooms)

    def _reserve(self, room: Room, size: int) -> None:
        limit = self.place.limit
        with self._changed:
            self._rooms.add(room)
            while (
                not self._closed
                and self._reserved() + size > limit
                and self._reserved() > room.bytes
            ):
                self._changed.wait()  # Until the previous scene is written and its room closed.
            if self._closed:
                raise ScratchClosedError(f"{self.folder}: the build was stopped; run it again.")
            if room.bytes + size > limit:
                raise SourceError(
                    room.name,
                    f"needs more than {limit / 1e6:,.0f} MB of scratch",
                    "raise --scratch-limit or, as workers share it, use fewer --workers",
                )
            room.bytes += size

    def _release(self, room: Room, size: int) -> None:
        with self._changed:
            room.bytes -= size
            if room.bytes <= 0:
                self._rooms.discard(room)
            self._changed.notify_all()


class Room:
    """A folder in scratch. bytes: size of its content; name: for errors."""

    def __init__(self, scratch: Scratch, folder: Path) -> None:
        self.scratch, self.folder = scratch, folder
        self.bytes, self.name = 0, "the scene"

    def reserve(self, size: int) -> None:
        """Reserve this many bytes, waiting for other rooms to close.

        Raises SourceError if they exceed the limit, and ScratchClosedError.
        """
        self.scratch._reserve(self, size)

    def release(self, size: int) -> None:
        """Release this many bytes, after files were removed."""
        self.scratch._release(self, size)

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.scratch._release(self, self.bytes)


@contextmanager
def open_scratch(place: ScratchPlace) -> Iterator[Scratch]:
    """Create a folder for this process in scratch, and remove it after the block.

    Folders of killed processes are removed first. Raises UsageError if it cannot be created.
    """
    try:
        own, handle = _own_folder(place.folder)
    except OSError as error:
        raise UsageError(
            f"{place.folder}: cannot be written ({error.strerror}); choose another --scratch."
        ) from error
    scratch = Scratch(place, own)
    try:
        yield scratch
    finally:
        scratch.close()
        shutil.rmtree(own, ignore_errors=True)
        os.close(handle)
        with suppress(OSError):
            _remove_if_unused(place.folder)


def _own_folder(folder: Path) -> tuple[Path, int]:
    """A new folder in scratch, and a handle that locks it while the process runs."""
    for attempt in range(ATTEMPTS):
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with _locked(folder) as lock:
                if made:
                    os.write(lock, MADE)
                _clear_leftovers(folder)
                own = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder))
                handle = os.open(own, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try_lock(handle)
                return own, handle
        except FileNotFoundError:  # Its last user removed it.
            if attempt == ATTEMPTS - 1:
                raise
    raise AssertionError


def _remove_if_unused(folder: Path) -> None:
    """Remove an unused lock file, and the folder if a build created it."""
    with _locked(folder) as lock:
        if [path.name for path in folder.iterdir()] == [LOCK]:
            made = os.pread(lock, len(MADE), 0) == MADE
            (folder / LOCK).unlink()
            if made:
                folder.rmdir()


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    import fcntl

    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        with suppress(OSError):  # A file system without locks.
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)


def _clear_leftovers(folder: Path) -> None:
    for path in folder.glob(f"{PREFIX}*"):
        with suppress(OSError):
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if try_lock(handle):
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(handle)
