"""TUM RGB-D: lists of images with times, and a trajectory with other times."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from occgen_hub.camera_mapping import CameraMapping
from occgen_hub.errors import SourceError
from occgen_hub.files import MAX_TABLE_ROWS, is_file, read_bytes
from occgen_hub.media import image_size, read_rgb

from .recording import (
    TOLERANCE,
    Layout,
    Recording,
    depth_reader,
    file_among,
    left_out_note,
    needed_lens,
    pair_up,
)
from .trajectories import read_trajectory

UNIT = 1 / 5000
TRAJECTORIES = ("groundtruth.txt", "trajectory.txt", "CameraTrajectory.txt")


class TumRgbd(Layout):
    """`rgb.txt`, `depth.txt` and `groundtruth.txt`; depth with 5,000 units per metre."""

    what = "a TUM RGB-D recording"

    def recognise(self, place: Path) -> bool:
        """By rgb.txt and a trajectory."""
        return is_file(place / "rgb.txt") and file_among(place, TRAJECTORIES) is not None

    def has_depth(self, place: Path, mapping: CameraMapping) -> bool:
        """By depth.txt."""
        return is_file(place / "depth.txt")

    def read(self, place: Path, mapping: CameraMapping) -> Recording:
        """Colour and depth within 20 ms of each other, with the pose at the time of the depth."""
        trajectory_path = file_among(place, TRAJECTORIES)
        assert trajectory_path is not None
        lists, color_times, colors = [place / "rgb.txt"], *read_list(place / "rgb.txt")
        total, reader, size, times = len(colors), None, None, color_times
        depths: list[Path] = []
        if self.has_depth(place, mapping):
            lists.append(place / "depth.txt")
            depth_times, all_depths = read_list(place / "depth.txt")
            pairs = pair_up(color_times, depth_times)
            colors = [colors[n] for n in pairs[:, 0]]
            depths = [all_depths[n] for n in pairs[:, 1]]
            times = depth_times[pairs[:, 1]]
            if not len(pairs):
                problem = f"has no time within {TOLERANCE:g} s of one in depth.txt"
                raise SourceError(place / "rgb.txt", problem, "check the clocks of both")
        paired = len(colors)
        trajectory = read_trajectory(trajectory_path, mapping)
        if trajectory.times is None:
            problem = "has no times, which are needed to match frames"
            raise SourceError(trajectory_path, problem, "give 'time tx ty tz qx qy qz qw' lines")
        poses, tracked = trajectory.at(times)
        check_tracked(trajectory_path, tracked, times, trajectory.times)
        kept = np.flatnonzero(tracked)
        colors, times = [colors[n] for n in kept], times[kept]
        if depths:
            depths = [depths[n] for n in kept]
            reader, size = depth_reader(depths, mapping, UNIT)
        own_size = image_size(colors[0])
        lens, files = needed_lens(place, own_size, mapping)
        return Recording(
            read_color=lambda frame: read_rgb(colors[frame], own_size),
            color_lens=[lens] * len(colors),
            poses=poses[kept],
            sources=[*lists, trajectory_path, *files, *colors, *depths],
            colors=colors,
            read_depth=reader,
            depth_size=size,
            times=times,
            notes=(
                *left_out_note(
                    total, without_depth=total - paired, without_a_pose=paired - len(colors)
                ),
            ),
        )


def read_list(path: Path) -> tuple[NDArray[np.float64], list[Path]]:
    """The ascending times and the images of a list with 'time name' in each line."""
    rows = []
    for number, line in enumerate(read_bytes(path).decode("utf-8", "replace").splitlines(), 1):
        words = line.partition("#")[0].split(maxsplit=1)
        if not words:
            continue
        try:
            if "\0" in line:
                raise ValueError
            rows.append((float(words[0]), path.parent / words[1].strip()))
        except (ValueError, IndexError):
            problem = f"line {number}: is not 'time name'"
            raise SourceError(path, problem, "restore it from the source") from None
    if not rows or len(rows) > MAX_TABLE_ROWS:
        raise SourceError(path, f"lists {len(rows)} images", "restore it from the source")
    rows.sort(key=lambda row: row[0])
    return np.array([time for time, _ in rows]), [name for _, name in rows]


def check_tracked(
    path: Path,
    tracked: NDArray[np.bool_],
    times: NDArray[np.float64],
    known_times: NDArray[np.float64],
) -> None:
    """Raise SourceError if no frame has a pose. The message has the times of both."""
    if not tracked.any():
        problem = (
            f"has no pose at the time of any frame (it runs from {known_times[0]:.3f} to "
            f"{known_times[-1]:.3f} s, the frames from {times[0]:.3f} to {times[-1]:.3f} s)"
        )
        raise SourceError(path, problem, "check the clocks, or give --time-offset SECONDS")
