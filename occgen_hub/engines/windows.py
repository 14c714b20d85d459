"""Long videos: overlapping windows, joined one after another into one world.

Memory holds the cameras and the frames that the next window shares. The depth of frames is stored
on disk in the unit of its window, so that windows can be moved when a loop is found.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from occgen_hub.engines.store import FrameStore
from occgen_hub.geometry.camera import fit_intrinsics
from occgen_hub.geometry.joining import METRIC_ERROR, SCALE_ERROR, Overlap, blend, join
from occgen_hub.geometry.pose_graph import Edge
from occgen_hub.geometry.sim3 import Sim3

JOIN_POINTS = 20_000
"""Number of points of an overlap used to fit a Sim3; more do not improve it."""

ROTATION_ERROR, POSITION_ERROR = np.radians(0.5), 0.01
"""Assumed error of a join: radians, and a share of the window's extent."""

POOR_SEAM = 0.1
"""Median distance of points after joining, as a share of their depth, that is noted."""


def plan(count: int, size: int, overlap: int) -> list[range]:
    """Windows of at most `size` frames that cover `count` frames; neighbours share `overlap`.

    The last two may share more, so that all windows have the same length.
    """
    if count <= size:
        return [range(count)]
    starts = [*range(0, count - size, size - overlap), count - size]
    return [range(start, start + size) for start in starts]


@dataclass(frozen=True)
class Window:
    """A network's prediction for n views, in a world of its own.

    world_from_camera: (n, 4, 4) float64; local: (n, h, w, 3) float32 points in the cameras'
    frames; kept: (n, h, w) bool, the points used to join and fit: confident, and not at a depth
    edge; confidence: (n, h, w) float32 in [0, 1], 0 where there is no point; colors: (n, h, w, 3)
    uint8 RGB.
    """

    world_from_camera: NDArray[np.float64]
    local: NDArray[np.float32]
    kept: NDArray[np.bool_]
    confidence: NDArray[np.float32]
    colors: NDArray[np.uint8]

    def __len__(self) -> int:
        """The number of views."""
        return len(self.local)

    def __getitem__(self, part: slice) -> Window:
        """A window of some of the views."""
        return Window(
            self.world_from_camera[part],
            self.local[part],
            self.kept[part],
            self.confidence[part],
            self.colors[part],
        )

    def copy(self, start: int) -> Window:
        """A copy of the views from `start` on, without references to the others' memory."""
        return concatenated([self[start:]])


def concatenated(windows: list[Window]) -> Window:
    """One window with the views of all, which must be in one world."""
    return Window(
        np.concatenate([window.world_from_camera for window in windows]),
        np.concatenate([window.local for window in windows]),
        np.concatenate([window.kept for window in windows]),
        np.concatenate([window.confidence for window in windows]),
        np.concatenate([window.colors for window in windows]),
    )


class Assembly:
    """The views of all windows, in the world of the first camera and the scale of the first window.

    store: for the depth of views; image_size: (width, height), pixels, for the intrinsics; metric:
    whether the network's unit is the metre, see `geometry.joining.join`.

    Attributes: intrinsics: (3, 3) of each view, None where no pinhole camera fits; windows: the
    views of each window; nodes: world_from_window of each; edges: the joins of neighbours;
    residuals: of each join; unscaled: number of joins without a scale (`geometry.joining.join`).
    """

    def __init__(
        self, store: FrameStore, image_size: tuple[int, int], *, metric: bool = False
    ) -> None:
        self._store, self.image_size, self.metric = store, image_size, metric
        self._tail: Window | None = None
        self._poses: list[NDArray[np.float64]] = []
        self._owner: list[int] = []
        self.windows: list[range] = []
        self.nodes: list[Sim3] = []
        self.edges: list[Edge] = []
        self.intrinsics: list[NDArray[np.float64] | None] = []
        self.residuals: list[float] = []
        self.unscaled = 0

    def add(self, window: Window, shared_before: int, shared_after: int) -> None:
        """Add the next window. The numbers are of views shared with its neighbours."""
        # Relative to its first camera, because the error of a join rotates it about the origin.
        own = _inverse(window.world_from_camera[0]).poses(window.world_from_camera)
        window = replace(window, world_from_camera=own)
        if self._tail is None:
            self.nodes.append(Sim3.identity())
            start = 0
        else:
            self._join(self._tail, window, shared_before)
            start = self.windows[-1].stop - shared_before
        self.windows.append(range(start, start + len(window)))
        self._poses.append(window.world_from_camera)
        # Shared views get the depth of the window with the nearer middle, because views at the end
        # of a window are seen from fewer directions.
        end = len(window) - shared_after + shared_after // 2
        for view in range(len(self._owner) - start, end):
            self._store_view(window, view)
        self._tail = window.copy(len(window) - shared_after)

    @property
    def world_from_camera(self) -> NDArray[np.float64]:
        """(T, 4, 4) poses of all views."""
        return merged(self.nodes, list(zip(self.windows, self._poses, strict=True)))

    @property
    def scales(self) -> NDArray[np.float64]:
        """(m,) float64: the scale of each of m windows relative to the first one."""
        return np.array([node.scale for node in self.nodes]) / self.nodes[0].scale

    def owner(self, view: int) -> int:
        """The number of the window from which a view's depth was stored."""
        return self._owner[view]

    def depth(self, view: int) -> NDArray[np.float32]:
        """(h, w) float32 depth of a view, in the unit of the world, 0 for none."""
        return self._store.depth(view) * np.float32(self.nodes[self._owner[view]].scale)

    def confidence(self, view: int) -> NDArray[np.float32]:
        """(h, w) float32 confidence of a view, in [0, 1]."""
        return self._store.confidence(view)

    def color(self, view: int) -> NDArray[np.uint8]:
        """(h, w, 3) uint8 RGB of a view."""
        return self._store.color(view)

    def _join(self, tail: Window, window: Window, shared: int) -> None:
        earlier, later = overlaps(tail, window[:shared])
        fit = join(earlier, later, metric=self.metric)
        self.residuals.append(fit.residual)
        self.unscaled += not fit.scaled
        number = len(self.nodes)
        extent = window_extent(window)
        spread = join_spread(extent * fit.sim3.scale, metric=self.metric)
        self.edges.append(Edge(number - 1, number, fit.sim3, spread))
        self.nodes.append(self.nodes[-1] @ fit.sim3)

    def _store_view(self, window: Window, view: int) -> None:
        """Store a view's depth in the unit of its window."""
        confidence = window.confidence[view]
        depth = np.where(confidence > 0, window.local[view][..., 2], np.float32(0))
        self._store.add(depth, confidence, window.colors[view])
        self._owner.append(len(self.windows) - 1)
        self.intrinsics.append(
            fit_intrinsics(window.local[view], window.kept[view], self.image_size)
        )


def merged(
    nodes: list[Sim3], windows: list[tuple[range, NDArray[np.float64]]]
) -> NDArray[np.float64]:
    """Merge the poses of windows into one (T, 4, 4) path.

    nodes: world_from_window; windows: the frames of each window and their (n, 4, 4) poses, in
    order. Poses that two windows share are blended (see `blend`).
    """
    whole = np.empty((windows[-1][0].stop, 4, 4))
    done = 0
    for node, (frames, own) in zip(nodes, windows, strict=True):
        poses = node.poses(own)
        shared = done - frames.start
        whole[frames.start : done] = blend(whole[frames.start : done], poses[:shared])
        whole[done : frames.stop] = poses[shared:]
        done = frames.stop
    return whole


def join_spread(extent: float, *, metric: bool) -> tuple[float, float, float]:
    """The assumed error of the join of two windows, as in `pose_graph.Edge`.

    extent: of the later window, in the earlier one's unit (see `window_extent`).
    """
    scale = METRIC_ERROR if metric else SCALE_ERROR
    return (scale, float(ROTATION_ERROR), POSITION_ERROR * extent)


def window_extent(window: Window) -> float:
    """The length of a window's path plus its median depth. Its errors grow with this length."""
    positions = window.world_from_camera[:, :3, 3]
    path = float(np.linalg.norm(np.diff(positions, axis=0), axis=1).sum())
    depth = window.local[..., 2][window.kept]
    typical = float(np.median(depth[:: 1 + len(depth) // JOIN_POINTS])) if len(depth) else 0.0
    return max(path + typical, 1e-6)


def _inverse(world_from_camera: NDArray[np.float64]) -> Sim3:
    R, t = world_from_camera[:3, :3], world_from_camera[:3, 3]
    return Sim3(1.0, R, t).inverse()


def overlaps(earlier: Window, later: Window) -> Iterator[Overlap]:
    """The points of two windows at the same pixels of the same views, evenly chosen."""
    both = np.flatnonzero(earlier.kept & later.kept)
    both = both[:: 1 + len(both) // JOIN_POINTS]
    views, pixels = np.divmod(both, earlier.kept[0].size)
    for window in (earlier, later):
        local = window.local.reshape(len(window), -1, 3)[views, pixels].astype(np.float64)
        poses = window.world_from_camera
        points = np.einsum("nij,nj->ni", poses[views, :3, :3], local) + poses[views, :3, 3]
        confidence = window.confidence.reshape(len(window), -1)[views, pixels]
        yield Overlap(points, poses, confidence)
