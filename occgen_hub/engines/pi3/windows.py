"""Long videos: windows that overlap, joined one after the other into one scene.

What is kept is the fused cloud, the cameras, and the frames that the next window will share.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from occgen_hub.geometry.camera import fit_intrinsics
from occgen_hub.geometry.cloud import Cloud, VoxelDownsample
from occgen_hub.geometry.joining import Overlap, blend, join
from occgen_hub.geometry.poses import transform
from occgen_hub.geometry.sim3 import Sim3

JOIN_POINTS = 20_000
"""Of an overlap, for fitting a Sim3; more do not make it better."""

POOR_SEAM = 0.1
"""Median distance of an overlap's points after joining, as a share of their distance."""


def plan(count: int, size: int, overlap: int) -> list[range]:
    """Windows of at most `size` that cover `count` frames, each sharing `overlap` with the next.

    The last two may share more, so that the last is as long as the others.
    """
    if count <= size:
        return [range(count)]
    starts = [*range(0, count - size, size - overlap), count - size]
    return [range(start, start + size) for start in starts]


@dataclass(frozen=True)
class Window:
    """What a network makes of n views, in a world of its own.

    world_from_camera: (n, 4, 4) float64; local: (n, h, w, 3) float32 points in the cameras'
    frames; kept: (n, h, w) bool, those to believe; colors: (n, h, w, 3) uint8.
    """

    world_from_camera: NDArray[np.float64]
    local: NDArray[np.float32]
    kept: NDArray[np.bool_]
    colors: NDArray[np.uint8]

    def __len__(self) -> int:
        """How many views there are."""
        return len(self.local)

    def __getitem__(self, part: slice) -> Window:
        """Some of the views."""
        return Window(
            self.world_from_camera[part], self.local[part], self.kept[part], self.colors[part]
        )

    def moved(self, sim3: Sim3) -> Window:
        """The same in another world."""
        local = self.local * np.float32(sim3.scale)
        return Window(sim3.poses(self.world_from_camera), local, self.kept, self.colors)

    def points(
        self, view: int, depth_range: tuple[float, float]
    ) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
        """(m, 3) points of a view in the world, those within a range of depth, and colours."""
        depth = self.local[view][..., 2]
        kept = self.kept[view] & (depth >= depth_range[0]) & (depth <= depth_range[1])
        local = self.local[view][kept].astype(np.float64)
        return transform(self.world_from_camera[view], local), self.colors[view][kept]


def concatenated(first: Window, second: Window) -> Window:
    """The views of both."""
    return Window(
        np.concatenate([first.world_from_camera, second.world_from_camera]),
        np.concatenate([first.local, second.local]),
        np.concatenate([first.kept, second.kept]),
        np.concatenate([first.colors, second.colors]),
    )


class Assembly:
    """A scene made of windows, in the world of the first camera and the scale of the first window.

    voxel_size: of the fused cloud, in that scale; image_size: (width, height) that intrinsics
    are for; depth_range: nearest and farthest depth that is fused, in that scale: what lies far off
    shares no voxel with anything, and would take memory for each pixel.
    """

    def __init__(
        self,
        voxel_size: float,
        image_size: tuple[int, int],
        depth_range: tuple[float, float] = (0.0, math.inf),
    ) -> None:
        self._fused = VoxelDownsample(voxel_size)
        self._size, self._depth_range = image_size, depth_range
        self._tail: Window | None = None
        self.world_from_camera: list[NDArray[np.float64]] = []
        self.intrinsics: list[NDArray[np.float64] | None] = []
        self.residuals: list[float] = []
        self.unscaled = 0

    def add(self, window: Window, shared_before: int, shared_after: int) -> None:
        """Take the next window, which shares so many views with its neighbours."""
        if self._tail is None:
            window = window.moved(_inverse(window.world_from_camera[0]))
        else:
            window = self._joined(self._tail, window, shared_before)
        settled = len(window) - shared_after
        for view in range(settled):
            self._settle(window, view)
        self._tail = concatenated(window[settled:], window[:0])  # A copy: the rest is let go.

    @property
    def points(self) -> int:
        """How many the fused cloud has so far."""
        return len(self._fused)

    def cloud(self) -> Cloud:
        """The fused cloud so far."""
        return self._fused.cloud()

    def _joined(self, tail: Window, window: Window, shared: int) -> Window:
        """A window in the scene's world, with what the tail says of the views that both have.

        Their poses go over from the one's to the other's; of their points the nearer one's are
        taken: what a network sees at a window's end is seen from fewer sides.
        """
        fit = join(*_overlaps(tail, window[:shared]))
        self.residuals.append(fit.residual)
        self.unscaled += not fit.scaled
        window = window.moved(fit.sim3)
        poses = blend(tail.world_from_camera, window.world_from_camera[:shared])
        poses = np.concatenate([poses, window.world_from_camera[shared:]])
        merged = concatenated(tail[: shared // 2], window[shared // 2 :])
        return Window(poses, merged.local, merged.kept, merged.colors)

    def _settle(self, window: Window, view: int) -> None:
        """Take a view into the scene for good."""
        points, colors = window.points(view, self._depth_range)
        near = (np.abs(points) < self._fused.reach).all(axis=1)
        self._fused.add(points[near], colors[near])
        self.world_from_camera.append(window.world_from_camera[view])
        self.intrinsics.append(fit_intrinsics(window.local[view], window.kept[view], self._size))


def _inverse(world_from_camera: NDArray[np.float64]) -> Sim3:
    R, t = world_from_camera[:3, :3], world_from_camera[:3, 3]
    return Sim3(1.0, R, t).inverse()


def _overlaps(earlier: Window, later: Window) -> Iterator[Overlap]:
    """What two windows say of the same views, at the same pixels, evenly chosen."""
    both = np.flatnonzero(earlier.kept & later.kept)
    both = both[:: 1 + len(both) // JOIN_POINTS]
    views, pixels = np.divmod(both, earlier.kept[0].size)
    for window in (earlier, later):
        local = window.local.reshape(len(window), -1, 3)[views, pixels].astype(np.float64)
        poses = window.world_from_camera
        points = np.einsum("nij,nj->ni", poses[views, :3, :3], local) + poses[views, :3, 3]
        yield Overlap(points, poses)
