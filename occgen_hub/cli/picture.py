"""Commands that show a built dataset: `visualize`, `render`, `view` and `report`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from occgen_hub.cli.command import (
    FOLDER,
    Examples,
    default_output_path,
    progress_bar,
    say,
    with_options,
)
from occgen_hub.cli.mapping import MAPPING, take_cameras
from occgen_hub.errors import OccGenError, UsageError, one_line
from occgen_hub.stopping import Stopped, received
from occgen_hub.visual import SEQUENCES

if TYPE_CHECKING:
    from occgen_hub.loading import Trajectory

MOST_BYTES = 10**9
"""Bytes. `visualize` asks before it writes more."""

TRAJECTORY = click.argument("trajectory")

_SOURCE = (
    click.option(
        "--input", "root", type=FOLDER,
        help="A source. TRAJECTORY is then the id of one of its episodes, which is built first.",
    ),
    click.option(
        "--source", default="internnav", show_default=True, metavar="NAME",
        help="The kind of --input, as in build.",
    ),
    click.option(
        "--engine", default="auto", show_default=True, metavar="NAME",
        help="With --input, as in build.",
    ),
    click.option("--weights", type=FOLDER, help="With --input, as in build."),
    click.option("--device", help="With --input, as in build."),
    click.option("--config", type=FOLDER, help="With --input: settings, a YAML file."),
    click.option(
        "--set", "settings", multiple=True, metavar="KEY=VALUE",
        help="With --input: one setting; repeatable.",
    ),
    *MAPPING,
)  # fmt: skip

_HISTORY = (
    click.option(
        "--history-len", type=click.IntRange(0, 10_000), default=10, show_default=True,
        help="Number of past frames whose occupancy is shown too.",
    ),
    click.option(
        "--history-step", type=click.IntRange(1, 10_000), default=2, show_default=True,
        help="Step between past frames, in frames.",
    ),
)  # fmt: skip


@contextmanager
def _opened(trajectory: str, root: Path | None, how: dict[str, Any]) -> Iterator[Trajectory]:
    """The trajectory that a command names: a folder, or an episode that is built first."""
    from occgen_hub.loading import Trajectory

    if root is None:
        yield Trajectory.open(_folder(Path(trajectory)))
        return
    from occgen_hub.config import load_config
    from occgen_hub.temporary_build import temporary_build

    options = {name: how[name] for name in ("source", "engine", "weights", "device")}
    options["config"] = load_config(how["config"], how["settings"])
    options["cameras"] = take_cameras(how)
    with (
        progress_bar("build", unit="frame") as progress,
        temporary_build(
            trajectory, root=root, progress=lambda done: progress(done, None), **options
        ) as folder,
    ):
        yield Trajectory.open(folder)


def _folder(place: Path) -> Path:
    """A trajectory's folder, or the only one in a dataset."""
    from occgen_hub.loading import built

    if not place.is_dir():
        raise UsageError(
            f"{place}: is not a folder; give <group>/<scene>/<trajectory> of a dataset that "
            "occgen-hub build wrote or, with --input, the id of an episode of a source."
        )
    found = built(place)
    if len(found) > 1:
        names = ", ".join(shlex.quote(str(path)) for path in found[:3])
        raise UsageError(f"{place}: has {len(found)} trajectories; name one, for example {names}.")
    return found[0]


@click.command(
    cls=Examples,
    example="occgen-hub visualize out/sample_zed/house_000/trajectory_0 clouds\n"
    "occgen-hub visualize --input rooms sample_zed/house_000/trajectory_0 clouds",
)
@TRAJECTORY
@click.argument("out", type=FOLDER)
@click.option(
    "--only", type=click.Choice(SEQUENCES), multiple=True,
    help="Only these files; repeatable. By default all six kinds.",
)  # fmt: skip
@click.option("--yes", is_flag=True, help="Write more than a gigabyte without asking.")
@with_options(*_HISTORY, *_SOURCE)
def visualize(
    trajectory: str,
    out: Path,
    only: tuple[str, ...],
    yes: bool,
    history_len: int,
    history_step: int,
    root: Path | None,
    **how: Any,
) -> None:
    """Write a trajectory as point clouds, a file per frame, for MeshLab, CloudCompare or numpy.

    Each has the scene (label 0), the path so far (1) and the occupied cells (2) in world or camera
    coordinates, as npy or ply. Two kinds have only the cells. Asks before it writes more than a
    gigabyte.
    """
    from occgen_hub.visual.sequences import estimate_bytes, write_sequences

    kinds = tuple(dict.fromkeys(only)) or SEQUENCES
    with _opened(trajectory, root, how) as opened:
        size = estimate_bytes(opened, only=kinds, history_len=history_len)
        s = "" if len(kinds) == 1 else "s"
        say(f"About {size / 1e6:,.0f} MB in {len(kinds)} folder{s}.", err=True)
        if size > MOST_BYTES and not yes:
            _ask(out, size)
        with progress_bar("visualize", unit="frame") as progress:
            count = write_sequences(
                opened, out, only=kinds, history_len=history_len, history_step=history_step,
                progress=progress,
            )  # fmt: skip
    say(f"{count} files: {out}")


def _ask(out: Path, size: int) -> None:
    """Ask whether to write this many bytes. Raises UsageError if there is no terminal."""
    if not _can_answer():
        raise UsageError(
            f"{out}: about {size / 1e9:.1f} GB would be written; add --yes, or write less with "
            f"--only, as in --only {SEQUENCES[0]}."
        )
    click.confirm(f"Write {size / 1e9:.1f} GB to {one_line(str(out))}?", abort=True, err=True)


def _can_answer() -> bool:
    """Whether the input is a terminal."""
    return sys.stdin.isatty()


class Rate(click.FloatRange):
    """A number in a range. NaN is rejected, although click accepts it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number."""
        number = super().convert(value, param, ctx)
        return self.fail(f"{value!r} is not a number", param, ctx) if isnan(number) else number


def _size(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    width, x, height = value.partition("x")
    if not (x and width.isdecimal() and height.isdecimal() and value.isascii() and len(value) < 20):
        raise click.BadParameter("give width and height such as 1280x480")
    return int(width), int(height)


@click.command(
    cls=Examples,
    example="occgen-hub render out/sample_zed/house_000/trajectory_0 room.mp4\n"
    "occgen-hub render out/sample_zed/house_000/trajectory_0 room.png --view world --frame 12",
)
@TRAJECTORY
@click.argument("out", metavar="OUT.mp4", type=FOLDER)
@click.option(
    "--view", type=click.Choice(["world", "ego", "panels"]), default="panels", show_default=True,
    help="The scene from outside; the occupancy from the camera; or the image and both.",
)  # fmt: skip
@click.option(
    "--size", callback=_size, metavar="WxH",
    help="Pixels; by default world 1280x720, panels 1920x540, ego in the shape of the images.",
)  # fmt: skip
@click.option("--fps", type=Rate(0.1, 240), help="By default the trajectory's.")
@click.option(
    "--frame", type=click.IntRange(0), help="The frame of a .png; by default the middle one."
)
@click.option(
    "--camera", type=FOLDER,
    help="JSON: the world's viewpoint, from view --choose-camera; by default automatic.",
)  # fmt: skip
@click.option(
    "--color", type=click.Choice(["depth", "class"]), default="depth", show_default=True,
    help="Colours in the camera's view: by depth or, in a dataset with labels, by class.",
)  # fmt: skip
@with_options(*_HISTORY, *_SOURCE)
def render(
    trajectory: str,
    out: Path,
    view: Any,
    size: tuple[int, int] | None,
    fps: float | None,
    frame: int | None,
    camera: Path | None,
    color: Any,
    history_len: int,
    history_step: int,
    root: Path | None,
    **how: Any,
) -> None:
    """Make a video of a trajectory or, with OUT.png, a picture of one frame, without a screen.

    The world view shows the coloured scene, the path, the camera with its image, and occupied
    cells, blue to yellow by height and pale for past frames. The ego view shows the cells that
    the camera sees, coloured by depth (near ones are bright) or by class. Needs the extra `visual`.
    """
    from occgen_hub.visual.optional_dependencies import require_pyvista
    from occgen_hub.visual.render import RenderOptions
    from occgen_hub.visual.render import render as write
    from occgen_hub.visual.viewpoint import Viewpoint

    require_pyvista()
    viewpoint = Viewpoint.load(camera) if camera else None
    shot = RenderOptions(view, size, viewpoint, history_len, history_step, color)
    with (
        _opened(trajectory, root, how) as opened,
        progress_bar("render", unit="frame") as progress,
    ):
        write(opened, out, shot, fps=fps, frame=frame, progress=progress)
    say(f"{'Picture' if out.suffix.lower() == '.png' else 'Video'}: {out}")


@click.command(
    cls=Examples,
    example="occgen-hub view out/sample_zed/house_000/trajectory_0\n"
    "occgen-hub view out/sample_zed/house_000/trajectory_0 --save room.rrd",
)
@TRAJECTORY
@click.option("--save", type=FOLDER, metavar="FILE.rrd", help="Write a file for the viewer.")
@click.option("--web", is_flag=True, help="Serve the viewer to browsers, until Ctrl-C.")
@click.option(
    "--ports", nargs=2, type=click.IntRange(1, 65535), default=(9090, 9876), show_default=True,
    help="With --web: ports of the page and of the data.",
)  # fmt: skip
@click.option(
    "--choose-camera", type=FOLDER, metavar="FILE.json",
    help="Open a window to choose the viewpoint, and write it for render --camera.",
)  # fmt: skip
@with_options(*_SOURCE)
def view(
    trajectory: str,
    save: Path | None,
    web: bool,
    ports: tuple[int, int],
    choose_camera: Path | None,
    root: Path | None,
    **how: Any,
) -> None:
    """Show a trajectory over time in rerun's viewer.

    It shows images, depth, the coloured scene, the camera on its path, occupied cells and observed
    space, in a window. Without a screen, --web serves a page, and --save writes a file for rerun
    FILE.rrd on another machine. Needs the extra `visual`.
    """
    from occgen_hub.visual.optional_dependencies import require, require_pyvista
    from occgen_hub.visual.viewpoint_picker import choose_viewpoint, has_screen

    if sum((save is not None, web, choose_camera is not None)) > 1:
        raise UsageError("--save, --web and --choose-camera: give one of them.")
    if choose_camera is not None:
        require_pyvista()
    else:
        require("rerun")
    if root is None:
        _folder(Path(trajectory))
    if not (save or web or choose_camera or has_screen()):
        raise UsageError(
            "there is no screen for the viewer; use --web for a browser, or --save FILE.rrd to "
            "open the file on another machine."
        )
    with _opened(trajectory, root, how) as opened:
        if choose_camera is not None:
            choose_viewpoint(opened, choose_camera)
            say(f"Viewpoint: {choose_camera}")
            say(f"Next: occgen-hub render ... --camera {shlex.quote(str(choose_camera))}")
        elif save is not None:
            _save(opened, save)
        elif web:
            _show(opened, ports)
        else:
            _show(opened)


def _save(trajectory: Trajectory, place: Path) -> None:
    from occgen_hub.visual import viewer
    from occgen_hub.visual.output_paths import atomic_output

    if place.suffix != ".rrd":
        raise UsageError(f"--save {place}: give a name that ends in .rrd.")
    with progress_bar("view", unit="frame") as progress, atomic_output(place) as partial:
        viewer.save(trajectory, partial, progress)
    say(f"Recording: {place}")
    say(f"Next: rerun {shlex.quote(str(place))}")


def _show(trajectory: Trajectory, ports: tuple[int, int] | None = None) -> None:
    """Show the viewer until its window is closed or, if it is served, until Ctrl-C."""
    import tempfile

    from occgen_hub.visual import viewer

    with tempfile.TemporaryDirectory(prefix="occgen-") as folder:
        recorded = Path(folder, "trajectory.rrd")
        with progress_bar("view", unit="frame") as progress:
            viewer.save(trajectory, recorded, progress)
        with viewer.viewer(recorded, ports) as process:
            if ports is not None:
                say(f"Open {viewer.viewer_url(ports)}")
                click.echo("Ctrl-C ends it.")
            try:
                code = process.wait()
            except Stopped:
                received.clear()  # The normal way to end a server.
                return
        if code:
            raise OccGenError(
                f"rerun's viewer ended with {code}; try --save FILE.rrd and then rerun FILE.rrd, "
                "which says why."
            )


@click.command(cls=Examples, example="occgen-hub report out --output out.html")
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.option("--output", type=FOLDER, help="The file of the page; by default DIR_report.html.")
def report(folder: Path, output: Path | None) -> None:
    """Write a report on a dataset as one HTML page, which needs no network.

    It has a contact sheet, pictures and figures of each trajectory in a table to sort and search,
    and the failures.
    """
    from occgen_hub.visual.report import write_report

    place = output or default_output_path(folder, "_report.html")
    with progress_bar("report", unit="trajectory") as progress:
        count = write_report(folder, place, progress)
    s = "y" if count == 1 else "ies"
    say(f"{count} trajector{s}: {place}")
