"""How many frames a second `render` makes of each view, encoding included."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from occgen_hub.builder import Settings, load_builder
from occgen_hub.loading import Trajectory, trajectories
from occgen_hub.runtime.loop import list_episodes, run
from occgen_hub.sample import make_sample
from occgen_hub.visual.film import Shot, render


def rates(trajectory: Trajectory, size: tuple[int, int]) -> dict[str, dict[str, float]]:
    found = {}
    for view in ("world", "ego", "panels"):
        with tempfile.TemporaryDirectory() as folder:
            times = [time.perf_counter()]
            shot = Shot(view, size)  # type: ignore[arg-type]  # one of them
            render(
                trajectory, Path(folder, "out.mp4"), shot,
                progress=lambda *_, times=times: times.append(time.perf_counter()),
            )  # fmt: skip
        found[view] = {
            "frames_per_second": (len(times) - 2) / (times[-1] - times[1]),
            "seconds_to_first_frame": times[1] - times[0],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trajectory", type=Path, nargs="?", help="a built one; else the sample's")
    parser.add_argument("--size", type=int, nargs=2, default=(1280, 480))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = options.trajectory
        if place is None:
            source, out = Path(folder, "source"), Path(folder, "out")
            make_sample(source, trajectories=1, frames=24)
            builder = load_builder("internnav", source)
            run(builder, list_episodes(builder), out, Settings())
            (place,) = trajectories(out)
        print(json.dumps(rates(Trajectory.open(place), tuple(options.size)), indent=1))


if __name__ == "__main__":
    main()
