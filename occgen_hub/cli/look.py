"""Commands that look at a built dataset."""

from __future__ import annotations

from pathlib import Path

import click

from occgen_hub.cli.command import FOLDER, Examples, default_output_path, progress_bar, say


@click.command(cls=Examples, example="occgen-hub validate out")
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def validate(folder: Path, as_json: bool) -> int:
    """Check a dataset against its schema, and its files against each other.

    The exit code is 0 if it is valid, else 1.
    """

    from occgen_hub.files import dump_json
    from occgen_hub.runtime.finalize import unfinished
    from occgen_hub.validation import validate as check

    with progress_bar("validate", unit="trajectory") as progress:
        report = check(folder, progress)
    if as_json:
        click.echo(dump_json(report.as_dict(), indent=1))
    else:
        for finding in report.findings:
            say(str(finding))
        verdict = "valid" if report.valid else f"{len(report.findings)} finding(s)"
        s = "y" if report.trajectories == 1 else "ies"
        say(f"{report.trajectories} trajector{s}, {report.frames} frames: {verdict}.")
    for warning in report.warnings:
        say(f"Warning: {warning}", err=True)
    for remark in unfinished(folder):
        say(f"Note: {remark}.", err=True)
    return 0 if report.valid else 1


@click.command(cls=Examples, example="occgen-hub inspect out --preview out.png")
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.option("--trajectory", help="The trajectory to show; by default the first.")
@click.option(
    "--frame", type=click.IntRange(0), help="The frame to show; by default the middle one."
)
@click.option(
    "--preview",
    type=FOLDER,
    help="The file of the picture; by default DIR_preview.png in the current folder.",
)
def inspect(folder: Path, trajectory: str | None, frame: int | None, preview: Path | None) -> None:
    """Describe a dataset, and write a picture of one of its frames."""
    from occgen_hub.visual.inspection import describe, picture

    place = preview or default_output_path(folder, "_preview.png")
    picture(folder, place, trajectory, frame)
    for line in describe(folder, trajectory):
        say(line)
    say(f"Picture: {place}")
