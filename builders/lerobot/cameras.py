"""Apply a camera mapping to a dataset's columns, and write a first mapping."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray

from occgen_hub.builder import CameraSurvey
from occgen_hub.camera_mapping import CameraMapping
from occgen_hub.episode import Column, Note
from occgen_hub.errors import SourceError, UsageError
from occgen_hub.geometry.lens import Lens, opencv_matrix
from occgen_hub.geometry.poses import RIGID, rigidity_error
from occgen_hub.geometry.trajectory import poses_at

from .dataset import Info, LeRobotFeature

MAPPED = "correct the mapping"
HALF_TURN = np.diag([-1.0, -1.0, 1.0, 1.0])
"""Rotation about the optical axis, for cameras with negative focal lengths."""

LONGEST_GAP = 0.25
"""Largest time between two poses to interpolate between them, seconds."""

PARTS = ("observation.images.", "observation.image.", "observation.depth.", "observation.")
"""Prefixes of feature names that are not part of the camera's name."""


def camera_name(key: str) -> str:
    """The name of a camera in ids of trajectories, from its feature."""
    short = next((key.removeprefix(part) for part in PARTS if key.startswith(part)), key)
    return re.sub(r"[^A-Za-z0-9_-]+", "_", short).strip("_-")[-80:] or "camera"


def is_color(key: str, feature: LeRobotFeature) -> bool:
    """Whether a feature may be colour images."""
    encoded = feature.dtype in ("video", "image")
    pixels = feature.visual and (encoded or (feature.dtype == "uint8" and 3 in feature.shape))
    return pixels and not feature.depth_map and "depth" not in key.lower()


def check_mapping(mapping: CameraMapping, info: Info) -> None:
    """Raise UsageError if a mapping names a feature that does not exist or is of another kind."""
    for attribute in ("rgb", "depth", "info", "pose"):
        key = getattr(mapping, attribute)
        if key is None:
            continue
        feature = info.features.get(key)
        option = {"info": "intrinsics"}.get(attribute, attribute)
        if feature is None:
            known = ", ".join(sorted(info.features))[:600]
            raise UsageError(f"{option} {key}: {info.path} has no such feature; it has {known}.")
        if feature.visual != (attribute in ("rgb", "depth")):
            kind = f"{feature.dtype} of shape {list(feature.shape)}"
            raise UsageError(f"{option} {key}: is {kind}, which cannot be {option}; {MAPPED}.")
    if mapping.info is not None and mapping.intrinsics is not None:
        raise UsageError(f"intrinsics: both numbers and {mapping.info} are given; {MAPPED}.")


# Poses


def poses_of(
    mapping: CameraMapping, columns: dict[str, Column], times: NDArray[np.float64], path: Path
) -> tuple[NDArray[np.float64] | None, NDArray[np.bool_]]:
    """(T, 4, 4) float64 world_from_camera, OpenCV axes, and (T,) bool: which are known.

    The poses are None if the mapping has none. times: (T,) seconds of the rows, ascending.
    """
    length = len(times)
    if mapping.pose is None:
        if mapping.body_from_camera is None:
            return None, np.ones(length, np.bool_)
        still = np.tile(np.eye(4), (length, 1, 1))
        return mapping.world_from_camera(still), np.ones(length, np.bool_)
    values = np.asarray(_numbers(mapping.pose, columns, path), np.float64)
    try:
        poses = mapping.poses(values)
    except ValueError as error:
        raise SourceError(path, f"column {mapping.pose} {error}", MAPPED) from None
    known = rigidity_error(poses) <= RIGID
    if not known.any():
        raise SourceError(path, f"column {mapping.pose} has no rigid transform", _remedy(poses))
    if mapping.time_offset:
        own = times[known] + mapping.time_offset
        poses, known = poses_at(times, own, poses[known], LONGEST_GAP, 1e-6)
        if not known.any():
            problem = f"has no pose in {mapping.pose} at the time of any frame"
            raise SourceError(path, problem, "check time_offset")
    standard = np.tile(np.eye(4), (length, 1, 1))
    standard[known] = mapping.world_from_camera(poses[known])
    return standard, known


def _remedy(poses: NDArray[np.float64]) -> str:
    if (rigidity_error(poses.transpose(0, 2, 1)) <= RIGID).any():
        return "its matrices are in column-major order; write them in row-major order"
    return f"{MAPPED}, or its pose_layout"


def _numbers(key: str, columns: dict[str, Column], path: Path) -> NDArray[np.float64]:
    column = columns.get(key)
    if column is None or column.feature.dtype in ("string", "bool"):
        raise SourceError(path, f"has no numbers in a column {key}", MAPPED)
    return np.asarray(column.values)


# Intrinsics


def lenses_of(
    mapping: CameraMapping, columns: dict[str, Column], size: tuple[int, int], path: Path
) -> tuple[list[Lens] | None, bool]:
    """The lens of each of T frames, and whether focal lengths are negative in the source.

    The lenses are None if the mapping has no intrinsics. size: (width, height) of the colour
    images.
    """
    if mapping.info is None:
        lens, length = mapping.lens(size), len(next(iter(columns.values())).values)
        return (None if lens is None else [lens] * length), False
    values = _numbers(mapping.info, columns, path).astype(np.float64)
    flat: NDArray[np.float64] = values.reshape(len(values), -1)
    if flat.shape[1] == 9:
        flat = flat[:, [0, 4, 2, 5]]
    elif flat.shape[1] != 4:
        problem = f"column {mapping.info} has {flat.shape[1]} numbers, not fx, fy, cx, cy or 3 x 3"
        raise SourceError(path, problem, MAPPED)
    turned = bool((flat[:, :2] < 0).all())
    if turned:
        flat = flat * [-1, -1, 1, 1]
    if not (np.isfinite(flat).all() and (flat[:, :2] > 0).all()):
        bad = flat[np.flatnonzero(~(np.isfinite(flat).all(axis=1) & (flat[:, :2] > 0).all(axis=1)))]
        problem = f"column {mapping.info} has focal lengths of {bad[0, 0]:g} by {bad[0, 1]:g}"
        raise SourceError(path, problem, MAPPED)
    known = {tuple(row): Lens.of(opencv_matrix(*row), size) for row in flat.tolist()}
    return [known[tuple(row)] for row in flat.tolist()], turned


def notes_of(mapping: CameraMapping, columns: dict[str, Column], *, turned: bool) -> list[Note]:
    """Notes on assumptions about a camera."""
    notes = []
    if turned:
        text = (
            f"the focal lengths in {mapping.info} are negative: the camera's x and y are assumed "
            "to point left and up, and its poses are rotated by 180 degrees about the optical axis"
        )
        notes.append(Note("negative focal length", text))
    if mapping.pose is not None and mapping.pose_layout is None:
        count = np.asarray(columns[mapping.pose].values)[0].size
        taken = {6: "x, y, z, roll, pitch, yaw", 7: "x, y, z and a quaternion x, y, z, w"}
        if count in taken:
            text = f"the {count} numbers of {mapping.pose} are read as {taken[count]}"
            notes.append(Note("pose layout", f"{text}; set pose_layout to change that"))
    return notes


# A first mapping


def survey(info: Info) -> CameraSurvey:
    """Describe the features of a dataset, and guess a mapping from their names."""
    features = info.features
    colors = [key for key, feature in features.items() if is_color(key, feature)]
    depths = [
        key
        for key, feature in features.items()
        if feature.visual and not is_color(key, feature)
        and (feature.depth_map or "depth" in key.lower())
    ]  # fmt: skip
    numbers = {key: f for key, f in features.items() if not f.visual}
    intrinsics = _named(numbers, r"intrinsic|camera_int|cam_k\b|camera_k\b", (4, 9))
    poses = _named(numbers, r"extrinsic|camera_ext|camera_pose|cam_pose|pose", (16, 12, 7, 6))
    kinds = {"colour": colors, "depth": depths, "intrinsics": intrinsics, "poses": poses}
    lines = [
        f"{what}: {', '.join(_shown(key, features[key]) for key in keys) or 'none found'}"
        for what, keys in kinds.items()
    ]
    text = ["# Which columns belong to which camera; docs/formats.md lists the possible keys.",
            "# The lines are guessed from names: check and correct them.",
            "cameras:"]  # fmt: skip
    for key in colors:
        text += _entry(key, depths, intrinsics, poses, features, alone=len(colors) == 1)
    if not colors:
        text += ["  []"]
    return CameraSurvey(tuple(lines), "\n".join(text) + "\n")


def _named(features: dict[str, LeRobotFeature], words: str, counts: Iterable[int]) -> list[str]:
    return [
        key
        for key, feature in features.items()
        if re.search(words, key.lower()) and int(np.prod(feature.shape)) in counts
    ]


def _shown(key: str, feature: LeRobotFeature) -> str:
    own = ", LeRobot's own depth" if feature.depth_map else ""
    return f"{key} ({feature.dtype} {'x'.join(map(str, feature.shape))}{own})"


def _entry(
    color: str,
    depths: list[str],
    intrinsics: list[str],
    poses: list[str],
    features: dict[str, LeRobotFeature],
    *,
    alone: bool,
) -> list[str]:
    """The lines of one camera. Uncertain guesses are comments."""
    lines = [f"  - rgb: {_quoted(color)}"]
    for name, keys in (("depth", depths), ("intrinsics", intrinsics), ("pose", poses)):
        own = keys if alone and len(keys) == 1 else _of_camera(color, keys)
        sure = len(own) == 1
        others = [_quoted(key) for key in (own or keys)]
        example = {"intrinsics": "[600, 600, 320, 240]   # fx, fy, cx, cy, pixels"}
        guess = others[0] if sure else " or ".join(others) or example.get(name, "none found")
        lines.append(f"    {'' if sure else '# '}{name}: {guess}")
        if sure and name == "depth" and not features[own[0]].depth_map:
            usual = "m" if features[own[0]].dtype.startswith("float") else "mm"
            lines.append(f"    depth_unit: {usual}   # m, cm, mm, or metres in one unit")
        if sure and name == "pose":
            count = int(np.prod(features[own[0]].shape))
            layouts = {6: "xyz_rpy", 7: "xyz_quaternion_xyzw   # or xyz_quaternion_wxyz"}
            lines.append(f"    pose_layout: {layouts.get(count, 'matrix')}")
            lines.append("    pose_direction: world_from_camera   # or camera_from_world")
            lines.append("    pose_axes: opencv   # or opengl: y up, z backward; ros: x forward")
    lines.append("    # body_from_camera: 16 numbers, if the poses are those of a moving body")
    return lines


def _of_camera(color: str, keys: list[str]) -> list[str]:
    """The features whose names have the words that distinguish a camera's name."""
    words = set(re.split(r"[^a-z0-9]+", camera_name(color).lower())) - {"rgb", "image", "color", ""}
    found = [key for key in keys if words <= set(re.split(r"[^a-z0-9]+", key.lower()))]
    return found if words else keys


def _quoted(key: str) -> str:
    return yaml.safe_dump(key, default_flow_style=True, width=1000).splitlines()[0]
