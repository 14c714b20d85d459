"""Reading a built trajectory: trainers, validation, pictures and exports all come here.

Headers are checked against the schema before anything is allocated, and pickles are never loaded.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.lib import format as npy
from numpy.typing import NDArray

from occgen_hub.config import MAX_CELLS
from occgen_hub.errors import DatasetError
from occgen_hub.files import read_json, read_jsonl
from occgen_hub.geometry.cloud import Cloud
from occgen_hub.geometry.ply import read_ply
from occgen_hub.media import read_depth, read_rgb
from occgen_hub.occupancy.codec import unpack
from occgen_hub.occupancy.grid import Grid
from occgen_hub.schema import Schema, load_schema

REBUILD = "build this trajectory again"
MAX_ARRAY_BYTES = 1 << 33
SCHEMA = "trajectory"


def trajectories(root: Path) -> list[Path]:
    """The trajectories below a folder, or the folder itself if it is one, sorted."""
    mark = load_schema(SCHEMA).path("record")
    if (root / mark).is_file():
        return [root]
    found = []
    for parent, folders, _ in os.walk(root):
        if (Path(parent) / mark).is_file():
            found.append(Path(parent))
            folders.clear()
        else:
            folders[:] = sorted(name for name in folders if not name.startswith("."))
    return found


@dataclass(frozen=True)
class NpzArray:
    """An array in an npz: its header, read; `load` reads the rest."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def load(self) -> NDArray[Any]:
        """The whole array; raises DatasetError when it is not all there."""
        if self.size_bytes > MAX_ARRAY_BYTES:
            raise DatasetError(
                self.path, f"array {self.name} claims {self.size_bytes} bytes", REBUILD
            )
        flat = np.frombuffer(b"".join(self._chunks(self.size_bytes)), self.dtype)
        return flat.reshape(self.shape)

    def rows(self) -> Iterator[NDArray[Any]]:
        """The rows of a 2-D array, one in memory at a time."""
        width = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        if width > MAX_ARRAY_BYTES:
            raise DatasetError(
                self.path, f"array {self.name} claims rows of {width} bytes", REBUILD
            )
        with _open_member(self.path, self.name) as (file, _):
            for _ in range(self.shape[0]):
                row = file.read(width)
                if len(row) < width:
                    raise DatasetError(self.path, f"array {self.name} is cut short", REBUILD)
                yield np.frombuffer(row, self.dtype).reshape(self.shape[1:])

    @property
    def size_bytes(self) -> int:
        """How many bytes the header says there are."""
        size = self.dtype.itemsize
        for n in self.shape:
            size *= n
        return size

    def _chunks(self, left: int) -> Iterator[bytes]:
        with _open_member(self.path, self.name) as (file, _):
            while left:
                chunk = file.read(min(left, 1 << 22))
                if not chunk:
                    raise DatasetError(self.path, f"array {self.name} is cut short", REBUILD)
                left -= len(chunk)
                yield chunk


@contextmanager
def _open_member(path: Path, name: str) -> Iterator[tuple[IO[bytes], NpzArray]]:
    """An array inside an npz, opened past its header, which has been read and checked."""
    broken = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
            shape, fortran, dtype = _read_header(file)
            if dtype.hasobject or fortran:
                raise DatasetError(path, f"array {name} is pickled or not in C order", REBUILD)
            yield file, NpzArray(path, name, shape, dtype)
    except FileNotFoundError:
        raise DatasetError(path, "is missing", REBUILD) from None
    except KeyError:
        raise DatasetError(path, f"has no array {name}", REBUILD) from None
    except broken as error:
        raise DatasetError(path, f"array {name} cannot be read ({error})", REBUILD) from None


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran order, and type; raises ValueError when it is no npy file."""
    magic = npy.read_magic(file)  # type: ignore[no-untyped-call]  # numpy's own
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(magic)
    if read is None:
        raise ValueError("of an unknown version")
    shape, fortran, dtype = read(file)  # type: ignore[no-untyped-call]  # numpy's own
    if min(shape, default=0) < 0:
        raise ValueError("of a negative size")
    return shape, fortran, dtype


def npz_array(path: Path, name: str) -> NpzArray:
    """The header of an array in an npz; raises DatasetError when it cannot be read."""
    with _open_member(path, name) as (_, array):
        return array


@dataclass(frozen=True)
class Trajectory:
    """A built trajectory on disk; each call reads the file that it needs, and no other."""

    path: Path
    schema: Schema
    record: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> Trajectory:
        """The trajectory in a folder; raises SourceError when it has no usable record."""
        schema = load_schema(SCHEMA)
        return cls(path, schema, read_json(path / schema.path("record")))

    def file(self, key: str, frame: int | None = None) -> Path:
        """The place of a file of the schema."""
        return self.path / self.schema.path(key, frame)

    @property
    def grid(self) -> Grid:
        """The camera grid of its occupancy."""
        try:
            grid = self.record["grid"]
            x, y, z = (float(v) for v in grid["pc_range"][:3])
            nx, ny, nz = (int(n) for n in grid["shape"])
            found = Grid((x, y, z), float(grid["voxel_size"]), (nx, ny, nz))
        except (KeyError, TypeError, ValueError):
            raise DatasetError(self.file("record"), "does not describe a grid", REBUILD) from None
        if min(found.shape) < 1 or found.cells > MAX_CELLS or not found.voxel_size > 0:
            raise DatasetError(self.file("record"), f"claims a grid of {found.shape}", REBUILD)
        return found

    @property
    def image_size(self) -> tuple[int, int]:
        """(width, height) of its images, pixels."""
        try:
            width, height = (int(n) for n in self.record["scene"]["image_size"])
        except (KeyError, TypeError, ValueError):
            raise DatasetError(
                self.file("record"), "does not say the image size", REBUILD
            ) from None
        return width, height

    def info(self) -> dict[str, Any]:
        """meta/info.json."""
        return read_json(self.file("info"))

    def tasks(self) -> list[str]:
        """The instructions, in words, by task_index."""
        return [str(row.get("task", "")) for row in read_jsonl(self.file("tasks"))]

    def table(self) -> pa.Table:
        """The parquet; raises DatasetError when it cannot be read."""
        path = self.file("frames")
        try:
            return pq.ParquetFile(path).read()
        except (pa.ArrowException, OSError, ValueError) as error:
            text = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
            raise DatasetError(path, f"cannot be read ({text.rstrip('.')})", REBUILD) from None

    def column(self, name: str, table: pa.Table | None = None) -> NDArray[Any]:
        """A column of the schema as (T, *shape), or (T,) for plain numbers."""
        table = self.table() if table is None else table
        if name not in table.column_names:
            raise DatasetError(self.file("frames"), f"has no column {name}", REBUILD)
        try:
            return self.schema.features[name].to_numpy(table[name])
        except (ValueError, AttributeError) as error:
            raise DatasetError(self.file("frames"), f"column {name}: {error}", REBUILD) from None

    def world_from_camera(self) -> NDArray[np.float64]:
        """(T, 4, 4) float64, OpenCV axes, metres."""
        return self.column(self.schema.poses).astype(np.float64)

    def intrinsics(self) -> NDArray[np.float64]:
        """(T, 3, 3) float64, pixels of the original image."""
        return self.column(self.schema.intrinsics).astype(np.float64)

    def visible(self) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
        """The visible occupied cells: (T + 1,) row ends and (n,) columns, as in a CSR matrix."""
        path = self.file("visible")
        ends, columns = npz_array(path, "indptr").load(), npz_array(path, "indices").load()
        rising = ends.ndim == 1 and len(ends) and ends[0] == 0 and (np.diff(ends) >= 0).all()
        if columns.ndim != 1 or not rising or ends[-1] != len(columns):
            raise DatasetError(path, "is not a CSR matrix", REBUILD)
        return ends, columns

    def observed(self) -> Iterator[NDArray[np.bool_]]:
        """(cells,) bool of each frame in order: observed, free and occupied alike."""
        cells = self.grid.cells
        for row in npz_array(self.file("observed"), "data").rows():
            yield unpack(row, cells)

    def scene_cells(self) -> NDArray[np.float32]:
        """(M, 3) float32: centres of the scene's occupied cells, world, metres."""
        return npz_array(self.file("scene_occupancy"), "data").load()

    def cloud(self) -> Cloud:
        """The scene's cloud, thinned, world, metres."""
        return read_ply(self.file("scene_cloud"))

    def rgb(self, frame: int) -> NDArray[np.uint8] | None:
        """(H, W, 3) uint8, or None where the images were left out."""
        path = self.file("rgb", frame)
        return read_rgb(path, self.image_size) if path.is_file() else None

    def depth(self, frame: int) -> NDArray[np.float64] | None:
        """(H, W) float64 metres, or None where depth was left out."""
        path = self.file("depth", frame)
        return read_depth(path, self.image_size) / 10_000 if path.is_file() else None
