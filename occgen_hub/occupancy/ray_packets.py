"""Ray packets: the cells crossed by 64 rays of a camera at a time, found once for all its frames.

A packet has the rays of 8 x 8 neighbouring pixels. It stores a list of the distinct cells that its
rays cross, each with 64 bits for the rays that cross it. Each step of a ray in x, y or z increases
the distance |i - i0| + |j - j0| + |k - k0| from the camera's cell by one, so a list sorted by this
distance has the cells of every ray in order. For a frame, each list is processed once: all its
cells up to the first occupied one are observed; after it, those crossed by a ray that has not yet
reached an occupied cell. A cell is visited once per packet instead of once per ray, and no axis is
chosen on the way. The lists come from `rays.follow` and are as exact.

For the camera and grid of docs/performance.md, the lists have 4.5 million cells, of which a frame
needs 1.9 million. Single rays cross 30.2 million cells, 17.2 million of them before they hit.
Packets of 4 x 4 would need half as many cells again; packets of 16 x 16 a fifth fewer, with four
words for each.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from threading import Lock
from typing import Self

import numba
import numpy as np
from numba import prange
from numpy.typing import NDArray

from occgen_hub.jit import njit
from occgen_hub.occupancy.grid import Grid
from occgen_hub.occupancy.rays import OBSERVED, OCCUPIED, follow

_EDGE = 8
"""Edge of a packet in pixels: 8 x 8 rays have one bit each in a word."""
_MAX_CELLS = 20_000_000
"""Largest number of cells in all lists, 240 MB."""
_STRIPS = 4
"""Strips of the image per thread."""
_SLOTS = 1 << 12
_FAR = np.int64(1) << 40
_MIN_FRAMES = 4
"""Frames of a camera after which its packets are made. Making them takes as long as four frames."""


@dataclass(frozen=True)
class RayPackets:
    """The lists of all packets, by image column and then downwards.

    cells: (n,) uint32, columns of the grid; crossing: (n,) uint64, bit 8 a + b for the ray of pixel
    (a, b) of the packet; ends: (packets + 1,) int64, the start of each list; rays: (packets,)
    uint64, the rays in the image that cross the grid; shares: (threads, n) int64, the packets of
    each thread, -1 for none.
    """

    cells: NDArray[np.uint32]
    crossing: NDArray[np.uint64]
    ends: NDArray[np.int64]
    rays: NDArray[np.uint64]
    shares: NDArray[np.int64]

    @classmethod
    def of(cls, grid: Grid, intrinsics: NDArray[np.float64], size: tuple[int, int]) -> Self | None:
        """The packets of a camera's image, or None if their lists would be too long to keep.

        intrinsics: (3, 3), pixels, no skew; size: (width, height) of the image.
        """
        # All threads, even if the calling thread is limited to one: the others wait for this.
        threads = numba.config.NUMBA_NUM_THREADS
        K = np.asarray(intrinsics, np.float64)
        camera = (K[0, 0], K[1, 1], K[0, 2], K[1, 2])
        shape = np.asarray(grid.shape, np.int64)
        one = partial(_packet_column, camera, size, grid.camera_in_cells, shape)
        parts, total = [], 0
        with ThreadPoolExecutor(threads) as pool:
            for part in pool.map(one, range(0, size[0], _EDGE)):
                parts.append(part)
                total += len(part[0])
                if total > _MAX_CELLS:
                    pool.shutdown(cancel_futures=True)
                    return None
        cells, crossing, lengths, rays = map(np.concatenate, zip(*parts, strict=True))
        ends = np.concatenate([[0], np.cumsum(lengths)])
        return cls(cells, crossing, ends, rays, _distribute_strips(len(parts), len(rays), threads))


def follow_packets(
    packets: RayPackets, state: NDArray[np.uint8], unmeasured: NDArray[np.bool_] | None = None
) -> None:
    """Set bit OBSERVED of each cell of `state` that a ray reaches; bit OCCUPIED stops rays.

    unmeasured: see `visibility.trace`. Pixels whose rays are followed are removed from it.
    """
    _follow(
        packets.cells, packets.crossing, packets.ends, packets.rays, packets.shares, state,
        np.empty((0, 0), np.bool_) if unmeasured is None else unmeasured,
    )  # fmt: skip


def packets_if_repeated(
    grid: Grid, intrinsics: NDArray[np.float64], size: tuple[int, int]
) -> RayPackets | None:
    """The packets of a camera that has had several frames, else None.

    The arguments are those of `RayPackets.of`. The packets of the last two cameras are cached.
    """
    K = np.asarray(intrinsics, np.float64)
    return _camera(grid, K[0, 0], K[1, 1], K[0, 2], K[1, 2], size).packets()


def prepare(grid: Grid, intrinsics: NDArray[np.float64], size: tuple[int, int]) -> None:
    """Make the packets of the camera with the most frames of an episode, before its first frame.

    intrinsics: (T, 3, 3), pixels, of each frame; size: (width, height) of the images.
    """
    cameras, frames = np.unique(np.asarray(intrinsics, np.float64), axis=0, return_counts=True)
    if len(frames) and frames.max() > _MIN_FRAMES:
        K = cameras[frames.argmax()]
        _camera(grid, K[0, 0], K[1, 1], K[0, 2], K[1, 2], size).packets(at_once=True)


@dataclass
class _Camera:
    """A camera, the number of its frames so far, and its packets once they are made."""

    make: Callable[[], RayPackets | None]
    frames: int = 0
    made: RayPackets | None = None
    lock: Lock = field(default_factory=Lock)

    def packets(self, *, at_once: bool = False) -> RayPackets | None:
        with self.lock:
            if self.frames <= _MIN_FRAMES and (at_once or self.frames == _MIN_FRAMES):
                self.made, self.frames = self.make(), _MIN_FRAMES
            self.frames += 1
            return self.made


@lru_cache(maxsize=2)
def _camera(
    grid: Grid, fx: float, fy: float, cx: float, cy: float, size: tuple[int, int]
) -> _Camera:
    intrinsics = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
    return _Camera(partial(RayPackets.of, grid, intrinsics, size))


def _distribute_strips(columns: int, packets: int, threads: int) -> NDArray[np.int64]:
    """Distribute strips of the image over threads in turn.

    Strips are wide, since threads at neighbouring pixels write to the same memory; each thread has
    several, since a scene may be near on one side and far on the other.
    """
    number = np.arange(packets)
    strips = number // (packets // columns) * threads * _STRIPS // columns
    dealt = [number[strips % threads == thread] for thread in range(threads)]
    shares = np.full((threads, max(map(len, dealt))), -1)
    for share, numbers in zip(shares, dealt, strict=True):
        share[: len(numbers)] = numbers
    return shares


@njit(nogil=True)
def _packet_column(camera, size, origin, shape, left):
    """The lists of the packets that start at image column `left`, from top to bottom."""
    nx, ny, nz = shape[0], shape[1], shape[2]
    packets = (size[1] + _EDGE - 1) // _EDGE
    paths = np.empty((_EDGE * _EDGE, nx + ny + nz), np.uint32)
    cells, crossing = np.empty(1 << 14, np.uint32), np.empty(1 << 14, np.uint64)
    lengths, rays = np.empty(packets, np.int64), np.zeros(packets, np.uint64)
    places = np.zeros(_SLOTS, np.uint64)
    total = np.uint64(0)
    for packet in range(packets):
        starts, ends = _paths(camera, size, origin, shape, left, packet * _EDGE, paths)
        begin = total
        for ray in range(len(starts)):
            if starts[ray] < ends[ray]:
                rays[packet] |= np.uint64(1) << np.uint64(ray)
        for distance in range(starts.min(), ends.max()):
            if total + np.uint64(_EDGE * _EDGE) > np.uint64(len(cells)):
                cells, crossing = _grow(cells), _grow(crossing)
            total = _add(distance, paths, starts, ends, cells, crossing, total, places)
        lengths[packet] = total - begin
    return cells[:total].copy(), crossing[:total].copy(), lengths, rays


@njit()
def _paths(camera, size, origin, shape, left, top, paths):
    """Write the cells of each ray of a packet; returns the distances of their starts and ends."""
    fx, fy, cx, cy = camera
    start = np.floor(origin)
    origin = (origin[0], origin[1], origin[2])
    dims = (shape[0], shape[1], shape[2])
    starts, ends = np.full(len(paths), _FAR), np.zeros(len(paths), np.int64)
    for ray in range(len(paths)):
        u, v = left + ray // _EDGE, top + ray % _EDGE
        if u >= size[0] or v >= size[1]:
            continue
        dx, dy = (u + 0.5 - cx) * fy, (v + 0.5 - cy) * fx
        length = follow(dx, dy, fx * fy, origin, dims, None, paths[ray])
        if length:
            first = np.int64(paths[ray, 0])
            i, j, k = first // (dims[1] * dims[2]), first // dims[2] % dims[1], first % dims[2]
            starts[ray] = abs(i - start[0]) + abs(j - start[1]) + abs(k - start[2])
            ends[ray] = starts[ray] + length
    return starts, ends


@njit()
def _add(distance, paths, starts, ends, cells, crossing, total, places):
    """Add the cells of a packet's rays at a distance; returns the new total number of cells.

    `places` maps a cell's hash to its index. After a collision, a cell may be listed twice with
    different rays, which gives the same result.
    """
    begin = total
    for ray in range(np.uint64(len(paths))):  # Unsigned: see `_follow`.
        step = distance - starts[ray]
        if step < 0 or distance >= ends[ray]:
            continue
        cell = paths[ray, np.uint64(step)]
        slot = np.uint64(np.uint32(cell * 0x9E3779B1) >> np.uint32(20))
        place = places[slot]
        if place < begin or place >= total or cells[place] != cell:
            place = total
            places[slot] = place
            cells[place] = cell
            crossing[place] = 0
            total += np.uint64(1)
        crossing[place] |= np.uint64(1) << ray
    return total


@njit()
def _grow(array):
    longer = np.empty(2 * len(array), array.dtype)
    longer[: len(array)] = array
    return longer


@njit(parallel=True, nogil=True)
def _follow(cells, crossing, ends, rays, shares, state, unmeasured):
    one = np.uint64(1)
    for share in prange(len(shares)):
        for packet in shares[share]:
            if packet < 0:
                break
            # Unsigned: numba checks each signed index for being negative, which took half the time.
            n, end = np.uint64(ends[packet]), np.uint64(ends[packet + 1])
            active = rays[packet]
            if len(unmeasured) > 0:
                active &= ~_left_out(packet, active, cells, crossing, n, end, state, unmeasured)
            if active == rays[packet]:
                while n < end:
                    cell = cells[n]
                    if state[cell] & OCCUPIED:
                        break
                    state[cell] = OBSERVED
                    n += one
            while n < end and active != 0:
                crossed = crossing[n] & active
                if crossed != 0:
                    cell = cells[n]
                    byte = state[cell]
                    state[cell] = byte | OBSERVED
                    if byte & OCCUPIED:
                        active &= ~crossed
                n += one


@njit(nogil=True)
def _left_out(packet, rays, cells, crossing, n, end, state, unmeasured):
    """The rays of a packet's unmeasured pixels that meet no occupied cell; unmarks the others."""
    height, width = unmeasured.shape
    rows = (height + _EDGE - 1) // _EDGE
    left, top = packet // rows * _EDGE, packet % rows * _EDGE
    active = np.uint64(0)
    for a in range(min(_EDGE, width - left)):
        for b in range(min(_EDGE, height - top)):
            if unmeasured[top + b, left + a]:
                active |= np.uint64(1) << np.uint64(_EDGE * a + b)
    if active == 0:
        return active
    active &= rays
    while n < end and active != 0:
        crossed = crossing[n] & active
        if crossed != 0 and state[cells[n]] & OCCUPIED:
            active &= ~crossed
        n += np.uint64(1)
    for a in range(min(_EDGE, width - left)):
        for b in range(min(_EDGE, height - top)):
            bit = (active >> np.uint64(_EDGE * a + b)) & np.uint64(1)
            unmeasured[top + b, left + a] = bit != 0
    return active
