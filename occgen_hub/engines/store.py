"""Depth, confidence and colours of a video's frames on disk, to bound the use of memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

MAX_CONFIDENCE = 65_535
"""The stored value of a confidence of 1."""


class FrameStore:
    """Depth, confidence and colours of frames of one size, numbered in the order of adding.

    folder: for the files; size: (width, height) in pixels. Frames may be read from several threads
    at once.
    """

    def __init__(self, folder: Path, size: tuple[int, int]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._shape = size[::-1]
        self._paths = {name: folder / f"{name}.raw" for name in ("depth", "confidence", "color")}

    def add(
        self,
        depth: NDArray[np.float32],
        confidence: NDArray[np.float32],
        color: NDArray[np.uint8],
    ) -> None:
        """Append a frame: (h, w) depth, 0 for none; (h, w) confidence in [0, 1]; (h, w, 3) RGB."""
        # Two bytes, because one byte would round all confidences above 0.998 to 1.
        stored = np.rint(confidence * MAX_CONFIDENCE).astype(np.uint16)
        arrays = {"depth": depth.astype(np.float32), "confidence": stored, "color": color}
        for name, array in arrays.items():
            with self._paths[name].open("ab") as file:
                file.write(np.ascontiguousarray(array).tobytes())

    def depth(self, number: int) -> NDArray[np.float32]:
        """(h, w) float32 depth of a frame, 0 for none."""
        return self._read("depth", np.float32, number, self._shape)

    def confidence(self, number: int) -> NDArray[np.float32]:
        """(h, w) float32 in [0, 1], in steps of 1/65,535."""
        stored = self._read("confidence", np.uint16, number, self._shape)
        return stored.astype(np.float32) / np.float32(MAX_CONFIDENCE)

    def color(self, number: int) -> NDArray[np.uint8]:
        """(h, w, 3) uint8 RGB of a frame."""
        return self._read("color", np.uint8, number, (*self._shape, 3))

    def _read[Scalar: np.generic](
        self, name: str, dtype: type[Scalar], number: int, shape: tuple[int, ...]
    ) -> NDArray[Scalar]:
        count = int(np.prod(shape))
        start = number * count * np.dtype(dtype).itemsize
        return np.fromfile(self._paths[name], dtype, count, offset=start).reshape(shape)
