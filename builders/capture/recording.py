"""The common form of all captures, and helpers to read their files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from occgen_hub.camera_mapping import CameraMapping
from occgen_hub.episode import Note
from occgen_hub.errors import SourceError
from occgen_hub.files import MAX_TABLE_ROWS, is_file, natural_key, parse_json, read_bytes
from occgen_hub.geometry.lens import Lens, opencv_matrix
from occgen_hub.geometry.poses import RIGID, rigidity_error
from occgen_hub.media import image_size, read_depth, read_rgb

TOLERANCE = 0.02
"""Largest time difference between colour, depth and pose of a frame, seconds."""

LONGEST_GAP = 0.25
"""Largest time between two poses to interpolate between them, seconds. After a longer gap, tracking
was lost."""

NONE = 65535
"""A value, other than 0, that sensors write for no measurement."""

IMAGES = (".jpg", ".jpeg", ".png")

CALIBRATIONS = (
    *("camera-intrinsics.txt", "camera_intrinsics.txt", "intrinsics.txt", "intrinsic.txt"),
    *("camera_intrinsic.json", "camera_intrinsics.json", "intrinsic.json", "intrinsics.json"),
)
"""Names of files with the intrinsics of the colour camera, in the order of their preference."""

GIVE = "give --intrinsics fx,fy,cx,cy in pixels of the colour images"
"""The remedy where a recording lacks intrinsics."""


@dataclass(frozen=True)
class Recording:
    """T frames of a capture, as recorded. Images are decoded on demand.

    Attributes:
        read_color: frame number to (h, w, 3) uint8 RGB, with the lens distortion.
        color_lens: the lens of each of the T colour images, all of one size.
        poses: (T, 4, 4) float64, world_from_camera, OpenCV axes, in the unit of the files.
        sources: all files used for the frames.
        colors: the T files of colour images, or () if they are not separate files.
        read_depth: frame number to (h, w) float64 metres, 0 for none; None without depth.
        depth_lens: the lens of the depth images; None for that of colour.
        depth_size: (width, height) of the depth images, pixels.
        times: (T,) float64 times of the frames, seconds, ascending; None if unknown.
        notes: for the user.
    """

    read_color: Callable[[int], NDArray[np.uint8]]
    color_lens: Sequence[Lens]
    poses: NDArray[np.float64]
    sources: Sequence[Path]
    colors: Sequence[Path] = ()
    read_depth: Callable[[int], NDArray[np.float64]] | None = None
    depth_lens: Lens | None = None
    depth_size: tuple[int, int] | None = None
    times: NDArray[np.float64] | None = None
    notes: tuple[Note, ...] = ()


class Layout(ABC):
    """A layout of captures. what: a description with an article, for messages."""

    what: ClassVar[str]

    @abstractmethod
    def recognise(self, place: Path) -> bool:
        """Whether a folder or file has this layout, by the names of files."""

    @abstractmethod
    def has_depth(self, place: Path, mapping: CameraMapping) -> bool:
        """Whether it has depth, by a quick check."""

    @abstractmethod
    def read(self, place: Path, mapping: CameraMapping) -> Recording:
        """Read the recording. Raises SourceError if its files cannot be used."""

    def sources(self, place: Path, mapping: CameraMapping) -> list[Path]:
        """All files used for the recording."""
        return list(self.read(place, mapping).sources)


# Files


def images_in(folder: Path, suffixes: tuple[str, ...] = IMAGES) -> list[Path]:
    """The images of a folder in natural order of their names, in which 10 comes after 9."""
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError as error:
        problem = f"cannot be listed ({error.strerror})"
        raise SourceError(folder, problem, "check its permissions") from error
    kept = [name for name in names if name.lower().endswith(suffixes) and name[0] != "."]
    if len(kept) > MAX_TABLE_ROWS:
        problem = f"has {len(kept)} images, more than an episode can have"
        raise SourceError(folder, problem, "split it into several recordings")
    return [folder / name for name in sorted(kept, key=natural_key)]


def folder_among(place: Path, names: Iterable[str]) -> Path | None:
    """The first of these folders that exists, or None."""
    return next((place / name for name in names if (place / name).is_dir()), None)


def files_among(place: Path, names: Iterable[str]) -> list[Path]:
    """Those of these files that exist, in the same order."""
    return [place / name for name in names if is_file(place / name)]


def file_among(place: Path, names: Iterable[str]) -> Path | None:
    """The first of these files that exists, or None."""
    return next(iter(files_among(place, names)), None)


def numbers_in(
    path: Path,
    limit: int = 1 << 16,
    remedy: str = "restore it, or leave this recording out",
    *,
    header: Sequence[str] = (),
) -> list[list[float]]:
    """The numbers in each line of a text file, without comments (#) and empty lines.

    "nan" and "inf" are accepted, since they mark lost tracking. header: names with which the first
    line begins. Raises SourceError with `remedy`.
    """
    rows = []
    for number, line in enumerate(read_bytes(path, limit).splitlines(), 1):
        words = line.partition(b"#")[0].replace(b",", b" ").split()
        if header and number == 1:
            if words[: len(header)] != [name.encode() for name in header]:
                problem = f"does not begin with the columns {', '.join(header)}"
                raise SourceError(path, problem, remedy)
            continue
        try:
            if words:
                rows.append([float(word) for word in words])
        except ValueError:
            start = line.strip().decode(errors="replace")[:40]
            problem = f"line {number}: is not a row of numbers ({start})"
            raise SourceError(path, problem, remedy) from None
    return rows


def matrix_in(path: Path, n: int) -> NDArray[np.float64]:
    """The (n, n) float64 matrix in a text file. For 3 x 3, a 4 x 4 one is accepted too."""
    rows = numbers_in(path)
    matrix = np.array(rows) if len({len(row) for row in rows}) == 1 else np.empty(0)
    if n == 3 and matrix.shape in ((4, 4), (3, 4)):
        matrix = matrix[:3, :3]
    if matrix.shape != (n, n):
        problem = f"does not contain a {n} x {n} matrix"
        raise SourceError(path, problem, "restore it, or leave the frame out")
    return matrix


def valid_poses(poses: NDArray[np.float64]) -> NDArray[np.bool_]:
    """(n,) bool: which of (n, 4, 4) poses are rigid and finite. Others mean lost tracking."""
    return np.asarray(rigidity_error(poses) <= RIGID, np.bool_)


@dataclass(frozen=True)
class FrameFiles:
    """The files of a frame. depth: None in a recording without depth."""

    color: Path
    pose: Path
    depth: Path | None


def tracked_frames(
    place: Path, frames: Sequence[FrameFiles]
) -> tuple[list[FrameFiles], NDArray[np.float64], list[Note]]:
    """The frames with all files and a valid pose, their (n, 4, 4) poses, and notes on the others.

    A pose is a matrix in a text file. Raises SourceError if no frame remains.
    """
    whole = [f for f in frames if is_file(f.pose) and (f.depth is None or is_file(f.depth))]
    if not whole:
        problem = "has no frame with colour, a pose and (if other frames have it) depth"
        raise SourceError(place, problem, "restore the frames from the source")
    poses = np.stack([matrix_in(frame.pose, 4) for frame in whole])
    tracked = valid_poses(poses)
    if not tracked.any():
        problem = "has no pose that is rigid and finite: tracking was lost in all frames"
        raise SourceError(place, problem, "leave this recording out")
    kept = [frame for frame, good in zip(whole, tracked, strict=True) if good]
    notes = left_out_note(
        len(frames),
        without_depth_or_pose=len(frames) - len(whole),
        where_tracking_was_lost=len(whole) - len(kept),
    )
    return kept, poses[tracked], notes


def recorded(
    frames: Sequence[FrameFiles],
    poses: NDArray[np.float64],
    lens: Lens,
    mapping: CameraMapping,
    unit: float,
    *,
    files: Sequence[Path] = (),
    depth_lens: Lens | None = None,
    notes: Iterable[Note] = (),
) -> Recording:
    """The recording of tracked frames that all have the same lens and size.

    unit: the unit of depth in metres, if the mapping has none; files: those that give the lenses.
    """
    depths = [frame.depth for frame in frames if frame.depth is not None]
    reader, size = depth_reader(depths, mapping, unit) if depths else (None, None)
    return Recording(
        read_color=lambda frame: read_rgb(frames[frame].color, lens.size),
        color_lens=[lens] * len(frames),
        poses=mapping.world_from_camera(poses),
        sources=[*files, *(f.pose for f in frames), *(f.color for f in frames), *depths],
        colors=[frame.color for frame in frames],
        read_depth=reader,
        depth_lens=depth_lens,
        depth_size=size,
        notes=tuple(notes),
    )


# Intrinsics


def stated_lens(
    place: Path, size: tuple[int, int], mapping: CameraMapping
) -> tuple[Lens | None, list[Path]]:
    """The lens of colour images of `size`, from the user or from a file, and that file.

    The files of `CALIBRATIONS` are searched in the folder and its parent. A text file has fx fy cx
    cy, or a 3 x 3 or 4 x 4 matrix; a JSON file has the format of Open3D. Numbers follow OpenCV's
    convention.
    """
    if (given := mapping.lens(size)) is not None:
        return given, []
    for folder in (place, place.parent):
        if (path := file_among(folder, CALIBRATIONS)) is not None:
            matrix, own_size = _calibration(path)
            fx, fy, cx, cy = (float(matrix[at]) for at in ((0, 0), (1, 1), (0, 2), (1, 2)))
            lens = Lens.of(opencv_matrix(fx, fy, cx, cy), own_size or size)
            return lens.resized(size), [path]
    return None, []


def lens_in(path: Path, size: tuple[int, int]) -> Lens:
    """The lens of images of `size` from a 3 x 3 or 4 x 4 matrix in OpenCV's convention.

    Raises SourceError.
    """
    K = matrix_in(path, 3)
    return Lens.of(opencv_matrix(K[0, 0], K[1, 1], K[0, 2], K[1, 2]), size)


def _calibration(path: Path) -> tuple[NDArray[np.float64], tuple[int, int] | None]:
    if path.suffix == ".json":
        try:
            values = parse_json(read_bytes(path, 1 << 16))
            numbers = np.array(values["intrinsic_matrix"], np.float64).reshape(3, 3).T
            size = int(values["width"]), int(values["height"])
        except (ValueError, KeyError, TypeError):
            problem = "lacks width, height and intrinsic_matrix in the format of Open3D"
            raise SourceError(path, problem, f"correct it, or {GIVE}") from None
        return numbers, size
    rows = numbers_in(path)
    if len(rows) == 1 and len(rows[0]) == 4:
        fx, fy, cx, cy = rows[0]
        return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]]), None
    return matrix_in(path, 3), None


def needed_lens(
    place: Path, size: tuple[int, int], mapping: CameraMapping
) -> tuple[Lens, list[Path]]:
    """Like `stated_lens`, but raises SourceError if the intrinsics are unknown."""
    lens, files = stated_lens(place, size, mapping)
    if lens is None:
        remedy = f"{GIVE} ({size[0]} x {size[1]}), or put fx fy cx cy into intrinsics.txt"
        raise SourceError(place, "has no file with the intrinsics of the camera", remedy)
    return lens, files


# Depth


def depth_reader(
    paths: Sequence[Path], mapping: CameraMapping, unit: float
) -> tuple[Callable[[int], NDArray[np.float64]], tuple[int, int]]:
    """A function from frame number to (h, w) float64 metres, 0 for none, and (width, height).

    unit: the unit of integers in metres, if the mapping has none. A `.npy` file may have
    floating-point numbers, which are metres if the mapping has no unit.
    """
    size = depth_size(paths[0])

    def read(frame: int) -> NDArray[np.float64]:
        path = paths[frame]
        values = read_npy(path) if path.suffix == ".npy" else read_depth(path, size)
        if values.shape != size[::-1]:
            problem = f"has shape {values.shape}, the first depth image {size[::-1]}"
            raise SourceError(path, problem, "restore it, or leave the frame out")
        return in_metres(values, mapping, unit)

    return read, size


def in_metres(values: NDArray[Any], mapping: CameraMapping, unit: float) -> NDArray[np.float64]:
    """Convert stored depth to (h, w) float64 metres, 0 for none.

    Floating-point numbers are ignored if they are not finite or not positive, integers if they are
    0 or 65535. Without a unit in the mapping, floats are metres and integers have `unit` metres.
    """
    if values.dtype.kind == "f":
        metres = values.astype(np.float64) * (mapping.depth_unit or 1.0)
        return np.where(np.isfinite(metres) & (metres > 0), metres, 0.0)
    return np.where(values >= NONE, 0.0, values.astype(np.float64) * (mapping.depth_unit or unit))


def depth_size(path: Path) -> tuple[int, int]:
    """(width, height) of a depth image or array."""
    if path.suffix == ".npy":
        height, width = read_npy(path).shape
        return width, height
    return image_size(path)


def read_npy(path: Path) -> NDArray[Any]:
    """Read a 2-D array of floats or unsigned integers. Raises SourceError, also for pickles."""
    import io

    data = read_bytes(path, 1 << 28)
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError):
        raise SourceError(path, "is not a readable array", "restore it") from None
    array = np.squeeze(array)
    if array.ndim != 2 or array.dtype.kind not in "fu":
        problem = f"has {array.dtype} of shape {array.shape}, which is not a depth image"
        raise SourceError(path, problem, "save (height, width) float32 metres, or uint16")
    return np.asarray(array)


# Time


def pair_up(times: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.int64]:
    """(n, 2) int64 indices of times and other times that match.

    A pair matches if each is the nearest of the other, within `TOLERANCE`.
    """
    if not len(times) or not len(others):
        return np.zeros((0, 2), np.int64)
    forward, back = _nearest(times, others), _nearest(others, times)
    own = np.arange(len(times))
    kept = (back[forward] == own) & (np.abs(others[forward] - times) <= TOLERANCE)
    return np.stack([own[kept], forward[kept]], axis=1)


def _nearest(times: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.int64]:
    """For each time, the index of the nearest of the ascending others."""
    after = np.searchsorted(others, times).clip(0, len(others) - 1)
    before = np.maximum(after - 1, 0)
    nearer = np.abs(others[before] - times) <= np.abs(others[after] - times)
    return np.where(nearer, before, after)


def left_out_note(total: int, **reasons: int) -> list[Note]:
    """A note on frames that are left out. reasons: counts by reason, with `_` between words."""
    parts = [f"{count} {name.replace('_', ' ')}" for name, count in reasons.items() if count]
    if not parts:
        return []
    count = sum(reasons.values())
    return [Note("left out", f"{count} of {total} frames are left out: {', '.join(parts)}")]
