"""Errors of images and videos that cannot be decoded, and the limit of their size."""

from __future__ import annotations

from pathlib import Path

from occgen_hub.errors import SourceError, shorten_message

MAX_PIXELS = 1 << 26
"""64 megapixels, more than any camera's frame has, and little enough for memory."""

RESTORE = "restore it from the source, or move this trajectory out of the input"
REENCODE = "re-encode it, which skips damaged parts, or move this trajectory out of the input"

DAMAGE = (OSError, SyntaxError, ValueError, EOFError)
"""The exceptions that Pillow raises for a damaged file."""


def damaged(path: Path, error: BaseException) -> SourceError:
    """The error for a file whose decoding raised `error`."""
    return SourceError(path, f"is damaged ({short_message(error)})", RESTORE)


def short_message(error: BaseException) -> str:
    """A short form of a library's error message."""
    message = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return shorten_message(message.split(": '")[0], 120)


def check_pixels(path: Path, width: int, height: int) -> None:
    """Raise SourceError if a header states no pixels, or more than MAX_PIXELS."""
    if not 0 < width * height <= MAX_PIXELS:
        raise SourceError(path, f"claims {width} x {height} pixels", RESTORE)
