"""How scratch, memory and planning grow with the number of scenes, on made-up scenes in archives.

    .venv/bin/python scripts/rehearse_scale.py [--scenes 20 200] [--planned 10000]

Nothing is pushed. Each figure is of a process of its own; docs/scale.md says what they mean.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

from occgen_hub.sample import make_sample

PAUSE = 0.02
"""Seconds between two looks at what the build holds."""

PLAN = """
import json, sys, time
import psutil
from pathlib import Path
from occgen_hub.job import open_job
from occgen_hub.runtime.records import make_plan

begin = time.perf_counter()
job = open_job("internnav", Path(sys.argv[1]), Path(sys.argv[2]))
listed = time.perf_counter()
plan = make_plan(job, 64)
planned = time.perf_counter()
todo = sum(job.reason_to_build(ref) is not None for ref in job.refs)
checked = time.perf_counter()
assert sum(map(len, plan.shards)) == todo == len(job.refs)
print(json.dumps({"scenes": len(job.refs), "listing": listed - begin, "planning": planned - listed,
                  "checking": checked - planned, "bytes": psutil.Process().memory_info().rss}))
"""


def make_archive(folder: Path, frames: int) -> Path:
    """An archive of a scene of two trajectories of a few frames."""
    make_sample(folder / "sample", trajectories=2, frames=frames, seed=7)
    (scene,) = (path for path in (folder / "sample/sample_zed").iterdir() if path.is_dir())
    with tarfile.open(folder / "scene.tar.gz", "w:gz") as archive:
        archive.add(scene, scene.name)
    return folder / "scene.tar.gz"


def make_tree(archive: Path, root: Path, scenes: int) -> None:
    """A tree in which this archive is every scene, under links so that it is stored once."""
    for number in range(scenes):
        place = root / f"group_{number % 4}/scene_{number:05d}.tar.gz"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.hardlink_to(archive)


def held(folder: Path) -> int:
    """The bytes of the files below a folder that changes."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            stat = path.stat()
            total += stat.st_size if path.is_file() else 0
    return total


def build(root: Path, out: Path, workers: int, limit: str) -> dict[str, float]:
    """Build a tree. Returns seconds, episodes, bytes of the dataset, and the most bytes of scratch
    and of memory that all processes of the build held at a time.
    """
    scratch = out.with_name(f"{out.name}-scratch")
    config = root.with_suffix(".yaml")
    command = [
        sys.executable, "-m", "occgen_hub", "build", "--input", root, "--output", out,
        "--workers", str(workers), "--scratch", scratch, "--scratch-limit", limit,
        "--config", config,
    ]  # fmt: skip
    config.write_text("voxel_size: 0.25\n", encoding="utf-8")
    most_scratch = most_memory = 0
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    family = psutil.Process(process.pid)
    while process.poll() is None:
        memory = 0
        with suppress(psutil.Error):
            for member in (family, *family.children(recursive=True)):
                with suppress(psutil.Error):
                    memory += member.memory_info().rss
        most_memory = max(most_memory, memory)
        with suppress(OSError):
            most_scratch = max(most_scratch, held(scratch))
        time.sleep(PAUSE)
    spent = time.perf_counter() - begin
    if process.returncode:
        raise SystemExit(f"The build of {root} ended with {process.returncode}.")
    episodes = sum(1 for _ in out.rglob("meta/occgen.json"))
    return {
        "seconds": spent, "episodes": episodes, "output": held(out),
        "scratch": most_scratch, "memory": most_memory,
    }  # fmt: skip


def main() -> None:
    """Print a line for each number of scenes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--scenes", type=int, nargs="*", default=[20, 200])
    parser.add_argument("--planned", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--frames", type=int, default=2)
    parser.add_argument("--scratch-limit", default="500MB")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        archive = make_archive(folder, chosen.frames)
        print(f"an archive: {archive.stat().st_size / 1e6:.2f} MB", flush=True)
        if chosen.planned:
            make_tree(archive, folder / "planned", chosen.planned)
            done = subprocess.run(
                [sys.executable, "-c", PLAN, folder / "planned", folder / "none"],
                stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            found = json.loads(done.stdout)
            print(
                f"{found['scenes']:,} scenes: listed in {found['listing']:.1f} s, planned in "
                f"{found['planning']:.1f} s, checked in {found['checking']:.1f} s, "
                f"{found['bytes'] / 1e6:.0f} MB of memory",
                flush=True,
            )
        for count in chosen.scenes:
            make_tree(archive, folder / f"tree-{count}", count)
            made = build(
                folder / f"tree-{count}", folder / f"out-{count}", chosen.workers,
                chosen.scratch_limit,
            )  # fmt: skip
            print(
                f"{count} scenes, {made['episodes']} episodes: {made['seconds']:.0f} s, scratch "
                f"{made['scratch'] / 1e6:.2f} MB at most, memory {made['memory'] / 1e6:.0f} MB at "
                f"most, dataset {made['output'] / 1e6:.1f} MB",
                flush=True,
            )


if __name__ == "__main__":
    main()
