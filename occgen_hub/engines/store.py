"""What a network made of each frame, on disk: memory does not grow with the length of a video."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SURE = 65_535
"""How a confidence of 1 is stored."""


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
        # In two bytes: in one, all that is surer than 0.998 would be entirely sure.
        sure = np.rint(confidence * SURE).astype(np.uint16)
        arrays = {"depth": depth.astype(np.float32), "confidence": sure, "color": color}
        for name, array in arrays.items():
            with self._paths[name].open("ab") as file:
                file.write(np.ascontiguousarray(array).tobytes())

    def depth(self, place: int) -> NDArray[np.float32]:
        """(h, w) float32."""
        return self._read("depth", np.float32, place, self._shape)

    def confidence(self, place: int) -> NDArray[np.float32]:
        """(h, w) float32 in [0, 1], to 1/65,535."""
        stored = self._read("confidence", np.uint16, place, self._shape)
        return stored.astype(np.float32) / np.float32(SURE)

    def color(self, place: int) -> NDArray[np.uint8]:
        """(h, w, 3) uint8."""
        return self._read("color", np.uint8, place, (*self._shape, 3))

    def _read[Scalar: np.generic](
        self, name: str, dtype: type[Scalar], place: int, shape: tuple[int, ...]
    ) -> NDArray[Scalar]:
        count = int(np.prod(shape))
        start = place * count * np.dtype(dtype).itemsize
        return np.fromfile(self._paths[name], dtype, count, offset=start).reshape(shape)
