"""The failures of a dataset's builds, on disk: the next run leaves alone what would fail again.

`failures.jsonl` is written when a run ends. Until then each process adds its own to a journal, so
that a run that is killed after days forgets none.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from occgen_hub.errors import OccGenError
from occgen_hub.files import dump_json, parse_json, read_bytes, written_whole
from occgen_hub.runtime.results import Failure

FAILURES = "failures.jsonl"
_JOURNAL = ".failures-{}.jsonl"


def known(out: Path) -> dict[str, Failure]:
    """The failures that earlier runs left in a dataset, by episode; what is no line is none."""
    found: dict[str, Failure] = {}
    for path in (out / FAILURES, *_journals(out)):
        try:
            lines = read_bytes(path).splitlines()
        except OccGenError:
            continue
        for line in lines:
            if (failure := _parsed(line)) is not None:
                found[failure.id] = failure
    return found


def record(out: Path, failure: Failure, process: str = "0") -> None:
    """Add a failure to a process's journal, if that can be written: else it is tried again."""
    try:
        with (out / _JOURNAL.format(process)).open("a", encoding="utf-8") as file:
            file.write(_line(failure))
    except OSError:
        pass


def write(out: Path, failures: Iterable[Failure]) -> None:
    """Write the failures of a run that ended, which are all there are; without any, the file goes.

    Raises OccGenError where that cannot be done.
    """
    path, rows = out / FAILURES, sorted(failures, key=lambda failure: failure.id)
    try:
        if rows:
            with written_whole(path) as partial:
                partial.write_text("".join(map(_line, rows)), encoding="utf-8")
        elif path.exists():  # To remove what is not there fails in a read-only folder.
            path.unlink()
        for journal in _journals(out):
            journal.unlink()
    except OSError as error:
        raise OccGenError(
            f"{path}: cannot be written ({error.strerror}); mend that and run again."
        ) from error


def _journals(out: Path) -> list[Path]:
    return sorted(out.glob(_JOURNAL.format("*")))


def _line(failure: Failure) -> str:
    row = {"episode": failure.id, "reason": failure.reason}
    row |= {key: value for key in ("trace", "state") if (value := getattr(failure, key))}
    return dump_json(row) + "\n"


def _parsed(line: bytes) -> Failure | None:
    try:
        row = parse_json(line)
        values = row["episode"], row["reason"], row.get("trace", ""), row.get("state", "")
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return Failure(*values) if all(isinstance(value, str) for value in values) else None
