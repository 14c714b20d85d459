"""Occupancy and visibility of a frame compared with other methods, and growth of its time.

Part of scripts/bench. All methods get the same rays and the same cells, in one run. The run also
checks that ours is exact: a sample of rays by rational arithmetic, and the whole frame against rays
that are followed one by one.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from fixed_stride import fixed_stride

from occgen_hub.builder import load_builder
from occgen_hub.config import Config
from occgen_hub.engines.rgbd import SensorDepth
from occgen_hub.occupancy.grid import Grid
from occgen_hub.occupancy.point_blocks import PointBlocks, into_blocks
from occgen_hub.occupancy.ray_packets import RayPackets, follow_packets
from occgen_hub.occupancy.visibility import (
    OBSERVED,
    OCCUPIED,
    first_occupied,
    observe,
    warm_up,
)
from occgen_hub.pipeline import reconstruct

RATIONAL_RAYS = 200
Size = tuple[int, int]


class Scene:
    """A trajectory's cloud and cameras. Methods are compared on frame 0."""

    def __init__(self, source: Path) -> None:
        builder = load_builder("internnav", source)
        episode = builder.read(next(builder.episodes()))
        found = reconstruct(episode, SensorDepth(), Config(), Path(os.devnull))
        assert episode.intrinsics is not None
        self.points = found.cloud.points
        self.cloud: PointBlocks = into_blocks(found.cloud.points)
        self.poses = found.world_from_camera
        self.K = episode.intrinsics[0].astype(np.float32).astype(np.float64)
        self.size: Size = episode.image_size


def best_time(
    run: Callable[[], object], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """The time of the fastest of several calls, seconds, to exclude effects of other load."""
    times = []
    for _ in range(repeats):
        start = clock()
        run()
        times.append(clock() - start)
    return min(times)


def measure(source: Path, repeats: int) -> dict[str, Any]:
    """All figures, as a dictionary for JSON."""
    warm_up()
    scene, grid, threads = Scene(source), Grid.of(Config()), numba.get_num_threads()
    compared = _compare(scene, grid, repeats)
    numba.set_num_threads(1)  # Growth is measured as processor time of one core.
    try:
        growth = {
            "rays": _growth_with_rays(scene, repeats),
            "cells": _growth_with_cells(scene, repeats),
            "frames": _growth_with_frames(scene, grid),
        }
    finally:
        numba.set_num_threads(threads)
    return {
        "threads": threads,
        "rays": scene.size[0] * scene.size[1],
        "cells": grid.cells,
        "compared": compared,
        "growth": growth,
    }


def _setup_seconds(scene: Scene, grid: Grid, K: np.ndarray, size: Size) -> float:
    """Processor seconds that a camera's first frames take beyond later ones, to make its ray
    packets.
    """
    state = np.empty(grid.cells, np.uint8)

    def frame() -> None:
        observe(grid, scene.cloud, scene.poses[0], K, size, state)

    first = best_time(lambda: [frame() for _ in range(6)], 1, time.process_time)
    return first - 6 * best_time(frame, 3, time.process_time)


# Ours and others, on frame 0


def _compare(scene: Scene, grid: Grid, repeats: int) -> dict[str, Any]:
    K, size = scene.K, scene.size
    packets = RayPackets.of(grid, K, size)
    assert packets is not None
    state = np.empty(grid.cells, np.uint8)
    observe(grid, scene.cloud, scene.poses[0], K, size, state)
    blank = state & OCCUPIED

    _setup_seconds(scene, grid, K, size)
    seconds = {
        "ours: voxelise, see, pack": best_time(
            lambda: observe(grid, scene.cloud, scene.poses[0], K, size, state), 10 * repeats
        )
    }
    # Observed cells cost the same as unobserved ones, so all calls can use one state.
    ours, single = blank.copy(), blank.copy()
    seconds["ours: see only"] = best_time(lambda: follow_packets(packets, ours), 10 * repeats)
    # Scattered pixels, the worst case: real ones are connected.
    holes, left_out = np.random.default_rng(0).random(size[::-1]) < 0.02, blank.copy()
    seconds["ours, 2 % without depth: see only"] = best_time(
        lambda: follow_packets(packets, left_out, holes.copy()), 10 * repeats
    )
    ends = first_occupied(grid, K, size, single)
    seconds["single exact rays: see only"] = best_time(
        lambda: first_occupied(grid, K, size, single), repeats
    )
    marched, solid = np.zeros(grid.cells, bool), torch.from_numpy(blank > 0)

    def march() -> None:
        marched[:] = fixed_stride(grid, K, size, solid).numpy()

    seconds["fixed stride in PyTorch: see only"] = best_time(march, 2)
    octomap = _octomap(grid, K, size, ends)
    if octomap is not None:
        seconds["OctoMap, insertPointCloud: see only"] = best_time(octomap, 3)
    seen, occupied = (ours & OBSERVED) > 0, blank > 0
    whole = seconds["ours: voxelise, see, pack"]
    return {
        "ms": {name: 1e3 * value for name, value in seconds.items()},
        "times_ours": {name: value / whole for name, value in seconds.items()},
        "observed_cells": int(seen.sum()),
        "cells_that_differ_from_single_rays": int((ours != single).sum()),
        "rays_checked_rationally": RATIONAL_RAYS,
        "rays_that_differ_from_rational": _wrong_rays(grid, K, occupied, seen, ends),
        # Shares of the occupied cells that each method calls visible.
        "fixed_stride_hidden_share": _share(occupied & marched, ~seen),
        "fixed_stride_missed_share": _share(occupied & seen, ~marched),
    }


def _share(cells: np.ndarray, wrong: np.ndarray) -> float:
    return float((cells & wrong).sum() / max(cells.sum(), 1))


def _octomap(
    grid: Grid, K: np.ndarray, size: Size, ends: np.ndarray
) -> Callable[[], object] | None:
    """A function that traces the same rays with OctoMap; None if it is not installed."""
    try:
        import octomap
    except ImportError:
        return None
    u, v = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    x, y = (u + 0.5 - K[0, 2]) / K[0, 0], (v + 0.5 - K[1, 2]) / K[1, 1]
    rays = np.stack([x, y, np.ones_like(x)], -1).astype(np.float64)
    # A ray without a hit ends at the edge of the grid.
    lower = np.asarray(grid.lower)
    upper = lower + np.asarray(grid.shape) * grid.voxel_size
    with np.errstate(divide="ignore"):
        depth = np.where(rays > 0, upper / rays, lower / rays).min(axis=-1)
    hit = ends >= 0
    centres = grid.centres(np.maximum(ends, 0).reshape(-1)).reshape(*ends.shape, 3)
    depth[hit] = centres[hit][:, 2]
    points = (rays * depth[..., None]).reshape(-1, 3)

    def insert() -> object:
        tree = octomap.OcTree(grid.voxel_size)
        tree.insertPointCloud(points, np.zeros(3))
        return tree

    return insert


def _wrong_rays(
    grid: Grid, K: np.ndarray, occupied: np.ndarray, seen: np.ndarray, ends: np.ndarray
) -> int:
    """Number of rays of a sample for which rational arithmetic gives another result."""
    sys.path.append(str(Path(__file__).parent.parent / "tests"))
    from test_visibility import crossed_cells  # The reference of the tests of exactness.

    fx, fy, cx, cy = (Fraction(float(K[i])) for i in ((0, 0), (1, 1), (0, 2), (1, 2)))
    half, wrong = Fraction(1, 2), 0
    rng = np.random.default_rng(0)
    for v, u in zip(*(rng.integers(0, n, RATIONAL_RAYS) for n in ends.shape), strict=True):
        direction = [(int(u) + half - cx) / fx, (int(v) + half - cy) / fy, Fraction(1)]
        columns = np.ravel_multi_index(np.array(crossed_cells(grid, direction)).T, grid.shape)
        hits = np.flatnonzero(occupied[columns])
        end = columns[hits[0]] if len(hits) else -1
        reached = columns[: hits[0] + 1] if len(hits) else columns
        wrong += int(ends[v, u] != end or not seen[reached].all())
    return wrong


# Growth


def _growth_with_rays(scene: Scene, repeats: int) -> list[dict[str, float]]:
    grid, rows = Grid.of(Config()), []
    for scale in (0.25, 0.5, 1, 2):
        size = (round(scene.size[0] * scale), round(scene.size[1] * scale))
        K = scene.K * [[scale], [scale], [1]]
        rows.append({"rays": size[0] * size[1], **_frame(scene, grid, K, size, repeats)})
    return rows


def _growth_with_cells(scene: Scene, repeats: int) -> list[dict[str, float]]:
    rows = []
    for voxel_size in (0.1, 0.05, 0.025, 0.02, 0.0125):
        grid = Grid.of(Config(voxel_size=voxel_size))
        rows.append({"cells": grid.cells, **_frame(scene, grid, scene.K, scene.size, repeats)})
    return rows


def _frame(scene: Scene, grid: Grid, K: np.ndarray, size: Size, repeats: int) -> dict[str, float]:
    """Milliseconds of frame 0 and of a camera's setup on one core, and the megabytes it keeps."""
    beginning = _setup_seconds(scene, grid, K, size)
    state = np.empty(grid.cells, np.uint8)
    seconds = best_time(
        lambda: observe(grid, scene.cloud, scene.poses[0], K, size, state),
        4 * repeats,
        time.process_time,
    )
    made = RayPackets.of(grid, K, size)
    kept = 0 if made is None else made.cells.nbytes + made.crossing.nbytes
    return {"frame_ms": 1e3 * seconds, "once_a_camera_ms": 1e3 * beginning, "kept_mb": kept / 1e6}


def _growth_with_frames(scene: Scene, grid: Grid) -> list[dict[str, float]]:
    """Milliseconds per frame on one core, for longer and longer walks along the trajectory."""
    state, rows = np.empty(grid.cells, np.uint8), []
    # Every fifth frame, then their neighbours, so that any ten frames in a row are comparable.
    spread = [scene.poses[t] for start in range(5) for t in range(start, len(scene.poses), 5)]

    def walk(frames: int) -> None:
        for t in range(frames):
            pose = spread[t % len(spread)]
            observe(grid, scene.cloud, pose, scene.K, scene.size, state)

    _setup_seconds(scene, grid, scene.K, scene.size)
    for frames in (10, 50, 100, 500):
        seconds = best_time(partial(walk, frames), max(3, 500 // frames), time.process_time)
        rows.append({"frames": frames, "frame_ms": 1e3 * seconds / frames})
    return rows


def table(figures: dict[str, Any]) -> None:
    """Print the figures."""
    compared = figures["compared"]
    print(f"\n{figures['rays']:,} rays, {figures['cells']:,} cells, {figures['threads']} threads")
    print(f"  {'frame 0':<38}{'ms':>9}  {'times ours':>10}")
    for name, ms in compared["ms"].items():
        print(f"  {name:<38}{ms:>9.1f}  {compared['times_ours'][name]:>10.1f}")
    if not any(name.startswith("OctoMap") for name in compared["ms"]):
        print("  OctoMap is not installed: .venv/bin/pip install octomap-python")
    print(
        f"  exactness: {compared['cells_that_differ_from_single_rays']} cells differ from single "
        f"exact rays; {compared['rays_that_differ_from_rational']} of "
        f"{compared['rays_checked_rationally']} rays from rational arithmetic"
    )
    hidden, missed = (compared[f"fixed_stride_{kind}_share"] for kind in ("hidden", "missed"))
    print(
        f"  fixed stride: {hidden:.0%} of the occupied cells that it calls visible are hidden, "
        f"{missed:.0%} of the visible ones are missed"
    )
    for kind in ("rays", "cells", "frames"):
        print(f"\n  {kind:>12}  {'ms, 1 core':>10}  {'once a camera, ms':>17}  {'kept, MB':>8}")
        for row in figures["growth"][kind]:
            print(
                f"  {row[kind]:>12,}  {row['frame_ms']:>10.2f}  "
                f"{row.get('once_a_camera_ms', 0):>17.0f}  {row.get('kept_mb', 0):>8.0f}"
            )
