"""The commands `export` and `push`."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from occgen_hub.cli.command import FOLDER, Examples, bar_disabled, progress_bar, say, say_by_folder
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
    default="lerobot-v3.0", show_default=True, help="The format of the export.",
)  # fmt: skip
@click.option(
    "--fps", type=click.IntRange(1, 240),
    help="Frames per second, if the trajectories have several rates, or theirs is only assumed.",
)  # fmt: skip
@click.option(
    "--navdp-layout", type=click.Choice(["scenes", "trajectories"]),
    help="navdp: scenes with many episodes, for its current loader, or a folder per episode, for "
    "earlier ones.  [default: scenes]",
)  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace an earlier export at OUT.")
@click.option(
    "--update", is_flag=True,
    help="OUT is an export edited with LeRobot's tools: only update its occupancy.",
)  # fmt: skip
def export(
    folder: Path, out: Path, to: Any, fps: int | None, navdp_layout: Any, overwrite: bool,
    update: bool,
) -> None:  # fmt: skip
    """Export all trajectories of a dataset as one dataset in another format.

    lerobot-v3.0: RGB and depth as video, occupancy as Parquet, in few files, for LeRobot; push
    sends it to the Hub too. navdp: a root folder for InternNav's NavDP loader. occscannet and
    occ3d: the scene around each camera, including hidden cells, for the loaders of those datasets.
    """
    if update and to != "lerobot-v3.0":
        raise UsageError("--update: is only for --to lerobot-v3.0; leave it out.")
    if navdp_layout is not None and to != "navdp":
        raise UsageError("--navdp-layout: is only for --to navdp; leave it out.")
    if update:
        if overwrite or fps is not None:
            raise UsageError(
                "--update: does not change tables or videos; leave --overwrite and --fps out."
            )
        from occgen_hub.exporting import update_export

        remarks = update_export(folder, out)
    else:
        make = _export_function(to, navdp_layout, fps)
        with progress_bar("export", unit="frame") as progress:
            remarks = make(folder, out, overwrite=overwrite, progress=progress)
    for remark in remarks:
        say(f"Note: {remark}.", err=True)
    from occgen_hub.files import files_under

    sizes = [path.stat().st_size for path in files_under(out)]
    amount = f"{len(sizes):,} files, {sum(sizes) / 1e6:,.1f} MB"
    say(f"{'Updated' if update else 'Exported to'} {out}: {amount}.")
    if to != "navdp":
        say(f"Next: occgen-hub push {shlex.quote(str(out))} --repo-id ORG/NAME")


def _export_function(to: Any, navdp_layout: Any, fps: int | None) -> Callable[..., list[str]]:
    """The function that writes a format. Raises UsageError for options of other formats."""
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
    resumable=True,
)
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.option("--repo-id", required=True, metavar="ORG/NAME", help="The dataset on the Hub.")
@click.option("--private", is_flag=True, help="Create the dataset as private.")
@click.option("--revision", help="A branch, created if needed; by default main.")
@click.option("--create-pr", is_flag=True, help="Push to a pull request; continues your open one.")
@click.option("--dry-run", is_flag=True, help="Send nothing; only print what would be sent.")
@click.option("--verbose", is_flag=True, help="With --dry-run: list every file, not totals.")
def push(
    folder: Path,
    repo_id: str,
    private: bool,
    revision: str | None,
    create_pr: bool,
    dry_run: bool,
    verbose: bool,
) -> None:
    """Push a dataset to the Hugging Face Hub.

    It must be valid. Its card is updated, unless you wrote your own. Files that the Hub has already
    are not sent again, so starting an interrupted push again resumes it. The token is HF_TOKEN, or
    that of hf auth login.
    """
    from huggingface_hub.utils.tqdm import disable_progress_bars

    from occgen_hub import hub
    from occgen_hub.card import states_no_license
    from occgen_hub.runtime.finalize import unfinished

    hub.check_target(repo_id, revision, create_pr)
    if not dry_run:
        hub.check_token(repo_id)
    if bar_disabled():
        disable_progress_bars()
    with progress_bar("validate", unit="trajectory") as progress:
        files = hub.prepare(folder, progress)
    for warning in (*(f"{remark}." for remark in unfinished(folder)), *hub.warnings(files)):
        say(f"Warning: {warning}", err=True)
    if dry_run:
        say_by_folder(
            {path: f"{size:>14,} bytes  {path}" for path, size in files.items()},
            lambda paths: (
                f"{sum(files[path] for path in paths):>14,} bytes  {len(paths):>8,} files"
            ),
            verbose=verbose,
        )
    total = f"{len(files):,} files of {sum(files.values()):,} bytes"
    if dry_run:
        kind = "private" if private else "public, since --private is not given"
        say(f"{total} would be pushed to {repo_id}; nothing was sent.")
        say(f"If that dataset does not exist yet, it will be {kind}.")
    if states_no_license(folder):
        say("The card states no licence; docs/licence.md says how to give yours.")
    if dry_run:
        return
    address = hub.push(folder, repo_id, private=private, revision=revision, create_pr=create_pr)
    say(f"{total} are on the Hub.")
    say(address)
