"""Frames per second of `render` for each view, including encoding.

Part of scripts/bench. Run directly, `python scripts/bench_visual.py` prints the same figures.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

from occgen_hub import build
from occgen_hub.loading import Trajectory, trajectories
from occgen_hub.visual.render import RenderOptions, View, render

SIZE = (1280, 480)


def visual(source: Path, size: tuple[int, int] = SIZE) -> dict[str, dict[str, float]]:
    """Times for the first trajectory of a source. Start-up is measured separately."""
    with tempfile.TemporaryDirectory() as folder:
        summary = build("internnav", source, folder, limit=1)
        assert not summary.failures, summary.failures
        (place,) = trajectories(Path(folder))
        return {view: _rate(Trajectory.open(place), view, size) for view in get_args(View)}


def _rate(trajectory: Trajectory, view: Any, size: tuple[int, int]) -> dict[str, float]:
    times = [time.perf_counter()]

    def progress(done: int, total: int) -> None:
        times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        render(trajectory, Path(folder, "out.mp4"), RenderOptions(view, size), progress=progress)
        end = time.perf_counter()
    return {
        "frames_per_second": (len(times) - 2) / (end - times[1]),
        "seconds_to_first_frame": times[1] - times[0],
    }


def visual_table(found: dict[str, dict[str, float]]) -> None:
    """Print the results of `visual`."""
    print(f"\nrender at {SIZE[0]} x {SIZE[1]}, frames a second, and seconds before the first")
    for view, row in found.items():
        print(f"  {view:<34}{row['frames_per_second']:<8.1f}{row['seconds_to_first_frame']:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "input", type=Path, nargs="?", help="an InternData-N1 tree; default: a sample"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = options.input
        if source is None:
            from occgen_hub.sample import make_sample

            source = Path(folder, "sample")
            make_sample(source, trajectories=1, frames=24)
        found = visual(source)
    visual_table(found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
