"""failures.jsonl and report.json, the two reports at the root of a dataset."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from occgen_hub.atomic import atomic_file
from occgen_hub.errors import OccGenError
from occgen_hub.files import dump_json, has_content, parse_json, read_bytes, read_json
from occgen_hub.runtime.results import Failure, Summary

FAILURES = "failures.jsonl"
REPORT = "report.json"

FIGURES = (
    "version", "finished", "executor", "frames", "seconds", "frames_per_second",
    "episodes_per_second", "stages", "notes", "processes",
)  # fmt: skip
"""Values that a report keeps from the earlier one if nothing was built."""


def read_failures(out: Path) -> list[Failure]:
    """The failures listed in failures.jsonl. Malformed lines are ignored."""
    failures = []
    with suppress(OccGenError):
        for line in read_bytes(out / FAILURES).splitlines():
            with suppress(ValueError, TypeError, KeyError, AttributeError):
                row = parse_json(line)
                values = row["episode"], row["reason"], row.get("trace", "")
                if all(isinstance(value, str) for value in values):
                    failures.append(Failure(*values))
    return failures


def write_failures(out: Path, failures: Iterable[Failure]) -> None:
    """Write failures.jsonl, or remove it if there are no failures. Raises OSError."""
    rows = [
        {"episode": f.id, "reason": f.reason, **({"trace": f.trace} if f.trace else {})}
        for f in sorted(failures, key=lambda failure: failure.id)
    ]
    _write(out / FAILURES, "".join(f"{dump_json(row)}\n" for row in rows).encode())


def report_digest(out: Path) -> str | None:
    """The digest of the records that report.json was made from; None without a report."""
    return _read_report(out).get("records")


def write_report(out: Path, summary: Summary, run: dict[str, Any], records: str) -> None:
    """Write report.json, unless the present one was made from the same records. Raises OSError.

    run: the time and settings of the build, which come first; records: the digest of the records.
    If nothing was built, the figures of the earlier report are kept.
    """
    earlier = _read_report(out)
    if earlier.get("records") == records:
        return
    report = {**_describe(summary, run), "records": records}
    if not summary.built:
        report |= {key: earlier[key] for key in FIGURES if key in earlier}
    _write(out / REPORT, f"{dump_json(report, indent=1)}\n".encode())


def _read_report(out: Path) -> dict[str, Any]:
    try:
        return read_json(out / REPORT)
    except OccGenError:
        return {}


def _write(path: Path, content: bytes) -> None:
    if not content:
        if path.exists():  # In a read-only folder, removing a missing file is an error too.
            path.unlink()
    elif not has_content(path, content):
        with atomic_file(path) as partial:
            partial.write_bytes(content)


def _describe(summary: Summary, run: dict[str, Any]) -> dict[str, Any]:
    """The content of report.json, as described in docs/formats.md."""
    total = max(sum(summary.stages.values()), 1e-9)
    seconds = max(summary.seconds, 1e-9)
    return {
        "version": version("occgen-hub"),
        **run,
        "episodes": {
            "total": summary.episodes,
            "built": summary.built,
            "present": summary.present,
            "failed": len(summary.failures),
        },
        "frames": summary.frames,
        "seconds": round(summary.seconds, 3),
        "frames_per_second": round(summary.frames / seconds, 3),
        "episodes_per_second": round(summary.built / seconds, 4),
        "stages": {
            stage: {"seconds": round(spent, 3), "share": round(spent / total, 4)}
            for stage, spent in summary.stages.most_common()
        },
        "notes": dict(sorted(summary.notes.items())),
        "remarks": summary.remarks,
        "processes": [asdict(process) for process in summary.processes],
        "failures": [{"episode": f.id, "reason": f.reason} for f in summary.failures],
    }
