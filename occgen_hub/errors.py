"""What can go wrong, said so that a user can act on it."""

from __future__ import annotations

from pathlib import Path
from unicodedata import category


class OccGenError(Exception):
    """A failure that a user can act on; its text is one sentence naming the file and the remedy.

    exit_code: what the command line ends with when nothing catches it; has_lines: whether line
    breaks in the text are ours, and not those of a name.
    """

    exit_code = 1
    has_lines = False


class UsageError(OccGenError):
    """The command, an option or a configuration is wrong; nothing was done."""

    exit_code = 2


class MachineError(OccGenError):
    """The machine's fault and no file's: the same may go well another time."""


class SourceError(OccGenError):
    """A file of the source cannot be used: says which, what is wrong and what to do."""

    def __init__(self, path: Path | str, problem: str, remedy: str) -> None:
        super().__init__(f"{path}: {problem}; {remedy}.")
        self.path, self.problem, self.remedy = str(path), problem, remedy

    def __reduce__(self) -> tuple[type[SourceError], tuple[str, str, str]]:
        """Pickled by its parts, so that it crosses from a worker process whole."""
        return type(self), (self.path, self.problem, self.remedy)


def in_brief(text: str, limit: int = 160) -> str:
    """The first line of what a library says, without its full stop, cut between words."""
    line = (text.strip().splitlines() or [""])[0].rstrip(". ")
    if len(line) <= limit:
        return line
    words = line[: limit + 1].rpartition(" ")[0] or line[:limit]
    return f"{words.rstrip(' .,;:(')} ..."


def one_line(text: str) -> str:
    """Text for a terminal: line breaks, control characters and changes of direction escaped."""
    return "".join(
        letter.encode("unicode_escape").decode()
        if category(letter) in ("Cc", "Cs", "Zl", "Zp") or letter in _DIRECTIONS
        else letter
        for letter in text
    )


_DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


class DatasetError(SourceError):
    """A file of a built dataset cannot be used."""
