"""A point cloud sorted into blocks of space, so that a frame processes only blocks near it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCK = 0.5
"""Edge of a block in metres: small enough to skip most of a house, large enough for many points."""


@dataclass(frozen=True)
class PointBlocks:
    """A point cloud in blocks.

    points: (n, 3) float32, world metres, block by block; starts: (blocks + 1,) int64, the index of
    each block's first point; lower, upper: (blocks, 3) float32, the bounding box of its points.
    """

    points: NDArray[np.float32]
    starts: NDArray[np.int64]
    lower: NDArray[np.float32]
    upper: NDArray[np.float32]


def into_blocks(points: NDArray[np.float32]) -> PointBlocks:
    """Sort (n, 3) finite world points by block, keeping their order within a block."""
    return sorted_into_blocks(points)[0]


def sorted_into_blocks(points: NDArray[np.float32]) -> tuple[PointBlocks, NDArray[np.int64]]:
    """Like `into_blocks`; also returns the (n,) original indices of the sorted points."""
    if not len(points):
        none = np.zeros((0, 3), np.float32)
        return PointBlocks(none, np.zeros(1, np.int64), none, none), np.zeros(0, np.int64)
    block = np.floor(points / np.float32(BLOCK)).astype(np.int64)
    block -= block.min(axis=0)
    _, ny, nz = block.max(axis=0) + 1
    key = (block[:, 0] * ny + block[:, 1]) * nz + block[:, 2]
    if key.max() < 1 << 16:
        key = key.astype(np.uint16)  # numpy uses radix sort for 16 bits.
    order = np.argsort(key, kind="stable")
    points, key = points[order], key[order]
    first = np.flatnonzero(np.diff(key.astype(np.int64), prepend=-1))
    starts = np.append(first, len(points)).astype(np.int64)
    lower = np.minimum.reduceat(points, first, axis=0)
    upper = np.maximum.reduceat(points, first, axis=0)
    return PointBlocks(points, starts, lower, upper), order
