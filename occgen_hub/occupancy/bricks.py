"""A cloud sorted into bricks of space, so that a frame touches only what is near it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BRICK = 0.5
"""Metres: fine enough to skip most of a house, coarse enough that a brick holds many points."""


@dataclass(frozen=True)
class BrickedCloud:
    """points: (n, 3) float32, world metres, brick after brick; starts: (bricks + 1,) int64, where
    each begins; lower, upper: (bricks, 3) float32, the bounding box of each brick's points.
    """

    points: NDArray[np.float32]
    starts: NDArray[np.int64]
    lower: NDArray[np.float32]
    upper: NDArray[np.float32]


def into_bricks(points: NDArray[np.float32]) -> BrickedCloud:
    """Sort (n, 3) finite world points by brick, keeping their order within a brick."""
    return sorted_into_bricks(points)[0]


def sorted_into_bricks(points: NDArray[np.float32]) -> tuple[BrickedCloud, NDArray[np.int64]]:
    """The same, and the (n,) numbers of the points in their new order."""
    if not len(points):
        none = np.zeros((0, 3), np.float32)
        return BrickedCloud(none, np.zeros(1, np.int64), none, none), np.zeros(0, np.int64)
    brick = np.floor(points / np.float32(BRICK)).astype(np.int64)
    brick -= brick.min(axis=0)
    _, ny, nz = brick.max(axis=0) + 1
    key = (brick[:, 0] * ny + brick[:, 1]) * nz + brick[:, 2]
    if key.max() < 1 << 16:
        key = key.astype(np.uint16)  # Which numpy sorts by radix.
    order = np.argsort(key, kind="stable")
    points, key = points[order], key[order]
    first = np.flatnonzero(np.diff(key.astype(np.int64), prepend=-1))
    starts = np.append(first, len(points)).astype(np.int64)
    lower = np.minimum.reduceat(points, first, axis=0)
    upper = np.maximum.reduceat(points, first, axis=0)
    return BrickedCloud(points, starts, lower, upper), order
