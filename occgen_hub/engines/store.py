"""What a network made of each frame, on disk: memory does not grow with the length of a video."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray


class FrameStore:
    """Depth, confidence and colours of frames of one size, in the order in which they were added.

    folder: where the files go; size: (width, height), pixels. Frames are read by their place, from
    several threads at once if need be.
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
        """One more frame: (h, w) depth, 0 for none; (h, w) confidence in [0, 1]; (h, w, 3) RGB."""
        arrays = {"depth": depth, "confidence": np.rint(confidence * 255).astype(np.uint8)}
        for name, array in {**arrays, "color": color}.items():
            with self._paths[name].open("ab") as file:
                file.write(np.ascontiguousarray(array).tobytes())

    def depth(self, place: int) -> NDArray[np.float32]:
        """(h, w) float32."""
        return self._read("depth", np.float32, place, self._shape)

    def confidence(self, place: int) -> NDArray[np.float32]:
        """(h, w) float32 in [0, 1], to 1/255."""
        stored = self._read("confidence", np.uint8, place, self._shape)
        return stored.astype(np.float32) / np.float32(255)

    def color(self, place: int) -> NDArray[np.uint8]:
        """(h, w, 3) uint8."""
        return self._read("color", np.uint8, place, (*self._shape, 3))

    def _read[Scalar: np.generic](
        self, name: str, dtype: type[Scalar], place: int, shape: tuple[int, ...]
    ) -> NDArray[Scalar]:
        count = int(np.prod(shape))
        start = place * count * np.dtype(dtype).itemsize
        return np.fromfile(self._paths[name], dtype, count, offset=start).reshape(shape)
