"""The options that say what the files of a recording do not: where parts are, units and axes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from occgen_hub.errors import UsageError

if TYPE_CHECKING:
    from occgen_hub.camera_mapping import CameraMapping

TOPICS = ("rgb", "depth", "pose", "info")

MAPPING = (
    click.option(
        "--intrinsics", metavar="FX,FY,CX,CY",
        help="The camera's, pixels of the colour images, as OpenCV, ROS and RealSense give them; "
        "distortion may follow: K1,K2,P1,P2[,K3].",
    ),
    click.option("--depth-unit", type=click.Choice(["m", "cm", "mm"]), help="The unit of depth."),
    click.option(
        "--depth-scale", type=click.FloatRange(0, min_open=True), metavar="NUMBER",
        help="Units of depth in a metre, as 5000, or metres in a unit, as 0.0002.",
    ),
    click.option(
        "--pose-axes", type=click.Choice(["opencv", "opengl"]),
        help="The cameras' axes: y down and z forward, or y up and z backward.",
    ),
    click.option(
        "--pose-direction", type=click.Choice(["world_from_camera", "camera_from_world"]),
        help="What the poses are.",
    ),
    click.option(
        "--time-offset", type=float, metavar="SECONDS", help="To add to the times of the poses."
    ),
    click.option(
        "--topics", metavar="KIND=TOPIC,...",
        help="Topics of a bag: rgb, depth, info (CameraInfo), pose (/tf or odometry).",
    ),
)  # fmt: skip
"""Options, in their order; a command takes them as `NAMES`."""

NAMES = (
    *("intrinsics", "depth_unit", "depth_scale", "pose_axes", "pose_direction", "time_offset"),
    "topics",
)


def take_cameras(options: dict[str, Any]) -> tuple[CameraMapping, ...]:
    """The mapping that the options of `MAPPING` make, empty where none was given.

    They are removed from `options`. Raises UsageError where one is wrong.
    """
    from occgen_hub.camera_mapping import UNITS, camera_mapping, metres_in_unit

    given = {name: options.pop(name) for name in NAMES}
    unit, scale = given.pop("depth_unit"), given.pop("depth_scale")
    if unit is not None and scale is not None:
        raise UsageError("--depth-scale: --depth-unit says the same; leave one of them out.")
    metres = UNITS[unit] if unit is not None else None if scale is None else metres_in_unit(scale)
    topics, intrinsics = given.pop("topics"), given.pop("intrinsics")
    values = {
        **given,
        "depth_unit": metres,
        "intrinsics": None if intrinsics is None else _numbers(intrinsics),
        **({} if topics is None else _topics(topics)),
    }
    if all(value is None for value in values.values()):
        return ()
    return (camera_mapping("--", values),)


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
