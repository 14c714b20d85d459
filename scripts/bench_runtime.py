"""Benchmark of processes and threads, of flushing, and of memory over many episodes.

Part of scripts/bench. Run directly, `python scripts/bench_runtime.py` prints the same figures.

The same episodes are built in three ways: by one process on one core, by two such processes that
share the episodes, and by one process on both cores. Several rounds are timed in turn, and the best
of each counts, because other load only slows a build down. Processes start together when all have
finished loading and compiling.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from occgen_hub.sample import make_sample


def build_share(
    source: str, out: str, shares: int, number: int, cores: list[int], begin: Any, results: Any
) -> None:
    """Build one share of the episodes on these cores. Runs in a separate process."""
    os.sched_setaffinity(0, cores)
    os.environ["NUMBA_NUM_THREADS"] = str(len(cores))
    from occgen_hub.builder import load_builder
    from occgen_hub.episode_build import Settings
    from occgen_hub.job import list_episodes
    from occgen_hub.occupancy.visibility import warm_up
    from occgen_hub.runtime.episodes import build_episodes
    from occgen_hub.runtime.results import Summary
    from occgen_hub.runtime.shard import share_out

    builder = load_builder("internnav", Path(source))
    refs = list_episodes(builder)
    mine = share_out([builder.work(ref) for ref in refs], shares)[number]
    warm_up()
    next(build_episodes(builder, refs[:1], Path(out, f"warm_{number}"), Settings()))
    begin.wait()
    start = time.monotonic()
    summary = Summary()
    for result in build_episodes(builder, [refs[n] for n in mine], Path(out), Settings()):
        summary.add(result)
    assert not summary.failures, summary.failures
    results.put((start, time.monotonic(), summary.frames, dict(summary.stages)))


def build(source: Path, groups: list[list[int]]) -> dict[str, Any]:
    """Frames per second of processes on these cores, from the common start to the last end."""
    context = multiprocessing.get_context("spawn")
    begin, results = context.Barrier(len(groups)), context.Queue()
    with tempfile.TemporaryDirectory() as out:
        processes = [
            context.Process(
                target=build_share,
                args=(str(source), out, len(groups), number, cores, begin, results),
            )
            for number, cores in enumerate(groups)
        ]
        for process in processes:
            process.start()
        rows = [results.get(timeout=1200) for _ in processes]
        for process in processes:
            process.join()
    seconds = max(end for _, end, _, _ in rows) - min(start for start, _, _, _ in rows)
    stages: dict[str, float] = {}
    for row in rows:
        for stage, spent in row[3].items():
            stages[stage] = stages.get(stage, 0.0) + spent
    frames = sum(row[2] for row in rows)
    return {"frames": frames, "frames_per_second": frames / seconds, "stages": stages}


def throughput(source: Path, rounds: int) -> dict[str, Any]:
    """Time one process on one core, two processes on one core each, and one on both cores."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    ways = {
        "one process, one core": [cores[:1]],
        "two processes, one core each": [[core] for core in cores],
        "one process, both cores": [cores],
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, groups in ways.items():
            found[name].append(build(source, groups))
    speeds = {name: max(run["frames_per_second"] for run in runs) for name, runs in found.items()}
    one, two, both = speeds.values()
    stages = found["one process, both cores"][-1]["stages"]
    total = sum(stages.values())
    return {
        "frames": found["one process, one core"][0]["frames"],
        "frames_per_second": speeds,
        "two_processes_to_one": two / one,
        "both_cores_to_two_processes": both / two,
        "stages_share": {k: v / total for k, v in sorted(stages.items(), key=lambda i: -i[1])},
    }


def peak_memory(source: Path, out: Path) -> int:
    """Run `occgen-hub build` in a separate process. Returns its peak memory, bytes, as reported."""
    command = ["-m", "occgen_hub", "build", "--input", str(source), "--output", str(out)]
    subprocess.run(
        [sys.executable, *command, "--set", "voxel_size=0.1", "--media", "link"],
        check=True,
        capture_output=True,
        env=os.environ | {"TQDM_DISABLE": "1"},
    )
    (process,) = json.loads((out / "report.json").read_text())["processes"]
    return int(process["peak_memory"])


def memory_by_episodes(counts: tuple[int, int] = (20, 200), frames: int = 6) -> dict[str, Any]:
    """Peak memory of a build of few and of many episodes, which are copies of four."""
    with tempfile.TemporaryDirectory() as folder:
        four = Path(folder, "four")
        make_sample(four, trajectories=4, frames=frames)
        found = sorted(path.parent for path in four.rglob("meta"))
        peaks = {}
        for count in counts:
            source = Path(folder, f"source_{count}")
            for number in range(count):
                place = source / "group" / f"scene_{number // 10:03d}" / f"trajectory_{number % 10}"
                shutil.copytree(found[number % len(found)], place, copy_function=os.link)
            peaks[count] = peak_memory(source, Path(folder, f"out_{count}"))
    few, lot = (peaks[count] for count in counts)
    return {"peak_memory_mb": {k: round(v / 1e6) for k, v in peaks.items()}, "ratio": lot / few}


def repeat_scene(scene: Path, out: Path, count: int) -> None:
    """Write a scene of `count` episodes, all hard links to the only episode of `scene`."""
    (out / "meta").mkdir(parents=True)
    for path in scene.rglob("*"):
        if path.is_dir():
            (out / path.relative_to(scene)).mkdir(exist_ok=True)
    for kind in ("rgb", "depth"):
        images = sorted((scene / f"videos/chunk-000/observation.images.{kind}").iterdir())
        for number in range(count * len(images)):
            image = images[number % len(images)]
            place = out / image.relative_to(scene)
            place.with_name(f"{number}{image.suffix}").hardlink_to(image)
    table = scene / "data/chunk-000/episode_000000.parquet"
    for number in range(count):
        (out / f"data/chunk-000/episode_{number:06d}.parquet").hardlink_to(table)
    (out / "meta/info.json").hardlink_to(scene / "meta/info.json")
    (out / "meta/pointcloud.ply").hardlink_to(scene / "meta/pointcloud.ply")
    for name in ("tasks", "episodes", "episodes_stats"):
        (first, *_) = (scene / f"meta/{name}.jsonl").read_text().splitlines()
        row = json.loads(first)
        with (out / f"meta/{name}.jsonl").open("w") as file:
            for number in range(count):
                row["task_index" if name == "tasks" else "episode_index"] = number
                if "image_index" in row:
                    row["image_index"] = {"min": number * len(images)} | {
                        "max": (number + 1) * len(images) - 1
                    }
                file.write(json.dumps(row) + "\n")


def time_by_episodes(counts: tuple[int, int] = (50, 800), frames: int = 6) -> dict[str, Any]:
    """Seconds per frame of a build, and seconds of a rerun with nothing to do, by the number of
    episodes in a scene.
    """
    found: dict[str, Any] = {"milliseconds_per_frame": {}, "rerun_seconds": {}}
    with tempfile.TemporaryDirectory() as folder:
        make_sample(Path(folder, "one"), trajectories=1, frames=frames, layout="scenes")
        (scene,) = (path.parent for path in Path(folder, "one").rglob("meta"))
        for count in counts:
            source, out = Path(folder, f"source_{count}"), Path(folder, f"out_{count}")
            repeat_scene(scene, source / "group" / "scene", count)
            command = ["-m", "occgen_hub", "build", "--input", str(source), "--output", str(out)]
            command += ["--set", "voxel_size=0.1", "--media", "none"]
            times = []
            for _ in range(2):
                start = time.monotonic()
                env = os.environ | {"TQDM_DISABLE": "1"}
                subprocess.run([sys.executable, *command], check=True, capture_output=True, env=env)
                times.append(time.monotonic() - start)
                if not found["rerun_seconds"].get(count) and len(times) == 1:
                    report = json.loads((out / "report.json").read_text())
                    (process,) = report["processes"]
                    per_frame = 1000 * process["seconds"] / process["frames"]
                    found["milliseconds_per_frame"][count] = per_frame
            found["rerun_seconds"][count] = times[1]
    few, lot = (found["milliseconds_per_frame"][count] for count in counts)
    return {**found, "ratio": lot / few}


def measure(trajectories: int = 12, frames: int = 10, rounds: int = 3) -> dict[str, Any]:
    """All figures of this script."""
    print("measuring processes and threads", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        make_sample(Path(folder, "source"), trajectories=trajectories, frames=frames)
        figures = throughput(Path(folder, "source"), rounds)
    return {**figures, "many": memory_by_episodes()}


def runtime_table(figures: dict[str, Any]) -> None:
    """Print the results of `measure`."""
    print(f"\nprocesses and threads, {figures['frames']} frames")
    for name, speed in figures["frames_per_second"].items():
        print(f"  {name:<30} {speed:>6.1f} frames/s")
    print(f"  two processes to one           {figures['two_processes_to_one']:>6.2f}  (1.7 wanted)")
    print(
        f"  both cores to two processes    {figures['both_cores_to_two_processes']:>6.2f}  "
        "(0.9 wanted)"
    )
    shares = ", ".join(f"{k} {v:.0%}" for k, v in figures["stages_share"].items())
    print(f"  of it: {shares}")
    peaks = " and ".join(f"{v} MB ({k})" for k, v in figures["many"]["peak_memory_mb"].items())
    print(f"  peak memory, by episodes: {peaks}, ratio {figures['many']['ratio']:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trajectories", type=int, default=12)
    parser.add_argument(
        "--frames", type=int, default=10, help="frames of the first trajectory; others differ"
    )
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    runtime_table(measure(options.trajectories, options.frames, options.rounds))
