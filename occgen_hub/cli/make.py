"""Commands that make things: `sample` and `build`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from occgen_hub.cli.command import FOLDER, Examples, no_bar, progress_bar
from occgen_hub.cli.stopping import stop_if_asked
from occgen_hub.errors import OccGenError

if TYPE_CHECKING:
    from occgen_hub.builder import DatasetBuilder, EpisodeRef, Settings, Stage
    from occgen_hub.runtime.loop import Result, Summary


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
@click.option("--faults", is_flag=True, help="With the mistakes in meta files that real data has.")
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


@click.command(
    cls=Examples,
    example="occgen-hub build --source internnav --input traj_data --output out --workers 8",
)
@click.option("--source", default="internnav", show_default=True, help="What kind of source it is.")
@click.option(
    "--input", "root", type=FOLDER, required=True,
    help="The root of the source tree; for videos also a single one.",
)  # fmt: skip
@click.option("--output", "out", type=FOLDER, required=True, help="Where the dataset goes.")
@click.option(
    "--engine",
    default="auto",
    show_default=True,
    help="How to reconstruct: rgbd from sensor depth, pi3 or pi3x from images; auto takes rgbd "
    "where there is depth, else pi3x or pi3 by the weights that are there.",
)
@click.option(
    "--weights",
    type=FOLDER,
    help="A network's weights; ckpt/NAME/model.safetensors or the Hub's if not given.",
)
@click.option("--device", help="Where networks run, as cuda:1; a GPU if there is one.")
@click.option(
    "--condition",
    metavar="LIST",
    help="What pi3x is told besides the images: depth, intrinsics, poses, or some of them.",
)
@click.option("--config", type=FOLDER, help="A YAML file of settings.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="One setting; repeatable."
)
@click.option(
    "--media",
    type=click.Choice(["copy", "link", "none"]),
    default="copy",
    show_default=True,
    help="What to do with the source's images and videos: link makes hard links.",
)
@click.option(
    "--workers", type=click.IntRange(1), default=1, show_default=True,
    help="Processes; they share the cores.",
)  # fmt: skip
@click.option("--limit", type=click.IntRange(1), help="Build only the first so many episodes.")
@click.option("--overwrite", is_flag=True, help="Build also what is there already.")
@click.option(
    "--parquet-occupancy/--no-parquet-occupancy",
    default=True,
    show_default=True,
    help="Write the occupancy as Parquet as well, in occupancy/, which the Hub can stream.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be built.")
def build(
    source: str,
    root: Path,
    out: Path,
    engine: str,
    weights: Path | None,
    device: str | None,
    condition: str | None,
    config: Path | None,
    settings: tuple[str, ...],
    media: Any,
    workers: int,
    limit: int | None,
    overwrite: bool,
    parquet_occupancy: bool,
    dry_run: bool,
) -> int:
    """Build an occupancy dataset from a source.

    What is there already and up to date is left alone, so an interrupted build goes on when it is
    started again. Ends with 0 when all was built, 1 when some episodes failed, 2 when used wrongly.
    """
    from occgen_hub.builder import Settings, load_builder
    from occgen_hub.config import load_config
    from occgen_hub.runtime.loop import check_places, choose_engine, list_episodes

    if condition is not None:
        settings += (f"condition=[{condition}]",)
    parameters = load_config(config, settings)
    check_places(root, out)
    builder = load_builder(source, root)
    refs = list_episodes(builder, limit)
    chosen = choose_engine(builder, refs, engine, weights, device)
    chosen.check(parameters)
    how = Settings(parameters, chosen, media, overwrite)
    if dry_run:
        return _plan(builder, refs, out, how)
    return _build(builder, refs, out, how, workers, parquet_occupancy)


def _plan(builder: DatasetBuilder, refs: list[EpisodeRef], out: Path, settings: Settings) -> int:
    missing = 0
    for ref in refs:
        try:
            reason = builder.outdated(ref, out, settings)
            present = reason is None and not settings.overwrite
            state = "present" if present else f"to build: {reason or 'is there, --overwrite'}"
        except OccGenError as error:
            present, state = False, f"would fail: {error}"
        missing += not present
        click.echo(f"{ref.id}  {state}")
    click.echo(f"{missing} of {len(refs)} episodes would be built into {out}; nothing was done.")
    return 0


def _build(
    builder: DatasetBuilder,
    refs: list[EpisodeRef],
    out: Path,
    settings: Settings,
    workers: int,
    parquet_occupancy: bool,
) -> int:
    from threading import Lock

    from tqdm import tqdm

    from occgen_hub.occupancy.visibility import warm_up
    from occgen_hub.runtime.loop import Listener, run

    warm_up()
    seen: set[str] = set()
    frames = {"reconstructed": 0, "built": 0}
    turn = Lock()  # Frames are counted in a thread of its own where there are workers.
    with tqdm(
        total=len(refs), unit="episode", desc="build", dynamic_ncols=True, disable=no_bar()
    ) as bar:

        def finished(result: Result) -> None:
            stop_if_asked()
            for line in _news(result, seen):
                bar.write(line, file=sys.stderr)
            with turn:
                bar.update()

        def count(stage: Stage, done: int) -> None:
            frames[stage] += done
            with turn:
                elapsed = max(bar.format_dict["elapsed"], 1e-9)
                bar.set_postfix_str(
                    f"{frames['reconstructed']} frames reconstructed, "
                    f"{frames['built'] / elapsed:.1f} built a second",
                    refresh=False,
                )
                bar.update(0)

        summary = run(
            builder, refs, out, settings, workers, Listener(finished, count),
            parquet_occupancy=parquet_occupancy,
        )  # fmt: skip
    _print_summary(summary, out, refs)
    return 1 if summary.failures else 0


def _news(result: Result, seen: set[str]) -> list[str]:
    """Lines to print about an episode: its failure, or those of its notes that are new in kind."""
    from occgen_hub.runtime.loop import Failure

    if isinstance(result, Failure):
        return [f"failed  {result.id}: {result.reason}"]
    new = [note for note in result.notes if note.code not in seen]
    seen.update(note.code for note in new)
    return [f"note    {result.id}: {note.text}" for note in new]


def _print_summary(summary: Summary, out: Path, refs: list[EpisodeRef]) -> None:
    from occgen_hub.runtime.loop import FAILURES

    rate = f", {summary.frames / summary.seconds:.1f} frames/s" if summary.frames else ""
    click.echo(
        f"{summary.built} built, {summary.present} already there, {len(summary.failures)} failed "
        f"of {len(refs)} episodes; {summary.frames} frames in {summary.seconds:.1f} s{rate}."
    )
    if total := sum(summary.stages.values()):
        shares = ", ".join(f"{k} {v / total:.0%}" for k, v in summary.stages.most_common())
        click.echo(f"Time spent: {shares}.")
    repeated = [f"{code} ({n})" for code, n in sorted(summary.notes.items()) if n > 1]
    if repeated:
        click.echo(f"Notes that were on several episodes, and on how many: {', '.join(repeated)}.")
    for remark in summary.remarks:
        click.echo(f"Note: {remark}.")
    if summary.failures:
        click.echo(f"The failures are listed in {out / FAILURES}:")
        for failure in summary.failures[:20]:
            click.echo(f"  {failure.id}: {failure.reason}")
        if len(summary.failures) > 20:
            click.echo(f"  and {len(summary.failures) - 20} more.")
    place = shlex.quote(str(out))
    click.echo(f"Next: occgen-hub validate {place}" if summary.built else f"Dataset: {out}")
