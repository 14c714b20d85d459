"""Time and memory to open a dataset of many episodes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from occgen_hub.index import Entry, bucket, file_stem, split, write_index

OPEN = """
import json, sys, time
import psutil, torch, pyarrow.compute, pyarrow.parquet
from occgen_hub.training import OccupancyDataset

before, begin, idle = psutil.Process().memory_info().rss, time.perf_counter(), time.process_time()
frames = OccupancyDataset(sys.argv[1], keys=("occupancy", "mask", "pose"))
spent, core = time.perf_counter() - begin, time.process_time() - idle
memory = psutil.Process().memory_info().rss
print(json.dumps({"frames": len(frames), "episodes": len(frames.episodes), "seconds": spent,
                  "core_seconds": core, "bytes": memory, "bytes_more": memory - before}))
"""


def synthetic_entries(episodes: int, per_scene: int = 100, frames: int = 76) -> Iterator[Entry]:
    """Index rows of a synthetic dataset like InternData-N1, with half a shard per scene."""
    sums = [f"{n:064x}" for n in range(7)]
    for number in range(episodes):
        scene = f"group_{number // per_scene % 4}/scene_{number // per_scene:05d}"
        name = f"occupancy/{bucket(scene)}/{file_stem(scene)}-000.parquet"
        yield Entry(
            episode=f"{scene}/trajectory_{number % per_scene}", scene=scene, split=split(scene),
            frames=frames, image_size=(480, 270), fov=(69.4, 42.5), shape=(200, 125, 200),
            voxel_size=0.02, pc_range=(-2, -1.5, -0.5, 2, 1, 3.5), moving=False, quality=0.97,
            sigma=(0.001, 0.003, 0.01), contradicted=0.03, supports=7.0, residual=0.004,
            shift=0.002, turn=0.05, builder="internnav", engine="rgbd", version="0", config="{}",
            network=None, licence=None, source_licence=None, source_sha256=sums[number % 7],
            features="{}", record_sha256=f"{number:064x}", info_sha256=sums[0], files=12,
            shards=(name,), shard_sha256=(sums[1],), shard_starts=(0,),
            row_groups=(number % per_scene * 10,), group_rows=8,
        )  # fmt: skip


def write_synthetic_index(root: Path, episodes: int, per_scene: int = 100) -> None:
    """Write the index of a synthetic dataset and an empty file for each shard."""
    rows = list(synthetic_entries(episodes, per_scene))
    write_index(root, rows)
    for name in {name for row in rows for name in row.shards}:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def measure_opening(root: Path) -> dict[str, float]:
    """Open the dataset in a separate process.

    Returns its frames and episodes, seconds, core_seconds (processor time), bytes of memory, and
    bytes_more (the increase since the imports).
    """
    command = [sys.executable, "-c", OPEN, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    import tempfile

    for count in (20_000, 830_000):
        with tempfile.TemporaryDirectory() as folder:
            write_synthetic_index(Path(folder), count, 100 if count < 100_000 else 280)
            size = sum(path.stat().st_size for path in Path(folder, "index").iterdir())
            found = measure_opening(Path(folder))
            print(
                f"{count:,} episodes: index {size / 1e6:.1f} MB, "
                f"opened in {found['seconds']:.2f} s ({found['core_seconds']:.2f} s of CPU), "
                f"{found['bytes'] / 1e6:.0f} MB in all, {found['bytes_more'] / 1e6:.0f} MB of them "
                "for it"
            )
