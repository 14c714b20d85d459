"""Several cameras with one clock, fused like one camera that jumps between their poses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
from numpy.typing import NDArray

from occgen_hub.fusion.moving import MovingPoints
from occgen_hub.geometry.camera import scale_intrinsics
from occgen_hub.views import Views


def joined_views(cameras: Sequence[Views]) -> Views:
    """The views of n cameras with one clock and one world, as those of one camera that jumps.

    Frame t of camera c is frame t * n + c. Depth, confidence, colours and labels are resized to the
    largest images, by the nearest pixel. Labels of cameras without labels are 0.
    """
    n, length = len(cameras), len(cameras[0].intrinsics)
    size = max((views.image_size for views in cameras), key=prod)
    poses = np.stack([views.world_from_camera for views in cameras], axis=1)
    intrinsics = [
        scale_intrinsics(views.intrinsics, *np.divide(size, views.image_size)) for views in cameras
    ]
    frames = [views.frames * n + c for c, views in enumerate(cameras)]

    def depth(frame: int) -> NDArray[np.float32]:
        own = cameras[frame % n].depth(frame // n)
        return np.ascontiguousarray(_nearest(own, size))

    def confidence(frame: int) -> NDArray[np.float32]:
        read = cameras[frame % n].read_confidence
        if read is None:
            return np.ones(size[::-1], np.float32)
        return np.ascontiguousarray(_nearest(read(frame // n), size))

    def color(frame: int) -> NDArray[np.uint8]:
        return np.ascontiguousarray(_nearest(cameras[frame % n].read_color(frame // n), size))

    def labels(frame: int) -> NDArray[np.uint8]:
        read = cameras[frame % n].read_labels
        if read is None:
            return np.zeros(size[::-1], np.uint8)
        return np.ascontiguousarray(_nearest(read(frame // n), size))

    labelled = any(views.read_labels is not None for views in cameras)
    unsure = any(views.read_confidence is not None for views in cameras)
    return replace(
        cameras[0],
        world_from_camera=np.ascontiguousarray(poses.reshape(n * length, 4, 4)),
        intrinsics=np.ascontiguousarray(np.stack(intrinsics, axis=1).reshape(n * length, 3, 3)),
        image_size=size,
        depth_size=size,
        frames=np.sort(np.concatenate(frames)),
        read_depth=depth,
        read_color=color,
        read_confidence=confidence if unsure else None,
        scale=1.0,  # Of the depth above.
        read_labels=labels if labelled else None,
    )


def _nearest[Pixel: np.generic](image: NDArray[Pixel], size: tuple[int, int]) -> NDArray[Pixel]:
    """(h, w, ...) pixels resized to `size` (width, height), by the nearest pixel."""
    (height, width), (wide, high) = image.shape[:2], size
    if (width, height) == size:
        return image
    rows = ((np.arange(high) + 0.5) * height / high).astype(np.int64)
    columns = ((np.arange(wide) + 0.5) * width / wide).astype(np.int64)
    return image[rows][:, columns]


@dataclass(frozen=True)
class JoinedMovingPoints:
    """The moving points of all n cameras at a time, from the moving points of `joined_views`."""

    frames: MovingPoints
    cameras: int

    def __call__(self, moment: int) -> NDArray[np.float32]:
        """(k, 3) float32 world metres."""
        first = moment * self.cameras
        return np.concatenate([self.frames(first + c) for c in range(self.cameras)])

    def labelled(self, moment: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """The same points, and their (k,) uint8 classes; see `MovingPoints.labelled`."""
        first = moment * self.cameras
        found = [self.frames.labelled(first + c) for c in range(self.cameras)]
        points, classes = zip(*found, strict=True)
        return np.concatenate(points), np.concatenate(classes)
