"""The three states of a scene's cells on the world's grid: occupied, free, unknown. Compiled.

Cells are stored in blocks of 32 x 32 x 32, one bit per cell. Only blocks with known cells are
stored, so memory grows with the volume that the frames saw.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from occgen_hub.jit import njit
from occgen_hub.occupancy.classes import joined_classes
from occgen_hub.occupancy.grid import Grid
from occgen_hub.occupancy.visibility import FrameOccupancy
from occgen_hub.taxonomy import UNLABELLED

BLOCK = 32
"""Cells along each edge of a block."""

BLOCK_BYTES = BLOCK**3 // 8
"""Bytes of a block, with one bit per cell."""

FREE, OCCUPIED, UNKNOWN = np.uint8(0), np.uint8(1), np.uint8(255)
"""The labels of cells."""

_REACH = 1 << 20
"""Number of blocks on each side of the world's origin that fit into a block's key."""


@dataclass(frozen=True)
class SceneStates:
    """The known cells of a scene, in B blocks of the world's grid.

    Cell (i, j, k) of the world's grid is the half-open box that starts at `voxel_size * (i, j, k)`,
    world metres; it is in block (i // 32, j // 32, k // 32). Cells that are neither occupied nor
    free are unknown.

    Attributes:
        voxel_size: edge of a cell, metres.
        blocks: (B, 3) int32, the numbers of the blocks, ascending.
        occupied, free: (B, 32, 32) uint32: bit 31 - k of word (i, j) is cell (i, j, k) of a block.
            No cell is both.
        classes: (n,) uint8 of the occupied cells, in the order of `cells`; None without labels.
    """

    voxel_size: float
    blocks: NDArray[np.int32]
    occupied: NDArray[np.uint32]
    free: NDArray[np.uint32]
    classes: NDArray[np.uint8] | None = None

    @classmethod
    def from_packed(
        cls,
        voxel_size: float,
        blocks: NDArray[np.int32],
        occupied: NDArray[np.uint8],
        free: NDArray[np.uint8],
    ) -> SceneStates:
        """From (B, 4096) uint8 bits of `np.packbits`, cells in C order.

        Raises ValueError if blocks do not ascend, or a cell is both occupied and free.
        """
        if not len(blocks) == len(occupied) == len(free):
            raise ValueError("has blocks without their cells")
        keys = _keys(blocks.astype(np.int64))
        if (
            np.abs(blocks.astype(np.int64)).max(initial=0) >= _REACH
            or not (np.diff(keys) > 0).all()
        ):
            raise ValueError("has blocks that do not ascend")
        if (occupied & free).any():
            raise ValueError("has cells that are both occupied and free")
        return cls(voxel_size, blocks, _words(occupied), _words(free))

    def part(self, start: int, stop: int) -> SceneStates:
        """The states of blocks `start` to `stop` only."""
        kept = slice(start, stop)
        classes = self.classes
        if classes is not None:
            ends = self.class_ends()
            last = min(stop, len(self.blocks))
            classes = classes[ends[min(start, last)] : ends[last]]
        parts = (self.blocks[kept], self.occupied[kept], self.free[kept])
        return SceneStates(self.voxel_size, *parts, classes)

    def class_ends(self) -> NDArray[np.int64]:
        """(B + 1,) the start of each block's occupied cells, in the order of `cells`."""
        counts = np.bitwise_count(self.occupied).sum(axis=(1, 2), dtype=np.int64)
        return np.concatenate([[0], np.cumsum(counts)])

    def labelled(self, wanted: bool) -> SceneStates:
        """The same states without classes or, if `wanted`, with them, by default UNLABELLED."""
        if wanted == (self.classes is not None):
            return self
        unlabelled = np.full(self.class_ends()[-1], UNLABELLED, np.uint8)
        return replace(self, classes=unlabelled if wanted else None)

    def with_classes(self, centres: NDArray[np.float32], classes: NDArray[np.uint8]) -> SceneStates:
        """The same states with the classes of the occupied cells.

        centres: (n, 3) centres of all occupied cells in any order, world metres; classes: (n,).
        Raises ValueError if they are not those of the occupied cells.
        """
        own = self.cells(OCCUPIED)
        found = np.floor(centres.astype(np.float64) / self.voxel_size).astype(np.int64)
        first, second = (np.lexsort(cells.T[::-1]) for cells in (own, found))
        if len(classes) != len(own) or not np.array_equal(own[first], found[second]):
            raise ValueError("has classes of other cells than the occupied ones")
        ordered = np.empty(len(own), np.uint8)
        ordered[first] = classes[second]
        return replace(self, classes=ordered)

    def equals(self, other: SceneStates) -> bool:
        """Whether all cells have the same states."""
        same = self.voxel_size == other.voxel_size and all(
            np.array_equal(getattr(self, name), getattr(other, name))
            for name in ("blocks", "occupied", "free")
        )
        if self.classes is None or other.classes is None:
            return same and self.classes is other.classes
        return same and np.array_equal(self.classes, other.classes)

    def packed(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """The (B, 4096) uint8 bits of the occupied and of the free cells."""
        return _bytes(self.occupied), _bytes(self.free)

    def cells(self, state: np.uint8) -> NDArray[np.int64]:
        """(n, 3) int64 numbers of the occupied or of the free cells, block by block."""
        bits = np.unpackbits(_bytes(self.occupied if state == OCCUPIED else self.free), axis=-1)
        block, cell = np.nonzero(bits)
        within = np.stack(np.unravel_index(cell, (BLOCK, BLOCK, BLOCK)), axis=-1)
        return self.blocks[block].astype(np.int64) * BLOCK + within

    def cut(
        self,
        grid: Grid,
        world_from_grid: NDArray[np.float64],
        stride: int = 1,
        seen: tuple[NDArray[np.uint8], NDArray[np.bool_]] | None = None,
    ) -> NDArray[np.uint8]:
        """(nx, ny, nz) uint8 labels of the cells of a grid in the scene.

        Each cell has the state of the world's cell that contains its centre. With a stride, cells
        are that many times as wide: occupied if any of their cells is, else free if any is, else
        unknown. Their number is the smallest that covers the grid.

        With classes, occupied cells have their class, or with a stride the most common one, see
        `classes.joined_classes`.

        world_from_grid: (4, 4), metres; seen: the observations of a frame, which take precedence:
        its labels with that stride (with classes, without it), and (nx, ny, nz) bool, which cells
        it observed, without a stride.
        """
        if self.classes is not None and stride > 1:
            return joined_classes(self.cut(grid, world_from_grid, 1, seen), stride)
        pose = np.asarray(world_from_grid, np.float64)
        corners = _corners(grid, pose) / (self.voxel_size * BLOCK)
        # One more block on each side, so that rounding cannot lead outside.
        low = np.floor(corners.min(axis=0)).astype(np.int64) - 1
        shape = np.floor(corners.max(axis=0)).astype(np.int64) - low + 2
        table = np.full(shape, -1, np.int32)
        here = self.blocks - low
        inside = np.flatnonzero(((here >= 0) & (here < shape)).all(axis=1))
        table[tuple(here[inside].T)] = inside
        if seen is None:
            out = np.full([-(-n // stride) for n in grid.shape], UNKNOWN, np.uint8)
            known: NDArray[np.bool_] = np.zeros((0, 0, 0), np.bool_)
        else:
            out, known = seen[0].copy(), np.ascontiguousarray(seen[1])
        start, steps = _affine(grid, pose, self.voxel_size)
        start -= low * BLOCK
        shift = stride.bit_length() - 1
        _cut(
            self.occupied, self.free, table, start, steps, np.asarray(grid.shape), shift, known, out
        )
        if self.classes is not None:
            _assign_classes(
                self.occupied, self._ranks, self.classes, table, start, steps, known, out
            )
        return out

    @cached_property
    def _ranks(self) -> NDArray[np.int32]:
        """(B, 32, 32) int32: the number of occupied cells before those of a word."""
        counts = np.bitwise_count(self.occupied).astype(np.int32)
        ends = np.cumsum(counts, dtype=np.int32).reshape(counts.shape)
        before: NDArray[np.int32] = ends - counts
        return before


class FreeSpace:
    """Collects the free space of frames on the world's grid. Thread-safe.

    A cell of the world is free if its centre is in a cell that some frame observed as free. The
    result does not depend on the order of the frames.
    """

    def __init__(self, grid: Grid) -> None:
        """grid: of the frames, in their cameras' axes."""
        self._grid = grid
        self._slots: dict[tuple[int, int, int], int] = {}
        self._words: NDArray[np.uint32] = np.zeros((64, BLOCK, BLOCK), np.uint32)
        self._lock = threading.Lock()

    def add(self, frame: FrameOccupancy, world_from_camera: NDArray[np.float64]) -> None:
        """Add the free cells of a frame. world_from_camera: (4, 4), OpenCV axes, metres."""
        grid = self._grid
        free = frame.observed.copy()
        _clear(free, frame.visible)
        pose = as_written(world_from_camera)
        blocks = _blocks_near(grid, pose)
        with self._lock:
            slots = np.array([self._slot(block) for block in map(tuple, blocks.tolist())], np.int64)
            _add(
                free, pose, np.asarray(grid.lower), grid.voxel_size,
                np.asarray(grid.shape), blocks, slots, self._words,
            )  # fmt: skip

    def states(self, points: NDArray[np.float32]) -> SceneStates:
        """The states of a scene with these (n, 3) points of its surface, world metres.

        Cells with points are occupied, even if frames observed them as free.
        """
        numbers = np.array(list(self._slots), np.int64).reshape(-1, 3)
        words = self._words[: len(numbers)]
        full = words.any(axis=(1, 2))
        return with_points(points, self._grid.voxel_size, numbers[full], words[full])

    def _slot(self, block: tuple[int, int, int]) -> int:
        slot = self._slots.setdefault(block, len(self._slots))
        if slot == len(self._words):
            self._words = np.concatenate([self._words, np.zeros_like(self._words)])
        return slot


def with_points(
    points: NDArray[np.float32],
    voxel_size: float,
    free_blocks: NDArray[np.int64],
    free: NDArray[np.uint32],
) -> SceneStates:
    """The states of a scene, from (n, 3) points of its surface and blocks of free cells."""
    cells = np.floor(points.astype(np.float64) / voxel_size).astype(np.int64)
    own = _keys(cells // BLOCK)
    keys = np.union1d(own, _keys(free_blocks))
    if not len(keys):  # At least one block, so that its files have a row.
        keys = _keys(np.zeros((1, 3), np.int64))
    occupied, opened = np.zeros((2, len(keys), BLOCK, BLOCK), np.uint32)
    i, j, k = (cells % BLOCK).T
    # `at` is needed, because several points may be in the same word.
    bits = np.uint32(1) << (np.uint32(BLOCK - 1) - k.astype(np.uint32))
    np.bitwise_or.at(occupied, (np.searchsorted(keys, own), i, j), bits)
    opened[np.searchsorted(keys, _keys(free_blocks))] = free
    return SceneStates(voxel_size, _numbers(keys), occupied, opened & ~occupied)


def as_written(world_from_camera: NDArray[np.float64]) -> NDArray[np.float64]:
    """A pose as it is stored in a trajectory, so that a reader computes the same free cells."""
    return world_from_camera.astype(np.float32).astype(np.float64)


def _keys(blocks: NDArray[np.int64]) -> NDArray[np.int64]:
    """(n,) keys of (n, 3) blocks, in the same order."""
    x, y, z = (blocks + _REACH).T
    keys: NDArray[np.int64] = (x << 42) | (y << 21) | z
    return keys


def _numbers(keys: NDArray[np.int64]) -> NDArray[np.int32]:
    axes = [keys >> 42, keys >> 21 & 0x1FFFFF, keys & 0x1FFFFF]
    return (np.stack(axes, axis=-1) - _REACH).astype(np.int32)


def _words(packed: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """(B, 4096) bytes to (B, 32, 32) words. The first byte of a word is its highest."""
    words = np.ascontiguousarray(packed).view(">u4").astype(np.uint32)
    return words.reshape(-1, BLOCK, BLOCK)


def _bytes(words: NDArray[np.uint32]) -> NDArray[np.uint8]:
    return words.astype(">u4").reshape(-1, BLOCK * BLOCK).view(np.uint8).reshape(-1, BLOCK_BYTES)


def _corners(grid: Grid, pose: NDArray[np.float64]) -> NDArray[np.float64]:
    """(8, 3) world metres of a grid's corners."""
    sides = [
        (low, low + n * grid.voxel_size) for low, n in zip(grid.lower, grid.shape, strict=True)
    ]
    corners = np.stack(np.meshgrid(*sides, indexing="ij"), axis=-1).reshape(-1, 3)
    world: NDArray[np.float64] = corners @ pose[:3, :3].T + pose[:3, 3]
    return world


def _affine(
    grid: Grid, pose: NDArray[np.float64], voxel_size: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The centre of cell (0, 0, 0), and (3, 3) steps along the axes, in world cells."""
    first = np.asarray(grid.lower) + 0.5 * grid.voxel_size
    start = (pose[:3, :3] @ first + pose[:3, 3]) / voxel_size
    return start, np.ascontiguousarray(pose[:3, :3] * (grid.voxel_size / voxel_size))


def _blocks_near(grid: Grid, pose: NDArray[np.float64]) -> NDArray[np.int64]:
    """(m, 3) the blocks that may overlap a camera's grid."""
    edge = BLOCK * grid.voxel_size
    corners = _corners(grid, pose) / edge
    low, high = (np.floor(f(corners, axis=0)).astype(np.int64) for f in (np.min, np.max))
    blocks = np.stack(
        np.meshgrid(*(np.arange(a, b + 1) for a, b in zip(low, high, strict=True)), indexing="ij"),
        axis=-1,
    ).reshape(-1, 3)
    middles = ((blocks + 0.5) * edge - pose[:3, 3]) @ pose[:3, :3]
    lower = np.asarray(grid.lower)
    outside = np.maximum(lower - middles, middles - lower - grid.voxel_size * np.array(grid.shape))
    near = (np.maximum(outside, 0) ** 2).sum(axis=1) <= 0.76 * edge**2  # Half a diagonal, squared.
    return np.ascontiguousarray(blocks[near])


@njit(nogil=True)
def _clear(packed, cells):
    """Clear the bits of cells, in the order of `np.packbits`."""
    for cell in cells:
        packed[cell >> 3] &= ~(np.uint8(128) >> np.uint8(cell & 7))


@njit(nogil=True)
def _near_free(free, ny, nz, near):
    """Mark the cubes of 8 x 8 x 8 cells that have a cell of `free`, and their neighbours.

    near: bool, with one more cube on each side than the grid.
    """
    for byte in range(len(free)):
        if free[byte] == 0:
            continue
        for bit in range(8):
            if free[byte] & (np.uint8(128) >> np.uint8(bit)):
                cell = np.uint32(8 * byte + bit)
                row = np.uint32(cell // np.uint32(nz))
                i, j = np.uint32(row // np.uint32(ny)), np.uint32(row % np.uint32(ny))
                k = np.uint32(cell - np.uint32(row * np.uint32(nz)))
                near[1 + (i >> 3), 1 + (j >> 3), 1 + (k >> 3)] = True
                if nz % 8 == 0:
                    break  # The others of the byte are in the same cube.
    spread = near.copy()
    for a in range(near.shape[0]):
        for b in range(near.shape[1]):
            for c in range(near.shape[2]):
                if near[a, b, c]:
                    box = spread[max(a - 1, 0) : a + 2, max(b - 1, 0) : b + 2]
                    box[:, :, max(c - 1, 0) : c + 2] = True
    return spread


@njit(nogil=True, error_model="numpy")
def _add(free, pose, lower, size, shape, blocks, slots, words):
    """Set the bits, at `slots` of `words`, of the cells of `blocks` with centres in `free`."""
    nx, ny, nz = shape[0], shape[1], shape[2]
    near = np.zeros(((nx + 7) // 8 + 2, (ny + 7) // 8 + 2, (nz + 7) // 8 + 2), np.bool_)
    near = _near_free(free, ny, nz, near)
    d0, d1, d2 = pose[2, 0], pose[2, 1], pose[2, 2]  # Along the last axis of the world.
    for n in range(len(blocks)):
        for cube in range(64):
            first_i, first_j, first_k = (cube >> 4) * 8, (cube >> 2 & 3) * 8, (cube & 3) * 8
            # The middle of 8 x 8 x 8 cells of the world, in cubes of 8 cells of the camera:
            # their cells are less than a cube away.
            x = (blocks[n, 0] * 32 + first_i + 4) * size - pose[0, 3]
            y = (blocks[n, 1] * 32 + first_j + 4) * size - pose[1, 3]
            z = (blocks[n, 2] * 32 + first_k + 4) * size - pose[2, 3]
            a0 = (pose[0, 0] * x + pose[1, 0] * y + pose[2, 0] * z - lower[0]) / size
            a1 = (pose[0, 1] * x + pose[1, 1] * y + pose[2, 1] * z - lower[1]) / size
            a2 = (pose[0, 2] * x + pose[1, 2] * y + pose[2, 2] * z - lower[2]) / size
            u, v, w = np.floor(a0 / 8) + 1, np.floor(a1 / 8) + 1, np.floor(a2 / 8) + 1
            if not (0 <= u < near.shape[0] and 0 <= v < near.shape[1] and 0 <= w < near.shape[2]):
                continue
            if not near[int(u), int(v), int(w)]:
                continue
            mask = np.uint32(0xFF000000) >> np.uint32(first_k)
            for i in range(first_i, first_i + 8):
                x = (blocks[n, 0] * 32 + i + 0.5) * size - pose[0, 3]
                for j in range(first_j, first_j + 8):
                    word = words[slots[n], i, j]
                    if word & mask == mask:
                        continue
                    y = (blocks[n, 1] * 32 + j + 0.5) * size - pose[1, 3]
                    z = (blocks[n, 2] * 32 + 0.5) * size - pose[2, 3]
                    a0 = (pose[0, 0] * x + pose[1, 0] * y + pose[2, 0] * z - lower[0]) / size
                    a1 = (pose[0, 1] * x + pose[1, 1] * y + pose[2, 1] * z - lower[1]) / size
                    a2 = (pose[0, 2] * x + pose[1, 2] * y + pose[2, 2] * z - lower[2]) / size
                    for k in range(first_k, first_k + 8):
                        u, v, w = a0 + k * d0, a1 + k * d1, a2 + k * d2
                        if u < 0.0 or v < 0.0 or w < 0.0 or u >= nx or v >= ny or w >= nz:
                            continue
                        cell = np.uint64((int(u) * ny + int(v)) * nz + int(w))
                        byte = free[cell >> np.uint64(3)]
                        if byte & (np.uint8(128) >> np.uint8(cell & np.uint64(7))):
                            word |= np.uint32(0x80000000) >> np.uint32(k)
                    words[slots[n], i, j] = word


@njit(nogil=True, error_model="numpy", inline="always")
def _world_cell(table, x, y, z):
    """The block at a position, in world cells from the first block of `table`, and the cell in it.

    Returns the block's number, -1 for none, the cell's word (i, j), and the shift of its bit.
    """
    u, v, w = np.uint64(x), np.uint64(y), np.uint64(z)
    five, low = np.uint64(5), np.uint64(31)
    block = table[u >> five, v >> five, w >> five]
    return block, u & low, v & low, np.uint32(31) - np.uint32(w & low)


@njit(nogil=True, error_model="numpy")
def _cut(occupied, free, table, start, steps, shape, shift, known, out):
    """start: in world cells from the first block of `table`; all positions are positive.

    known: cells to skip, or an empty array.
    """
    some_known = known.size > 0
    for i in range(shape[0]):
        for j in range(shape[1]):
            x = start[0] + steps[0, 0] * i + steps[0, 1] * j
            y = start[1] + steps[1, 0] * i + steps[1, 1] * j
            z = start[2] + steps[2, 0] * i + steps[2, 1] * j
            for k in range(shape[2]):
                if some_known and known[i, j, k]:
                    continue
                block, u, v, bit = _world_cell(
                    table, x + steps[0, 2] * k, y + steps[1, 2] * k, z + steps[2, 2] * k
                )
                if block < 0:
                    continue
                at = np.uint64(block)
                if (occupied[at, u, v] >> bit) & np.uint32(1):
                    out[i >> shift, j >> shift, k >> shift] = 1
                elif out[i >> shift, j >> shift, k >> shift] == 255 and (
                    (free[at, u, v] >> bit) & np.uint32(1)
                ):
                    out[i >> shift, j >> shift, k >> shift] = 0


@njit(nogil=True, error_model="numpy")
def _assign_classes(occupied, ranks, classes, table, start, steps, known, out):
    """Give the occupied cells of `out` the classes of the world's cells, except known ones.

    The arguments are those of `_cut`; ranks: of a word's first cell in `classes`.
    """
    some_known = known.size > 0
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            x = start[0] + steps[0, 0] * i + steps[0, 1] * j
            y = start[1] + steps[1, 0] * i + steps[1, 1] * j
            z = start[2] + steps[2, 0] * i + steps[2, 1] * j
            for k in range(out.shape[2]):
                if out[i, j, k] != 1 or (some_known and known[i, j, k]):
                    continue
                block, u, v, bit = _world_cell(
                    table, x + steps[0, 2] * k, y + steps[1, 2] * k, z + steps[2, 2] * k
                )
                if block < 0:
                    continue
                at = np.uint64(block)
                here = occupied[at, u, v] >> bit
                if not here & np.uint32(1):
                    continue
                rank = ranks[at, u, v]
                before = here >> np.uint32(1)
                while before:
                    before &= before - np.uint32(1)
                    rank += 1
                out[i, j, k] = classes[rank]
