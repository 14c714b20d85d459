"""The command `sample`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from occgen_hub.cli.command import FOLDER, Examples, progress_bar


class _Size(click.ParamType[tuple[float, float]]):
    """Metres and degrees, such as 0.004,0.15."""

    name = "METRES,DEGREES"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, float]:
        """The two numbers. Fails if there are not two."""
        try:
            metres, degrees = (float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(
                f"{value!r} is not metres,degrees; give two numbers such as 0.004,0.15", param, ctx
            )
        return metres, degrees


@click.command(
    cls=Examples,
    example="occgen-hub sample rooms --trajectories 4 --frames 30\n"
    "occgen-hub sample hard --noise kinect --noise speckle --pose-noise --people 2",
)
@click.argument("out", type=FOLDER)
@click.option("--trajectories", default=3, show_default=True, help="Number of trajectories.")
@click.option("--frames", default=24, show_default=True, help="Frames of the first; others differ.")
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same bytes.")
@click.option(
    "--layout",
    type=click.Choice(["vln-n1", "vln-n1-scenes", "vln-ce"]),
    default="vln-n1",
    show_default=True,
    help="InternData-N1 with a folder per trajectory, its newer layout with many episodes per "
    "scene folder, or VLN-CE with two cameras per episode.",
)
@click.option("--faults", is_flag=True, help="With mistakes that occur in meta files of real data.")
@click.option(
    "--noise",
    type=click.Choice(["kinect", "stereo", "network", "flying", "speckle"]),
    multiple=True,
    help="Errors of the depth images; repeatable, in any order.",
)
@click.option(
    "--pose-noise", type=_Size(), is_flag=False, flag_value="0.004,0.15",
    help="Independent errors of the stated poses: standard deviation per axis; "
    "0.004,0.15 if no value is given.",
)  # fmt: skip
@click.option(
    "--pose-drift", type=_Size(), is_flag=False, flag_value="0.02,0.3",
    help="Smooth drift of the stated poses: maximum per axis; 0.02,0.3 if no value is given.",
)  # fmt: skip
@click.option(
    "--people", default=0, show_default=True,
    help="Number of people who walk, or walk and then stand, in each trajectory.",
)  # fmt: skip
@click.option(
    "--labels", is_flag=True, help="With label images: the class of what each pixel shows."
)
def sample(
    out: Path,
    trajectories: int,
    frames: int,
    seed: int,
    layout: Any,
    faults: bool,
    noise: tuple[str, ...],
    pose_noise: tuple[float, float] | None,
    pose_drift: tuple[float, float] | None,
    people: int,
    labels: bool,
) -> None:
    """Make a source like InternData-N1 of ray-traced rooms, with ground truth.

    OUT/ground_truth has the mesh of the rooms, with --labels the class of each triangle, and
    for each episode the true poses and the people of every frame.
    """
    from occgen_hub.sample import make_sample

    with progress_bar("sample", unit="frame") as progress:
        made = make_sample(
            out, trajectories=trajectories, frames=frames, seed=seed, layout=layout, faults=faults,
            noise=noise, pose_noise=pose_noise, pose_drift=pose_drift, people=people,
            labels=labels,
            progress=progress,
        )  # fmt: skip
    for path in made:
        click.echo(path)
    source, target = shlex.quote(str(out)), shlex.quote(f"{out}_occ")
    click.echo(f"Next: occgen-hub build --source internnav --input {source} --output {target}")
