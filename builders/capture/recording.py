"""What every layout of captures is read into, and what reading them has in common."""

from __future__ import annotations

import re
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
from occgen_hub.files import MAX_TABLE_ROWS, is_file, parse_json, read_bytes
from occgen_hub.geometry.lens import Lens, opencv_matrix
from occgen_hub.geometry.poses import RIGID, rigidity_error
from occgen_hub.media import image_size, read_depth, read_rgb

TOLERANCE = 0.02
"""Seconds: colour, depth and poses that are no farther apart are of one moment."""

LONGEST_GAP = 0.25
"""Seconds between two poses, for those between them to be known: longer, and tracking was lost."""

NONE = 65535
"""What sensors write besides 0 where they measured nothing."""

IMAGES = (".jpg", ".jpeg", ".png")

CALIBRATIONS = (
    *("camera-intrinsics.txt", "camera_intrinsics.txt", "intrinsics.txt", "intrinsic.txt"),
    *("camera_intrinsic.json", "camera_intrinsics.json", "intrinsic.json", "intrinsics.json"),
)
"""Names of files with the intrinsics of the colour camera, in the order of their preference."""

GIVE = "give --intrinsics fx,fy,cx,cy in pixels of the colour images"


@dataclass(frozen=True)
class Recording:
    """T frames of a capture, as its files have them; nothing is decoded yet.

    Attributes:
        read_color: frame number to (h, w, 3) uint8 RGB, distorted as the lens has it.
        color_lens: the lens of each frame's colour image, T of them, all of one size.
        poses: (T, 4, 4) float64, world_from_camera, OpenCV axes, in the unit of the files.
        sources: every file that the frames are made from.
        colors: the files of the colour images, T of them, or () where they are in no files.
        read_depth: frame number to (h, w) float64 metres, 0 for none; None where there is no depth.
        depth_lens: the lens of the depth images; None for the colour's.
        depth_size: (width, height) of the depth images.
        times: (T,) float64 seconds of the frames, ascending; None where nothing says.
        notes: what a user should know.
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
    """One layout of captures. what: what a folder of it is, with an article."""

    what: ClassVar[str]

    @abstractmethod
    def recognise(self, place: Path) -> bool:
        """Whether a folder, or a file, is in this layout, by the names in it."""

    @abstractmethod
    def has_depth(self, place: Path, mapping: CameraMapping) -> bool:
        """Whether it has depth; looked up quickly."""

    @abstractmethod
    def read(self, place: Path, mapping: CameraMapping) -> Recording:
        """The recording; raises SourceError where its files cannot be used."""

    def sources(self, place: Path, mapping: CameraMapping) -> list[Path]:
        """Every file that it is made from."""
        return list(self.read(place, mapping).sources)


# Files


def images_in(folder: Path, suffixes: tuple[str, ...] = IMAGES) -> list[Path]:
    """The images of a folder in the order of the numbers in their names: 10 comes after 9."""
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError as error:
        problem = f"cannot be listed ({error.strerror})"
        raise SourceError(folder, problem, "check its permissions") from error
    kept = [name for name in names if name.lower().endswith(suffixes) and name[0] != "."]
    if len(kept) > MAX_TABLE_ROWS:
        raise SourceError(folder, f"holds {len(kept)} images", "make several recordings of it")
    return [folder / name for name in sorted(kept, key=natural)]


def natural(name: str) -> tuple[list[str | int], str]:
    """A key to sort names by, in which digits count as the numbers that they write."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if n % 2 else part for n, part in enumerate(parts)], name


def folder_among(place: Path, names: Iterable[str]) -> Path | None:
    """The first of the folders of these names that is there."""
    return next((place / name for name in names if (place / name).is_dir()), None)


def file_among(place: Path, names: Iterable[str]) -> Path | None:
    """The first of the files of these names that is there."""
    return next((place / name for name in names if is_file(place / name)), None)


def numbers_in(path: Path, limit: int = 1 << 16) -> list[list[float]]:
    """The numbers of each line of a text file, comments (#) and empty lines left out.

    "nan" and "inf" are numbers here: they stand where tracking was lost.
    """
    rows = []
    for number, line in enumerate(read_bytes(path, limit).splitlines(), 1):
        words = line.partition(b"#")[0].replace(b",", b" ").split()
        try:
            if words:
                rows.append([float(word) for word in words])
        except ValueError:
            problem = f"line {number}: is not a row of numbers"
            raise SourceError(path, problem, "restore it, or leave this recording out") from None
    return rows


def matrix_in(path: Path, n: int) -> NDArray[np.float64]:
    """The (n, n) float64 matrix in a text file; one of 4 x 4 also serves as one of 3 x 3."""
    rows = numbers_in(path)
    matrix = np.array(rows) if len({len(row) for row in rows}) == 1 else np.empty(0)
    if n == 3 and matrix.shape in ((4, 4), (3, 4)):
        matrix = matrix[:3, :3]
    if matrix.shape != (n, n):
        raise SourceError(path, f"holds no {n} x {n} matrix", "restore it, or leave the frame out")
    return matrix


def known(poses: NDArray[np.float64]) -> NDArray[np.bool_]:
    """(n, 4, 4) to (n,) bool: which are rigid and finite; others mean that tracking failed."""
    return np.asarray(rigidity_error(poses) <= RIGID, np.bool_)


@dataclass(frozen=True)
class FrameFiles:
    """The files of a frame; depth is None in a recording without."""

    color: Path
    pose: Path
    depth: Path | None


def tracked_frames(
    place: Path, frames: Sequence[FrameFiles]
) -> tuple[list[FrameFiles], NDArray[np.float64], list[Note]]:
    """The frames whose files are all there and whose pose is known, and (n, 4, 4) those poses.

    A pose is a matrix in a text file. Notes say how many are left out; raises SourceError where no
    frame remains.
    """
    whole = [f for f in frames if is_file(f.pose) and (f.depth is None or is_file(f.depth))]
    if not whole:
        problem = "holds no frame with colour, a pose and, if any has it, depth"
        raise SourceError(place, problem, "restore the frames from the source")
    poses = np.stack([matrix_in(frame.pose, 4) for frame in whole])
    tracked = known(poses)
    if not tracked.any():
        problem = "has no pose that is rigid and finite: tracking was lost in all frames"
        raise SourceError(place, problem, "leave this recording out")
    kept = [frame for frame, good in zip(whole, tracked, strict=True) if good]
    notes = left_out(
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
    """The recording of tracked frames, all of one lens and of that lens's size.

    unit: metres in a unit of depth, where the mapping says nothing; files: what says the lenses.
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

    The files of `CALIBRATIONS` are looked for in the folder and in the one above it. A text holds
    fx fy cx cy, a 3 x 3 or a 4 x 4 matrix, a JSON what Open3D writes. Numbers are as OpenCV has
    them.
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


def _calibration(path: Path) -> tuple[NDArray[np.float64], tuple[int, int] | None]:
    if path.suffix == ".json":
        try:
            values = parse_json(read_bytes(path, 1 << 16))
            numbers = np.array(values["intrinsic_matrix"], np.float64).reshape(3, 3).T
            size = int(values["width"]), int(values["height"])
        except (ValueError, KeyError, TypeError):
            problem = "holds no width, height and intrinsic_matrix, as Open3D writes them"
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
    """As `stated_lens`; raises SourceError where nothing says the intrinsics."""
    lens, files = stated_lens(place, size, mapping)
    if lens is None:
        raise SourceError(place, f"does not say the camera's intrinsics ({CALIBRATIONS[0]})", GIVE)
    return lens, files


# Depth


def depth_reader(
    paths: Sequence[Path], mapping: CameraMapping, unit: float
) -> tuple[Callable[[int], NDArray[np.float64]], tuple[int, int]]:
    """A function from frame number to (h, w) float64 metres, 0 for none, and (width, height).

    unit: metres in a unit of whole numbers, where the mapping says nothing. A `.npy` file may hold
    floating-point numbers, which are metres where it says nothing.
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
    """(h, w) float64 metres, 0 for none, of depth as it is stored.

    Floating-point numbers are none where they are not finite or not over 0, whole ones where they
    are 0 or 65535. The unit is the mapping's; without one it is a metre, or for whole numbers
    `unit` metres.
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
    """A 2-D array of numbers; pickles are refused."""
    import io

    data = read_bytes(path, 1 << 28)
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError):
        raise SourceError(path, "is not an array that can be read", "restore it") from None
    array = np.squeeze(array)
    if array.ndim != 2 or array.dtype.kind not in "fu":
        problem = f"holds {array.dtype} of shape {array.shape}, no depth image"
        raise SourceError(path, problem, "save (height, width) float32 metres, or uint16")
    return np.asarray(array)


# Time


def pair_up(times: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.int64]:
    """(n, 2) numbers of the times, and of those of the others, that belong together.

    Each is the other's nearest, and no farther than `TOLERANCE`.
    """
    if not len(times) or not len(others):
        return np.zeros((0, 2), np.int64)
    there, back = _nearest(times, others), _nearest(others, times)
    mine = np.arange(len(times))
    kept = (back[there] == mine) & (np.abs(others[there] - times) <= TOLERANCE)
    return np.stack([mine[kept], there[kept]], axis=1)


def _nearest(times: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.int64]:
    """For each time the number of the nearest of the others, which ascend."""
    after = np.searchsorted(others, times).clip(0, len(others) - 1)
    before = np.maximum(after - 1, 0)
    nearer = np.abs(others[before] - times) <= np.abs(others[after] - times)
    return np.where(nearer, before, after)


def left_out(total: int, **reasons: int) -> list[Note]:
    """A note on frames that are left out: how many for which reason, words joined by `_`."""
    parts = [f"{count} {name.replace('_', ' ')}" for name, count in reasons.items() if count]
    if not parts:
        return []
    count = sum(reasons.values())
    return [Note("left out", f"{count} of {total} frames are left out: {', '.join(parts)}")]
