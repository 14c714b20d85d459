"""ScanNet as its Python exporter and many other tools write it: a folder for each kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from occgen_hub.camera_mapping import CameraMapping
from occgen_hub.errors import SourceError
from occgen_hub.files import is_file
from occgen_hub.geometry.lens import Lens, opencv_matrix
from occgen_hub.media import image_size, read_rgb

from .recording import (
    Layout,
    Recording,
    depth_reader,
    images_in,
    known,
    left_out,
    matrix_in,
    needed_lens,
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
        images = images_in(place / "color")
        with_depth = self.has_depth(place, mapping)
        whole = [
            path
            for path in images
            if is_file(place / "pose" / f"{path.stem}.txt")
            and (not with_depth or is_file(place / "depth" / f"{path.stem}.png"))
        ]
        if not whole:
            problem = "holds no frame with colour, a pose and, if there is a folder depth, depth"
            raise SourceError(place, problem, "restore the frames from the source")
        all_poses = np.stack([matrix_in(place / "pose" / f"{p.stem}.txt", 4) for p in whole])
        tracked = known(all_poses)
        if not tracked.any():
            problem = "holds no pose that is rigid and finite: tracking was lost in all frames"
            raise SourceError(place / "pose", problem, "leave this recording out")
        colors = [path for path, good in zip(whole, tracked, strict=True) if good]
        depths = [place / "depth" / f"{p.stem}.png" for p in colors] if with_depth else []
        reader = size = depth_lens = None
        files: list[Path] = []
        if with_depth:
            reader, size = depth_reader(depths, mapping, UNIT)
            own = place / "intrinsic" / "intrinsic_depth.txt"
            if mapping.intrinsics is None and is_file(own):
                depth_lens = _lens(own, size)
                files.append(own)
        own_size = image_size(colors[0])
        stated = place / "intrinsic" / "intrinsic_color.txt"
        if mapping.intrinsics is None and is_file(stated):
            lens, found = _lens(stated, own_size), [stated]
        elif depth_lens is not None:
            lens, found = depth_lens.resized(own_size), []
        else:
            lens, found = needed_lens(place, own_size, mapping)
        poses = [place / "pose" / f"{path.stem}.txt" for path in colors]
        return Recording(
            read_color=lambda frame: read_rgb(colors[frame], own_size),
            color_lens=[lens] * len(colors),
            poses=mapping.world_from_camera(all_poses[tracked]),
            sources=[*files, *found, *poses, *colors, *depths],
            colors=colors,
            read_depth=reader,
            depth_lens=depth_lens,
            depth_size=size,
            notes=(
                *left_out(
                    len(images),
                    without_depth_or_pose=len(images) - len(whole),
                    where_tracking_was_lost=len(whole) - len(colors),
                ),
            ),
        )


def _lens(path: Path, size: tuple[int, int]) -> Lens:
    """From a 4 x 4 matrix as ScanNet writes it: the centre of the first pixel is (0, 0)."""
    K = matrix_in(path, 3)
    return Lens.of(opencv_matrix(K[0, 0], K[1, 1], K[0, 2], K[1, 2]), size)
