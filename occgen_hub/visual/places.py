"""Where a user wants a picture to go: what is wrong with that place is said as wrong use."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from occgen_hub.errors import SourceError, UsageError
from occgen_hub.files import written_whole


@contextmanager
def written_for(place: Path) -> Iterator[Path]:
    """`written_whole`, where what goes wrong with the place is said as wrong use."""
    if not place.name or place.is_dir():
        raise UsageError(f"{place}: is a folder; give the name of a file.")
    try:
        with written_whole(place) as partial:
            yield partial
    except SourceError:
        raise
    except OSError as error:
        raise UsageError(
            f"{place}: cannot be written ({error.strerror or error}); choose another place."
        ) from error


@contextmanager
def fresh_folder(out: Path) -> Iterator[Path]:
    """A folder to write to that becomes `out`, which is to be new, when the block ends well."""
    if out.name in ("", ".."):
        raise UsageError(f"{out}: give the name of a new folder.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: is there already; give a new folder, or remove it.")
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        raise UsageError(
            f"{out}: cannot be written ({error.strerror or error}); choose another place."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
