"""Moving points: connected points of one frame that the static surface does not explain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import prange
from numpy.typing import NDArray

from occgen_hub.fusion.depth_map import DepthMap, DepthMaps, camera_values
from occgen_hub.fusion.evidence import NEAREST, Tolerance, allowed, in_sight
from occgen_hub.geometry.poses import transform
from occgen_hub.jit import njit
from occgen_hub.occupancy.point_blocks import PointBlocks
from occgen_hub.prefetch import prefetch
from occgen_hub.taxonomy import UNLABELLED

MIN_AREA = 0.01
"""Smallest visible area of a moving object in square metres: about a hand."""

MIN_PIXELS = 25
"""Smallest number of pixels of a moving object. Smaller groups are noise at any distance."""

MIN_CORE = 0.4
"""Smallest share of a moving object's pixels with four neighbours that belong to it too. A seam of
wrong depths along an edge is thin and has fewer."""

REACH = 1.0
"""Metres by which a moving object may extend beyond its pixels that are known to move."""

ATTACHED = 0.5
"""Share of the frames that saw a static point in which it must be connected to moving pixels, for
it to belong to a moving object. It must also fulfil ABSENT."""

ABSENT = 0.25
"""The number of frames that looked there and measured nothing must be at least this share of the
number that saw the point. A floor is connected to the feet on it, but every frame sees it."""

WIDEST_SPLAT = 64
"""Largest number of pixels that a point of the static surface covers to each side."""


@dataclass(frozen=True)
class MovingPoints:
    """Finds the moving points in the frames of a recording.

    static: the static surface; seen_through: measured points that other frames saw through (without
    any, nothing moves); maps: the recording; tolerance: of their depth; spacing: metres between the
    points of the static surface; depth_range: metres, nearer or farther depth is ignored; only: the
    frames with moving objects, None if unknown.
    """

    static: PointBlocks
    seen_through: PointBlocks
    maps: DepthMaps
    tolerance: Tolerance
    spacing: float
    depth_range: tuple[float, float]
    only: frozenset[int] | None = None

    def __call__(self, frame: int) -> NDArray[np.float32]:
        """(n, 3) float32 world metres: the moving points of a frame.

        A pixel is moving if it is well in front of all static surface in the 3 x 3 pixels around
        it, and so are enough connected pixels. Its depth is the mean over those of its 3 x 3
        neighbours that lie on the same surface, because no other frame can improve it. Empty for a
        frame without depth. Thread-safe.
        """
        frames = self.maps.frames
        place = np.searchsorted(frames, frame)
        known = place < len(frames) and frames[place] == frame
        if not known or not self._may_move(frame):
            return np.zeros((0, 3), np.float32)
        view = self.maps(frame)
        kept, tolerance = self._pixels(view), self.tolerance.values()
        points: NDArray[np.float32] = _smoothed(view.depth, kept, view.camera(), tolerance)
        return points

    def labelled(self, frame: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """The points of a frame as above, and their (n,) uint8 classes, UNLABELLED for none.

        Each has the class of its own pixel. The views must have labels.
        """
        points, views = self(frame), self.maps.views
        assert views.read_labels is not None
        if not len(points):
            return points, np.zeros(0, np.uint8)
        labels = views.read_labels(frame)
        in_camera = transform(np.linalg.inv(views.world_from_camera[frame]), points.astype(float))
        K = views.intrinsics[frame]
        rows = in_camera[:, 1] / in_camera[:, 2] * K[1, 1] + K[1, 2]
        columns = in_camera[:, 0] / in_camera[:, 2] * K[0, 0] + K[0, 2]
        height, width = labels.shape
        v = rows.astype(np.int64).clip(0, height - 1)
        u = columns.astype(np.int64).clip(0, width - 1)
        own = labels[v, u]
        return points, np.where(own == 0, np.uint8(UNLABELLED), own)

    def frames_that_move(self) -> frozenset[int]:
        """The frames with moving objects."""
        frames = self.maps.frames.tolist()
        found = prefetch(lambda frame: self._may_move(frame) and self._moves(frame), frames)
        return frozenset(frame for frame, moves in zip(frames, found, strict=True) if moves)

    def _moves(self, frame: int) -> bool:
        return bool(self._pixels(self.maps(frame)).any())

    def attached(self) -> NDArray[np.bool_]:
        """(n,) bool: the static points that belong to moving objects.

        If no depth was measured behind a moving object, no frame sees through it, and its points
        look static. But in the frames that see them they are connected to its other points, and
        other frames measure nothing there.
        """
        count = len(self.static.points)
        seen, connected, absent = (np.zeros(count, np.uint16) for _ in range(3))
        static, tolerance = self.static, self.tolerance.values()
        for view, around in prefetch(self._view, self.maps.frames.tolist()):
            _count_connected(
                static.points, static.starts, static.lower, static.upper, view.pixels, around,
                view.camera(), tolerance, seen, connected, absent,
            )  # fmt: skip
        found: NDArray[np.bool_] = (
            (connected > 0)
            & (connected >= ATTACHED * seen)
            & (absent > 0)
            & (absent >= ABSENT * seen)
        )
        return found

    def _view(self, frame: int) -> tuple[DepthMap, NDArray[np.bool_]]:
        """A frame, and (h, w) bool: its pixels that move or are connected to those."""
        view = self.maps(frame)
        if not self._may_move(frame):
            return view, np.zeros(view.depth.shape, np.bool_)
        moving = self._pixels(view)
        return view, _grow_moving(view.depth, moving, view.camera(), self.tolerance.values())

    def _pixels(self, view: DepthMap) -> NDArray[np.bool_]:
        """(h, w) bool: the pixels of moving objects."""
        static, tolerance, camera = self.static, self.tolerance.values(), view.camera()
        surface = _render(
            static.points, static.starts, static.lower, static.upper, camera, view.depth.shape,
            self.spacing,
        )  # fmt: skip
        trusted = (
            view.trusted & (view.depth >= self.depth_range[0]) & (view.depth <= self.depth_range[1])
        )
        in_front = _in_front(view.pixels, trusted, surface, tolerance, self.spacing)
        kept: NDArray[np.bool_] = _connected(view.depth, in_front, camera, tolerance)
        return kept

    def _may_move(self, frame: int) -> bool:
        """Whether a frame sees enough points that other frames saw through."""
        if self.only is not None:
            return frame in self.only
        points = self.seen_through
        views = self.maps.views
        width, height = views.depth_size
        camera = camera_values(views.world_from_camera[frame], views.depth_intrinsics(frame))
        visible = _in_image(
            points.points, points.starts, points.lower, points.upper, camera, width, height
        )
        return bool(visible >= MIN_PIXELS)


@njit(nogil=True, inline="always", error_model="numpy")
def _projected(point, camera):
    """Depth of a world point in a camera, metres, and its projection, pixels."""
    x, y, z = point[0] - camera[9], point[1] - camera[10], point[2] - camera[11]
    depth = camera[2] * x + camera[5] * y + camera[8] * z
    u = camera[12] * (camera[0] * x + camera[3] * y + camera[6] * z) / depth + camera[14]
    v = camera[13] * (camera[1] * x + camera[4] * y + camera[7] * z) / depth + camera[15]
    return depth, u, v


@njit(nogil=True, error_model="numpy")
def _in_image(points, starts, low, high, camera, width, height):
    """The number of points that project into an image, counted up to MIN_PIXELS."""
    count = 0
    for block in range(len(starts) - 1):
        if not in_sight(low[block], high[block], camera, width, height):
            continue
        for n in range(starts[block], starts[block + 1]):
            depth, u, v = _projected(points[n], camera)
            if depth <= NEAREST:
                continue
            count += 0 <= u < width and 0 <= v < height
            if count >= MIN_PIXELS:
                return count
    return count


@njit(nogil=True, error_model="numpy")
def _render(points, starts, low, high, camera, shape, spacing):
    """(h, w) float32: depth of the nearest static point at each pixel, infinite for none."""
    height, width = shape
    surface = np.full((height, width), np.inf, np.float32)
    wide = camera.copy()  # Points beside the image cover pixels of it too.
    wide[14:16] += WIDEST_SPLAT
    margin = 2 * WIDEST_SPLAT
    for block in range(len(starts) - 1):
        if not in_sight(low[block], high[block], wide, width + margin, height + margin):
            continue
        for n in range(starts[block], starts[block + 1]):
            depth, u, v = _projected(points[n], camera)
            if depth <= NEAREST:
                continue
            if not (-WIDEST_SPLAT <= u < width + WIDEST_SPLAT):
                continue
            if not (-WIDEST_SPLAT <= v < height + WIDEST_SPLAT):
                continue
            i, j = int(np.floor(u)), int(np.floor(v))
            reach = min(int(0.6 * spacing * camera[12] / depth + 0.5), WIDEST_SPLAT)
            for row in range(max(j - reach, 0), min(j + reach + 1, height)):
                for column in range(max(i - reach, 0), min(i + reach + 1, width)):
                    if depth < surface[row, column]:
                        surface[row, column] = depth
    return surface


@njit(nogil=True, error_model="numpy")
def _in_front(pixels, trusted, surface, tolerance, spacing):
    """(h, w) bool: trusted pixels well in front of all static surface around them.

    A point represents all surface in a cube of edge `spacing`, so it may be off by that much.
    """
    height, width = surface.shape
    found = np.zeros((height, width), np.bool_)
    for v in range(height):
        for u in range(width):
            if not trusted[v, u]:
                continue
            here = np.float64(pixels[v, u, 0])
            static = np.inf
            for j in range(max(v - 1, 0), min(v + 2, height)):
                for i in range(max(u - 1, 0), min(u + 2, width)):
                    static = min(static, surface[j, i])
            slope = here * here * (abs(pixels[v, u, 1]) + abs(pixels[v, u, 2]))
            found[v, u] = static - here > allowed(here, slope, tolerance) + spacing
    return found


@njit(nogil=True, error_model="numpy")
def _same_surface(first, second, tolerance):
    """Whether two neighbouring depths may belong to one object."""
    return abs(first - second) <= allowed(first, 0.0, tolerance) + 0.05 * first


@njit(nogil=True, error_model="numpy")
def _connected(depth, candidates, camera, tolerance):
    """(h, w) bool: the candidates in groups that are large and thick enough."""
    height, width = depth.shape
    left, kept = candidates.copy(), np.zeros((height, width), np.bool_)
    stack = np.empty((height * width, 2), np.int32)
    for row in range(height):
        for column in range(width):
            if not left[row, column]:
                continue
            left[row, column] = False
            stack[0, 0], stack[0, 1] = row, column
            end, done, core, area = 1, 0, 0, 0.0
            while done < end:  # Processed pixels stay on the stack: together they are the group.
                v, u = stack[done]
                done += 1
                area += depth[v, u] ** 2 / (camera[12] * camera[13])
                inside = 0 < v < height - 1 and 0 < u < width - 1
                core += (
                    inside
                    and candidates[v - 1, u]
                    and candidates[v + 1, u]
                    and candidates[v, u - 1]
                    and candidates[v, u + 1]
                )
                for j in range(max(v - 1, 0), min(v + 2, height)):
                    for i in range(max(u - 1, 0), min(u + 2, width)):
                        if left[j, i] and _same_surface(depth[v, u], depth[j, i], tolerance):
                            left[j, i] = False
                            stack[end, 0], stack[end, 1] = j, i
                            end += 1
            if end >= MIN_PIXELS and area >= MIN_AREA and core >= MIN_CORE * end:
                for n in range(end):
                    kept[stack[n, 0], stack[n, 1]] = True
    return kept


@njit(nogil=True, error_model="numpy")
def _grow_moving(depth, moving, camera, tolerance):
    """(h, w) bool: the pixels that move, and those on the same surface within `REACH` of one."""
    height, width = depth.shape
    found = moving.copy()
    queue = np.empty((height * width, 2), np.int32)
    start = np.empty((height * width, 2), np.int32)  # The moving pixels that they are reached from.
    end, done = 0, 0
    for v in range(height):
        for u in range(width):
            if moving[v, u]:
                queue[end, 0], queue[end, 1] = v, u
                start[end, 0], start[end, 1] = v, u
                end += 1
    while done < end:
        v, u = queue[done]
        row, column = start[done]
        done += 1
        z = depth[row, column]
        x, y = (column - camera[14]) / camera[12] * z, (row - camera[15]) / camera[13] * z
        for j in range(max(v - 1, 0), min(v + 2, height)):
            for i in range(max(u - 1, 0), min(u + 2, width)):
                here = depth[j, i]
                if found[j, i] or here <= 0 or not _same_surface(depth[v, u], here, tolerance):
                    continue
                across = (i - camera[14]) / camera[12] * here - x
                down = (j - camera[15]) / camera[13] * here - y
                if across**2 + down**2 + (here - z) ** 2 <= REACH**2:
                    found[j, i] = True
                    queue[end, 0], queue[end, 1] = j, i
                    start[end, 0], start[end, 1] = row, column
                    end += 1
    return found


@njit(nogil=True, parallel=True, error_model="numpy")
def _count_connected(
    points, starts, low, high, pixels, around, camera, tolerance, seen, connected, absent
):  # fmt: skip
    """Count for each point the frames that see it, those of them in which its pixel is in `around`,
    and those that look there and measure nothing, or see through it."""
    height, width = around.shape
    for block in prange(len(starts) - 1):
        if not in_sight(low[block], high[block], camera, width, height):
            continue
        for n in range(starts[block], starts[block + 1]):
            depth, u, v = _projected(points[n], camera)
            if depth <= NEAREST or not (0 <= u < width and 0 <= v < height):
                continue
            i, j = int(u), int(v)
            measured, nearest = np.float64(pixels[j, i, 0]), pixels[j, i, 3]
            slope = measured * measured * (abs(pixels[j, i, 1]) + abs(pixels[j, i, 2]))
            within = allowed(depth, slope, tolerance)
            if measured > 0 and abs(measured - depth) <= within:
                seen[n] += 1
                connected[n] += around[j, i]
            elif nearest == 0 or nearest - depth > within:
                absent[n] += 1


@njit(nogil=True, error_model="numpy")
def _smoothed(depth, kept, camera, tolerance):
    """(n, 3) float32 world points of the kept pixels."""
    height, width = depth.shape
    points = np.empty((np.count_nonzero(kept), 3), np.float32)
    count = 0
    for v in range(height):
        for u in range(width):
            if not kept[v, u]:
                continue
            total, number = 0.0, 0
            for j in range(max(v - 1, 0), min(v + 2, height)):
                for i in range(max(u - 1, 0), min(u + 2, width)):
                    near = abs(depth[j, i] - depth[v, u]) <= allowed(depth[v, u], 0.0, tolerance)
                    if kept[j, i] and near:
                        total += depth[j, i]
                        number += 1
            z = total / number
            x = (u + 0.5 - camera[14]) / camera[12] * z
            y = (v + 0.5 - camera[15]) / camera[13] * z
            for axis in range(3):
                points[count, axis] = (
                    camera[3 * axis] * x + camera[3 * axis + 1] * y + camera[3 * axis + 2] * z
                    + camera[9 + axis]
                )  # fmt: skip
            count += 1
    return points
