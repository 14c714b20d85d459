"""The command line: parse, call, print. Heavy imports are left to the command that needs them."""

from __future__ import annotations

import io
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from occgen_hub.errors import OccGenError

if TYPE_CHECKING:
    from occgen_hub.builder import DatasetBuilder, EpisodeRef, Settings, Stage
    from occgen_hub.runtime.loop import Result, Summary

FOLDER = click.Path(file_okay=True, dir_okay=True, path_type=Path)


class Examples(click.Command):
    """A command whose help ends with an example, printed as it stands."""

    def __init__(self, *args: Any, example: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.example = example

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Print the example."""
        with formatter.section("Example"):
            for line in self.example.splitlines():
                formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="occgen-hub", prog_name="occgen-hub")
def cli() -> None:
    """Turn recordings into 4D occupancy datasets for LeRobot and the Hugging Face Hub.

    Begin with a made-up source: occgen-hub sample rooms, then build, validate and inspect it.
    Progress bars are turned off by TQDM_DISABLE=1.
    """


@cli.command(cls=Examples, example="occgen-hub sample rooms --trajectories 4 --frames 30")
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
    from tqdm import tqdm

    from occgen_hub.sample import make_sample

    with tqdm(unit="frame", desc="sample", leave=False, disable=_no_bar()) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        made = make_sample(
            out, trajectories=trajectories, frames=frames, seed=seed, layout=layout, faults=faults,
            progress=progress,
        )  # fmt: skip
    for path in made:
        click.echo(path)
    source, target = shlex.quote(str(out)), shlex.quote(f"{out}_occ")
    click.echo(f"Next: occgen-hub build --source internnav --input {source} --output {target}")


@cli.command(
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
        total=len(refs), unit="episode", desc="build", dynamic_ncols=True, disable=_no_bar()
    ) as bar:

        def finished(result: Result) -> None:
            _stop_if_asked()
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


def _no_bar() -> bool | None:
    """For tqdm's `disable`: None leaves out bars where no terminal is."""
    return True if os.environ.get("TQDM_DISABLE", "0") not in ("", "0") else None


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


@cli.group()
def weights() -> None:
    """Fetch the weights of the networks, or check them."""


NETWORK = click.argument("name", type=click.Choice(["pi3", "pi3x"]))


@weights.command(cls=Examples, example="occgen-hub weights pull pi3x")
@NETWORK
@click.option("--revision", help="A commit or tag on the Hub; the one in ckpt/ if not given.")
def pull(name: Any, revision: str | None) -> None:
    """Fetch a network's published weights into the Hub's cache, and check them."""
    from occgen_hub.engines.pi3 import weights as files

    found = files.fetch(name, revision)
    files.check(found)
    files.verify(found)
    click.echo(found.path)
    click.echo(f"Next: occgen-hub build --source video --engine {name} --input VIDEO --output out")


@weights.command("check", cls=Examples, example="occgen-hub weights check pi3x")
@NETWORK
@click.option("--weights", "path", type=FOLDER, help="Where they are, if not in the usual place.")
def check_weights(name: Any, path: Path | None) -> None:
    """Say which weights are used, whether they are whole, and under which licence they are.

    Fetches nothing. Ends with 0 when they fit the network and are the published ones, or those
    that a config.json beside them describes, and with 2 when they are not.
    """
    from occgen_hub.engines.pi3 import weights as files

    found = files.find(name, path, fetching=False)
    digest = files.verify(found)
    size = found.path.stat().st_size
    said = "as published" if found.checkpoint.sha256 else "whole"
    click.echo(f"{found.path}: {name}, {size / 1e9:.2f} GB, {said}.")
    click.echo(f"SHA-256: {digest}")
    click.echo(f"Licence: {found.checkpoint.terms}.")


@cli.command(cls=Examples, example="occgen-hub validate out")
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def validate(folder: Path, as_json: bool) -> int:
    """Check a dataset against its schema and against itself.

    Ends with 0 when it is valid and with 1 when it is not.
    """
    from tqdm import tqdm

    from occgen_hub.files import dump_json
    from occgen_hub.validation import validate as check

    with tqdm(unit="trajectory", desc="validate", leave=False, disable=_no_bar()) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = check(folder, progress)
    if as_json:
        click.echo(dump_json(report.as_dict(), indent=1))
    else:
        for finding in report.findings:
            click.echo(str(finding))
        verdict = "valid" if report.valid else f"{len(report.findings)} finding(s)"
        s = "y" if report.trajectories == 1 else "ies"
        click.echo(f"{report.trajectories} trajector{s}, {report.frames} frames: {verdict}.")
    return 0 if report.valid else 1


@cli.command(cls=Examples, example="occgen-hub push out --repo-id my-org/rooms-occupancy --private")
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.option("--repo-id", required=True, metavar="ORG/NAME", help="The dataset on the Hub.")
@click.option("--private", is_flag=True, help="Make it private, if it is made now.")
@click.option("--revision", help="A branch, made if it is missing; main if not given.")
@click.option("--create-pr", is_flag=True, help="As a pull request; an open one of yours goes on.")
@click.option("--dry-run", is_flag=True, help="Send nothing; only say what would go.")
def push(
    folder: Path, repo_id: str, private: bool, revision: str | None, create_pr: bool, dry_run: bool
) -> None:
    """Send a dataset to the Hugging Face Hub.

    It has to be valid; its card is brought up to date, unless you wrote one. What is on the Hub
    already is not sent again, so an interrupted push goes on when it is started again. The token
    is HF_TOKEN, or that of hf auth login.
    """
    from huggingface_hub.utils.tqdm import disable_progress_bars
    from tqdm import tqdm

    from occgen_hub import hub

    hub.check_target(repo_id, revision, create_pr)
    if not dry_run:
        hub.check_token(repo_id)
    if _no_bar():
        disable_progress_bars()
    with tqdm(unit="trajectory", desc="validate", leave=False, disable=_no_bar()) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        files = hub.prepare(folder, progress)
    for warning in hub.warnings(files):
        click.echo(f"Warning: {warning}", err=True)
    if dry_run:
        for path, size in files.items():
            click.echo(f"{size:>14,}  {path}")
    said = f"{len(files):,} files of {sum(files.values()):,} bytes"
    if dry_run:
        click.echo(f"{said} would go to {repo_id}; nothing was sent.")
        return
    address = hub.push(folder, repo_id, private=private, revision=revision, create_pr=create_pr)
    click.echo(f"{said} are on the Hub.")
    click.echo(address)


@cli.command(cls=Examples, example="occgen-hub inspect out --preview out.png")
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.option("--trajectory", help="Which trajectory to picture; the first if not given.")
@click.option(
    "--frame", type=click.IntRange(0), help="Which frame to picture; the middle one if not given."
)
@click.option(
    "--preview", type=FOLDER, help="Where the picture goes; DIR_preview.png if not given."
)
def inspect(folder: Path, trajectory: str | None, frame: int | None, preview: Path | None) -> None:
    """Say what is in a dataset, and make a picture of one of its frames."""
    from occgen_hub.visual.inspection import describe, picture

    place = preview or Path(f"{folder.resolve().name}_preview.png")
    picture(folder, place, trajectory, frame)
    for line in describe(folder, trajectory):
        click.echo(line)
    click.echo(f"Picture: {place}")


def main() -> None:
    """Run the command line; errors become one sentence and an exit code."""
    _stop_in_order()
    for stream in (sys.stdout, sys.stderr):  # A file's name may be no text that a terminal has.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except OccGenError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
    except (Stopped, click.Abort, KeyboardInterrupt):
        click.echo(
            "Stopped. What was finished stays; the same command goes on from there.", err=True
        )
        sys.exit(128 + (_received[0] if _received else signal.SIGINT))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        click.echo(f"Error: {place}{error.strerror or error}.", err=True)
        sys.exit(1)
    finally:
        _stop_at_once()
    sys.exit(code if isinstance(code, int) else 0)


STOPS = (signal.SIGINT, signal.SIGTERM)
_received: list[int] = []


class Stopped(BaseException):
    """Ctrl-C, or a scheduler's SIGTERM. (Python remembers a KeyboardInterrupt that was caught.)"""


def _stop_in_order() -> None:
    """Let a first signal unwind the command; a second one ends it at once.

    Signals that are ignored, as those of a job in the background may be, stay so.
    """

    def stop(number: int, _: object) -> None:
        _received.append(number)
        _stop_at_once()
        sys.unraisablehook = lambda _: None  # It may come where nothing can be raised.
        raise Stopped

    _received.clear()
    for number in STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)


def _stop_at_once() -> None:
    for number in STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def _stop_if_asked() -> None:
    """Stop where it could not be raised or was swallowed, as by a library being imported."""
    if _received:
        raise Stopped
