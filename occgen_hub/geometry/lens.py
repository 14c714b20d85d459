"""Lenses: images and depth of a distorted camera, as a pinhole camera has them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from occgen_hub.geometry.camera import scale_intrinsics

CENTRE = 0.5
"""Where the centre of a pixel lies; OpenCV counts from it, see `opencv_matrix`."""


def opencv_matrix(fx: float, fy: float, cx: float, cy: float) -> NDArray[np.float64]:
    """(3, 3) float64 intrinsics, from numbers as OpenCV, ROS and RealSense give them.

    There the centre of the first pixel is (0, 0); here it is (0.5, 0.5).
    """
    return np.array([[fx, 0.0, cx + CENTRE], [0.0, fy, cy + CENTRE], [0.0, 0.0, 1.0]])


@dataclass(frozen=True)
class Lens:
    """A calibrated camera.

    Attributes:
        fx, fy, cx, cy: pixels; pixel (u, v) has its centre at (u + 0.5, v + 0.5).
        size: (width, height) of the images that these numbers are of, pixels.
        distortion: OpenCV's coefficients. "radial": k1, k2, p1, p2[, k3[, k4, k5, k6]], of 4, 5 or
            8; "fisheye": k1 to k4. Empty, or all 0, for none.
        model: OpenCV's model of the distortion.
    """

    fx: float
    fy: float
    cx: float
    cy: float
    size: tuple[int, int]
    distortion: tuple[float, ...] = ()
    model: Literal["radial", "fisheye"] = "radial"

    @classmethod
    def of(
        cls,
        K: NDArray[np.floating],
        size: tuple[int, int],
        distortion: tuple[float, ...] = (),
        model: Literal["radial", "fisheye"] = "radial",
    ) -> Lens:
        """From a (3, 3) matrix, pixel centres at a half."""
        fx, fy, cx, cy = (float(K[at]) for at in ((0, 0), (1, 1), (0, 2), (1, 2)))
        return cls(fx, fy, cx, cy, size, distortion, model)

    @property
    def matrix(self) -> NDArray[np.float64]:
        """(3, 3) float64 intrinsics of the pinhole camera without the distortion."""
        return np.array([[self.fx, 0.0, self.cx], [0.0, self.fy, self.cy], [0.0, 0.0, 1.0]])

    def resized(self, size: tuple[int, int]) -> Lens:
        """The same lens for images of another (width, height)."""
        if size == self.size:
            return self
        K = scale_intrinsics(self.matrix, size[0] / self.size[0], size[1] / self.size[1])
        return Lens.of(K, size, self.distortion, self.model)

    @property
    def distorts(self) -> bool:
        """Whether it is not a pinhole camera as it is."""
        return any(self.distortion) or self.model == "fisheye"

    def pinhole(self) -> Lens:
        """The camera with the same matrix and size and no distortion."""
        return replace(self, distortion=(), model="radial")


@dataclass(frozen=True)
class PinholeView:
    """What a camera saw, resampled to what a pinhole camera at its place sees.

    source: the camera that took the images; target: the pinhole camera, of the same place and axes.
    Where the target looks past the source's image, colour is black and depth 0.
    """

    source: Lens
    target: Lens

    @property
    def same(self) -> bool:
        """Whether images stay as they are."""
        return not self.source.distorts and self.source.pinhole() == self.target

    def color(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(h, w, 3) uint8 of the source to (H, W, 3) of the target.

        Interpolated bilinearly, after pixels were averaged where many of them become one.
        """
        if self.same:
            return image
        import cv2

        if self._reduced.size != self.source.size:
            smaller = cv2.resize(image, self._reduced.size, interpolation=cv2.INTER_AREA)
            image = np.asarray(smaller, np.uint8)
        x, y = self._color_maps
        mapped = cv2.remap(image, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
        return np.asarray(mapped, np.uint8)

    def depth[Number: np.generic](self, image: NDArray[Number]) -> NDArray[Number]:
        """(h, w) of the source to (H, W) of the target, each the nearest pixel's.

        Depth is along the optical axis, which both cameras share, so values stay as they are.
        """
        if self.same:
            return image
        rows, columns, inside = self._nearest
        mapped: NDArray[Number] = np.where(inside, image[rows, columns], image.dtype.type(0))
        return mapped

    @cached_property
    def _reduced(self) -> Lens:
        """The source, its images made as many times smaller as the target's are, if at all."""
        (width, height), (w, h) = self.source.size, self.target.size
        factor = min(width // w, height // h)
        return (
            self.source.resized((width // factor, height // factor)) if factor > 1 else self.source
        )

    @cached_property
    def _color_maps(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return _maps(self._reduced, self.target)

    @cached_property
    def _nearest(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        x, y = _maps(self.source, self.target)
        width, height = self.source.size
        columns, rows = np.rint(x).astype(np.int64), np.rint(y).astype(np.int64)
        inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
        return rows.clip(0, height - 1), columns.clip(0, width - 1), inside


def _maps(source: Lens, target: Lens) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(H, W) float32 columns and rows of the source, as OpenCV counts, for each target pixel."""
    import cv2

    half = np.array([[0, 0, CENTRE], [0, 0, CENTRE], [0, 0, 0]])
    K, wanted = source.matrix - half, target.matrix - half
    coefficients: NDArray[Any] = np.asarray(source.distortion or np.zeros(4), np.float64)
    how = (K, coefficients, np.eye(3), wanted, target.size, cv2.CV_32FC1)
    fisheye = source.model == "fisheye"
    make = cv2.fisheye.initUndistortRectifyMap if fisheye else cv2.initUndistortRectifyMap
    x, y = make(*how)
    return np.asarray(x, np.float32), np.asarray(y, np.float32)
