"""Occupancy on disk: npz files with CSR matrices and packed masks, written frame by frame.

The files have the format of `scipy.sparse.save_npz` and `numpy.savez_compressed`. Writing needs
memory for one frame only, whatever the length of the trajectory.

Most of the time is spent in deflate. Measured for a frame of a real trajectory: for observed bits,
zlib takes 4.1 ms and gives 10.8 kB, zlib-ng at level 5 1.0 ms and 10.1 kB, with the same bytes on
every processor if it is fed frame by frame. For sorted columns, zlib takes 3.7 ms and gives 46.8
kB, at level 1 1.7 ms and 47.1 kB; zlib-ng does not find their short repeats (73.6 kB).
"""

from __future__ import annotations

import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from zlib_ng import zlib_ng

_CHUNK = 1 << 20


class NpzWriter:
    """A compressed npz whose arrays may be streamed. Equal content gives equal bytes."""

    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, allowZip64=True)

    def add(self, name: str, array: NDArray[Any]) -> None:
        """Write a whole array."""
        with self.stream(name, array.dtype, array.shape) as file:
            file.write(np.ascontiguousarray(array).tobytes())

    def add_bits(self, name: str, packed: NDArray[np.uint8]) -> None:
        """Write a whole array of packed bits, compressed as masks are."""
        with self.stream(name, np.uint8, packed.shape, _bits_compressor) as file:
            file.write(np.ascontiguousarray(packed).tobytes())

    @contextmanager
    def stream(
        self,
        name: str,
        dtype: Any,
        shape: tuple[int, ...],
        deflate: Callable[[], Any] | None = None,
    ) -> Iterator[IO[bytes]]:
        """A file for an array's elements, written in C order.

        deflate: creates a raw compressor like `zlib.compressobj`; None uses zipfile's.
        """
        with self._zip.open(f"{name}.npy", "w", force_zip64=True) as file:
            if deflate is not None:
                # zipfile has no public way to set a compressor.
                file._compressor = deflate()  # type: ignore[attr-defined]  # see above
            header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
            npy.write_array_header_1_0(file, header)  # type: ignore[no-untyped-call]  # numpy's own
            yield file

    def __enter__(self) -> Self:
        """For `with`; the file is complete when the block ends."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finish the archive."""
        self._zip.close()


class CellsWriter:
    """Writes a CSR matrix (frames, cells), row by row: of ones, such as the visible cells, or of
    values, such as their classes. Instead of cells, its columns may be pixels.
    """

    def __init__(self, path: Path, cells: int) -> None:
        self._path, self._cells = path, cells
        self._ends = [0]
        self._columns = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115  # closed by close()
        self._values = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115  # closed by close()

    @property
    def count(self) -> int:
        """The number of cells in all frames so far."""
        return self._ends[-1]

    def append(self, columns: NDArray[np.int32], values: NDArray[np.uint8] | None = None) -> None:
        """Append the cells of one frame. columns: (n,) int32, sorted; values: (n,), None for ones.

        Either all frames have values or none.
        """
        self._columns.write(columns.tobytes())
        if values is not None:
            self._values.write(values.tobytes())
        self._ends.append(self._ends[-1] + len(columns))

    def close(self) -> None:
        """Write the file, from the columns that were kept in a temporary file."""
        frames, count = len(self._ends) - 1, self._ends[-1]
        # scipy needs one dtype for both index arrays, wide enough for the number of entries.
        index = np.dtype(np.int32 if count < 2**31 else np.int64)
        with self._columns, self._values, NpzWriter(self._path) as out:
            self._columns.seek(0)
            with out.stream("indices", index, (count,), _columns_compressor) as file:
                while chunk := self._columns.read(_CHUNK):
                    file.write(np.frombuffer(chunk, np.int32).astype(index, copy=False).tobytes())
            out.add("indptr", np.asarray(self._ends, index))
            out.add("format", np.array(b"csr"))
            out.add("shape", np.array([frames, self._cells], np.int64))
            with out.stream("data", np.uint8, (count,), _bits_compressor) as file:
                if self._values.tell():
                    self._values.seek(0)
                    while chunk := self._values.read(_CHUNK):
                        file.write(chunk)
                    return
                for start in range(0, count, _CHUNK):
                    file.write(b"\x01" * min(_CHUNK, count - start))


class ObservedWriter:
    """Writes the packed masks (frames, ceil(cells / 8)) of the observed cells, row by row."""

    def __init__(self, path: Path, frames: int, shape: tuple[int, int, int]) -> None:
        self._npz = NpzWriter(path)
        self._shape = shape
        width = -(-int(np.prod(shape)) // 8)
        self._stream = self._npz.stream("data", np.uint8, (frames, width), _bits_compressor)
        self._file = self._stream.__enter__()

    def append(self, observed: NDArray[np.uint8]) -> None:
        """Append one frame. observed: (ceil(cells / 8),) uint8, `np.packbits` of its mask."""
        self._file.write(observed.tobytes())

    def close(self) -> None:
        """Finish the file."""
        self._stream.__exit__(None, None, None)
        self._npz.add("shape", np.asarray(self._shape, np.int64))
        self._npz.add("mode", np.array("packed"))
        self._npz.__exit__(None, None, None)


def _bits_compressor() -> Any:
    return zlib_ng.compressobj(5, zlib_ng.DEFLATED, -15)


def _columns_compressor() -> Any:
    return zlib.compressobj(1, zlib.DEFLATED, -15)


def unpack(observed: NDArray[np.uint8], cells: int) -> NDArray[np.bool_]:
    """(..., ceil(cells / 8)) packed masks to (..., cells) bool."""
    return np.unpackbits(observed, axis=-1, count=cells).astype(bool)
