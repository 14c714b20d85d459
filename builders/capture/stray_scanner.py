"""Recordings of the app Stray Scanner, with the LiDAR of an iPhone or iPad."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from occgen_hub.camera_mapping import CameraMapping
from occgen_hub.episode import Note
from occgen_hub.errors import SourceError
from occgen_hub.files import MAX_TABLE_ROWS, is_file
from occgen_hub.geometry.lens import Lens
from occgen_hub.media import VideoReader, read_labels, video_facts

from .recording import (
    GIVE,
    Layout,
    Recording,
    depth_reader,
    left_out_note,
    lens_in,
    numbers_in,
    valid_poses,
)
from .trajectories import MAX_BYTES, poses_of

UNIT = 0.001
VIDEO, ODOMETRY, MATRIX = "rgb.mp4", "odometry.csv", "camera_matrix.csv"
COLUMNS = ("timestamp", "frame", "x", "y", "z", "qx", "qy", "qz", "qw")
RESTORE = "export the recording from the app again, or leave it out"

LOW = 1
"""Depth of a lower confidence is left out, as in the app's own viewer. ARKit's are 0, 1 and 2."""


@dataclass(frozen=True)
class _Frame:
    """A row of odometry.csv. n: its number in the video; confidence: None without that file."""

    n: int
    depth: Path | None
    confidence: Path | None


class StrayScanner(Layout):
    """`rgb.mp4`, `odometry.csv`, `camera_matrix.csv`, and `depth/` and `confidence/` by frame.

    Depth is in millimetres. Poses have OpenCV axes, and the y axis of their world points up. The
    format is described in docs/format.md of the app's repository, strayrobots/scanner.
    """

    what = "a recording of Stray Scanner"

    def recognise(self, place: Path) -> bool:
        """By the video and odometry.csv."""
        return is_file(place / VIDEO) and is_file(place / ODOMETRY)

    def has_depth(self, place: Path, mapping: CameraMapping) -> bool:
        """By the folder depth, which devices without LiDAR do not write."""
        return (place / "depth").is_dir()

    def read(self, place: Path, mapping: CameraMapping) -> Recording:
        """The frames with colour, depth if there is any, and a pose.

        Frames of the video and rows of odometry.csv belong together in their order.
        """
        times, poses, frames = _rows(place)
        facts = video_facts(place / VIDEO)
        with_depth = self.has_depth(place, mapping)
        shown = [frame for frame in frames if frame.n < facts.frames]
        whole = [frame for frame in shown if frame.depth is not None or not with_depth]
        tracked = valid_poses(poses)
        kept = [frame for frame in whole if tracked[frame.n]]
        if not kept:
            problem = "has no frame with colour, a pose and (if there is a folder depth) depth"
            raise SourceError(place, problem, RESTORE)
        rows = [frame.n for frame in kept]
        lens, matrix = _lens(place, facts.size, mapping)
        read_color, read_depth, depth_size = VideoReader(place / VIDEO, facts.size), None, None
        if with_depth:
            read_depth, depth_size = _depth_reader(kept, mapping)
        known = np.isfinite(times).all() and (np.diff(times) > 0).all()
        return Recording(
            read_color=lambda frame: read_color(rows[frame]),
            color_lens=[lens] * len(kept),
            poses=mapping.world_from_camera(poses[rows]),
            sources=[*_files(place, kept), *matrix],
            read_depth=read_depth,
            depth_size=depth_size,
            times=times[rows] if known else None,
            notes=(
                *_count_note(len(frames), facts.frames),
                *left_out_note(
                    len(frames),
                    after_the_end_of_the_video=len(frames) - len(shown),
                    without_depth=len(shown) - len(whole),
                    where_tracking_was_lost=len(whole) - len(kept),
                ),
            ),
        )

    def sources(self, place: Path, mapping: CameraMapping) -> list[Path]:
        """All files, also those of frames that are left out, so that the video is not read."""
        _, _, frames = _rows(place)
        matrix = [place / MATRIX] if mapping.intrinsics is None else []
        return [*_files(place, frames), *matrix]


def _rows(place: Path) -> tuple[NDArray[np.float64], NDArray[np.float64], list[_Frame]]:
    """(n,) times, (n, 4, 4) poses, with NaN for invalid ones, and the n frames."""
    path = place / ODOMETRY
    rows = numbers_in(path, MAX_BYTES, RESTORE, header=COLUMNS)
    widths = {len(row) for row in rows}
    if len(widths) != 1 or min(widths) < len(COLUMNS) or len(rows) > MAX_TABLE_ROWS:
        problem = f"has no table with the columns {', '.join(COLUMNS)}"
        raise SourceError(path, problem, RESTORE)
    table = np.array(rows, np.float64)
    numbers = table[:, 1]
    if not ((numbers >= 0) & (numbers < 1e9) & (numbers % 1 == 0)).all():
        raise SourceError(path, "has a frame number that is not a whole number", RESTORE)
    frames = [
        _Frame(n, *(_file(place / kind, int(number)) for kind in ("depth", "confidence")))
        for n, number in enumerate(numbers)
    ]
    return table[:, 0], poses_of(table[:, 2:5], table[:, 5:9]), frames


def _file(folder: Path, number: int) -> Path | None:
    """The image of a frame. Old versions of the app wrote depth as .npy."""
    stem = folder / f"{number:06d}"
    return next((path for s in (".png", ".npy") if is_file(path := stem.with_suffix(s))), None)


def _files(place: Path, frames: list[_Frame]) -> list[Path]:
    images = [path for frame in frames for path in (frame.depth, frame.confidence)]
    return [place / VIDEO, place / ODOMETRY, *(path for path in images if path is not None)]


def _lens(place: Path, size: tuple[int, int], mapping: CameraMapping) -> tuple[Lens, list[Path]]:
    """The lens of the video, and the file that states it."""
    if (given := mapping.lens(size)) is not None:
        return given, []
    path = place / MATRIX
    if not is_file(path):
        raise SourceError(path, "is missing", f"restore it, or {GIVE}")
    return lens_in(path, size), [path]


def _depth_reader(
    frames: list[_Frame], mapping: CameraMapping
) -> tuple[Callable[[int], NDArray[np.float64]], tuple[int, int]]:
    """Like `depth_reader`, without depth of low confidence."""
    depths = [frame.depth for frame in frames if frame.depth is not None]
    read, size = depth_reader(depths, mapping, UNIT)

    def confident(frame: int) -> NDArray[np.float64]:
        depth, path = read(frame), frames[frame].confidence
        return depth if path is None else np.where(read_labels(path, size) >= LOW, depth, 0.0)

    return confident, size


def _count_note(rows: int, frames: int) -> list[Note]:
    """A note if the video has more frames than odometry.csv."""
    if frames <= rows:
        return []
    text = f"{VIDEO} has {frames} frames and {ODOMETRY} {rows}: the last ones are not used"
    return [Note("video frames", text)]
