"""A plain folder of colour images, depth images and a trajectory, as many recorders write it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from occgen_hub.camera_mapping import CameraMapping
from occgen_hub.episode import Note
from occgen_hub.errors import SourceError
from occgen_hub.media import image_size, read_rgb

from .recording import (
    LONGEST_GAP,
    Layout,
    Recording,
    depth_reader,
    file_among,
    files_among,
    folder_among,
    images_in,
    left_out_note,
    needed_lens,
    pair_up,
    valid_poses,
)
from .trajectories import FORMATS, Trajectory, matched_times, named_times, read_trajectory
from .tum import check_tracked

UNIT = 0.001
COLORS = ("color", "colour", "rgb", "images", "image")
DEPTHS = ("depth", "depths", "depth_images")
TRAJECTORIES = (
    *("trajectory.txt", "traj.txt", "groundtruth.txt", "poses.txt", "camera_poses.txt"),
    *("CameraTrajectory.txt", "KeyFrameTrajectory.txt", "odometry.txt", "trajectory.log"),
)


class PlainFolder(Layout):
    """`color/`, `depth/` and a trajectory; depth in millimetres by default."""

    what = "a folder of colour and depth images"

    def recognise(self, place: Path) -> bool:
        """By a folder of colour with a folder of depth or a trajectory beside it."""
        return folder_among(place, COLORS) is not None and (
            folder_among(place, DEPTHS) is not None or file_among(place, TRAJECTORIES) is not None
        )

    def has_depth(self, place: Path, mapping: CameraMapping) -> bool:
        """By the folder of depth."""
        return folder_among(place, DEPTHS) is not None

    def read(self, place: Path, mapping: CameraMapping) -> Recording:
        """The frames with colour, depth if there is any, and a pose.

        Images named by times are matched by time, others by order.
        """
        folder, depth_folder = folder_among(place, COLORS), folder_among(place, DEPTHS)
        assert folder is not None
        candidates = files_among(place, TRAJECTORIES)
        if not candidates:
            problem = f"has no trajectory ({', '.join(TRAJECTORIES)})"
            raise SourceError(place, problem, f"give yours one of these names, with {FORMATS}")
        path, *others = candidates
        trajectory = read_trajectory(path, mapping)
        colors = images_in(folder)
        depths = images_in(depth_folder, (".png", ".npy")) if depth_folder else None
        for found, where in ((colors, folder), (depths, depth_folder)):
            if found is not None and not found:
                raise SourceError(where or place, "has no images", "restore them")
        total = len(colors)
        times = None
        if trajectory.times is not None:
            times = matched_times([image.stem for image in colors], trajectory, path)
        if times is not None:
            chosen, when, poses, paired = _by_time(path, trajectory, times, colors, depths)
        else:
            chosen, poses = _by_order(path, trajectory, colors, depths)
            when, paired = _own_times(trajectory, chosen[:, 0], colors), total
        colors = [colors[n] for n in chosen[:, 0]]
        gap = f"without a pose at their time (gaps over {LONGEST_GAP} s are not interpolated)"
        reasons = {"without depth": total - paired, gap: paired - len(colors)}
        chosen_depths = [] if depths is None else [depths[n] for n in chosen[:, 1]]
        size = image_size(colors[0])
        lens, files = needed_lens(place, size, mapping)
        reader = own_size = None
        if chosen_depths:
            reader, own_size = depth_reader(chosen_depths, mapping, UNIT)
        return Recording(
            read_color=lambda frame: read_rgb(colors[frame], size),
            color_lens=[lens] * len(colors),
            poses=poses,
            sources=[path, *files, *colors, *chosen_depths],
            colors=colors,
            read_depth=reader,
            depth_size=own_size,
            times=when,
            notes=(*_notes(path, others), *left_out_note(total, **reasons)),
        )


def _by_time(
    path: Path,
    trajectory: Trajectory,
    times: tuple[NDArray[np.float64], float],
    colors: list[Path],
    depths: list[Path] | None,
) -> tuple[NDArray[np.int64], NDArray[np.float64] | None, NDArray[np.float64], int]:
    """(n, 2) numbers of colour and depth images, their (n,) times, and (n, 4, 4) poses.

    The times are None if they are frame numbers instead of seconds. The last value is the number of
    colour images with depth, with or without a pose.
    """
    moments, unit = times
    order = np.argsort(moments, kind="stable")
    pairs = np.stack([order, np.zeros_like(order)], axis=1)
    when = moments[order]
    if depths is not None:
        try:
            depth_moments = np.array([float(image.stem) for image in depths]) * unit
        except ValueError:
            problem = "has depth images that are not named by times, unlike the colour images"
            raise SourceError(depths[0].parent, problem, "name both by times or numbers") from None
        by_time = np.argsort(depth_moments, kind="stable")
        matched = pair_up(when, depth_moments[by_time])
        pairs = np.stack([order[matched[:, 0]], by_time[matched[:, 1]]], axis=1)
        when = depth_moments[pairs[:, 1]]
        if not len(pairs):
            problem = "has no depth image within 0.02 s of a colour image"
            raise SourceError(depths[0].parent, problem, "check the clocks of both")
    poses, tracked = trajectory.at(when)
    assert trajectory.times is not None
    check_tracked(path, tracked, when, trajectory.times)
    counted = all(image.stem.isdecimal() for image in colors) and unit == 1.0
    return pairs[tracked], None if counted else when[tracked], poses[tracked], len(pairs)


def _notes(path: Path, others: list[Path]) -> list[Note]:
    """A note that other trajectories are not used."""
    if not others:
        return []
    names = " and ".join(other.name for other in others)
    return [Note("trajectory", f"the poses are those of {path.name}; {names} is not used")]


def _own_times(
    trajectory: Trajectory, chosen: NDArray[np.int64], colors: list[Path]
) -> NDArray[np.float64] | None:
    """(n,) seconds of the poses, or of the images' names if poses have none.

    None if there are none, or if they are frame numbers.
    """
    times = trajectory.times
    if times is None:
        times = named_times([image.stem for image in colors])
    if times is None or len(times) < 2 or np.median(np.diff(times)) == 1:
        return None
    return times[chosen]


def _by_order(
    path: Path, trajectory: Trajectory, colors: list[Path], depths: list[Path] | None
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Like `_by_time`, for one pose per image, in the same order."""
    counts = {len(colors), len(trajectory.poses), len(colors if depths is None else depths)}
    if len(counts) > 1:
        problem = (
            f"has {len(trajectory.poses)} poses for {len(colors)} colour images and "
            f"{'no' if depths is None else len(depths)} depth images"
        )
        raise SourceError(path, problem, "name the images by times, or give equal numbers")
    tracked = np.flatnonzero(valid_poses(trajectory.poses))
    if not len(tracked):
        problem = "has no usable pose: none is rigid with 0 0 0 1 as its last row"
        raise SourceError(path, problem, "write matrices row by row, or leave this recording out")
    return np.stack([tracked, tracked], axis=1), trajectory.poses[tracked]
