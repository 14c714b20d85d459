"""ScanNet as its Python exporter and many other tools write it: a folder for each kind."""

from __future__ import annotations

from pathlib import Path

from occgen_hub.camera_mapping import CameraMapping
from occgen_hub.files import is_file
from occgen_hub.media import image_size

from .recording import (
    FrameFiles,
    Layout,
    Recording,
    depth_size,
    images_in,
    lens_in,
    needed_lens,
    recorded,
    tracked_frames,
)

UNIT = 0.001


class ScanNet(Layout):
    """`color/N.jpg`, `depth/N.png`, `pose/N.txt` and `intrinsic/`; depth in millimetres."""

    what = "a ScanNet export"

    def recognise(self, place: Path) -> bool:
        """By the folders color and pose."""
        return (place / "color").is_dir() and (place / "pose").is_dir()

    def has_depth(self, place: Path, mapping: CameraMapping) -> bool:
        """By the folder depth."""
        return (place / "depth").is_dir()

    def read(self, place: Path, mapping: CameraMapping) -> Recording:
        """The frames that have all files and a pose."""
        with_depth = self.has_depth(place, mapping)
        frames, poses, notes = tracked_frames(
            place,
            [
                FrameFiles(
                    path,
                    place / "pose" / f"{path.stem}.txt",
                    place / "depth" / f"{path.stem}.png" if with_depth else None,
                )
                for path in images_in(place / "color")
            ],
        )
        size = image_size(frames[0].color)
        stated = [place / "intrinsic" / f"intrinsic_{kind}.txt" for kind in ("color", "depth")]
        files = [path for path in stated if is_file(path) and mapping.intrinsics is None]
        depth_lens = None
        if (depth := frames[0].depth) is not None and stated[1] in files:
            depth_lens = lens_in(stated[1], depth_size(depth))
        if stated[0] in files:
            lens = lens_in(stated[0], size)
        elif depth_lens is not None:
            lens = depth_lens.resized(size)
        else:
            lens, files = needed_lens(place, size, mapping)
        return recorded(
            frames, poses, lens, mapping, UNIT, files=files, depth_lens=depth_lens, notes=notes
        )
