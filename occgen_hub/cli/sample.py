"""The command `sample`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from occgen_hub.cli.command import FOLDER, Examples, progress_bar


@click.command(cls=Examples, example="occgen-hub sample rooms --trajectories 4 --frames 30")
@click.argument("out", type=FOLDER)
@click.option("--trajectories", default=3, show_default=True, help="How many to make.")
@click.option("--frames", default=24, show_default=True, help="Frames of the first; others differ.")
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same bytes.")
@click.option(
    "--layout",
    type=click.Choice(["trajectories", "scenes"]),
    default="trajectories",
    show_default=True,
    help="A folder a trajectory, or the newer one of many episodes in a scene's folder.",
)
@click.option(
    "--faults", is_flag=True, help="With some of the mistakes that meta files of real data have."
)
def sample(out: Path, trajectories: int, frames: int, seed: int, layout: Any, faults: bool) -> None:
    """Make a source tree like InternData-N1's, of ray-traced rooms, with the true mesh."""

    from occgen_hub.sample import make_sample

    with progress_bar("sample", unit="frame") as progress:
        made = make_sample(
            out, trajectories=trajectories, frames=frames, seed=seed, layout=layout, faults=faults,
            progress=progress,
        )  # fmt: skip
    for path in made:
        click.echo(path)
    source, target = shlex.quote(str(out)), shlex.quote(f"{out}_occ")
    click.echo(f"Next: occgen-hub build --source internnav --input {source} --output {target}")
