"""COLMAP: a sparse model of cameras and images, in text or binary, and the images.

The binary layout is that of COLMAP's src/colmap/scene/reconstruction_io.cc, little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from occgen_hub.camera_mapping import CameraMapping
from occgen_hub.episode import Note
from occgen_hub.errors import SourceError
from occgen_hub.files import MAX_TABLE_ROWS, is_file, natural_key, opened
from occgen_hub.geometry.lens import Lens
from occgen_hub.media import image_size, read_rgb

from .recording import Layout, Recording, left_out_note, valid_poses
from .trajectories import poses_of

MODELS = ("sparse/0", "sparse", "colmap/sparse/0", "dense/sparse", "")
IMAGES = ("images", "dense/images", "rgb", "color", "")

CAMERAS = {
    0: ("SIMPLE_PINHOLE", 3),
    1: ("PINHOLE", 4),
    2: ("SIMPLE_RADIAL", 4),
    3: ("RADIAL", 5),
    4: ("OPENCV", 8),
    5: ("OPENCV_FISHEYE", 8),
    6: ("FULL_OPENCV", 12),
    7: ("FOV", 5),
    8: ("SIMPLE_RADIAL_FISHEYE", 4),
    9: ("RADIAL_FISHEYE", 5),
    10: ("THIN_PRISM_FISHEYE", 12),
}
"""COLMAP's camera models by number: name, and number of parameters."""

MAX_LINE = 1 << 26
"""Limit of a line of images.txt in bytes. It lists an image's points."""

MAX_POINTS = 1 << 24
"""Of an image."""

RESTORE = "restore it, or export the model again"


class Colmap(Layout):
    """`cameras` and `images`, `.txt` or `.bin`; camera_from_world quaternions, unit free."""

    what = "a COLMAP model"

    def recognise(self, place: Path) -> bool:
        """By the files of a model in one of the usual folders."""
        return _model(place) is not None

    def has_depth(self, place: Path, mapping: CameraMapping) -> bool:
        """False: COLMAP models have no depth."""
        return False

    def read(self, place: Path, mapping: CameraMapping) -> Recording:
        """The registered images that exist, sorted by name."""
        model = _model(place)
        assert model is not None
        folder, kind = model
        cameras_path, images_path = (folder / f"{name}{kind}" for name in ("cameras", "images"))
        text = kind == ".txt"
        lenses = dict(_text_cameras(cameras_path) if text else _binary_cameras(cameras_path))
        rows = list(_text_images(images_path) if text else _binary_images(images_path))
        rows.sort(key=lambda row: natural_key(row[0]))
        root = _image_folder(place, folder, [name for name, *_ in rows])
        there = [row for row in rows if is_file(root / row[0])]
        if not there:
            problem = "has no registered image that is in one of the folders " + ", ".join(
                name or "." for name in IMAGES
            )
            raise SourceError(images_path, problem, "put the images there")
        raw = poses_of(np.array([row[3] for row in there]), np.array([row[2] for row in there]))
        good = np.flatnonzero(valid_poses(raw))
        if not len(good):
            raise SourceError(images_path, "has no usable pose", RESTORE)
        if missing := [there[n][1] for n in good if there[n][1] not in lenses]:
            raise SourceError(cameras_path, f"lacks the camera {missing[0]}", RESTORE)
        colors = [root / there[n][0] for n in good]
        size = image_size(colors[0])
        given = mapping.lens(size)
        own = [given or lenses[there[n][1]].resized(size) for n in good]
        direction = mapping.pose_direction or "camera_from_world"
        meant = mapping.model_copy(update={"pose_direction": direction})
        note = Note("units", "COLMAP's unit of length is free: the scene is in that unit")
        notes = left_out_note(
            len(rows),
            without_a_file=len(rows) - len(there),
            without_a_pose=len(there) - len(good),
        )
        return Recording(
            read_color=lambda frame: read_rgb(colors[frame], size),
            color_lens=own,
            poses=meant.world_from_camera(raw[good]),
            sources=[cameras_path, images_path, *colors],
            colors=colors,
            notes=(*notes, note),
        )


def _model(place: Path) -> tuple[Path, str] | None:
    """The folder of the model, and the suffix of its files."""
    for name in MODELS:
        for kind in (".bin", ".txt"):
            if all(is_file(place / name / f"{part}{kind}") for part in ("cameras", "images")):
                return place / name, kind
    return None


def _image_folder(place: Path, model: Path, names: list[str]) -> Path:
    """The folder that the images' names are in."""
    for above in (place, model.parent, model.parent.parent):
        for name in IMAGES:
            if names and is_file(above / name / names[0]):
                return above / name
    return place / IMAGES[0]


def lens_of(model: str, size: tuple[int, int], p: list[float], path: Path) -> Lens:
    """The lens of a COLMAP camera. The centre of its first pixel is (0.5, 0.5)."""
    if model in ("SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL"):
        f, cx, cy, *k = p
        return Lens(f, f, cx, cy, size, (*k, *[0.0] * (4 - len(k))) if k else ())
    if model in ("PINHOLE", "OPENCV", "FULL_OPENCV"):
        fx, fy, cx, cy, *k = p
        return Lens(fx, fy, cx, cy, size, tuple(k))
    if model == "OPENCV_FISHEYE":
        fx, fy, cx, cy, *k = p
        return Lens(fx, fy, cx, cy, size, tuple(k), "fisheye")
    if model in ("SIMPLE_RADIAL_FISHEYE", "RADIAL_FISHEYE"):
        f, cx, cy, *k = p
        return Lens(f, f, cx, cy, size, (*k, *[0.0] * (4 - len(k))), "fisheye")
    problem = f"has a camera of the model {model[:40]}, which is not supported"
    raise SourceError(path, problem, "undistort the images with 'colmap image_undistorter'")


def _text_cameras(path: Path) -> Iterator[tuple[int, Lens]]:
    for line in _lines(path):
        words = line.split()
        try:
            number, model, size = int(words[0]), words[1], (int(words[2]), int(words[3]))
            parameters = [float(word) for word in words[4:]]
        except (ValueError, IndexError):
            raise SourceError(path, "is not a list of COLMAP's cameras", RESTORE) from None
        if dict(CAMERAS.values()).get(model) not in (None, len(parameters)):
            raise SourceError(path, f"has {len(parameters)} parameters for a {model}", RESTORE)
        yield number, lens_of(model, size, parameters, path)


Row = tuple[str, int, list[float], list[float]]
"""An image: name, camera, quaternion x, y, z, w, and translation, both camera_from_world."""


def _text_images(path: Path) -> Iterator[Row]:
    """Parse images.txt. Each image has two lines; the second, its points, may be empty."""
    second = False
    for line in _lines(path, blank=True):
        if second:
            second = False
            continue
        if not line:
            continue
        words = line.split(maxsplit=9)
        try:
            w, x, y, z, *t = (float(word) for word in words[1:8])
            row = words[9], int(words[8]), [x, y, z, w], t
        except (ValueError, IndexError):
            raise SourceError(path, "is not a list of COLMAP's images", RESTORE) from None
        yield row
        second = True


def _lines(path: Path, *, blank: bool = False) -> Iterator[str]:
    with opened(path) as file:
        while line := file.readline(MAX_LINE):
            text = line.decode("utf-8", "replace").strip()
            if not text.startswith("#") and (text or blank):
                yield text


def _binary_cameras(path: Path) -> Iterator[tuple[int, Lens]]:
    with opened(path) as file:
        for _ in range(_count(file, path)):
            number, model, width, height = _unpack(file, "<iiQQ", path)
            if model not in CAMERAS:
                raise SourceError(path, f"has a camera of the unknown model {model}", RESTORE)
            name, count = CAMERAS[model]
            parameters = list(_unpack(file, f"<{count}d", path))
            yield number, lens_of(name, (width, height), parameters, path)


def _binary_images(path: Path) -> Iterator[Row]:
    with opened(path) as file:
        for _ in range(_count(file, path)):
            _, w, x, y, z, *t, camera = _unpack(file, "<i7di", path)
            name = bytearray()
            while (byte := file.read(1)) not in (b"\0", b"") and len(name) < 4096:
                name += byte
            (points,) = _unpack(file, "<Q", path)
            if points > MAX_POINTS:
                raise SourceError(path, f"claims {points} points of an image", RESTORE)
            file.seek(24 * points, 1)
            yield name.decode("utf-8", "replace"), camera, [x, y, z, w], t


def _count(file: BufferedReader, path: Path) -> int:
    (count,) = _unpack(file, "<Q", path)
    if count > MAX_TABLE_ROWS:
        raise SourceError(path, f"claims {count} entries", RESTORE)
    return int(count)


def _unpack(file: BufferedReader, layout: str, path: Path) -> tuple[Any, ...]:
    data = file.read(struct.calcsize(layout))
    if len(data) < struct.calcsize(layout):
        raise SourceError(path, "ends too early", RESTORE)
    return struct.unpack(layout, data)
