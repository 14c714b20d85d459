"""Coloured clouds, and voxel downsampling that takes a frame at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

REACH = 1 << 20
"""Voxels from the world's origin to where their numbers end: three fit into 63 bits."""


@dataclass(frozen=True)
class Cloud:
    """points: (n, 3) float32, metres; colors: (n, 3) uint8, RGB."""

    points: NDArray[np.float32]
    colors: NDArray[np.uint8]

    def __len__(self) -> int:
        """How many points there are."""
        return len(self.points)


class VoxelDownsample:
    """One point for each voxel that points fell into: their mean, with their mean colour.

    Voxels are cubes of edge `voxel_size` (metres) aligned to the world's origin. Memory grows with
    the surface seen, not with the number of points given.
    """

    def __init__(self, voxel_size: float) -> None:
        self.voxel_size = voxel_size
        self._count = 0
        self._table = np.full(1 << 16, -1, np.int32)
        self._keys = np.empty(1 << 15, np.int64)
        self._sums = np.empty((1 << 15, 6), np.float32)
        self._weights = np.empty(1 << 15, np.int32)

    @property
    def reach(self) -> float:
        """Metres from the origin within which points have to lie."""
        return (REACH - 1) * self.voxel_size

    def add(self, points: NDArray[np.float64], colors: NDArray[np.uint8]) -> None:
        """Take (n, 3) points, within `reach` of the origin, and their (n, 3) colours."""
        self._make_room(self._count + len(points))
        self._count = _insert(
            points, colors, self.voxel_size, self._table,
            self._keys, self._sums, self._weights, self._count,
        )  # fmt: skip

    def cloud(self) -> Cloud:
        """The downsampled cloud so far, in the order in which its voxels were first met."""
        n = self._count
        key = self._keys[:n]
        corner = np.stack([key >> 42, key >> 21 & 0x1FFFFF, key & 0x1FFFFF], axis=-1) - REACH
        mean = self._sums[:n] / self._weights[:n, None]
        points = ((corner + mean[:, :3]) * self.voxel_size).astype(np.float32)
        return Cloud(points, np.rint(mean[:, 3:]).astype(np.uint8))

    def _make_room(self, count: int) -> None:
        if count > len(self._keys):
            size = max(count, len(self._keys) * 3 // 2)
            self._keys = np.resize(self._keys, size)
            self._sums = np.resize(self._sums, (size, 6))
            self._weights = np.resize(self._weights, size)
        if 2 * count > len(self._table):
            self._table = np.full(1 << (2 * count).bit_length(), -1, np.int32)
            _rehash(self._keys, self._count, self._table)


def voxel_downsample(cloud: Cloud, voxel_size: float) -> Cloud:
    """`cloud` with one point for each voxel of edge `voxel_size`."""
    thinned = VoxelDownsample(voxel_size)
    thinned.add(cloud.points.astype(np.float64), cloud.colors)
    return thinned.cloud()


@njit(cache=True, nogil=True, inline="always")
def _slot(key, table):  # type: ignore[no-untyped-def]  # numba infers the types
    """Fibonacci hashing: multiply by 2^64 / golden ratio and fold the high bits down."""
    spread = np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)
    return np.int64((spread >> np.uint64(20)) & np.uint64(len(table) - 1))


@njit(cache=True, nogil=True)
def _rehash(keys, count, table):  # type: ignore[no-untyped-def]  # numba infers the types
    for n in range(count):
        slot = _slot(keys[n], table)
        while table[slot] >= 0:
            slot = (slot + 1) & (len(table) - 1)
        table[slot] = n


@njit(cache=True, nogil=True)
def _insert(points, colors, size, table, keys, sums, weights, count):  # type: ignore[no-untyped-def]  # numba infers the types
    for n in range(len(points)):
        x, y, z = points[n, 0] / size, points[n, 1] / size, points[n, 2] / size
        i, j, k = np.floor(x), np.floor(y), np.floor(z)
        key = (
            (np.int64(i) + REACH) << 42 | (np.int64(j) + REACH) << 21 | (np.int64(k) + REACH)
        )
        slot = _slot(key, table)
        while table[slot] >= 0 and keys[table[slot]] != key:
            slot = (slot + 1) & (len(table) - 1)
        found = table[slot]
        if found < 0:
            found = count
            table[slot] = found
            keys[found] = key
            sums[found] = 0.0
            weights[found] = 0
            count += 1
        sums[found, 0] += x - i
        sums[found, 1] += y - j
        sums[found, 2] += z - k
        for channel in range(3):
            sums[found, 3 + channel] += colors[n, channel]
        weights[found] += 1
    return count
