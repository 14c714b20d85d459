"""7-Scenes, and ScanNet as its own exporter writes it: frames by number, a pose file for each."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from occgen_hub.camera_mapping import CameraMapping
from occgen_hub.episode import Note
from occgen_hub.errors import SourceError
from occgen_hub.files import is_file
from occgen_hub.geometry.lens import Lens
from occgen_hub.media import image_size, read_rgb

from .recording import (
    CALIBRATIONS,
    GIVE,
    Layout,
    Recording,
    depth_reader,
    file_among,
    known,
    left_out,
    matrix_in,
)

UNIT = 0.001
KINECT = (585.0, 585.0, 320.0, 240.0)
"""fx, fy, cx, cy that 7-Scenes documents for its images of 640 x 480 pixels."""

FRAME = re.compile(r"(frame-[0-9]+)\.color\.(?:jpg|jpeg|png)")


class SevenScenes(Layout):
    """`frame-NNNNNN.{color,depth,pose}.*`; depth in millimetres."""

    what = "a 7-Scenes recording"

    def recognise(self, place: Path) -> bool:
        """By the first frame's name."""
        return place.is_dir() and next(place.glob("frame-*.pose.txt"), None) is not None

    def has_depth(self, place: Path, mapping: CameraMapping) -> bool:
        """By the depth images' names."""
        return next(place.glob("frame-*.depth.png"), None) is not None

    def read(self, place: Path, mapping: CameraMapping) -> Recording:
        """The frames that have all files and a pose."""
        names = {m[1]: path for path in place.iterdir() if (m := FRAME.fullmatch(path.name))}
        stems = sorted(names, key=lambda stem: int(stem.removeprefix("frame-")))
        with_depth = self.has_depth(place, mapping)
        endings = (".pose.txt", ".depth.png") if with_depth else (".pose.txt",)
        whole = [s for s in stems if all(is_file(place / f"{s}{end}") for end in endings)]
        if not whole:
            problem = "holds no frame with colour, a pose and, if any has it, depth"
            raise SourceError(place, problem, "restore the frames from the source")
        all_poses = np.stack([matrix_in(place / f"{stem}.pose.txt", 4) for stem in whole])
        tracked = known(all_poses)
        if not tracked.any():
            problem = "has no pose that is rigid and finite: tracking was lost in all frames"
            raise SourceError(place, problem, "leave this recording out")
        kept = [stem for stem, good in zip(whole, tracked, strict=True) if good]
        colors = [names[stem] for stem in kept]
        depths = [place / f"{stem}.depth.png" for stem in kept] if with_depth else []
        reader = size = None
        if with_depth:
            reader, size = depth_reader(depths, mapping, UNIT)
        own_size = image_size(colors[0])
        lens, files, notes = _lens(place, own_size, mapping)
        return Recording(
            read_color=lambda frame: read_rgb(colors[frame], own_size),
            color_lens=[lens] * len(kept),
            poses=mapping.world_from_camera(all_poses[tracked]),
            sources=[*files, *(place / f"{stem}.pose.txt" for stem in kept), *colors, *depths],
            colors=colors,
            read_depth=reader,
            depth_size=size,
            notes=(
                *notes,
                *left_out(
                    len(stems),
                    without_depth_or_pose=len(stems) - len(whole),
                    where_tracking_was_lost=len(whole) - len(kept),
                ),
            ),
        )


def _lens(
    place: Path, size: tuple[int, int], mapping: CameraMapping
) -> tuple[Lens, list[Path], list[Note]]:
    """The lens, the file that says it, and a note where it is the documented one.

    7-Scenes' principal point (320, 240) is the middle of the image, so its numbers are taken as
    they are: the centre of the first pixel is (0.5, 0.5).
    """
    if (given := mapping.lens(size)) is not None:
        return given, [], []
    for folder in (place, place.parent):
        if (path := file_among(folder, CALIBRATIONS)) is not None and path.suffix == ".txt":
            return Lens.of(matrix_in(path, 3), size), [path], []
    if size != (640, 480):
        raise SourceError(place, f"does not say the intrinsics of its {size} images", GIVE)
    text = "nothing says the intrinsics: those that 7-Scenes documents are taken (585,585,320,240)"
    return Lens(*KINECT, size), [], [Note("intrinsics", text)]
