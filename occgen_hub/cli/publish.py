"""Commands that hand a dataset on: `export` and `push`."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from occgen_hub.cli.command import FOLDER, Examples, no_bar, progress_bar, say, say_by_folder
from occgen_hub.errors import UsageError


@click.command(
    cls=Examples,
    example="occgen-hub export out out_lerobot --to lerobot-v3.0\n"
    "occgen-hub export out out_scannet --to occscannet",
)
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.argument("out", metavar="OUT", type=FOLDER)
@click.option(
    "--to", type=click.Choice(["lerobot-v3.0", "navdp", "occscannet", "occ3d"]),
    default="lerobot-v3.0", show_default=True, help="What to make of it.",
)  # fmt: skip
@click.option(
    "--fps", type=click.IntRange(1, 240),
    help="Frames a second, where the trajectories have several rates.",
)  # fmt: skip
@click.option(
    "--navdp-layout", type=click.Choice(["scenes", "trajectories"]),
    help="navdp: scenes of many episodes, which its loader reads today, or a folder an episode, "
    "which it read before.  [default: scenes]",
)  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace an earlier export at OUT.")
@click.option(
    "--update", is_flag=True,
    help="OUT is an export that LeRobot's tools edited: bring its occupancy up to date, no more.",
)  # fmt: skip
def export(
    folder: Path, out: Path, to: Any, fps: int | None, navdp_layout: Any, overwrite: bool,
    update: bool,
) -> None:  # fmt: skip
    """Make one dataset of another form of all trajectories of a dataset.

    lerobot-v3.0: RGB and depth become video, the occupancy lies beside it as Parquet: few files,
    which LeRobot loads, and push sends to the Hub as well. navdp: a root that InternNav's NavDP
    loader takes as it is. occscannet and occ3d: the scene around each camera, hidden cells
    included, as the loaders of those datasets read it.
    """
    if update and to != "lerobot-v3.0":
        raise UsageError("--update: goes with --to lerobot-v3.0; leave it out.")
    if navdp_layout is not None and to != "navdp":
        raise UsageError("--navdp-layout: goes with --to navdp; leave it out.")
    if update:
        if overwrite or fps is not None:
            raise UsageError(
                "--update: changes no table and no video; leave --overwrite and --fps out."
            )
        from occgen_hub.exporting import update_export

        remarks = update_export(folder, out)
    else:
        make = _maker(to, navdp_layout, fps)
        with progress_bar("export", unit="frame") as progress:
            remarks = make(folder, out, overwrite=overwrite, progress=progress)
    for remark in remarks:
        say(f"Note: {remark}.", err=True)
    say(f"{'Updated' if update else 'Exported to'} {out}.")
    if to != "navdp":
        say(f"Next: occgen-hub push {shlex.quote(str(out))} --repo-id ORG/NAME")


def _maker(to: Any, navdp_layout: Any, fps: int | None) -> Callable[..., list[str]]:
    """What writes an export of a form; raises UsageError for options that do not fit the form."""
    if to == "navdp":
        from occgen_hub.navdp import export_navdp

        if fps is not None:
            raise UsageError("--fps: is not used by --to navdp, which has images; leave it out.")
        return partial(export_navdp, layout=navdp_layout or "scenes")
    from occgen_hub.exporting import export

    return partial(export, to=to, fps=fps)


@click.command(
    cls=Examples,
    example="occgen-hub push out --repo-id my-org/rooms-occupancy --private",
    goes_on=True,
)
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.option("--repo-id", required=True, metavar="ORG/NAME", help="The dataset on the Hub.")
@click.option("--private", is_flag=True, help="Make it private, if it is made now.")
@click.option("--revision", help="A branch, made if it is missing; main if not given.")
@click.option("--create-pr", is_flag=True, help="As a pull request; an open one of yours goes on.")
@click.option("--dry-run", is_flag=True, help="Send nothing; only say what would go.")
@click.option("--verbose", is_flag=True, help="With --dry-run: every file, not totals by folder.")
def push(
    folder: Path,
    repo_id: str,
    private: bool,
    revision: str | None,
    create_pr: bool,
    dry_run: bool,
    verbose: bool,
) -> None:
    """Send a dataset to the Hugging Face Hub.

    It has to be valid; its card is brought up to date, unless you wrote one. What is on the Hub
    already is not sent again, so an interrupted push goes on when it is started again. The token
    is HF_TOKEN, or that of hf auth login.
    """
    from huggingface_hub.utils.tqdm import disable_progress_bars

    from occgen_hub import hub
    from occgen_hub.runtime.finalize import unfinished

    hub.check_target(repo_id, revision, create_pr)
    if not dry_run:
        hub.check_token(repo_id)
    if no_bar():
        disable_progress_bars()
    with progress_bar("validate", unit="trajectory") as progress:
        files = hub.prepare(folder, progress)
    for warning in (*(f"{remark}." for remark in unfinished(folder)), *hub.warnings(files)):
        say(f"Warning: {warning}", err=True)
    if dry_run:
        say_by_folder(
            {path: f"{size:>14,}  {path}" for path, size in files.items()},
            lambda paths: f"{sum(files[path] for path in paths):>14,}  {len(paths):>8,} files",
            verbose=verbose,
        )
    said = f"{len(files):,} files of {sum(files.values()):,} bytes"
    if dry_run:
        say(f"{said} would go to {repo_id}; nothing was sent.")
        return
    address = hub.push(folder, repo_id, private=private, revision=revision, create_pr=create_pr)
    say(f"{said} are on the Hub.")
    say(address)
