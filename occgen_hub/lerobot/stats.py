"""The statistics that LeRobot keeps of an episode's features."""

from __future__ import annotations

from typing import Any

import numpy as np

from occgen_hub.episode import Column


def column_stats(column: Column) -> dict[str, list[Any]]:
    """min, max, mean and std over the frames, with the feature's shape, and count.

    std is the population standard deviation, as in LeRobot.
    """
    values = np.asarray(column.values)
    rows = values.reshape(len(values), *column.feature.shape)
    wide = rows.astype(np.float64)
    return {
        "min": rows.min(axis=0).tolist(),
        "max": rows.max(axis=0).tolist(),
        "mean": wide.mean(axis=0).tolist(),
        "std": wide.std(axis=0).tolist(),
        "count": [len(rows)],
    }


def episode_stats(columns: dict[str, Column]) -> dict[str, dict[str, list[Any]]]:
    """Statistics of every numeric column. Strings and booleans have none."""
    return {
        name: column_stats(column)
        for name, column in columns.items()
        if column.feature.dtype not in ("string", "bool")
    }
