"""7-Scenes, and ScanNet as written by its own exporter: numbered frames, a pose file for each."""

from __future__ import annotations

import re
from pathlib import Path

from occgen_hub.camera_mapping import CameraMapping
from occgen_hub.episode import Note
from occgen_hub.errors import SourceError
from occgen_hub.files import natural_key
from occgen_hub.geometry.lens import Lens
from occgen_hub.media import image_size

from .recording import (
    CALIBRATIONS,
    GIVE,
    FrameFiles,
    Layout,
    Recording,
    file_among,
    matrix_in,
    recorded,
    tracked_frames,
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
        colors = {m[1]: path for path in place.iterdir() if (m := FRAME.fullmatch(path.name))}
        with_depth = self.has_depth(place, mapping)
        frames, poses, notes = tracked_frames(
            place,
            [
                FrameFiles(
                    colors[stem],
                    place / f"{stem}.pose.txt",
                    place / f"{stem}.depth.png" if with_depth else None,
                )
                for stem in sorted(colors, key=natural_key)
            ],
        )
        lens, files, lens_notes = _lens(place, image_size(frames[0].color), mapping)
        notes = [*lens_notes, *notes]
        return recorded(frames, poses, lens, mapping, UNIT, files=files, notes=notes)


def _lens(
    place: Path, size: tuple[int, int], mapping: CameraMapping
) -> tuple[Lens, list[Path], list[Note]]:
    """The lens, the file that states it, and a note if it is the documented default.

    7-Scenes' principal point (320, 240) is the middle of the image, so its numbers are taken as
    they are: the centre of the first pixel is (0.5, 0.5).
    """
    if (given := mapping.lens(size)) is not None:
        return given, [], []
    for folder in (place, place.parent):
        if (path := file_among(folder, CALIBRATIONS)) is not None and path.suffix == ".txt":
            return Lens.of(matrix_in(path, 3), size), [path], []
    if size != (640, 480):
        raise SourceError(place, f"does not state the intrinsics of its {size} images", GIVE)
    text = "intrinsics are not stated: those documented for 7-Scenes are used (585,585,320,240)"
    return Lens(*KINECT, size), [], [Note("intrinsics", text)]
