"""Time and memory of unusual recordings: long, large, tiny, and far from the origin of the world.

    .venv/bin/python scripts/bench_extremes.py [--frames 20000] [--only NAME]

Each recording is a synthetic room as a plain capture. `build` and `validate` run as commands in
processes of their own with one worker. Times are of processor and wall clock; memory is the peak of
the process. Cells have the default size of 2 cm.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from captures import tum_line
from made_up import depth_of, intrinsics, path, room

UTM = (512_000.0, 5_403_000.0, 250.0)
"""Metres: the position of a place in Europe in UTM coordinates."""


def write_room(
    folder: Path, frames: int, size: tuple[int, int], offset: tuple[float, ...] = (0.0, 0.0, 0.0)
) -> list[str]:
    """A recording of a room, seen to and fro. Returns the options for its intrinsics.

    size: (width, height) in pixels. Depth of large images is rendered at 960 x 540 and repeated.
    """
    for name in ("color", "depth"):
        (folder / name).mkdir(parents=True)
    factor = max(1, size[0] // 960)
    small = (size[0] // factor, size[1] // factor)
    there = path(min(frames, 200))
    pictures, rows = [], []
    for number, pose in enumerate(there):
        depth = depth_of(room(), pose, small).repeat(factor, 0).repeat(factor, 1)
        image = Image.fromarray((1000 * depth).astype(np.uint16))
        rgb = Image.fromarray((30 * np.stack([depth, depth + 1, depth + 2], -1)).astype(np.uint8))
        pictures.append((folder / f"depth/{number}.png", folder / f"color/{number}.jpg"))
        image.save(pictures[-1][0])
        rgb.save(pictures[-1][1])
    for frame in tqdm(range(frames), unit="frame", desc="recording"):
        turn, step = divmod(frame, len(there))
        number = step if turn % 2 == 0 else len(there) - 1 - step
        for file in pictures[number] if frame >= len(there) else ():
            file.with_stem(str(frame)).hardlink_to(file)
        pose = there[number].copy()
        pose[:3, 3] += offset
        rows.append(tum_line(frame / 10, pose))
    (folder / "trajectory.txt").write_text("\n".join(rows) + "\n")
    K = intrinsics(size)
    # In OpenCV's convention, the centre of the first pixel is (0, 0).
    return ["--intrinsics", f"{K[0, 0]},{K[1, 1]},{K[0, 2] - 0.5},{K[1, 2] - 0.5}"]


def run(*arguments: str | Path) -> dict[str, float]:
    """Seconds, seconds of processor time and peak memory of a command in MB."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "occgen_hub", *map(str, arguments)],
        env=os.environ | {"TQDM_DISABLE": "1"}, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{arguments[0]} ended with {code}: {errors}")
    return {
        "s": round(time.perf_counter() - begin, 1),
        "cpu_s": round(used.ru_utime + used.ru_stime, 1),
        "mb": used.ru_maxrss // 1024,
    }


def main() -> None:
    """Print a line of JSON for each recording."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=20_000, help="of the long recording")
    parser.add_argument("--only", help="the name of one recording")
    options = parser.parse_args()
    recordings = {
        "plain": (50, (640, 480), (0.0, 0.0, 0.0)),
        "8k": (4, (7680, 4320), (0.0, 0.0, 0.0)),
        "1x1": (50, (1, 1), (0.0, 0.0, 0.0)),
        "utm": (50, (640, 480), UTM),
        "long": (options.frames, (160, 120), (0.0, 0.0, 0.0)),
    }
    for name, (frames, size, offset) in recordings.items():
        if options.only not in (None, name):
            continue
        with tempfile.TemporaryDirectory(prefix="occgen-") as folder:
            place, out = Path(folder, "room"), Path(folder, "out")
            given = write_room(place, frames, size, offset)
            build = run("build", "--source", "capture", "--input", place, "--output", out, *given)
            check = run("validate", out)
            written = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
        figures = {"frames": frames, "size": size, "build": build, "validate": check}
        print(json.dumps({"name": name, **figures, "output_mb": round(written / 1e6, 1)}))


if __name__ == "__main__":
    main()
