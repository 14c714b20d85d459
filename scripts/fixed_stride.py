"""A baseline for visibility: all rays are sampled at a fixed stride, in PyTorch.

Occupancy pipelines usually compute visibility this way. It visits some cells several times and
misses others: a stride of one cell skips corners of cells, and the first sample in an occupied cell
may be behind an occupied cell that was missed.
"""

from __future__ import annotations

import numpy as np
import torch

from occgen_hub.occupancy.grid import Grid


def fixed_stride(
    grid: Grid, K: np.ndarray, size: tuple[int, int], occupied: torch.Tensor
) -> torch.Tensor:
    """(cells,) bool: the cells with samples, up to each ray's first sample in an occupied cell.

    occupied: (cells,) bool.
    """
    width, height = size
    u, v = torch.meshgrid(torch.arange(width), torch.arange(height), indexing="ij")
    x = (u.reshape(-1) + 0.5 - K[0, 2]) / K[0, 0]
    y = (v.reshape(-1) + 0.5 - K[1, 2]) / K[1, 1]
    rays = torch.nn.functional.normalize(
        torch.stack([x, y, torch.ones_like(x)], -1).float(), dim=-1
    )
    lower, shape = torch.tensor(grid.lower), torch.tensor(grid.shape)
    far = torch.maximum(lower.abs(), (lower + shape * grid.voxel_size).abs()).norm()
    samples = torch.arange(int(far / grid.voxel_size) + 1) * grid.voxel_size
    points = rays[:, None] * samples[None, :, None]
    cells = torch.floor((points - lower) / grid.voxel_size).long()
    inside = ((cells >= 0) & (cells < shape)).all(-1)
    columns = (cells[..., 0] * shape[1] + cells[..., 1]) * shape[2] + cells[..., 2]
    columns[~inside] = 0
    hits = occupied[columns] & inside
    reached = inside & (hits.cumsum(1) - hits.long() == 0)
    observed = torch.zeros(grid.cells, dtype=torch.bool)
    observed[columns[reached]] = True
    return observed
