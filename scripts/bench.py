"""Benchmarks: kernel, build stages, memory, bytes on disk, loading, pictures, visibility compared
with other methods, networks, processes and threads.

Times on a shared machine differ by half between runs, so all compared figures are measured in one
run. The tests check the exactness of the kernel, not this script.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numba
import numpy as np

from occgen_hub.builder import load_builder
from occgen_hub.config import Config
from occgen_hub.engines.rgbd import SensorDepth
from occgen_hub.episode_build import Settings
from occgen_hub.files import files_under
from occgen_hub.job import Job, list_episodes
from occgen_hub.occupancy.grid import Grid
from occgen_hub.occupancy.point_blocks import into_blocks
from occgen_hub.occupancy.visibility import OBSERVED, observe, trace, warm_up
from occgen_hub.pipeline import reconstruct
from occgen_hub.runtime.build import build_dataset
from occgen_hub.sample import make_sample
from occgen_hub.shards import shards

REAL = Path(__file__).parent.parent.parent / "shared" / "data" / "internnav" / "traj_data"


def memory(which: str) -> float:
    """Memory of this process in MB: VmRSS is current, VmHWM the peak since `reset_peak_memory`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(which))


def reset_peak_memory() -> None:
    """Reset VmHWM to the current memory."""
    Path("/proc/self/clear_refs").write_text("5")


def kernel(source: Path, repeats: int) -> dict[str, Any]:
    """Milliseconds per frame: median over frames and repeats, after one warm-up frame."""
    config = Config()
    builder = load_builder("internnav", source)
    episode = builder.read(next(builder.episodes()))
    scene = reconstruct(episode, SensorDepth(), config, Path(os.devnull))
    assert episode.intrinsics is not None
    grid, cloud = Grid.of(config), into_blocks(scene.cloud.points)
    warm_up()
    reset_peak_memory()
    before = memory("VmRSS")
    state = np.empty(grid.cells, np.uint8)
    whole, rays, visits = [], [], []
    frames = np.linspace(0, episode.length - 1, min(episode.length, 12)).astype(int)
    for repeat in range(repeats + 1):
        for t in frames:
            K, pose = episode.intrinsics[t], scene.world_from_camera[t]
            start = time.perf_counter()
            frame = observe(grid, cloud, pose, K, episode.image_size, state)
            middle = time.perf_counter()
            state &= ~OBSERVED
            again = time.perf_counter()
            trace(grid, K, episode.image_size, state)
            end = time.perf_counter()
            if repeat:
                whole.append(middle - start)
                rays.append(end - again)
                visits.append(int(np.unpackbits(frame.observed).sum()))
    width, height = episode.image_size
    return {
        "rays": width * height,
        "cells": grid.cells,
        "cloud_points": len(scene.cloud),
        "observed_cells": int(np.median(visits)),
        "frame_ms": 1e3 * float(np.median(whole)),
        "frame_ms_best": 1e3 * min(whole),
        "rays_ms": 1e3 * float(np.median(rays)),
        "memory_mb": memory("VmHWM") - before,
    }


def build(source: Path, workers: int) -> dict[str, Any]:
    """Measure the whole build in a separate process, to get its own peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--build", str(source), folder, str(workers)]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        figures: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
        out = Path(folder)
        sizes = {
            "all": sum(path.stat().st_size for path in files_under(out)),
            "occ_sequence.npz": sum(p.stat().st_size for p in out.rglob("occ_sequence.npz")),
            "mask_sequence.npz": sum(p.stat().st_size for p in out.rglob("mask_sequence.npz")),
            "parquet occupancy": sum(path.stat().st_size for path in shards(out)),
        }
        figures["parquet_share_of_npz"] = sizes["parquet occupancy"] / (
            sizes["occ_sequence.npz"] + sizes["mask_sequence.npz"]
        )
    figures["bytes_a_frame"] = {k: round(v / figures["frames"]) for k, v in sizes.items()}
    return figures


def build_here(source: Path, out: Path, workers: int) -> dict[str, Any]:
    builder = load_builder("internnav", source)
    refs = list_episodes(builder)
    warm_up()
    summary = build_dataset(Job(builder, refs, out, Settings()), workers)
    assert not summary.failures, summary.failures
    return {
        "workers": workers,
        "frames": summary.frames,
        "seconds": summary.seconds,
        "frames_per_second": summary.frames / summary.seconds,
        "stages_ms_a_frame": {k: 1e3 * v / summary.frames for k, v in summary.stages.items()},
        "peak_memory_mb": memory("VmHWM"),
    }


def networks(views: list[int]) -> list[dict[str, Any]]:
    """Measure both networks at full size, each in a separate process."""
    script = str(Path(__file__).with_name("bench_networks.py"))
    found = []
    for name in ("pi3", "pi3x"):
        print(f"measuring {name}, with stand-in weights of full size", file=sys.stderr)
        command = [sys.executable, script, name, *map(str, views)]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        found.append(json.loads(result.stdout.splitlines()[-1]))
    return found


def _or_dash(value: float | None, how: str) -> str:
    return "-" if value is None else format(value, how)


def network_table(found: list[dict[str, Any]]) -> None:
    for part in found:
        print(f"\n{part['network']} on {part['device']}, views of 308 x 224")
        print(
            f"  {'views':>5}  {'s a frame':>9}  {'plain':>7}  {'peak MB':>8}  {'plain':>7}  "
            f"{'of a matrix product':>19}  {'differs by':>10}"
        )
        for row in part["rows"]:
            print(
                f"  {row['views']:>5}  {row['seconds_a_frame']:>9.3f}  "
                f"{_or_dash(row['plain_seconds_a_frame'], '.3f'):>7}  "
                f"{row['peak_memory_mb']:>8.0f}  "
                f"{_or_dash(row['plain_peak_memory_mb'], '.0f'):>7}  "
                f"{row['share_of_matrix_product']:>19.0%}  "
                f"{_or_dash(row['plain_differs_by'], '.1e'):>10}"
            )


def table(name: str, part: dict[str, Any]) -> None:
    k, b = part["kernel"], part["build"]
    print(f"\n{name}")
    rows = [
        ("kernel, a frame (median)", f"{k['frame_ms']:.1f} ms"),
        ("kernel, a frame (best)", f"{k['frame_ms_best']:.1f} ms"),
        ("  of it the rays", f"{k['rays_ms']:.1f} ms for {k['rays']:,} rays"),
        ("  memory beyond the input", f"{k['memory_mb']:.0f} MB"),
        ("build", f"{b['frames_per_second']:.1f} frames/s, {b['seconds']:.1f} s"),
        *((f"  {s}", f"{ms:.1f} ms a frame") for s, ms in b["stages_ms_a_frame"].items()),
        ("peak memory", f"{b['peak_memory_mb']:.0f} MB"),
        *((f"on disk: {f}", f"{n:,} bytes a frame") for f, n in b["bytes_a_frame"].items()),
        ("  as a share of the npz", f"{b['parquet_share_of_npz']:.1%}"),
    ]
    for label, value in rows:
        print(f"  {label:<34}{value}")


def main() -> int:
    if sys.argv[1:2] == ["--build"]:
        print(json.dumps(build_here(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))))
        return 0
    # Imported here: these load torch and more, which must not count towards a build's memory.
    import bench_fusion
    import bench_runtime
    import bench_visibility
    from bench_loading import loading, loading_table
    from bench_visual import visual, visual_table

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=24, help="frames of the sample trajectory")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--input", type=Path, help="also measure this InternData-N1 tree")
    parser.add_argument(
        "--views",
        type=int,
        nargs="*",
        default=[2, 4, 8],
        help="numbers of views for the networks; empty: skip them",
    )
    parser.add_argument(
        "--json", type=Path, default=Path("bench.json"), help="file for the figures"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sample = Path(folder, "sample")
        make_sample(sample, trajectories=1, frames=options.frames)
        sources = {"sample, 1 trajectory": sample}
        real = options.input or REAL
        if real.is_dir():
            sources["real trajectory" if real == REAL else str(real)] = real
        report: dict[str, Any] = {
            "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
            "threads": numba.get_num_threads(),
            "sources": {
                name: {
                    "kernel": kernel(path, options.repeats),
                    "build": build(path, 1),
                    "loading": loading(path),
                    "visual": visual(path),
                }
                for name, path in sources.items()
            },
        }
        report["visibility"] = bench_visibility.measure(list(sources.values())[-1], options.repeats)
        report["fusion"] = bench_fusion.measure(list(sources.values())[-1], options.repeats)
        if options.views:
            report["networks"] = networks(options.views)
    report["runtime"] = bench_runtime.measure()
    print(f"{report['machine']}, {report['threads']} threads")
    for name, part in report["sources"].items():
        table(name, part)
        loading_table(part["loading"])
        visual_table(part["visual"])
    bench_visibility.table(report["visibility"])
    bench_fusion.fusion_table(report["fusion"])
    network_table(report.get("networks", []))
    bench_runtime.runtime_table(report["runtime"])
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nfigures: {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
