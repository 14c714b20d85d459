"""Cost per frame in a scene of many episodes, and cost of a build with nothing to do.

    .venv/bin/python scripts/bench_episodes.py [--episodes 50 800] [--frames 2]

Each build is a separate process with one worker. The cost of starting a process is subtracted from
the cost per frame; it is measured on a scene of one episode with nothing to do. The cost per frame
is processor time, which is less sensitive to other load.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from occgen_hub.sample import make_sample

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from test_hard_conditions import many_episodes


def build(tree: Path, out: Path) -> tuple[float, float]:
    """Run a build. Returns its wall time and processor time, seconds."""
    options = ("--set", "voxel_size=0.25", "--workers", "1")
    command = ["build", "--input", str(tree), "--output", str(out), *options]
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "occgen_hub", *command],
        env=os.environ | {"TQDM_DISABLE": "1"}, check=True, capture_output=True,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - begin, used


def measure(place: Path, episodes: int, frames: int) -> tuple[tuple[float, float], ...]:
    """Build a scene, then build it again. Returns the times of both."""
    make_sample(place / "tree", trajectories=1, frames=frames, layout="vln-n1-scenes", seed=3)
    (scene,) = (path.parent for path in (place / "tree").rglob("meta"))
    many_episodes(scene, episodes)
    time.sleep(0.2)
    return build(place / "tree", place / "out"), build(place / "tree", place / "out")


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--episodes", type=int, nargs="+", default=[50, 800])
    parser.add_argument("--frames", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="occgen-") as folder:
        _, (_, start) = measure(Path(folder, "start"), 1, options.frames)
        for episodes in options.episodes:
            first, again = measure(Path(folder, str(episodes)), episodes, options.frames)
            figures = {
                "episodes": episodes,
                "build_s": round(first[0], 2),
                "cpu_ms_a_frame": round(1e3 * (first[1] - start) / (episodes * options.frames), 2),
                "nothing_to_do_s": round(again[0], 2),
                "nothing_to_do_cpu_s": round(again[1], 2),
                "peak_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1000,
            }
            print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
