"""Batches of items, for a DataLoader's `collate_fn`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import default_collate

from occgen_hub.loading import SCHEMA
from occgen_hub.schema import load_schema


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch of items, for a DataLoader's `collate_fn`. Dense values are stacked as usual.

    Sparse "occupancy" and "dynamic" become (n, 4) int32, rows (b, i, j, k) of item b, and "history"
    and "history_dynamic" (n, 5), rows (b, h, i, j, k), the format of sparse convolution libraries.
    So do the cells of LeRobotOccupancyDataset, under their own names.
    """
    named = [load_schema(SCHEMA).folder(file) for file in ("visible", "dynamic")]
    batch, sparse = {}, ("occupancy", "dynamic", "history", "history_dynamic", *named)
    for key in items[0]:
        values = [item[key] for item in items]
        if key in sparse and values[0].ndim == 2:
            numbered = [
                torch.nn.functional.pad(rows, (1, 0), value=b) for b, rows in enumerate(values)
            ]
            batch[key] = torch.cat(numbered)
        else:
            batch[key] = default_collate(values)
    return batch
