"""Speed of loading frames of a built dataset on one core, compared with other loaders."""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

GRID = ("occupancy", "mask")
WANTED = {
    "dense occupancy + mask": {"keys": GRID},
    "the same, voxel_stride=4": {"keys": GRID, "voxel_stride": 4},
    "the same with pose and task": {"keys": (*GRID, "pose", "task")},
    "the same with the image": {"keys": (*GRID, "pose", "image")},
    "sparse occupancy + mask": {"dense": False, "keys": GRID},
}
"""Arguments of OccupancyDataset. Frames are read in random order."""

STREAMED = {
    "OccupancyStream, with image, stride 1": {"keys": (*GRID, "image"), "voxel_stride": 1},
    "OccupancyStream, with image, stride 4": {"keys": (*GRID, "image"), "voxel_stride": 4},
}


def loading(source: Path, seconds: float = 2.0) -> dict[str, float]:
    """Frames per second of CPU time when loading a dataset, by the items that are read.

    Each kind is measured for `seconds` in four rounds, and the best round counts: a shared machine
    is sometimes slow.
    """
    from occgen_hub import OccupancyDataset, OccupancyStream, build

    cores = os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory() as folder:
        out, images = Path(folder, "out"), Path(folder, "images")
        summary = build("internnav", source, out, parquet_images=True)
        assert not summary.failures, summary.failures
        _write_lerobot(out, images)
        numbers = np.random.default_rng(0)
        kinds: dict[str, Iterator[Any]] = {}
        for name, how in WANTED.items():
            kinds[name] = _random_frames(OccupancyDataset(out, **how), numbers)
        for name, how in STREAMED.items():
            kinds[name] = _repeat(OccupancyStream(out, **how))
        kinds["datasets, streaming, cells as lists"] = _repeat(_stream_rows(out))
        kinds["StreamingLeRobotDataset, image only"] = _repeat(_stream_lerobot(images))
        found = dict.fromkeys(kinds, 0.0)
        os.sched_setaffinity(0, {min(cores)})
        try:
            for _ in range(4):
                for name, frames in kinds.items():
                    found[name] = max(found[name], _rate(frames, seconds / 4))
        finally:
            os.sched_setaffinity(0, cores)
    return found


def _random_frames(dataset: Any, numbers: np.random.Generator) -> Iterator[Any]:
    while True:
        yield dataset[int(numbers.integers(len(dataset)))]


def _repeat(frames: Any) -> Iterator[Any]:
    return itertools.chain.from_iterable(itertools.repeat(frames))


def _stream_rows(root: Path) -> Any:
    """Stream the rows of the shards with `datasets`. Images are not decoded."""
    from datasets import load_dataset

    files = [str(path) for path in sorted(root.glob("occupancy/*/*.parquet"))]
    return load_dataset("parquet", data_files=files, split="train", streaming=True).select_columns(
        ["occupied", "observed"]
    )


def _write_lerobot(root: Path, out: Path) -> None:
    """Write the images of a built dataset as a LeRobot dataset with PNG images in Parquet.

    Video is not used: LeRobot's streaming can decode it only with the system's FFmpeg.
    """
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    from occgen_hub import OccupancyDataset

    frames = OccupancyDataset(root, keys=("image", "episode", "task"))
    height, width = frames[0]["image"].shape[1:]
    names = ["height", "width", "channels"]
    image = {"dtype": "image", "shape": (height, width, 3), "names": names}
    written = LeRobotDataset.create(
        "bench/rooms",
        fps=10,
        features={"observation.images.rgb": image},
        root=out,
        use_videos=False,
    )
    for start, end in itertools.pairwise(frames.starts.tolist()):
        for number in range(start, end):
            item = frames[number]
            pixels = item["image"].permute(1, 2, 0).numpy()
            written.add_frame({"observation.images.rgb": pixels, "task": item["task"]})
        written.save_episode()
    written.finalize()


def _stream_lerobot(root: Path) -> Any:
    from lerobot.datasets.streaming_dataset import StreamingLeRobotDataset

    return StreamingLeRobotDataset("bench/rooms", root=root)


def _rate(frames: Iterator[Any], seconds: float) -> float:
    next(frames)
    start, done = time.process_time(), 0
    while (elapsed := time.process_time() - start) < seconds:
        next(frames)
        done += 1
    return done / elapsed


def loading_table(found: dict[str, float]) -> None:
    """Print the results of `loading`."""
    print("\nframes a second of CPU time, one core, one process")
    for name, rate in found.items():
        print(f"  {name:<40}{rate:,.0f}")


def main() -> None:
    """Measure the given tree, or a sample."""
    import sys

    from occgen_hub.sample import make_sample

    with tempfile.TemporaryDirectory() as folder:
        source = Path(sys.argv[1]) if sys.argv[1:] else Path(folder, "sample")
        if not sys.argv[1:]:
            make_sample(source, trajectories=1, frames=24)
        loading_table(loading(source))


if __name__ == "__main__":
    main()
