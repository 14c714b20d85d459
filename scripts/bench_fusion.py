"""Benchmark of fusion: time per frame and step compared with `fusion: union`, and peak memory.

Part of scripts/bench. Run directly, it prints the figures as JSON: bench_fusion.py TREE.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from occgen_hub.builder import load_builder
from occgen_hub.config import Config
from occgen_hub.engines.rgbd import SensorDepth
from occgen_hub.fusion.depth_map import DepthMaps
from occgen_hub.fusion.evidence import Tolerance
from occgen_hub.fusion.fuse import agree, fuse, union
from occgen_hub.fusion.noise import noise_model
from occgen_hub.fusion.quality import assess
from occgen_hub.occupancy.point_blocks import into_blocks
from occgen_hub.views import Views

LENGTHS = (10, 100, 500)
"""Lengths of the recordings for which peak memory is compared, in frames."""


def read_views(source: Path, length: int | None = None) -> Views:
    """The views of the first episode, repeated forwards and backwards up to `length`, if given."""
    builder = load_builder("internnav", source)
    episode = builder.read(next(builder.episodes()))
    views = SensorDepth().reconstruct(episode, Config(), Path(os.devnull))
    if length is None:
        return views
    there = np.arange(len(views.frames))
    walk = np.resize(np.concatenate([there, there[-2:0:-1]]), length).astype(np.int64)
    return replace(
        views,
        world_from_camera=views.world_from_camera[walk],
        intrinsics=views.intrinsics[walk],
        frames=np.arange(length),
        read_depth=lambda frame: views.read_depth(int(walk[frame])),
        read_color=lambda frame: views.read_color(int(walk[frame])),
    )


def steps(source: Path, repeats: int) -> dict[str, float]:
    """Milliseconds per frame of each step, best of `repeats` runs."""
    config, views = Config(), read_views(source)
    fuse(views, config)  # Compiles the code and fills the file cache.
    found: dict[str, list[float]] = {}
    for _ in range(repeats):
        marks = [time.perf_counter()]
        maps = DepthMaps(views, config.confidence, config.depth_edge)
        measured = union(maps, config)
        marks.append(time.perf_counter())
        tolerance = Tolerance.of(noise_model(maps, config.noise), config.voxel_size)
        marks.append(time.perf_counter())
        agreement = agree(measured, maps, tolerance, config)
        marks.append(time.perf_counter())
        assess(into_blocks(agreement.cloud.points), maps, tolerance, agreement)
        marks.append(time.perf_counter())
        for name, seconds in zip(
            ("union", "noise", "agree", "assess"), np.diff(marks), strict=True
        ):
            found.setdefault(name, []).append(1e3 * seconds / len(views.frames))
    return {name: min(values) for name, values in found.items()}


def peak_memory(source: Path, length: int) -> float:
    """Peak memory in MB of a process that fuses `length` frames."""
    command = [sys.executable, __file__, str(source), str(length)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(result.stdout.splitlines()[-1])


def measure(source: Path, repeats: int) -> dict[str, Any]:
    """Measure time and memory on the first episode of a tree."""
    return {
        "ms_a_frame": steps(source, repeats),
        "peak_memory_mb": {str(n): peak_memory(source, n) for n in LENGTHS},
    }


def fusion_table(part: dict[str, Any]) -> None:
    """Print the results of `measure`."""
    print("\nfusion")
    for name, value in part["ms_a_frame"].items():
        print(f"  {name:<34}{value:.1f} ms a frame")
    for length, value in part["peak_memory_mb"].items():
        print(f"  {'peak memory, ' + length + ' frames':<34}{value:.0f} MB")


def main() -> int:
    source = Path(sys.argv[1])
    if len(sys.argv) > 2:
        fuse(read_views(source, int(sys.argv[2])), Config())
        status = Path("/proc/self/status").read_text()
        print(int(status.split("VmHWM:")[1].split()[0]) / 1e3)
    else:
        print(json.dumps(measure(source, 3), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
