"""Detect wrong units, axes, directions or times of poses, and swapped focal lengths.

They are detected by comparing frames with one another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from occgen_hub.camera_mapping import UNITS
from occgen_hub.config import Config
from occgen_hub.episode import Note
from occgen_hub.errors import OccGenError
from occgen_hub.fusion.depth_map import DepthMap, DepthMaps
from occgen_hub.fusion.noise import compare
from occgen_hub.geometry.cloud import Cloud
from occgen_hub.geometry.poses import OPENGL_FROM_OPENCV, ROS_FROM_OPENCV
from occgen_hub.geometry.sim3 import rotation_angle
from occgen_hub.geometry.trajectory import poses_at
from occgen_hub.views import Views

PAIRS = 12
"""Number of pairs of frames to compare."""

MIN_BASELINE = (0.04, np.radians(4.0))
"""Minimum distance between the two cameras of a pair: a share of the median depth, or an angle.
Frames of a camera that stands still agree under any convention."""

STILL = (0.01, np.radians(0.5))
"""A camera stands still if it moves by less than this share of the median distance of the points
that it sees, and turns by less than this angle."""

STATIC = Note(
    "static camera",
    "the camera stands still: only surfaces that face it are seen, and no other view can confirm "
    "its depth, intrinsics and static surfaces",
)

DEPTH_TOLERANCE = (0.03, 0.01)
"""Share of the depth, and metres: two depths agree if they differ by at most the sum of both. If
another unit of depth is tried, the metres are scaled too; otherwise all near depth would agree."""

MIN_POINTS = 200
"""Minimum number of compared points for a meaningful share."""

MIN_AGREEMENT, POOR_AGREEMENT, MIN_GAIN = 0.6, 0.85, 0.25
"""Shares of depth that agree: the minimum for another convention to be named; the share below which
other times are tried; the minimum advantage of another convention."""

FULL_AGREEMENT = 0.95
"""If this share agrees, nothing else is tried. With swapped focal lengths that differ by a seventh,
nearly nine tenths still agree."""

HIGH_AGREEMENT, MAX_REMAINING = 0.9, 1 / 3
"""A convention is also better if the first share agrees with it, and its disagreeing share is at
most the second value times the disagreeing share without it. If a camera mostly turns, its frames
largely agree in any unit of depth."""

LOW_AGREEMENT = 0.25
"""If less agrees and no other convention is better, a note says so."""


MAX_SHIFT_SECONDS = 1.0
"""Largest time offset of the poses that is tried, seconds; at most `MAX_SHIFT_FRAMES` frames."""

MAX_SHIFT_FRAMES = 30

MIN_FOCAL_DIFFERENCE = 0.02
"""Smallest relative difference of focal lengths for which swapping them is tried."""


@dataclass(frozen=True)
class Convention:
    """Another possible convention of a recording.

    meaning: continues "as if"; remedy: what to do; poses: converts (T, 4, 4) poses from this
    convention, NaN for frames without a pose; factor: for depth; swapped: whether the focal lengths
    are swapped; hfov: horizontal field of view, degrees, None as given.
    """

    meaning: str
    remedy: str
    poses: Callable[[NDArray[np.float64]], NDArray[np.float64]] = lambda poses: poses
    factor: float = 1.0
    swapped: bool = False
    hfov: float | None = None


Poses = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def _with_axes(axes_from_opencv: NDArray[np.float64]) -> Poses:
    """A function that converts poses of cameras with other axes to OpenCV's axes."""

    def turn(poses: NDArray[np.float64]) -> NDArray[np.float64]:
        turned: NDArray[np.float64] = poses @ axes_from_opencv
        return turned

    return turn


_opengl = _with_axes(OPENGL_FROM_OPENCV)


def _inverse(poses: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.linalg.inv(poses), np.float64)


def _with_quaternions(order: list[int]) -> Poses:
    """A function that reads quaternions again. order: of the numbers read as x, y, z, w."""

    def reorder(poses: NDArray[np.float64]) -> NDArray[np.float64]:
        read = Rotation.from_matrix(poses[:, :3, :3]).as_quat()
        meant = poses.copy()
        meant[:, :3, :3] = Rotation.from_quat(read[:, order]).as_matrix()
        return meant

    return reorder


USUAL = {"metres": 1.0, "centimetres": 0.01, "millimetres": 0.001, "1/5000 m": 0.0002}
"""Units of depth that sources assume, and their lengths in metres."""


def _scaled(factor: float) -> Convention:
    return Convention(
        f"depth were {factor:g} times as large",
        f"check the unit of depth: {_unit_options(factor)}",
        factor=factor,
    )


def _unit_options(factor: float) -> str:
    """The options for another unit of depth, by the assumed unit."""
    found = []
    for taken, metres in USUAL.items():
        unit = metres * factor
        name = next((name for name, other in UNITS.items() if np.isclose(unit, other)), None)
        if name is not None:
            found.append(f"--depth-unit {name} if it was read as {taken}")
        elif taken == "millimetres" and 1e-5 < unit < UNITS["mm"]:
            found.append(f"--depth-scale {1 / unit:g} if it was read as {taken}")
    if not found:
        found.append(f"--depth-scale {1000 / factor:g} if it was read as millimetres")
    if factor == 1000:
        found.append("metres for the positions of the poses if they are in millimetres")
    return "give " + ", or ".join(found)


CONVENTIONS = (
    Convention(
        "the cameras' y and z axes had the opposite directions",
        "change --pose-axes (opencv: y down, z forward; opengl: y up, z backward), or convert the "
        "poses with occgen_hub.geometry.poses.from_opengl",
        _opengl,
    ),
    Convention(
        "the poses were inverted",
        "change --pose-direction (world_from_camera, the default, or camera_from_world), or invert "
        "them",
        _inverse,
    ),
    Convention(
        "the poses were inverted and had OpenGL's axes",
        "invert them and convert them with occgen_hub.geometry.poses.from_opengl",
        lambda poses: _opengl(_inverse(poses)),
    ),
    Convention(
        "the cameras' axes were those of a body in ROS (x forward, z up)",
        "give --pose-axes ros, or multiply the poses by the camera's mount",
        _with_axes(ROS_FROM_OPENCV),
    ),
    Convention(
        "the cameras' axes were OpenCV's (z forward, y down) and were taken for a body's",
        "leave --pose-axes ros out",
        _with_axes(ROS_FROM_OPENCV.T),
    ),
    Convention(
        "the quaternions were w, x, y, z",
        "write them as x, y, z, w, or give pose_layout: xyz_quaternion_wxyz in a mapping",
        _with_quaternions([1, 2, 3, 0]),
    ),
    Convention(
        "the quaternions were x, y, z, w and were read as w, x, y, z",
        "give pose_layout: xyz_quaternion_xyzw in the mapping",
        _with_quaternions([3, 0, 1, 2]),
    ),
    Convention(
        "the focal lengths were swapped",
        "give the horizontal one first: --intrinsics fx,fy,cx,cy",
        swapped=True,
    ),
    *(_scaled(factor) for factor in (0.001, 0.1, 0.2, 0.5, 2.0, 5.0, 10.0, 1000.0)),
)


def _shifted(frames: float, fps: float) -> Convention:
    """The convention in which each image has the pose of `frames` frames later."""

    def shift(poses: NDArray[np.float64]) -> NDArray[np.float64]:
        numbers = np.arange(len(poses), dtype=np.float64)
        later, there = poses_at(numbers + frames, numbers, poses, longest_gap=1.0, tolerance=0.0)
        return np.where(there[:, None, None], later, np.nan)

    seconds = frames / fps
    count = f"{abs(frames):g} frame{'s' if abs(frames) > 1 else ''}"
    return Convention(
        f"the poses were {count} ({abs(seconds):.3g} s) too {'late' if frames > 0 else 'early'}",
        f"shift their times, for example with --time-offset {-seconds:.3g}",
        shift,
    )


HFOVS = (42, 50, 55, 60, 65, 70, 75, 79, 84, 90, 95, 100, 110, 120)
"""Fields of view in degrees that are tried if the camera's is unknown."""

VIEW_MARGIN = 2 / 3
"""A note names another field of view if the share that disagrees is at most this share of that with
the assumed field of view."""


def stands_still(poses: NDArray[np.float64], cloud: Cloud) -> bool:
    """Whether a camera stands still. poses: (T, 4, 4) world_from_camera; cloud: its scene."""
    if len(poses) < 2 or not len(cloud):
        return False
    centres = poses[:, :3, 3]
    away = float(np.median(np.linalg.norm(cloud.points - centres[0], axis=1)))
    moved = float(np.linalg.norm(centres - centres[0], axis=1).max())
    turned = float(rotation_angle(poses[0, :3, :3], poses[:, :3, :3]).max())
    return moved <= STILL[0] * away and turned <= STILL[1]


def check_conventions(
    views: Views,
    episode: str,
    config: Config,
    *,
    fps: float = 30.0,
    assumed_view: bool = False,
    shifts: bool = True,
) -> list[Note]:
    """Compare frames that see the same places from different sides.

    fps: frames per second; assumed_view: whether the field of view is only assumed, so that others
    are tried as well; shifts: whether to try other times of the poses.

    Raises OccGenError if frames contradict one another, but agree with other poses, times,
    intrinsics or another unit of depth, which the error names. Returns a note if they contradict
    one another for another reason. If an engine other than rgbd made the depth, both name that
    engine, because options of the source would not help. Views of a network have no conventions and
    are not checked.
    """
    if not views.in_source_world or len(views.frames) < 2:
        return []
    pairs, poses = _pairs(views, config), views.world_from_camera
    given = _agreement(pairs, Convention("", ""), poses)
    if not pairs:
        return []
    if given is not None and given >= (POOR_AGREEMENT if assumed_view else FULL_AGREEMENT):
        return _view_note(pairs, given, poses) if assumed_view else []
    longest = min(MAX_SHIFT_FRAMES, int(MAX_SHIFT_SECONDS * fps), len(poses) - 2) if shifts else 0
    if given is not None and given >= POOR_AGREEMENT:
        longest = 0  # An offset of a frame is not an error.
    recorded = views.engine == "rgbd"
    others = (*CONVENTIONS, *(_VIEWS if assumed_view else ()))
    tried = [(_agreement(pairs, other, poses), other) for other in others]
    tried += _times(pairs, poses, longest, fps)
    found = [(share, other) for share, other in tried if share is not None]
    if found:
        share, other = max(found, key=lambda row: row[0])
        clear = share >= HIGH_AGREEMENT and 1 - share <= MAX_REMAINING * (1 - (given or 0.0))
        if clear or (given is not None and share >= max(MIN_AGREEMENT, given + MIN_GAIN)):
            seen = "nothing" if given is None else f"only {given:.0%}"
            if not recorded:
                raise OccGenError(f"{episode}: {_engine_disagrees(views.engine, seen)}.")
            raise OccGenError(
                f"{episode}: frames contradict one another ({seen} of the depth agrees from one "
                f"to another), but would agree ({share:.0%}) as if {other.meaning}; "
                f"{other.remedy}."
            )
    if (
        assumed_view and recorded and given is not None
        and (notes := _view_note(pairs, given, poses))
    ):  # fmt: skip
        return notes
    if given is None or given >= LOW_AGREEMENT:
        return []
    if not recorded:
        return [Note("frames disagree", _engine_disagrees(views.engine, f"only {given:.0%}"))]
    text = (
        f"only {given:.0%} of the depth agrees from one frame to another: check that poses, depth "
        "and intrinsics belong together (--intrinsics fx,fy,cx,cy for the size of the colour "
        "images, --depth-unit, --pose-axes, --pose-direction); do not use this unless nearly "
        "everything moved"
    )
    return [Note("frames disagree", text)]


def _engine_disagrees(engine: str, seen: str) -> str:
    """What is wrong with the depth of an engine, of which `seen` agrees between frames."""
    return (
        f"depth of the engine {engine} does not agree with the poses ({seen} of it agrees from one "
        "frame to another); check that the engine returns depth along the optical axis in the unit "
        "of the poses, or choose another one with --engine"
    )


def _with_view(hfov: float) -> Convention:
    return Convention(
        f"cameras saw about {hfov:g} degrees from side to side",
        f"give their field of view, perhaps --hfov {hfov:g}",
        hfov=hfov,
    )


_VIEWS = tuple(_with_view(hfov) for hfov in HFOVS)


def _view_note(pairs: list[Pair], given: float, poses: NDArray[np.float64]) -> list[Note]:
    """A note if frames agree clearly better with another field of view than the assumed one."""
    shares = [(_agreement(pairs, view, poses), view) for view in _VIEWS]
    tried = [(share, view) for share, view in shares if share is not None]
    share, best = max(tried, key=lambda row: row[0], default=(0.0, None))
    if best is None or best.hfov is None or 1 - share > VIEW_MARGIN * (1 - given):
        return []
    first = pairs[0][0][1]
    K, width = first.K, first.depth.shape[1]
    assumed = 2 * np.degrees(np.arctan(width / 2 / K[0, 0]))
    text = (
        f"frames agree better ({share:.0%} of the depth) as if cameras saw about {best.hfov:g} "
        f"degrees from side to side than with {assumed:.3g} ({given:.0%}): check --hfov"
    )
    return [Note("field of view", text)]


def _times(
    pairs: list[Pair], poses: NDArray[np.float64], longest: int, fps: float
) -> list[tuple[float | None, Convention]]:
    """The agreement for offsets of the poses of up to `longest` frames, to half a frame."""
    steps = [float(n) for n in range(-longest, longest + 1) if n]
    tried = [(_agreement(pairs, _shifted(step, fps), poses), step) for step in steps]
    if found := [(share, step) for share, step in tried if share is not None]:
        _, best = max(found)
        beside = [step for step in (best - 0.5, best + 0.5) if step]
        tried += [(_agreement(pairs, _shifted(step, fps), poses), step) for step in beside]
    return [(share, _shifted(step, fps)) for share, step in tried]


Pair = tuple[tuple[int, DepthMap], tuple[int, DepthMap]]
"""Two frames, each with its number."""


def _pairs(views: Views, config: Config) -> list[Pair]:
    """Pairs of frames with cameras far enough apart: two pairs for each of a few frames."""
    read = cache(DepthMaps(views, config.confidence, config.depth_edge))
    frames, pairs = views.frames.tolist(), []
    starts = np.unique(np.linspace(0, len(frames) - 2, PAIRS // 2).astype(int))
    for start in starts.tolist():
        here = read(frames[start])
        measured = here.depth[here.depth > 0]
        if not len(measured):
            continue
        change = np.linalg.inv(here.world_from_camera) @ views.world_from_camera[views.frames]
        apart = np.maximum(
            np.linalg.norm(change[:, :3, 3], axis=1)
            / (MIN_BASELINE[0] * float(np.median(measured))),
            rotation_angle(np.eye(3), change[:, :3, :3]) / MIN_BASELINE[1],
        )
        for steps in (1, 3):
            later = np.flatnonzero(apart[start:] >= steps)
            if len(later):
                other = frames[start + int(later[0])]
                pairs.append(((frames[start], here), (other, read(other))))
    return pairs


def _agreement(
    pairs: list[Pair], convention: Convention, poses: NDArray[np.float64]
) -> float | None:
    """The share of the compared points that agree. None if too few can be compared."""
    count = agreeing = 0
    metres = DEPTH_TOLERANCE[1] * convention.factor
    meant = convention.poses(poses)
    for pair in pairs:
        if not all(np.isfinite(meant[frame]).all() for frame, _ in pair):
            continue
        here, there = (_converted(view, convention, meant[frame]) for frame, view in pair)
        z, behind = compare(here, there, farthest=np.inf)
        count += len(z)
        agreeing += int((np.abs(behind) <= DEPTH_TOLERANCE[0] * z + metres).sum())
    return agreeing / count if count >= MIN_POINTS else None


def _converted(view: DepthMap, convention: Convention, pose: NDArray[np.float64]) -> DepthMap:
    """A depth map converted from a convention, with the given pose."""
    factor = np.float32(convention.factor)
    pixels = view.pixels * np.array([factor, 1 / factor, 1 / factor, factor], np.float32)
    K = view.K
    if convention.swapped and abs(K[0, 0] / K[1, 1] - 1) > MIN_FOCAL_DIFFERENCE:
        K = K.copy()
        K[0, 0], K[1, 1] = view.K[1, 1], view.K[0, 0]
    if convention.hfov is not None:
        K = K.copy()
        wanted = view.depth.shape[1] / 2 / np.tan(np.radians(convention.hfov) / 2)
        K[[0, 1], [0, 1]] *= wanted / K[0, 0]
    pose = np.ascontiguousarray(pose)
    return replace(view, depth=view.depth * factor, pixels=pixels, K=K, world_from_camera=pose)
