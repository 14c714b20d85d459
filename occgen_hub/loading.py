"""Reading built trajectories, for training, validation, pictures and exports.

Headers are checked against the schema before memory is allocated, and pickles are never loaded.
"""

from __future__ import annotations

import ast
import math
import os
import shlex
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite, prod
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from occgen_hub.config import MAX_CELLS
from occgen_hub.errors import DatasetError, SourceError, UsageError
from occgen_hub.files import (
    MAX_RECORD_BYTES,
    PUT_FILE,
    leaves_folder,
    opened,
    read_json,
    read_jsonl,
    read_parquet,
)
from occgen_hub.geometry.cloud import Cloud
from occgen_hub.geometry.ply import read_ply
from occgen_hub.media import MAX_PIXELS, VideoReader, read_depth, read_rgb
from occgen_hub.occupancy.codec import unpack
from occgen_hub.occupancy.grid import Grid
from occgen_hub.occupancy.states import BLOCK_BYTES, SceneStates
from occgen_hub.schema import Schema, load_schema
from occgen_hub.taxonomy import load_taxonomy, taxonomy_names

REBUILD = "remove this trajectory's folder and build it again"
NOT_BUILT = "give a folder written by occgen-hub build; if it is one, run the build again"
EXPORT = "meta/occgen_export.json"
"""The record of an export, see `lerobot.export_check`."""
NAVDP = "meta/occgen_navdp.json"
"""This file marks a folder as part of a NavDP export, see `navdp`."""

MAX_ARRAY_BYTES = 1 << 31
CHUNK = 1 << 22
SCHEMA = "trajectory"
RECORD = {"schema": dict, "source": dict, "grid": dict, "scene": dict, "notes": list, "files": dict}
"""The keys of a record that are checked on opening. `validate` checks the whole record."""


def trajectories(root: Path) -> list[Path]:
    """The trajectories below a folder, or the folder itself if it is one, sorted.

    Trajectories that lack a meta file are included, so that opening them reports the file. Exports,
    which look similar, are excluded. Raises DatasetError if a folder cannot be listed.
    """
    schema = load_schema(SCHEMA)
    marks = [schema.path(key) for key in ("record", "info")]
    found = []
    for parent, folders, _ in os.walk(root, onerror=_unlisted):
        if Path(parent, EXPORT).exists():
            folders.clear()
        elif any(Path(parent, mark).exists() for mark in marks):
            found.append(Path(parent))
            folders.clear()
        else:
            folders[:] = sorted(name for name in folders if not name.startswith("."))
    return found


def is_navdp_export(found: list[Path]) -> bool:
    """Whether the folders that `trajectories` found are those of a NavDP export."""
    return bool(found) and all((path / NAVDP).is_file() for path in found)


def _unlisted(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        problem, remedy = (
            f"cannot be listed ({error.strerror})",
            "check its permissions and its disk",
        )
        raise DatasetError(error.filename, problem, remedy) from error


def built(root: Path) -> list[Path]:
    """Like `trajectories`, but raises UsageError unless at least one of them was built.

    Damaged ones are included.
    """
    found, mark = trajectories(root), load_schema(SCHEMA).path("record")
    if any((path / mark).exists() for path in found):
        return found
    if (root / EXPORT).exists() or is_navdp_export(found):
        raise UsageError(f"{root}: is an export; give the dataset that it was made from.")
    if found:
        raise UsageError(
            f"{root}: has trajectories, but none with the {mark} that a build writes; give the "
            f"folder that occgen-hub build --input {shlex.quote(str(root))} wrote or, if this is "
            "it, run the build again."
        )
    problem = "has no trajectories" if root.is_dir() else "is not a folder"
    raise UsageError(f"{root}: {problem}; give the folder that occgen-hub build wrote.")


@dataclass(frozen=True)
class NpzArray:
    """The header of an array in an npz. `load` reads the data."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def load(self) -> NDArray[Any]:
        """Read the whole array. Raises DatasetError if it is truncated or too large."""
        if self.size_bytes > MAX_ARRAY_BYTES:
            raise DatasetError(
                self.path, f"array {self.name} claims {self.size_bytes} bytes", REBUILD
            )
        # Memory is used only when it is written, so a wrong size in the header costs nothing.
        content = np.empty(self.size_bytes, np.uint8)
        with _open_member(self.path, self.name) as (file, _):
            filled = 0
            while filled < len(content):
                chunk = file.read(min(CHUNK, len(content) - filled))
                if not chunk:
                    raise DatasetError(self.path, f"array {self.name} is cut short", REBUILD)
                content[filled : filled + len(chunk)] = np.frombuffer(chunk, np.uint8)
                filled += len(chunk)
        return content.view(self.dtype).reshape(self.shape)

    def rows(self) -> Iterator[NDArray[Any]]:
        """Yield the rows of a 2-D array, with one row in memory at a time."""
        width = prod(self.shape[1:]) * self.dtype.itemsize
        if not 0 < width <= MAX_ARRAY_BYTES:
            raise DatasetError(
                self.path, f"array {self.name} claims rows of {width} bytes", REBUILD
            )
        with _open_member(self.path, self.name) as (file, _):
            for _ in range(self.shape[0]):
                row = file.read(width)
                if len(row) < width:
                    raise DatasetError(self.path, f"array {self.name} is cut short", REBUILD)
                yield np.frombuffer(row, self.dtype).reshape(self.shape[1:])

    def pieces(self, ends: NDArray[np.integer], limit: int) -> Iterator[NDArray[Any]]:
        """Yield the elements of a 1-D array between successive `ends`, in ascending order.

        Raises DatasetError if a piece has more than `limit` elements or is truncated.
        """
        with _open_member(self.path, self.name) as (file, _):
            for count in np.diff(ends).tolist():
                if count > limit:
                    problem = f"array {self.name} has a row of {count} elements"
                    raise DatasetError(self.path, problem, REBUILD)
                piece = file.read(count * self.dtype.itemsize)
                if len(piece) < count * self.dtype.itemsize:
                    raise DatasetError(self.path, f"array {self.name} is cut short", REBUILD)
                yield np.frombuffer(piece, self.dtype)

    @property
    def size_bytes(self) -> int:
        """The size of the array in bytes, according to its header."""
        return prod(self.shape) * self.dtype.itemsize

    def check(self, kinds: str, *shape: int | None) -> NpzArray:
        """Return itself if its dtype has one of numpy's `kinds` and its shape is `shape`.

        None stands for any size. Raises DatasetError otherwise.
        """
        fits = len(shape) == len(self.shape) and all(
            size in (None, own) for size, own in zip(shape, self.shape, strict=True)
        )
        if self.dtype.kind not in kinds or not fits:
            problem = f"array {self.name} is {self.dtype} of shape {self.shape}"
            raise DatasetError(self.path, problem, REBUILD)
        return self


@contextmanager
def _open_member(path: Path, name: str) -> Iterator[tuple[IO[bytes], NpzArray]]:
    """Open an array in an npz, positioned after its header, which is checked."""
    broken = (
        *(OSError, ValueError, EOFError, RuntimeError, MemoryError, OverflowError),
        *(zipfile.BadZipFile, zlib.error, struct.error),
    )
    try:
        with (
            opened(path) as whole,
            zipfile.ZipFile(whole) as archive,
            archive.open(_member(archive, name)) as file,
        ):
            shape, fortran, dtype = _read_header(file)
            if dtype.hasobject or fortran:
                raise DatasetError(path, f"array {name} is pickled or not in C order", REBUILD)
            yield file, NpzArray(path, name, shape, dtype)
    except DatasetError:
        raise
    except SourceError as error:
        raise DatasetError(path, error.problem, REBUILD) from None
    except KeyError:
        raise DatasetError(path, f"has no array {name}", REBUILD) from None
    except broken as error:
        raise DatasetError(path, f"array {name} cannot be read ({error})", REBUILD) from None


def _member(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """Open a member. Raises KeyError if it is missing, ValueError if numpy did not write it."""
    member = archive.getinfo(f"{name}.npy")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError("its compression is unknown")
    return member


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran order, and dtype. Raises ValueError if it is not an npy file.

    numpy's reader is not used, because it takes a damaged header for one of Python 2 and raises
    arbitrary errors.
    """
    version = file.read(8).removeprefix(b"\x93NUMPY")
    if version not in (b"\1\0", b"\2\0"):
        raise ValueError("it is not an npy file of a known version")
    length = int.from_bytes(file.read(2 if version == b"\1\0" else 4), "little")
    text = file.read(min(length, _HEADER))
    if len(text) < length or b"\\" in text:  # Python would print a warning for escapes.
        raise ValueError("its header is damaged")
    try:
        header = ast.literal_eval(text.decode("latin1").strip())
        shape, fortran, kind = header["shape"], header["fortran_order"], header["descr"]
        dtype = np.dtype(kind) if isinstance(kind, str) else None
    except (SyntaxError, ValueError, TypeError, KeyError, MemoryError, RecursionError):
        raise ValueError("its header is damaged") from None
    sizes = shape if isinstance(shape, tuple) else (None,)
    if not all(type(size) is int and 0 <= size < 1 << 62 for size in sizes):
        raise ValueError("its header has no valid shape")
    if dtype is None or not dtype.itemsize or not isinstance(fortran, bool):
        raise ValueError("its header has no numeric type")
    return sizes, fortran, dtype


_HEADER = 10_000
"""Limit of a header in bytes. numpy's have about a hundred."""


def npz_array(path: Path, name: str) -> NpzArray:
    """Read the header of an array in an npz. Raises DatasetError."""
    with _open_member(path, name) as (_, array):
        return array


def _place(folder: Path, name: str) -> Path:
    """The path of a file of a trajectory. Raises DatasetError for a link out of the folder."""
    place = folder / name
    if leaves_folder(place, folder):
        raise DatasetError(place, "is a link that leads out of the trajectory", PUT_FILE)
    return place


def have_labels(folders: Iterable[Path]) -> bool:
    """Whether any of these trajectories has labels, by its files. Raises as `Trajectory.file`."""
    name = load_schema(SCHEMA).path("labels")
    return any(_place(folder, name).is_file() for folder in folders)


@dataclass(frozen=True)
class Trajectory:
    """A built trajectory on disk.

    A file is read when it is first used. Tables, meta files and row ends are cached; data that grow
    with the frames (cells, masks, images) are read again each time.
    """

    path: Path
    schema: Schema
    record: dict[str, Any]
    _kept: dict[tuple[str, str], Any] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def open(cls, path: Path) -> Trajectory:
        """Open the trajectory in a folder. Raises SourceError if it has no usable record."""
        schema = load_schema(SCHEMA)
        mark = _place(path, schema.path("record"))
        try:
            record = read_json(mark, MAX_RECORD_BYTES)
        except SourceError as error:
            raise DatasetError(mark, error.problem, NOT_BUILT) from None
        for key, kind in RECORD.items():
            if not isinstance(record.get(key), kind):
                raise DatasetError(mark, f"has no usable {key}", REBUILD)
        return cls(path, schema, record)

    def file(self, key: str, frame: int | None = None) -> Path:
        """The path of a file of the schema. Raises DatasetError for a link out of the folder."""
        return _place(self.path, self.schema.path(key, frame))

    @cached_property
    def grid(self) -> Grid:
        """The camera grid of its occupancy."""
        try:
            grid = self.record["grid"]
            x, y, z, *upper = (float(v) for v in grid["pc_range"])
            nx, ny, nz = (int(n) for n in grid["shape"])
            found = Grid((x, y, z), float(grid["voxel_size"]), (nx, ny, nz))
        except (KeyError, TypeError, ValueError, OverflowError):
            raise DatasetError(self.file("record"), "does not describe a grid", REBUILD) from None
        finite = all(map(isfinite, (*found.lower, *upper, found.voxel_size)))
        if not finite or len(upper) != 3 or found.voxel_size <= 0:
            raise DatasetError(self.file("record"), "does not describe a grid", REBUILD)
        if min(found.shape) < 1 or found.cells > MAX_CELLS:
            problem = f"does not have a grid of 1 to {MAX_CELLS} cells"
            raise DatasetError(self.file("record"), problem, REBUILD)
        return found

    @property
    def image_size(self) -> tuple[int, int]:
        """(width, height) of its images, pixels."""
        try:
            width, height = (int(n) for n in self.record["scene"]["image_size"])
        except (KeyError, TypeError, ValueError, OverflowError):
            raise DatasetError(
                self.file("record"), "does not state the image size", REBUILD
            ) from None
        if min(width, height) < 1 or width * height > MAX_PIXELS:
            problem = f"does not have images of 1 to {MAX_PIXELS} pixels"
            raise DatasetError(self.file("record"), problem, REBUILD)
        return width, height

    def info(self) -> dict[str, Any]:
        """meta/info.json."""
        return self.document("info")[0]

    def document(self, key: str) -> list[dict[str, Any]]:
        """The objects of a JSON Lines file of the schema, or the one object of a JSON file."""
        if ("document", key) not in self._kept:
            path, lines = self.file(key), self.schema.files[key].kind == "jsonl"
            self._kept["document", key] = read_jsonl(path) if lines else [read_json(path)]
        return self._kept["document", key]  # type: ignore[no-any-return]

    def tasks(self) -> list[str]:
        """The instructions as text, by task_index."""
        return [str(row.get("task", "")) for row in self.document("tasks")]

    def table(self) -> pa.Table:
        """The Parquet table of frames. Raises DatasetError if it cannot be read."""
        return self._table

    @cached_property
    def _table(self) -> pa.Table:
        path = self.file("frames")
        try:
            table = read_parquet(path)
        except SourceError as error:
            raise DatasetError(path, error.problem, REBUILD) from None
        if table.num_rows == 0:
            raise DatasetError(path, "has no frames", REBUILD)
        return table

    def column(self, name: str) -> NDArray[Any]:
        """A column of the schema as (T, *shape), or (T,) for plain numbers; read-only."""
        if ("column", name) not in self._kept:
            self._kept["column", name] = self._read_column(name)
        return self._kept["column", name]  # type: ignore[no-any-return]

    def _read_column(self, name: str) -> NDArray[Any]:
        table = self.table()
        feature = self.schema.features[name]
        if name not in table.column_names or table[name].type != feature.arrow_type():
            raise DatasetError(self.file("frames"), f"has no column {name} of its type", REBUILD)
        try:
            values = feature.to_numpy(table[name]).view()
        except ValueError as error:
            raise DatasetError(self.file("frames"), f"column {name}: {error}", REBUILD) from None
        values.flags.writeable = False
        return values

    def world_from_camera(self) -> NDArray[np.float64]:
        """(T, 4, 4) float64, OpenCV axes, metres. Add `world_origin` for the source's world."""
        poses = self.column(self.schema.poses).astype(np.float64)
        if not np.isfinite(poses).all():
            raise DatasetError(self.file("frames"), "has poses that are not finite", REBUILD)
        return poses

    @property
    def world_origin(self) -> NDArray[np.float64]:
        """(3,) float64, metres that were subtracted from the source's coordinates; mostly zeros."""
        return np.array(self.record["scene"].get("world_origin", (0.0, 0.0, 0.0)), np.float64)

    def intrinsics(self) -> NDArray[np.float64]:
        """(T, 3, 3) float64, pixels of the original image."""
        K = self.column(self.schema.intrinsics).astype(np.float64)
        if not (np.isfinite(K).all() and (K[:, [0, 1], [0, 1]] > 0).all()):
            raise DatasetError(self.file("frames"), "has invalid intrinsics", REBUILD)
        return K

    def visible_frames(self) -> Iterator[NDArray[np.integer]]:
        """Yield for each frame the (n,) columns of its visible occupied cells."""
        return self._frames("visible")

    def has_dynamic(self) -> bool:
        """Whether there are moving objects, that is, a file of moving cells."""
        return self.file("dynamic").is_file()

    def dynamic_frames(self) -> Iterator[NDArray[np.integer]]:
        """Yield for each frame the (n,) columns of visible cells with moving objects.

        They are empty if there is no file, because nothing moves. Raises DatasetError if the number
        of rows differs from the file of visible cells.
        """
        yield from self._optional_frames("dynamic")

    def left_out_frames(self) -> Iterator[NDArray[np.integer]]:
        """Yield for each frame the (n,) pixels `v * width + u` whose rays were left out.

        Those rays meet no occupied cell, and their pixels have no depth beyond the grid. Raises
        DatasetError as `dynamic_frames` does.
        """
        yield from self._optional_frames("left_out")

    def _optional_frames(self, key: str) -> Iterator[NDArray[np.integer]]:
        """Yield the columns of each row of a CSR file, none if the file does not exist."""
        frames = len(self.row_ends("visible")) - 1
        if not self.file(key).is_file():
            yield from (np.zeros(0, np.int32) for _ in range(frames))
            return
        rows = len(self.row_ends(key)) - 1
        if rows != frames:
            raise DatasetError(self.file(key), f"has {rows} rows for {frames} frames", REBUILD)
        yield from self._frames(key)

    @property
    def taxonomy(self) -> str | None:
        """The name of the taxonomy of its labels; None if it has no labels.

        Raises DatasetError for a file of labels without a known taxonomy.
        """
        if not self.file("labels").is_file():
            return None
        name = self.record.get("taxonomy")
        if name not in taxonomy_names():
            problem = "does not name a taxonomy of its labels that is known"
            raise DatasetError(self.file("record"), problem, REBUILD)
        return str(name)

    def label_frames(self) -> Iterator[NDArray[np.uint8]]:
        """Yield for each frame the (n,) uint8 classes of its visible cells, in their order.

        Raises DatasetError if there are no labels, or if they are not of the visible cells.
        """
        path, ends = self.file("labels"), self.row_ends("labels")
        if not np.array_equal(ends, self.row_ends("visible")):
            raise DatasetError(path, "has other rows than the visible cells", REBUILD)
        values = npz_array(path, "data").check("u", npz_array(path, "indices").shape[0])
        rows = zip(
            self._frames("visible"),
            self._frames("labels"),
            values.pieces(ends, self.grid.cells),
            strict=True,
        )
        known = load_taxonomy(str(self.taxonomy)).known()
        for frame, (visible, columns, classes) in enumerate(rows):
            if not np.array_equal(visible, columns):
                raise DatasetError(path, f"frame {frame}: is not of the visible cells", REBUILD)
            if values.dtype != np.uint8 or not known[classes].all():
                problem = f"frame {frame}: has classes that its taxonomy lacks"
                raise DatasetError(path, problem, REBUILD)
            yield classes

    def row_ends(self, key: str) -> NDArray[np.integer]:
        """(T + 1,) row pointers of a CSR file of the schema: where each frame's cells end."""
        return self._rows(key)[0]

    def _frames(self, key: str) -> Iterator[NDArray[np.integer]]:
        """Yield the columns of each row of a CSR file, with one row in memory at a time."""
        ends, stored = self._rows(key)
        for columns in stored.pieces(ends, self.row_width(key)):
            self._check_columns(key, columns)
            yield columns

    def row_width(self, key: str) -> int:
        """The number of columns of a CSR file of the schema: cells of the grid, or pixels."""
        return math.prod(self.image_size) if self._is_of_pixels(key) else self.grid.cells

    def _is_of_pixels(self, key: str) -> bool:
        return self.schema.files[key].arrays["data"].shape[1] == "pixels"

    def _rows(self, key: str) -> tuple[NDArray[np.integer], NpzArray]:
        path = self.file(key)
        columns = npz_array(path, "indices").check("i", None)
        if ("row ends", key) in self._kept:
            return self._kept["row ends", key], columns
        ends = npz_array(path, "indptr").check("i", None).load()
        rising = len(ends) and ends[0] == 0 and (ends[1:] >= ends[:-1]).all()
        if not rising or ends[-1] != columns.shape[0]:
            raise DatasetError(path, "is not a CSR matrix", REBUILD)
        self._kept["row ends", key] = ends
        return ends, columns

    def _check_columns(self, key: str, columns: NDArray[np.integer]) -> None:
        if len(columns) and not 0 <= columns.min() <= columns.max() < self.row_width(key):
            what = "image" if self._is_of_pixels(key) else "grid"
            raise DatasetError(self.file(key), f"has columns outside the {what}", REBUILD)

    def observed(self) -> Iterator[NDArray[np.bool_]]:
        """Yield for each frame (cells,) bool: whether a cell is observed, free or occupied."""
        cells = self.grid.cells
        for row in self.observed_packed():
            yield unpack(row, cells)

    def observed_packed(self) -> Iterator[NDArray[np.uint8]]:
        """Yield for each frame (ceil(cells / 8),) uint8: `np.packbits` of the observed cells."""
        packed = npz_array(self.file("observed"), "data")
        if packed.dtype != np.uint8:
            raise DatasetError(packed.path, f"array data is {packed.dtype}", REBUILD)
        yield from packed.check("u", None, -(-self.grid.cells // 8)).rows()

    def scene_cells(self) -> NDArray[np.float32]:
        """(M, 3) float32: centres of the scene's occupied cells, world, metres."""
        path = self.file("scene_occupancy")
        cells = npz_array(path, "data").check("f", None, 3).load()
        if not np.isfinite(cells).all():
            raise DatasetError(path, "has centres that are not finite", REBUILD)
        return cells

    def states(self) -> SceneStates:
        """The three states of the scene's cells, and the classes of the occupied ones if there are
        labels. Raises DatasetError if they are not valid.
        """
        path, bits = self.file("scene_occupancy"), (None, BLOCK_BYTES)
        blocks = npz_array(path, "blocks").check("i", None, 3).load().astype(np.int32)
        occupied, free = (npz_array(path, k).check("u", *bits).load() for k in ("occupied", "free"))
        try:
            states = SceneStates.from_packed(self.grid.voxel_size, blocks, occupied, free)
            if self.taxonomy is None:
                return states
            classes = npz_array(path, "labels").check("u", None).load()
            if classes.dtype != np.uint8 or not load_taxonomy(self.taxonomy).known()[classes].all():
                raise ValueError("has classes that its taxonomy lacks")
            return states.with_classes(self.scene_cells(), classes)
        except ValueError as error:
            raise DatasetError(path, str(error), REBUILD) from None

    def cloud(self) -> Cloud:
        """The scene's downsampled cloud, world metres. Raises SourceError."""
        return read_ply(self.file("scene_cloud"))

    def rgb(self, frame: int) -> NDArray[np.uint8] | None:
        """(H, W, 3) uint8 RGB, from the images or else the video; None if both were left out.

        A video has even sides, so that of an odd image size is resized.
        """
        return self.images()(frame)

    def images(self) -> Callable[[int], NDArray[np.uint8] | None]:
        """Like `rgb`, for many frames: a video is opened once. Ascending order is fast."""
        size, video = self.image_size, self.file("video")
        if self.file("rgb", 0).parent.is_dir():  # With images, a missing frame is an error.
            return lambda frame: read_rgb(self.file("rgb", frame), size)
        return VideoReader(video, size) if video.is_file() else lambda _: None

    def depth(self, frame: int) -> NDArray[np.float64] | None:
        """(H, W) float64 metres, 0 for none; None if depth was left out."""
        path = self.file("depth", frame)
        if not path.is_file():
            return None
        return read_depth(path, self.image_size) / self.schema.depth_units_per_metre
