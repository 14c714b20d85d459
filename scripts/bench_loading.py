"""How fast a trainer gets random frames of a built dataset, on one core."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

WANTED = {
    "dense occupancy + mask": {"dense": True, "keys": ("occupancy", "mask")},
    "the same with pose and task": {"dense": True, "keys": ("occupancy", "mask", "pose", "task")},
    "the same with the image": {"dense": True, "keys": ("occupancy", "mask", "pose", "image")},
    "sparse occupancy + mask": {"dense": False, "keys": ("occupancy", "mask")},
}


def loading(source: Path, seconds: float = 2.0) -> dict[str, float]:
    """Random frames a second of the dataset that a source gives, by what is asked for.

    Each kind is measured for `seconds`, in turns of a quarter of that, and its best turn counts: a
    machine that others use is slow for moments.
    """
    from occgen_hub import OccupancyDataset, build

    cores = os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory() as folder:
        summary = build("internnav", source, folder)
        assert not summary.failures, summary.failures
        datasets = {name: OccupancyDataset(folder, **how) for name, how in WANTED.items()}
        found = dict.fromkeys(WANTED, 0.0)
        os.sched_setaffinity(0, {min(cores)})
        try:
            for _ in range(4):
                for name, dataset in datasets.items():
                    found[name] = max(found[name], _rate(dataset, seconds / 4))
        finally:
            os.sched_setaffinity(0, cores)
    return found


def _rate(dataset: Any, seconds: float) -> float:
    order = np.random.default_rng(0).integers(len(dataset), size=1 << 16)
    start, done = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        dataset[int(order[done % len(order)])]
        done += 1
    return done / elapsed


def loading_table(found: dict[str, float]) -> None:
    """Print what `loading` found."""
    print("\nrandom frames a second, one core, one process")
    for name, rate in found.items():
        print(f"  {name:<34}{rate:,.0f}")
