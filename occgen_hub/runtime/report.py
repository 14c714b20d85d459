"""What a run leaves behind for people and machines: a log as it goes, report.json at its end."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from occgen_hub.errors import OccGenError
from occgen_hub.files import dump_json, hold, opened, written_whole
from occgen_hub.runtime.failures import FAILURES, known
from occgen_hub.runtime.results import Failure, Result, Summary

REPORT = "report.json"
LOGS = ".logs"
"""Hidden, since a folder of any other name may be a group of the source."""

LOCK = "lock"
"""Among the logs: the file that whoever writes into an output holds."""

_LOG = logging.getLogger("occgen_hub.runtime")


class _File(logging.FileHandler):
    """A log that does without what the disk does not take: the build itself says that."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # logging's own name
        """Say nothing."""


@contextmanager
def logged(out: Path, name: str = "build") -> Iterator[None]:
    """Add what happens inside the block to `out`/.logs/<name>.log, a line an event.

    Where no file can be made, it is still given to the logger `occgen_hub.runtime`.
    """
    handler: logging.Handler
    try:
        (out / LOGS).mkdir(parents=True, exist_ok=True)  # Others may not have made `out` yet.
        handler = _File(out / LOGS / f"{name}.log", encoding="utf-8", errors="backslashreplace")
    except OSError:
        handler = logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    before = _LOG.level
    _LOG.addHandler(handler)
    _LOG.setLevel(logging.INFO)
    try:
        yield
    except BaseException as error:
        _LOG.warning("stopped: %s", error or type(error).__name__)
        raise
    finally:
        _LOG.removeHandler(handler)
        _LOG.setLevel(before)
        with suppress(OSError):
            handler.close()


def say(text: str) -> None:
    """A line in the log."""
    _LOG.info(text)


def note(result: Result) -> None:
    """A line on an episode, and one on each of its notes."""
    if isinstance(result, Failure):
        kind = "failed before" if result.repeated else "failed"
        _LOG.warning("%s %s: %s%s", kind, result.id, result.reason, f"\n{result.trace}".rstrip())
        return
    seconds = ", ".join(f"{stage} {s:.2f} s" for stage, s in result.seconds.items())
    _LOG.info("%s %s: %d frames; %s", result.status, result.id, result.frames, seconds or "-")
    for item in result.notes:
        _LOG.info("note %s: %s", result.id, item.text)


def begin_report(out: Path) -> None:
    """Take away what an earlier run said, which is true no more."""
    with suppress(OSError):
        (out / REPORT).unlink(missing_ok=True)


def write_report(out: Path, summary: Summary, run: dict[str, Any]) -> None:
    """Write `out`/report.json. Where that cannot be done, the summary gets a remark.

    run: how the run was made, which is put first.
    """
    try:
        with written_whole(out / REPORT) as partial:
            text = dump_json(describe(summary, run), indent=1) + "\n"
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        summary.remarks.append(f"{out / REPORT} could not be written ({error.strerror})")


def unfinished(out: Path) -> list[str]:
    """Why a dataset may not be all that was to be built, as far as its last run left word of it.

    Nothing of one that came from elsewhere, without its logs.
    """
    try:
        with opened(out / LOGS / LOCK) as file:
            if not hold(file.fileno(), shared=True):
                return ["a build is writing here just now"]
        if not (out / REPORT).exists():
            return [f"the last build has not ended (no {REPORT}); wait for it, or run it again"]
    except (OSError, OccGenError):  # Then nobody left word.
        pass
    if (out / FAILURES).is_file() and (count := len(known(out))):
        s = "" if count == 1 else "s"
        return [f"{count} episode{s} failed: {out / FAILURES} says why"]
    return []


def describe(summary: Summary, run: dict[str, Any]) -> dict[str, Any]:
    """The report: docs/formats.md says what its parts are."""
    total = sum(summary.stages.values())
    seconds = max(summary.seconds, 1e-9)
    return {
        "version": version("occgen-hub"),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        **run,
        "episodes": {
            "total": summary.episodes,
            "built": summary.built,
            "present": summary.present,
            "failed": len(summary.failures),
            "failed_before": summary.repeated,
        },
        "frames": summary.frames,
        "seconds": round(summary.seconds, 3),
        "frames_per_second": round(summary.frames / seconds, 3),
        "episodes_per_second": round(summary.built / seconds, 4),
        "stages": {
            stage: {"seconds": round(spent, 3), "share": round(spent / max(total, 1e-9), 4)}
            for stage, spent in summary.stages.most_common()
        },
        "notes": dict(sorted(summary.notes.items())),
        "remarks": summary.remarks,
        "processes": [asdict(process) for process in summary.processes],
        "failures": [
            {"episode": f.id, "reason": f.reason, "failed_before": f.repeated}
            for f in summary.failures
        ],
    }
