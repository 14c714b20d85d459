"""The errors of images and videos that cannot be decoded, and the limit of their size."""

from __future__ import annotations

from pathlib import Path

from occgen_hub.errors import SourceError, in_brief

MAX_PIXELS = 1 << 26
"""64 megapixels: over any camera's frame, under what would fill a machine's memory."""

RESTORE = "restore it from the source or leave this trajectory out"
MEND = "encode it anew, which passes over what is damaged, or leave this trajectory out"

DAMAGE = (OSError, SyntaxError, ValueError, EOFError)
"""What Pillow raises in the middle of a damaged file."""


def damaged(path: Path, error: BaseException) -> SourceError:
    """What to raise for a file that `error` came up in the middle of."""
    return SourceError(path, f"is damaged ({brief(error)})", RESTORE)


def brief(error: BaseException) -> str:
    """What a library says of an error, in part of a line."""
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return in_brief(said.split(": '")[0], 120)


def check_pixels(path: Path, width: int, height: int) -> None:
    """Raise SourceError where a header claims none, or more than any camera's frame has."""
    if not 0 < width * height <= MAX_PIXELS:
        raise SourceError(path, f"claims {width} x {height} pixels", RESTORE)
