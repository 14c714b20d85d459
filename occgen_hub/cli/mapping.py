"""Options for what a recording does not state about its cameras, and the command `cameras`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from occgen_hub.cli.command import FOLDER, SOURCE, Examples, say
from occgen_hub.errors import UsageError

if TYPE_CHECKING:
    from occgen_hub.camera_mapping import CameraMapping

TOPICS = ("rgb", "depth", "pose", "info")

CAMERA = click.option(
    "--camera",
    "camera_keys",
    multiple=True,
    metavar="KEY",
    help="The colour images of a LeRobot dataset to build from; repeatable.",
)
"""For commands without their own option --camera."""

MAPPING = (
    click.option(
        "--cameras", "cameras_file", type=FOLDER, metavar="FILE",
        help="A YAML file on each camera; occgen-hub cameras INPUT writes one.",
    ),
    click.option(
        "--intrinsics", metavar="FX,FY,CX,CY",
        help="Intrinsics in pixels of the colour images, as in OpenCV, ROS and RealSense; "
        "distortion may follow: K1,K2,P1,P2[,K3].",
    ),
    click.option("--depth-unit", type=click.Choice(["m", "cm", "mm"]), help="The unit of depth."),
    click.option(
        "--depth-scale", type=click.FloatRange(0, min_open=True), metavar="NUMBER",
        help="Depth units per metre, such as 5000, or metres per unit, such as 0.0002.",
    ),
    click.option(
        "--pose-axes", type=click.Choice(["opencv", "opengl", "ros"]),
        help="The cameras' axes: z forward and y down, z backward and y up, or x forward and z up.",
    ),
    click.option(
        "--pose-direction", type=click.Choice(["world_from_camera", "camera_from_world"]),
        help="The direction of the poses.",
    ),
    click.option(
        "--time-offset", type=float, metavar="SECONDS", help="Added to the times of the poses."
    ),
    click.option(
        "--topics", metavar="KIND=TOPIC,...",
        help="Topics of a bag, or columns of a LeRobot dataset: rgb, depth, info (CameraInfo, "
        "intrinsics), pose (/tf, odometry).",
    ),
)  # fmt: skip
"""The options in order. A command receives them as `NAMES`."""

NAMES = (
    *("cameras_file", "intrinsics", "depth_unit", "depth_scale", "pose_axes"),
    *("pose_direction", "time_offset", "topics"),
)


def take_cameras(options: dict[str, Any]) -> tuple[CameraMapping, ...]:
    """The mapping of each camera from the options of `MAPPING`, empty if there are none.

    Options override a file, for all of its cameras. They are removed from `options`. Raises
    UsageError if one is invalid.
    """
    from occgen_hub.camera_mapping import UNITS, camera_mapping, metres_in_unit, read_cameras

    given = {name: options.pop(name) for name in NAMES}
    keys, file = options.pop("camera_keys", ()), given.pop("cameras_file")
    unit, scale = given.pop("depth_unit"), given.pop("depth_scale")
    if unit is not None and scale is not None:
        raise UsageError("--depth-scale: means the same as --depth-unit; leave one of them out.")
    metres = UNITS[unit] if unit is not None else None if scale is None else metres_in_unit(scale)
    topics, intrinsics = given.pop("topics"), given.pop("intrinsics")
    values = {
        **given,
        "depth_unit": metres,
        "intrinsics": None if intrinsics is None else _numbers(intrinsics),
        **({} if topics is None else _topics(topics)),
    }
    given = {name: value for name, value in values.items() if value is not None}
    if file is not None:
        listed = {camera.rgb: camera.as_json() for camera in read_cameras(file)}
        if unknown := [key for key in keys if key not in listed]:
            raise UsageError(f"--camera {unknown[0]}: is not in {file}; add it, or leave it out.")
        return tuple(camera_mapping("--", listed[key] | given) for key in keys or listed)
    if keys and "rgb" in given:
        raise UsageError("--topics: --camera names the colour images already; leave out rgb.")
    if keys:
        return tuple(camera_mapping("--", {"rgb": key, **given}) for key in dict.fromkeys(keys))
    return (camera_mapping("--", given),) if given else ()


@click.command(cls=Examples, example="occgen-hub cameras my_robot --output cameras.yaml")
@click.argument("root", metavar="INPUT", type=SOURCE)
@click.option("--source", default="lerobot", show_default=True, help="The kind of source.")
@click.option(
    "--output", "out", type=FOLDER, default=Path("cameras.yaml"), show_default=True,
    help="The file of the mapping.",
)  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
def cameras(root: Path | str, source: str, out: Path, overwrite: bool) -> None:
    """List columns of a dataset that may belong to its cameras, and write a mapping to edit.

    INPUT is a folder, or ORG/NAME of a LeRobot dataset on the Hub. Use the mapping with build
    --cameras. It is guessed from names only: check it.
    """
    from occgen_hub.atomic import atomic_file
    from occgen_hub.job import open_source

    if out.exists() and not overwrite:
        raise UsageError(f"{out}: already exists; give another --output, or --overwrite.")
    builder, _ = open_source(source, root)
    survey = builder.survey_cameras()
    for line in survey.lines:
        say(line)
    with atomic_file(out) as partial:
        partial.write_text(survey.mapping, encoding="utf-8")
    place = shlex.quote(str(root))
    say(f"Mapping: {out}. Check it, and then: occgen-hub build --source {source} --input {place} "
        f"--cameras {shlex.quote(str(out))} --output out")  # fmt: skip


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"--intrinsics {text[:60]}: is not a list of numbers; give fx,fy,cx,cy in pixels."
        ) from None


def _topics(text: str) -> dict[str, str]:
    topics = {}
    for part in text.split(","):
        kind, equals, topic = part.partition("=")
        if not equals or kind.strip() not in TOPICS or not topic.strip():
            raise UsageError(
                f"--topics {text[:60]}: give for example rgb=/camera/color/image_raw,"
                f"depth=/camera/depth/image_raw,pose=/tf; the kinds are {', '.join(TOPICS)}."
            )
        topics[kind.strip()] = topic.strip()
    return topics
