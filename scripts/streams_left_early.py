"""Check whether a process ends if it stops reading a `datasets` stream early, by Parquet layout.

    python scripts/streams_left_early.py SHARD.parquet [--trials N]

The rows of a shard are written in several layouts. Processes stream each layout and stop after some
rows. Up to version 4 of `datasets`, they may hang or abort (apache/arrow 45214).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

LEAVE = """
import sys
from datasets import load_dataset
rows = load_dataset("parquet", data_files=sys.argv[1], split="train", streaming=True,
                    cache_dir=sys.argv[3])
for number, row in enumerate(rows):
    if number == int(sys.argv[2]):
        break
print(number, flush=True)
"""

SECONDS = 30
"""Seconds after which a process that has printed its row counts as hanging."""

LAYOUTS = {
    "1 file, 1 row group": (1, 1, 0),
    "1 file, 2 row groups": (1, 2, 0),
    "1 file, 8 row groups": (1, 8, 0),
    "1 file, 8 row groups, two small columns": (1, 8, 0),
    "5 files, 1 row group each": (5, 1, 0),
    "5 files, 1 row group each, left in the third": (5, 1, 2),
}
"""Number of files, row groups per file, and the file in which reading stops."""


def write(table: pa.Table, folder: Path, files: int, groups: int) -> int:
    """Write the rows of a table in a layout. Returns the rows per file."""
    rows = max(1, min(8, table.num_rows // (files * groups)))
    for n in range(files):
        with pq.ParquetWriter(folder / f"{n}.parquet", table.schema) as writer:
            for group in range(groups):
                writer.write_table(table.slice((n * groups + group) * rows, rows))
    return rows * groups


def trials(folder: Path, row: int, count: int) -> Counter[str]:
    """Count how processes end if they stop reading a folder's stream at a row."""
    found: Counter[str] = Counter()
    for _ in range(count):
        command = [sys.executable, "-c", LEAVE, str(folder / "*.parquet"), str(row)]
        try:
            with tempfile.TemporaryDirectory() as cache:
                done = subprocess.run(
                    [*command, cache], capture_output=True, timeout=SECONDS, check=False
                )
            found["ended" if done.returncode == 0 else "aborted"] += 1
        except subprocess.TimeoutExpired:
            found["hung"] += 1
    return found


def main() -> None:
    """Print how the processes of each layout ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shard", type=Path)
    parser.add_argument("--trials", type=int, default=8)
    arguments = parser.parse_args()
    table = pq.read_table(arguments.shard)
    for name, (files, groups, left) in LAYOUTS.items():
        with tempfile.TemporaryDirectory() as place:
            small = table.select(["episode", "frame_index"]) if "small" in name else table
            rows = write(small, Path(place), files, groups)
            found = trials(Path(place), left * rows, arguments.trials)
        print(f"{name:48}", ", ".join(f"{n} {how}" for how, n in sorted(found.items())), flush=True)


if __name__ == "__main__":
    main()
