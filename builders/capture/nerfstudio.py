"""nerfstudio's transforms.json, which Record3D, Polycam, instant-ngp and others write as well."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from occgen_hub.camera_mapping import CameraMapping
from occgen_hub.episode import Note
from occgen_hub.errors import SourceError
from occgen_hub.files import MAX_TABLE_ROWS, is_file, natural_key, read_json
from occgen_hub.geometry.lens import Lens
from occgen_hub.media import image_size, read_rgb

from .recording import GIVE, IMAGES, Layout, Recording, depth_reader, left_out_note, valid_poses

UNIT = 0.001
TRANSFORMS = "transforms.json"
PINHOLES = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "PERSPECTIVE")
RADIAL = ("k1", "k2", "p1", "p2", "k3")
FISHEYE = ("k1", "k2", "k3", "k4")


class NerfStudio(Layout):
    """`transforms.json`: OpenGL cameras, intrinsics for all frames or each, depth if named."""

    what = "a nerfstudio transforms.json"

    def recognise(self, place: Path) -> bool:
        """By the file's name."""
        return is_file(place / TRANSFORMS)

    def has_depth(self, place: Path, mapping: CameraMapping) -> bool:
        """By the depth that the first frame names."""
        values = read_json(place / TRANSFORMS)
        return _text(_frames(values, place)[0].get("depth_file_path")) != ""

    def read(self, place: Path, mapping: CameraMapping) -> Recording:
        """The frames whose files exist, sorted by name."""
        path = place / TRANSFORMS
        values = read_json(path)
        frames = _frames(values, place)
        with_depth = _text(frames[0].get("depth_file_path")) != ""
        whole = [frame for frame in frames if _files_there(place, frame, with_depth)]
        if not whole:
            problem = "names no existing images" + (" with depth" if with_depth else "")
            raise SourceError(path, problem, "put them beside it, where file_path says")
        all_poses = np.stack([_pose(frame, path) for frame in whole])
        tracked = valid_poses(all_poses)
        if not tracked.any():
            problem = "has no transform_matrix that is rigid and finite"
            raise SourceError(path, problem, "restore it from the source")
        kept = [frame for frame, good in zip(whole, tracked, strict=True) if good]
        colors = [_image(place, frame) for frame in kept]
        size = image_size(colors[0])
        lenses = [_lens({**values, **frame}, size, mapping, path) for frame in kept]
        poses = all_poses[tracked]
        axes = mapping.pose_axes or "opengl"  # The default of this format only.
        poses = mapping.model_copy(update={"pose_axes": axes}).world_from_camera(poses)
        depths = [place / frame["depth_file_path"] for frame in kept] if with_depth else []
        reader = depth_size = None
        notes = left_out_note(
            len(frames),
            without_files=len(frames) - len(whole),
            without_a_pose=len(whole) - len(kept),
        )
        if with_depth:
            reader, depth_size = depth_reader(depths, mapping, _unit(values))
        else:
            text = (
                "transforms.json does not state the unit of its poses: the scene is in that unit, "
                "which is often not metres"
            )
            notes.append(Note("units", text))
        return Recording(
            read_color=lambda frame: read_rgb(colors[frame], size),
            color_lens=lenses,
            poses=poses,
            sources=[path, *colors, *depths],
            colors=colors,
            read_depth=reader,
            depth_size=depth_size,
            notes=tuple(notes),
        )


def _frames(values: dict[str, Any], place: Path) -> list[dict[str, Any]]:
    frames = values.get("frames")
    usable = (
        [f for f in frames if isinstance(f, dict) and _text(f.get("file_path"))]
        if isinstance(frames, list)
        else []
    )
    if not usable or len(usable) > MAX_TABLE_ROWS:
        problem = "lists no frames with a file_path"
        raise SourceError(place / TRANSFORMS, problem, "restore it from the source")
    return sorted(usable, key=lambda frame: natural_key(frame["file_path"]))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _image(place: Path, frame: dict[str, Any]) -> Path:
    """The image of a frame. NeRF's synthetic scenes name images without a suffix."""
    path = place / _text(frame.get("file_path"))
    if is_file(path) or path.suffix.lower() in IMAGES:
        return path
    return path.with_name(f"{path.name}.png")


def _files_there(place: Path, frame: dict[str, Any], with_depth: bool) -> bool:
    depth = _text(frame.get("depth_file_path"))
    return is_file(_image(place, frame)) and (
        not with_depth or (depth != "" and is_file(place / depth))
    )


def _pose(frame: dict[str, Any], path: Path) -> np.ndarray[Any, np.dtype[np.float64]]:
    try:
        pose = np.array(frame["transform_matrix"], np.float64)
    except (KeyError, TypeError, ValueError):
        pose = np.empty(0)
    if pose.shape == (3, 4):
        pose = np.concatenate([pose, [[0.0, 0.0, 0.0, 1.0]]])
    if pose.shape != (4, 4):
        problem = f"has no 4 x 4 transform_matrix for {_text(frame.get('file_path'))[:60]}"
        raise SourceError(path, problem, "restore it from the source")
    return pose


def _lens(
    values: dict[str, Any], size: tuple[int, int], mapping: CameraMapping, path: Path
) -> Lens:
    """The lens of a frame's image, from its own values and those for all frames.

    nerfstudio numbers pixels as COLMAP does: the centre of the first is (0.5, 0.5).
    """
    if (given := mapping.lens(size)) is not None:
        return given
    model = _text(values.get("camera_model")) or "OPENCV"
    fisheye = "FISHEYE" in model or values.get("is_fisheye") is True
    if not fisheye and model not in PINHOLES:
        problem = f"has the camera model {model[:40]}, which is not supported"
        raise SourceError(path, problem, "convert its images to perspective ones")
    width = _number(values, "w", size[0], path)
    height = _number(values, "h", size[1], path)
    angle = values.get("camera_angle_x")
    guess = width / 2 / np.tan(angle / 2) if isinstance(angle, float) and 0 < angle < 3.14 else 0.0
    fx = _number(values, "fl_x", guess, path)
    if fx <= 0:
        raise SourceError(path, "does not state the focal length (fl_x)", GIVE)
    fy = _number(values, "fl_y", fx, path)
    cx = _number(values, "cx", width / 2, path)
    cy = _number(values, "cy", height / 2, path)
    names = FISHEYE if fisheye else RADIAL
    distortion = tuple(_number(values, name, 0.0, path) for name in names)
    kind: Literal["radial", "fisheye"] = "fisheye" if fisheye else "radial"
    lens = Lens(fx, fy, cx, cy, (int(width), int(height)), distortion, kind)
    return lens.resized(size)


def _number(values: dict[str, Any], name: str, otherwise: float, path: Path) -> float:
    value = values.get(name, otherwise)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SourceError(path, f"has no number for {name}", "restore it from the source")
    return float(value)


def _unit(values: dict[str, Any]) -> float:
    """The unit of depth in metres, which instant-ngp and nerfstudio's tools may state."""
    for name in ("depth_unit_scale_factor", "integer_depth_scale"):
        value = values.get(name)
        if isinstance(value, float) and 0 < value <= 1:
            return value
    return UNIT
