"""A folder that appears under its name only when it is whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from occgen_hub.files import flush, flush_tree
from occgen_hub.stopwatch import Stopwatch


def clear_leftovers(place: Path) -> None:
    """Undo what an interrupted build left beside `place`."""
    partial, old = _beside(place)
    _remove(partial)
    _remove(scratch_folder(place))
    if old.exists() and not place.exists():
        old.rename(place)
    _remove(old)


@contextmanager
def staged(place: Path, clock: Stopwatch | None = None) -> Iterator[Path]:
    """An empty folder beside `place` that takes its place when the block ends well.

    By then all in it is on disk, and so are the folders that lead to it: a power cut leaves the
    trajectory whole or not there.
    """
    partial, old = _beside(place)
    clock = clock or Stopwatch()
    try:  # From before the folder is there: an interruption may come as soon as it is.
        _make(partial)
        yield partial
        with clock("flush"):
            flush_tree(partial)
        if place.exists():
            place.rename(old)
        partial.rename(place)
        with clock("flush"):
            flush(place.parents[:3])
    except BaseException:
        clear_leftovers(place)
        with suppress(OSError):  # Folders made for this trajectory alone go with it.
            place.parent.rmdir()
            place.parent.parent.rmdir()
        raise
    _remove(old)


def _make(folder: Path) -> None:
    """Make a folder and those above it, of which another process may remove an empty one."""
    for _ in range(4):
        with suppress(FileNotFoundError):
            folder.mkdir(parents=True)
            return
    folder.mkdir(parents=True)


def _remove(path: Path) -> None:
    """Remove a folder with all in it, or whatever a user put in its place."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _beside(place: Path) -> tuple[Path, Path]:
    """Where a trajectory is written, and where the one that it replaces waits to be removed."""
    return place.with_name(f".{place.name}.partial"), place.with_name(f".{place.name}.old")


def scratch_folder(place: Path) -> Path:
    """Where what does not fit into memory waits while a trajectory is built, beside its place."""
    return place.with_name(f".{place.name}.scratch")


def remove_scratch(place: Path) -> None:
    """Remove the scratch folder of a trajectory, and the folders above that hold nothing else."""
    _remove(scratch_folder(place))
    with suppress(OSError):
        place.parent.rmdir()
        place.parent.parent.rmdir()
