"""The rays of one camera, 64 at a time: the cells that they cross, found once for all its frames.

A packet is the rays of 8 x 8 neighbouring pixels. It is kept as a list of the distinct cells that
its rays cross, each with 64 bits that say which of the rays cross it. A step along a ray, in x, y
or z, takes it one cell farther from the camera's cell (|i - i0| + |j - j0| + |k - k0|), so by that
distance the list has every ray's cells in their order. To see a frame, each list is gone through
once: until the first occupied cell all its cells are observed; after it those that are crossed by a
ray which has not met an occupied cell. That visits a cell once a packet instead of once a ray, and
chooses no axis on the way. The lists come from `rays.follow`, so this is as exact as that.

On the camera and grid of docs/performance.md the lists hold 4.5 million cells, of which a frame
needs 1.9 million; single rays cross 30.2 million, and 17.2 million up to what they hit. Packets of
4 x 4 would need half as many again, those of 16 x 16 a fifth fewer with four words for each.
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
"""Pixels: 8 x 8 rays have the bits of one word."""
_MOST = 20_000_000
"""Cells in all lists: 240 MB."""
_STRIPS = 4
"""Strips of the image for each thread."""
_PLACES = 1 << 12
_FAR = np.int64(1) << 40
_WORTH = 4
"""Frames of one camera after which packets are made: they take as long as some four frames do."""


@dataclass(frozen=True)
class RayPackets:
    """The lists of all packets, one after another, by image column and then downwards.

    cells: (n,) uint32, columns of the grid; crossing: (n,) uint64, bit 8 a + b for the ray of pixel
    (a, b) of the packet; ends: (packets + 1,) int64, where each list begins; rays: (packets,)
    uint64, those that are in the image and meet the grid; shares: (threads, n) int64, which packets
    each thread takes, -1 for none.
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
        # All that there are, also where a thread that works alone comes first: others wait for it.
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
                if total > _MOST:
                    pool.shutdown(cancel_futures=True)
                    return None
        cells, crossing, lengths, rays = map(np.concatenate, zip(*parts, strict=True))
        ends = np.concatenate([[0], np.cumsum(lengths)])
        return cls(cells, crossing, ends, rays, _shares(len(parts), len(rays), threads))


def follow_packets(packets: RayPackets, state: NDArray[np.uint8]) -> None:
    """Set bit OBSERVED of each cell of `state` that a ray reaches; bit OCCUPIED stops rays."""
    _follow(
        packets.cells, packets.crossing, packets.ends, packets.rays, packets.shares, state
    )  # fmt: skip


def packets_when_worth(
    grid: Grid, intrinsics: NDArray[np.float64], size: tuple[int, int]
) -> RayPackets | None:
    """The packets of a camera that was asked for often enough, else None.

    Arguments as for `RayPackets.of`. The packets of the last two cameras are kept.
    """
    K = np.asarray(intrinsics, np.float64)
    return _camera(grid, K[0, 0], K[1, 1], K[0, 2], K[1, 2], size).packets()


def prepare(grid: Grid, intrinsics: NDArray[np.float64], size: tuple[int, int]) -> None:
    """Have the packets made of a camera that takes most of an episode's frames, before the first.

    intrinsics: (T, 3, 3), pixels, of each frame; size: (width, height) of the images.
    """
    cameras, frames = np.unique(np.asarray(intrinsics, np.float64), axis=0, return_counts=True)
    if len(frames) and frames.max() > _WORTH:
        K = cameras[frames.argmax()]
        _camera(grid, K[0, 0], K[1, 1], K[0, 2], K[1, 2], size).packets(at_once=True)


@dataclass
class _Camera:
    """A camera, how often it was asked for, and its packets once that pays."""

    make: Callable[[], RayPackets | None]
    frames: int = 0
    made: RayPackets | None = None
    lock: Lock = field(default_factory=Lock)

    def packets(self, *, at_once: bool = False) -> RayPackets | None:
        with self.lock:
            if self.frames <= _WORTH and (at_once or self.frames == _WORTH):
                self.made, self.frames = self.make(), _WORTH
            self.frames += 1
            return self.made


@lru_cache(maxsize=2)
def _camera(
    grid: Grid, fx: float, fy: float, cx: float, cy: float, size: tuple[int, int]
) -> _Camera:
    intrinsics = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
    return _Camera(partial(RayPackets.of, grid, intrinsics, size))


def _shares(columns: int, packets: int, threads: int) -> NDArray[np.int64]:
    """Strips of the image, dealt out to threads in turn.

    Wide strips, since two threads that work side by side wait for each other's cells; several a
    thread, since a scene may be near on one side and far on the other.
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
    """The lists of the packets whose leftmost pixels are in image column `left`, downwards."""
    nx, ny, nz = shape[0], shape[1], shape[2]
    packets = (size[1] + _EDGE - 1) // _EDGE
    paths = np.empty((_EDGE * _EDGE, nx + ny + nz), np.uint32)
    cells, crossing = np.empty(1 << 14, np.uint32), np.empty(1 << 14, np.uint64)
    lengths, rays = np.empty(packets, np.int64), np.zeros(packets, np.uint64)
    places = np.zeros(_PLACES, np.uint64)
    total = np.uint64(0)
    for packet in range(packets):
        starts, ends = _paths(camera, size, origin, shape, left, packet * _EDGE, paths)
        begin = total
        for ray in range(len(starts)):
            if starts[ray] < ends[ray]:
                rays[packet] |= np.uint64(1) << np.uint64(ray)
        for distance in range(starts.min(), ends.max()):
            if total + np.uint64(_EDGE * _EDGE) > np.uint64(len(cells)):
                cells, crossing = _twice(cells), _twice(crossing)
            total = _add(distance, paths, starts, ends, cells, crossing, total, places)
        lengths[packet] = total - begin
    return cells[:total].copy(), crossing[:total].copy(), lengths, rays


@njit()
def _paths(camera, size, origin, shape, left, top, paths):
    """Write the cells of each ray of a packet; at which distances each begins and has ended."""
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
    """Add the cells that the rays of a packet are in at a distance; how many cells there are then.

    `places` remembers where a cell was put, by a hash. Where two cells have the same, one of them
    may be put twice, each time with other rays, which does no harm.
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
def _twice(array):
    longer = np.empty(2 * len(array), array.dtype)
    longer[: len(array)] = array
    return longer


@njit(parallel=True, nogil=True)
def _follow(cells, crossing, ends, rays, shares, state):
    one = np.uint64(1)
    for share in prange(len(shares)):
        for packet in shares[share]:
            if packet < 0:
                break
            # Unsigned, since numba asks of each signed index whether it counts from the end: that
            # took as long as all the rest.
            n, end = np.uint64(ends[packet]), np.uint64(ends[packet + 1])
            while n < end:
                cell = cells[n]
                if state[cell] & OCCUPIED:
                    break
                state[cell] = OBSERVED
                n += one
            going = rays[packet]
            while n < end and going != 0:
                here = crossing[n] & going
                if here != 0:
                    cell = cells[n]
                    byte = state[cell]
                    state[cell] = byte | OBSERVED
                    if byte & OCCUPIED:
                        going &= ~here
                n += one
