"""Lens distortion: resample images and depth of a distorted camera to a pinhole camera."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from occgen_hub.geometry.camera import scale_intrinsics

CENTRE = 0.5
"""Coordinates of the first pixel's centre. In OpenCV they are 0, see `opencv_matrix`."""


def opencv_matrix(fx: float, fy: float, cx: float, cy: float) -> NDArray[np.float64]:
    """(3, 3) float64 intrinsics from numbers of OpenCV, ROS or RealSense, in pixels.

    There the centre of the first pixel is (0, 0), here it is (0.5, 0.5).
    """
    return np.array([[fx, 0.0, cx + CENTRE], [0.0, fy, cy + CENTRE], [0.0, 0.0, 1.0]])


@dataclass(frozen=True)
class Lens:
    """A calibrated camera.

    Attributes:
        fx, fy, cx, cy: pixels; pixel (u, v) has its centre at (u + 0.5, v + 0.5).
        size: (width, height) of the images to which these numbers apply, pixels.
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
        """A lens from (3, 3) intrinsics with pixel centres at a half."""
        fx, fy, cx, cy = (float(K[at]) for at in ((0, 0), (1, 1), (0, 2), (1, 2)))
        return cls(fx, fy, cx, cy, size, distortion, model)

    @property
    def matrix(self) -> NDArray[np.float64]:
        """(3, 3) float64 intrinsics without the distortion, in pixels."""
        return np.array([[self.fx, 0.0, self.cx], [0.0, self.fy, self.cy], [0.0, 0.0, 1.0]])

    def resized(self, size: tuple[int, int]) -> Lens:
        """The same lens for images of another (width, height)."""
        if size == self.size:
            return self
        K = scale_intrinsics(self.matrix, size[0] / self.size[0], size[1] / self.size[1])
        return Lens.of(K, size, self.distortion, self.model)

    @property
    def distorts(self) -> bool:
        """Whether this is not a pinhole camera."""
        return any(self.distortion) or self.model == "fisheye"

    def pinhole(self) -> Lens:
        """The pinhole camera with the same matrix and size."""
        return replace(self, distortion=(), model="radial")


@dataclass(frozen=True)
class PinholeView:
    """Resamples images of a camera to a pinhole camera with the same pose.

    source: the camera that took the images; target: the pinhole camera. Pixels of the target
    outside the source's image become black, with depth 0.
    """

    source: Lens
    target: Lens

    @property
    def same(self) -> bool:
        """Whether images are unchanged."""
        return not self.source.distorts and self.source.pinhole() == self.target

    def color(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Resample (h, w, 3) uint8 of the source to (H, W, 3) uint8 of the target.

        The interpolation is bilinear. If the target is much smaller, pixels are averaged first.
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
        """Resample (h, w) depth of the source to (H, W) of the target, by the nearest pixel.

        Depth is along the optical axis, which both cameras share, so values do not change.
        """
        if self.same:
            return image
        rows, columns, inside = self._nearest
        mapped: NDArray[Number] = np.where(inside, image[rows, columns], image.dtype.type(0))
        return mapped

    @cached_property
    def _reduced(self) -> Lens:
        """The source with its images reduced by the integer factor of the target's size."""
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
    """(H, W) float32 columns and rows in the source, in OpenCV's convention, per target pixel."""
    import cv2

    half = np.array([[0, 0, CENTRE], [0, 0, CENTRE], [0, 0, 0]])
    K, wanted = source.matrix - half, target.matrix - half
    coefficients: NDArray[Any] = np.asarray(source.distortion or np.zeros(4), np.float64)
    arguments = (K, coefficients, np.eye(3), wanted, target.size, cv2.CV_32FC1)
    fisheye = source.model == "fisheye"
    make = cv2.fisheye.initUndistortRectifyMap if fisheye else cv2.initUndistortRectifyMap
    x, y = make(*arguments)
    return np.asarray(x, np.float32), np.asarray(y, np.float32)
