"""Long videos: windows that overlap, joined one after the other into one world.

In memory are the cameras, and the frames that the next window will share; the depth of frames that
are done is in a store on disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from occgen_hub.engines.store import FrameStore
from occgen_hub.geometry.camera import fit_intrinsics
from occgen_hub.geometry.joining import Overlap, blend, join
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
    frames; kept: (n, h, w) bool, those to join and fit by: sure, and not at an edge; confidence:
    (n, h, w) float32 in [0, 1], 0 where there is no point; colors: (n, h, w, 3) uint8.
    """

    world_from_camera: NDArray[np.float64]
    local: NDArray[np.float32]
    kept: NDArray[np.bool_]
    confidence: NDArray[np.float32]
    colors: NDArray[np.uint8]

    def __len__(self) -> int:
        """How many views there are."""
        return len(self.local)

    def __getitem__(self, part: slice) -> Window:
        """Some of the views."""
        return Window(
            self.world_from_camera[part],
            self.local[part],
            self.kept[part],
            self.confidence[part],
            self.colors[part],
        )

    def moved(self, sim3: Sim3) -> Window:
        """The same in another world."""
        local = self.local * np.float32(sim3.scale)
        return replace(self, world_from_camera=sim3.poses(self.world_from_camera), local=local)


def concatenated(first: Window, second: Window) -> Window:
    """The views of both."""
    return Window(
        np.concatenate([first.world_from_camera, second.world_from_camera]),
        np.concatenate([first.local, second.local]),
        np.concatenate([first.kept, second.kept]),
        np.concatenate([first.confidence, second.confidence]),
        np.concatenate([first.colors, second.colors]),
    )


class Assembly:
    """Views of all windows, in the world of the first camera and the scale of the first window.

    store: where the depth of views goes that are done; image_size: (width, height) that intrinsics
    are for.

    Attributes: world_from_camera, (4, 4) of each view that is done; intrinsics, (3, 3) of each,
    None where none fits; residuals and unscaled, of the joins: see `geometry.joining.join`.
    """

    def __init__(self, store: FrameStore, image_size: tuple[int, int]) -> None:
        self._store, self._size = store, image_size
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
        done = len(window) - shared_after
        for view in range(done):
            self._keep(window, view)
        self._tail = concatenated(window[done:], window[:0])  # A copy: the rest is let go.

    def _joined(self, tail: Window, window: Window, shared: int) -> Window:
        """A window in the first one's world, with what the tail says of the views that both have.

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
        return replace(merged, world_from_camera=poses)

    def _keep(self, window: Window, view: int) -> None:
        """Store a view that no later window changes."""
        confidence = window.confidence[view]
        depth = np.where(confidence > 0, window.local[view][..., 2], np.float32(0))
        self._store.add(depth, confidence, window.colors[view])
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
