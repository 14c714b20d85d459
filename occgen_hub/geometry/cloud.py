"""Coloured point clouds, and voxel downsampling frame by frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occgen_hub.jit import njit

REACH = 1 << 20
"""Largest voxel coordinate, so that the three of a voxel fit into 63 bits."""


@dataclass(frozen=True)
class Cloud:
    """A point cloud. points: (n, 3) float32, metres; colors: (n, 3) uint8, RGB."""

    points: NDArray[np.float32]
    colors: NDArray[np.uint8]

    def __len__(self) -> int:
        """The number of points."""
        return len(self.points)


MAX_AVERAGED = 1 << 15
"""Number of points of a voxel that are averaged, the first ones. Sums of over twice as many colours
would not fit into float32, and more points hardly change the mean."""


class VoxelDownsample:
    """One point for each voxel that contains points: their mean, with their mean colour.

    Voxels are cubes of edge `voxel_size` (metres) aligned to the world's origin. Memory grows with
    the surface, not with the number of points. Voxels are stored in blocks of 8 x 8 x 8, so that
    points of neighbouring pixels are near in memory: 120 ns per point, while one hash table of all
    voxels took 190 ns.
    """

    def __init__(self, voxel_size: float) -> None:
        self.voxel_size = voxel_size
        self._used = np.zeros(2, np.int64)  # voxels, blocks
        self._table = np.full(1 << 12, -1, np.int32)
        self._block_keys: NDArray[np.int64] = np.empty(1 << 10, np.int64)
        self._blocks: NDArray[np.int32] = np.full((1 << 10, 512), -1, np.int32)
        self._keys: NDArray[np.int64] = np.empty(1 << 16, np.int64)
        # Sums of x, y, z, red, green, blue, and the number of points.
        self._sums: NDArray[np.float32] = np.empty((1 << 16, 7), np.float32)

    @property
    def reach(self) -> float:
        """Largest absolute coordinate of points, in metres."""
        return (REACH - 1) * self.voxel_size

    def add(self, points: NDArray[np.float64], colors: NDArray[np.uint8]) -> None:
        """Add (n, 3) points in metres, within `reach`, and their (n, 3) uint8 colours."""
        done = 0
        while True:
            done = _insert(
                points, colors, done, self.voxel_size, self._table, self._block_keys, self._blocks,
                self._keys, self._sums, self._used,
            )  # fmt: skip
            if done == len(points):
                return
            self._make_room()

    def __len__(self) -> int:
        """The number of points of the downsampled cloud so far."""
        return int(self._used[0])

    def cloud(self) -> Cloud:
        """The downsampled cloud so far, in the order in which its voxels got their first point."""
        n = self._used[0]
        key = self._keys[:n]
        corner = np.stack([key >> 42, key >> 21 & 0x1FFFFF, key & 0x1FFFFF], axis=-1) - REACH
        mean = self._sums[:n, :6] / self._sums[:n, 6:]
        points = ((corner + mean[:, :3]) * self.voxel_size).astype(np.float32)
        return Cloud(points, np.rint(mean[:, 3:]).astype(np.uint8))

    def _make_room(self) -> None:
        voxels, blocks = self._used.tolist()
        if voxels == len(self._keys):
            self._keys = _grown(self._keys, voxels)
            self._sums = _grown(self._sums, voxels)
        if blocks == len(self._block_keys):
            self._block_keys = _grown(self._block_keys, blocks)
            self._blocks = _grown(self._blocks, blocks)
            self._blocks[blocks:] = -1
            self._table = np.full(2 * len(self._table), -1, np.int32)
            _rehash(self._block_keys, blocks, self._table)


def voxel_downsample(cloud: Cloud, voxel_size: float) -> Cloud:
    """Downsample a cloud to one point per voxel of edge `voxel_size` (metres)."""
    thinned = VoxelDownsample(voxel_size)
    thinned.add(cloud.points.astype(np.float64), cloud.colors)
    return thinned.cloud()


def _grown(array: NDArray[Any], used: int) -> NDArray[Any]:
    larger = np.empty((2 * used, *array.shape[1:]), array.dtype)
    larger[:used] = array
    return larger


@njit(nogil=True, inline="always")
def _slot(key, table):
    """Fibonacci hashing: multiply by 2^64 / golden ratio and take high bits."""
    spread = np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)
    return np.int64((spread >> np.uint64(24)) & np.uint64(len(table) - 1))


@njit(nogil=True)
def _rehash(keys, count, table):
    for n in range(count):
        slot = _slot(keys[n], table)
        while table[slot] >= 0:
            slot = (slot + 1) & (len(table) - 1)
        table[slot] = n


@njit(nogil=True)
def _insert(points, colors, start, size, table, block_keys, blocks, keys, sums, used):
    """Add points from index `start`; returns the index of the first one that did not fit."""
    last_key, last_block = np.int64(-1), 0
    for n in range(start, len(points)):
        x, y, z = points[n, 0] / size, points[n, 1] / size, points[n, 2] / size
        fx, fy, fz = np.floor(x), np.floor(y), np.floor(z)
        i, j, k = np.int64(fx) + REACH, np.int64(fy) + REACH, np.int64(fz) + REACH
        block_key = (i >> 3) << 36 | (j >> 3) << 18 | (k >> 3)
        if block_key != last_key:
            slot = _slot(block_key, table)
            while table[slot] >= 0 and block_keys[table[slot]] != block_key:
                slot = (slot + 1) & (len(table) - 1)
            if table[slot] < 0:
                if used[1] == len(block_keys):
                    return n
                table[slot] = used[1]
                block_keys[used[1]] = block_key
                used[1] += 1
            last_key, last_block = block_key, table[slot]
        offset = (i & 7) << 6 | (j & 7) << 3 | (k & 7)
        voxel = blocks[last_block, offset]
        if voxel < 0:
            if used[0] == len(keys):
                return n
            voxel = used[0]
            blocks[last_block, offset] = voxel
            keys[voxel] = i << 42 | j << 21 | k
            sums[voxel] = 0.0
            used[0] += 1
        if sums[voxel, 6] < MAX_AVERAGED:
            sums[voxel, 0] += x - fx
            sums[voxel, 1] += y - fy
            sums[voxel, 2] += z - fz
            sums[voxel, 3] += colors[n, 0]
            sums[voxel, 4] += colors[n, 1]
            sums[voxel, 5] += colors[n, 2]
            sums[voxel, 6] += 1.0
    return len(points)
