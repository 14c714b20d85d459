"""Output paths of pictures and recordings. Invalid ones raise UsageError."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from occgen_hub.atomic import atomic_file, atomic_folder
from occgen_hub.errors import SourceError, UsageError


@contextmanager
def atomic_output(place: Path) -> Iterator[Path]:
    """Like `atomic_file`, but raises UsageError if the path cannot be written."""
    if not place.name or place.is_dir():
        raise UsageError(f"{place}: is a folder; give a file name.")
    try:
        with atomic_file(place) as partial:
            yield partial
    except SourceError:
        raise
    except OSError as error:
        raise UsageError(
            f"{place}: cannot be written ({error.strerror or error}); choose another place."
        ) from error


@contextmanager
def fresh_folder(out: Path) -> Iterator[Path]:
    """Yield a folder that becomes `out` if the block succeeds. Raises UsageError if it exists."""
    if out.name in ("", ".."):
        raise UsageError(f"{out}: give the name of a new folder.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: already exists; give a new folder, or remove it.")
    try:
        with atomic_folder(out) as partial:
            yield partial
            if out.exists():
                out.rmdir()  # Raises if the folder is no longer empty.
    except OSError as error:
        raise UsageError(
            f"{out}: cannot be written ({error.strerror or error}); choose another place."
        ) from error
