"""Long videos: windows that overlap, joined one after the other into one world.

In memory are the cameras, and the frames that the next window will share; the depth of frames is
in a store on disk, in the unit of the window that it comes from. So windows can still be moved when
a loop is found.
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
"""Of an overlap, for fitting a Sim3; more do not make it better."""

TURN_ERROR, PLACE_ERROR = np.radians(0.5), 0.01
"""What a join is taken to be off: radians, and a share of the window's reach."""

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

    def copy(self, start: int) -> Window:
        """A copy of the views from `start` on, which does not keep the others in memory."""
        return concatenated([self[start:]])


def concatenated(windows: list[Window]) -> Window:
    """The views of all, which are in one world."""
    return Window(
        np.concatenate([window.world_from_camera for window in windows]),
        np.concatenate([window.local for window in windows]),
        np.concatenate([window.kept for window in windows]),
        np.concatenate([window.confidence for window in windows]),
        np.concatenate([window.colors for window in windows]),
    )


class Assembly:
    """Views of all windows, in the world of the first camera and the scale of the first window.

    store: where the depth of views goes; image_size: (width, height) that intrinsics are for;
    metric: whether the network knows metres, see `geometry.joining.join`.

    Attributes: intrinsics, (3, 3) of each view that is done, None where none fits; windows: the
    views of each window; nodes: world_from_window of each; edges: the joins of neighbours;
    residuals and unscaled, of the joins: see `geometry.joining.join`.
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
        """Take the next window, which shares so many views with its neighbours."""
        # From its first camera: what a join is off turns a window about its origin.
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
        # The nearer window's depth: what is at a window's end is seen from fewer sides.
        end = len(window) - shared_after + shared_after // 2
        for view in range(len(self._owner) - start, end):
            self._keep(window, view)
        self._tail = window.copy(len(window) - shared_after)  # The rest is let go.

    @property
    def world_from_camera(self) -> NDArray[np.float64]:
        """(T, 4, 4) poses of all views."""
        return merged(self.nodes, list(zip(self.windows, self._poses, strict=True)))

    @property
    def scales(self) -> NDArray[np.float64]:
        """(m,) how much larger the unit of each window is than that of the first one."""
        return np.array([node.scale for node in self.nodes]) / self.nodes[0].scale

    def owner(self, view: int) -> int:
        """The number of the window that a view's depth is from."""
        return self._owner[view]

    def depth(self, view: int) -> NDArray[np.float32]:
        """(h, w) float32 of a view, in the unit of the world."""
        return self._store.depth(view) * np.float32(self.nodes[self._owner[view]].scale)

    def confidence(self, view: int) -> NDArray[np.float32]:
        """(h, w) float32 in [0, 1] of a view."""
        return self._store.confidence(view)

    def color(self, view: int) -> NDArray[np.uint8]:
        """(h, w, 3) uint8 of a view."""
        return self._store.color(view)

    def _join(self, tail: Window, window: Window, shared: int) -> None:
        earlier, later = overlaps(tail, window[:shared])
        fit = join(earlier, later, metric=self.metric)
        self.residuals.append(fit.residual)
        self.unscaled += not fit.scaled
        number = len(self.nodes)
        reach = window_reach(window)
        spread = join_spread(reach * fit.sim3.scale, metric=self.metric)
        self.edges.append(Edge(number - 1, number, fit.sim3, spread))
        self.nodes.append(self.nodes[-1] @ fit.sim3)

    def _keep(self, window: Window, view: int) -> None:
        """Store a view in its window's unit."""
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
    """(T, 4, 4) one path from the poses of windows, each in a world of its own.

    nodes: world_from_window; windows: the frames of each and their (n, 4, 4) poses, in order. Where
    two overlap, the path goes over evenly from the one to the other (see `blend`).
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


def join_spread(reach: float, *, metric: bool) -> tuple[float, float, float]:
    """What the join of two windows is taken to be off (see `pose_graph.Edge`).

    reach: of a window, in the earlier one's unit (see `window_reach`).
    """
    return (METRIC_ERROR if metric else SCALE_ERROR, float(TURN_ERROR), PLACE_ERROR * reach)


def window_reach(window: Window) -> float:
    """The length of a window's path and the median depth, which its errors are shares of."""
    places = window.world_from_camera[:, :3, 3]
    path = float(np.linalg.norm(np.diff(places, axis=0), axis=1).sum())
    depth = window.local[..., 2][window.kept]
    typical = float(np.median(depth[:: 1 + len(depth) // JOIN_POINTS])) if len(depth) else 0.0
    return max(path + typical, 1e-6)


def _inverse(world_from_camera: NDArray[np.float64]) -> Sim3:
    R, t = world_from_camera[:3, :3], world_from_camera[:3, 3]
    return Sim3(1.0, R, t).inverse()


def overlaps(earlier: Window, later: Window) -> Iterator[Overlap]:
    """What two windows say of the same views, at the same pixels, evenly chosen."""
    both = np.flatnonzero(earlier.kept & later.kept)
    both = both[:: 1 + len(both) // JOIN_POINTS]
    views, pixels = np.divmod(both, earlier.kept[0].size)
    for window in (earlier, later):
        local = window.local.reshape(len(window), -1, 3)[views, pixels].astype(np.float64)
        poses = window.world_from_camera
        points = np.einsum("nij,nj->ni", poses[views, :3, :3], local) + poses[views, :3, 3]
        sure = window.confidence.reshape(len(window), -1)[views, pixels]
        yield Overlap(points, poses, sure)
