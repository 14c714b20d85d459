"""Occupancy and visibility of a frame where its points are: on a GPU, in tensor operations.

What `visibility` does with loops over bundles is done here for the cells of all lists at once, in
some three hundred kernels and no loop over distances. First each ray's distance to its first
occupied cell, a minimum over the occupied cells that it crosses; then, for each bundle and
distance, the rays that come so far, 64 bits; then, for each cell of a list, whether one of those
that cross it is among them. Nothing is rounded but the points' cells, in float64 and in the same
order as on a CPU, so the result is the same, bit for bit. The same code runs on a CPU, where the
tests hold it to that.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from occgen_hub.occupancy.bundles import BUNDLE, Bundles, bundles_of
from occgen_hub.occupancy.grid import Grid

_NEVER = 1 << 30


@dataclass(frozen=True)
class _Tables:
    """Bundles on a device, entry by entry.

    cells: (n,) int64; crossing: (n,) int64, 64 bits; place: (n,) int64, bundle * distances +
    distance from the nearest; bundles, distances: how many there are.
    """

    cells: Tensor
    crossing: Tensor
    place: Tensor
    bundles: int
    distances: int

    @classmethod
    def of(cls, bundles: Bundles, grid: Grid, device: torch.device) -> Self:
        cells = torch.from_numpy(bundles.cells.view(np.int32)).to(device, torch.int64)
        crossing = torch.from_numpy(bundles.crossing.view(np.int64)).to(device)
        lengths = torch.from_numpy(np.diff(bundles.ends)).to(device)
        bundle = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)
        _, ny, nz = grid.shape
        i, j, k = (int(at) for at in np.floor(grid.camera_in_cells))
        distance = (cells // (ny * nz) - i).abs()
        distance += (cells // nz % ny - j).abs() + (cells % nz - k).abs()
        if len(cells):
            distance -= distance.min()
        distances = int(distance.max()) + 1 if len(cells) else 0
        return cls(cells, crossing, bundle * distances + distance, len(lengths), distances)


def observe_tensor(
    grid: Grid,
    points: Tensor,
    world_from_camera: NDArray[np.float64],
    intrinsics: NDArray[np.float64],
    size: tuple[int, int],
) -> tuple[NDArray[np.int32], NDArray[np.uint8]] | None:
    """The visible columns and the packed observed cells, or None where bundles would be too long.

    points: (n, 3) world coordinates, on any device; only the result leaves it. The other arguments
    as for `visibility.observe`, and the result as in its `FrameOccupancy`.
    """
    K = np.asarray(intrinsics, np.float64)
    camera = (float(K[0, 0]), float(K[1, 1]), float(K[0, 2]), float(K[1, 2]))
    tables = _tables(grid, camera, size, points.device)
    if tables is None:
        return None
    occupied = _occupied(grid, points, np.linalg.inv(world_from_camera).astype(np.float64))
    observed = _observed(tables, occupied)
    visible = (occupied & observed).nonzero()[:, 0].to(torch.int32)
    return visible.cpu().numpy(), _packed(observed).cpu().numpy()


@lru_cache(maxsize=2)
def _tables(
    grid: Grid, camera: tuple[float, ...], size: tuple[int, int], device: torch.device
) -> _Tables | None:
    fx, fy, cx, cy = camera
    bundles = bundles_of(grid, np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]]), size)
    return None if bundles is None else _Tables.of(bundles, grid, device)


def _occupied(grid: Grid, points: Tensor, camera_from_world: NDArray[np.float64]) -> Tensor:
    """(cells,) bool: in which cells a point lies; as `visibility._mark_cloud`, step by step."""
    x, y, z = points.to(torch.float64).unbind(1)
    column = torch.zeros(len(points), dtype=torch.int64, device=points.device)
    inside = torch.ones(len(points), dtype=torch.bool, device=points.device)
    for axis, cells in enumerate(grid.shape):
        a, b, c, t = (float(value) for value in camera_from_world[axis])
        place = ((a * x + b * y + c * z + t - grid.lower[axis]) / grid.voxel_size).floor()
        inside &= (place >= 0) & (place < cells)
        column = column * cells + place.clamp(0, cells - 1).to(torch.int64)
    occupied = torch.zeros(grid.cells, dtype=torch.bool, device=points.device)
    occupied[column[inside]] = True
    return occupied


def _observed(tables: _Tables, occupied: Tensor) -> Tensor:
    """(cells,) bool: the cells that a ray reaches."""
    device = occupied.device
    stops = occupied[tables.cells].nonzero()[:, 0]
    ends = torch.full((tables.bundles, BUNDLE), _NEVER, dtype=torch.int64, device=device)
    going = torch.zeros((tables.bundles, tables.distances), dtype=torch.int64, device=device)
    distances = torch.arange(tables.distances, device=device)
    crossing, place = tables.crossing[stops], tables.place[stops]
    stopping, at = place // max(1, tables.distances), place % max(1, tables.distances)
    for ray in range(BUNDLE):
        met = torch.where((crossing >> ray) & 1 > 0, at, _NEVER)
        ends[:, ray].scatter_reduce_(0, stopping, met, "amin")
        going |= (distances <= ends[:, ray, None]).to(torch.int64) << ray
    here = tables.crossing & going.view(-1)[tables.place]
    observed = torch.zeros_like(occupied)
    observed[tables.cells[here != 0]] = True
    return observed


def _packed(cells: Tensor) -> Tensor:
    """(n,) bool to (ceil(n / 8),) uint8, as `np.packbits`."""
    padded = torch.nn.functional.pad(cells, (0, -len(cells) % 8)).view(-1, 8)
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=cells.device)
    return (padded * weights).sum(1, dtype=torch.uint8)
