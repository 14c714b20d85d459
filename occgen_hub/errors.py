"""The errors of OccGen Hub."""

from __future__ import annotations

from pathlib import Path
from unicodedata import category

MAX_PATH, SHOWN = 4096, 300
"""A longer path is no file's, but the content of a damaged list: this many characters are shown."""


class OccGenError(Exception):
    """Base class. The message is one sentence that names the file, the problem and the remedy.

    exit_code: that of the command line; has_lines: whether the message has line breaks on purpose.
    """

    exit_code = 1
    has_lines = False


class UsageError(OccGenError):
    """The command, an option or a configuration is wrong. Nothing was done."""

    exit_code = 2


class MachineError(OccGenError):
    """A fault of the machine and not of a file. Trying again may succeed."""


class SourceError(OccGenError):
    """A file of the source cannot be used."""

    def __init__(self, path: Path | str, problem: str, remedy: str) -> None:
        self.path, self.problem, self.remedy = str(path), problem, remedy
        if len(self.path) > MAX_PATH:
            self.path = f"{self.path[:SHOWN]}..."
        super().__init__(f"{self.path}: {problem}; {remedy}.")

    def __reduce__(self) -> tuple[type[SourceError], tuple[str, str, str]]:
        """Pickle the parts, so that the error can be sent between processes."""
        return type(self), (self.path, self.problem, self.remedy)


def install_extra(extra: str) -> str:
    """The remedy where packages of an extra are missing. OccGen Hub is on no package index."""
    return (
        f"run pip install -e '.[{extra}]' in the clone of OccGen Hub, or "
        f"pip install 'WHEEL[{extra}]' with its wheel"
    )


def shorten_message(text: str, limit: int = 160) -> str:
    """The first line of a library's message without the full stop, shortened between words."""
    line = (text.strip().splitlines() or [""])[0].rstrip(". ")
    if len(line) <= limit:
        return line
    words = line[: limit + 1].rpartition(" ")[0] or line[:limit]
    return f"{words.rstrip(' .,;:(')} ..."


def one_line(text: str) -> str:
    """Escape line breaks, control characters and changes of direction, for a terminal."""
    return "".join(
        letter.encode("unicode_escape").decode()
        if category(letter) in ("Cc", "Cs", "Zl", "Zp") or letter in _DIRECTIONS
        else letter
        for letter in text
    )


_DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


class DatasetError(SourceError):
    """A file of a built dataset cannot be used."""
