"""The frames of a feature: part of a video, or a column of encoded images or arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from occgen_hub.camera_mapping import CameraMapping
from occgen_hub.errors import SourceError
from occgen_hub.files import plain, read_bytes
from occgen_hub.media import SequentialReader, decode_color, decode_grey, frames_at
from occgen_hub.media.video import Frames

from ..capture.recording import in_metres
from .dataset import INFO, LeRobotFeature, episode_batches, opened_table

ROWS = 8
"""Number of rows of a column of images to read at a time."""

IMAGE_BYTES = 1 << 28

CODES = 4096
"""Number of codes in LeRobot's depth videos, which have 12 bits."""

USUAL = {"depth_min": 0.01, "depth_max": 10.0, "shift": 3.5, "use_log": True}
"""LeRobot's default parameters of a depth video."""

UNIT = 0.001
"""Metres per unit of integer depth, by default."""


@dataclass(frozen=True)
class Place:
    """The images of a feature in an episode.

    key: the feature's name; path: its video or table; root: the dataset's folder; episode: its
    number; rows: (T,) the wanted rows of the episode, ascending; times: (T,) seconds of these rows
    in the video; tolerance: largest time difference of a video frame, seconds.
    """

    key: str
    feature: LeRobotFeature
    root: Path
    path: Path
    episode: int
    rows: NDArray[np.int64]
    times: NDArray[np.float64]
    tolerance: float


def color_reader(place: Place) -> Callable[[int], NDArray[np.uint8]]:
    """A function from frame number, below T, to (H, W, 3) uint8 RGB. All have the same size."""
    video = place.feature.video
    read = _video(place, grey=False) if video else _column(place, _color)
    return _of_one_size(read, place)


def depth_reader(place: Place, mapping: CameraMapping) -> Callable[[int], NDArray[np.float64]]:
    """A function from frame number, below T, to (H, W) float64 metres, 0 for none.

    LeRobot's own depth states its unit. Other integers have the mapping's unit, by default
    millimetres. Raises SourceError if both give a unit.
    """
    feature = place.feature
    own_unit = {"m": 1.0, "mm": 0.001}.get(str(feature.info.get("depth_unit")))
    if feature.depth_map and mapping.depth_unit and (feature.video or own_unit):
        problem = f"already states the unit of {place.key}"
        raise SourceError(place.root / INFO, problem, "leave out its unit in the mapping")
    if feature.video and feature.depth_map:
        metres = metres_of_codes(feature.info, place)
        read = _of_one_size(_video(place, grey=True), place)
        return lambda frame: metres[read(frame).clip(0, CODES - 1)]
    if own_unit is not None:
        mapping = mapping.model_copy(update={"depth_unit": own_unit})
    raw = _video(place, grey=True) if feature.video else _column(place, _depth)
    read = _of_one_size(raw, place)
    return lambda frame: in_metres(read(frame), mapping, UNIT)


def metres_of_codes(info: dict[str, Any], place: Place | None = None) -> NDArray[np.float64]:
    """(4096,) float64 metres of the codes in a depth video of LeRobot.

    The first and the last code stand for depth outside of the video's range. They become 0 (none).
    """
    values = {key: info.get(f"video.{key}", info.get(key, usual)) for key, usual in USUAL.items()}
    least, most, shift = (values[key] for key in ("depth_min", "depth_max", "shift"))
    share = np.arange(CODES) / (CODES - 1)
    try:
        if values["use_log"]:
            low, high = np.log(least + shift), np.log(most + shift)
            metres = np.exp(low + share * (high - low)) - shift
        else:
            metres = least + share * (most - least)
        known = bool(np.isfinite(metres).all() and (np.diff(metres) > 0).all())
    except (TypeError, ValueError):
        known = False
    if not known:
        path = Path(INFO) if place is None else place.root / INFO
        raise SourceError(path, "has no valid depth_min, depth_max and shift", "correct it")
    metres = np.where(metres > 0, metres, 0.0)
    metres[[0, -1]] = 0.0
    return np.asarray(metres, np.float64)


def _of_one_size[Pixel: np.generic](
    read: Callable[[int], NDArray[Pixel]], place: Place
) -> Callable[[int], NDArray[Pixel]]:
    shape: list[tuple[int, ...]] = []

    def checked(frame: int) -> NDArray[Pixel]:
        image = read(frame)
        if not shape:
            shape.append(image.shape)
        if image.shape != shape[0]:
            problem = f"has images of different shapes ({shape[0]}, {image.shape}) in {place.key}"
            raise SourceError(place.path, problem, "leave this episode out")
        return image

    return checked


def _video(place: Place, *, grey: bool) -> SequentialReader:
    start = partial(frames_at, place.path, place.times, place.tolerance, grey=grey)
    return SequentialReader(place.path, start)


def _column(place: Place, decode: Callable[[Any, Place], NDArray[Any]]) -> SequentialReader:
    return SequentialReader(place.path, partial(_values, place, decode))


def _values(place: Place, decode: Callable[[Any, Place], NDArray[Any]]) -> Frames:
    """Yield functions that decode the images in a column of the episode's table, in order."""
    wanted, row = iter(place.rows.tolist()), 0
    following = next(wanted, None)
    with opened_table(place.path) as file:
        if place.key not in file.schema_arrow.names:
            raise SourceError(place.path, f"has no column {place.key}", "correct the mapping")
        for batch in episode_batches(file, place.episode, [place.key], ROWS):
            column = plain(pa.Table.from_batches([batch]))[place.key]
            for n in range(batch.num_rows):
                if row == following:
                    yield partial(decode, column[n], place)
                    following = next(wanted, None)
                row += 1


def _color(value: Any, place: Place) -> NDArray[np.uint8]:
    content = _encoded(value, place)
    if content is not None:
        return decode_color(content, place.path)
    pixels = _array(value, place)
    if pixels.ndim == 3 and pixels.shape[0] == 3 and pixels.shape[2] != 3:
        pixels = pixels.transpose(1, 2, 0)
    whole = pixels.dtype.kind in "iu" and pixels.min(initial=0) >= 0 and pixels.max(initial=0) < 256
    if pixels.ndim != 3 or pixels.shape[2] != 3 or not whole:
        problem = f"has {pixels.dtype} of shape {pixels.shape} in {place.key}, not 8-bit RGB"
        raise SourceError(place.path, problem, "name another column of colour images")
    return np.ascontiguousarray(pixels, np.uint8)


def _depth(value: Any, place: Place) -> NDArray[Any]:
    content = _encoded(value, place)
    if content is None:
        pixels = np.squeeze(_array(value, place))
    else:
        pixels = decode_grey(content, place.path)
    if pixels.ndim != 2 or pixels.dtype.kind not in "fiu" or pixels.dtype.itemsize < 2:
        problem = f"has {pixels.dtype} of shape {pixels.shape} in {place.key}, not depth"
        raise SourceError(place.path, problem, "name another column of depth")
    return np.asarray(pixels)


def _encoded(value: Any, place: Place) -> bytes | None:
    """The bytes of an encoded image. The value has them, or names a file of the dataset."""
    if pa.types.is_struct(value.type):
        held = value.as_py() or {}
        content, name = held.get("bytes"), held.get("path")
        if isinstance(content, bytes):
            return content
    elif pa.types.is_string(value.type):
        name = value.as_py()
    elif pa.types.is_binary(value.type):
        return bytes(value.as_py() or b"")
    else:
        return None
    path = place.root / str(name)
    if not name or not path.resolve().is_relative_to(place.root.resolve()):
        raise SourceError(place.path, f"has no image in {place.key}", "restore it")
    return read_bytes(path, IMAGE_BYTES)


def _array(value: Any, place: Place) -> NDArray[Any]:
    """The array of a value of nested lists."""
    counts, kind = [1], value.type
    flat = value.values if pa.types.is_nested(kind) and value.is_valid else None
    while flat is not None:
        counts.append(len(flat))
        kind = kind.value_type
        if not (pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind)):
            break
        flat = flat.flatten()
    plain_numbers = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    if flat is None or flat.null_count or not plain_numbers or 0 in counts:
        raise SourceError(place.path, f"has no array in {place.key}", "correct the mapping")
    shape = [count // above for above, count in pairwise(counts)]
    try:
        return np.asarray(flat.to_numpy(zero_copy_only=False)).reshape(shape)
    except ValueError:
        problem = f"has an array with rows of different lengths in {place.key}"
        raise SourceError(place.path, problem, "correct the mapping") from None
