"""The stream of frames: how workers share it, its order, and resuming from a state."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import Fault, Hub, Repository
from torch.utils.data import DataLoader

import occgen_hub
from occgen_hub import OccupancyDataset, OccupancyStream
from occgen_hub.errors import UsageError
from occgen_hub.loading import trajectories
from occgen_hub.shards import shards, write_shards
from occgen_hub.training import KEYS

NAMES = ("episode", "frame_index")


@pytest.fixture(scope="module")
def rows(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 trajectories in 10 scenes, with images in the shards. Tests must not change it."""
    root = tmp_path_factory.mktemp("rows")
    for n, path in enumerate(trajectories(dataset) * 10):
        place = root / "group" / f"scene_{n // 2:02d}" / f"run_{n % 2}"
        shutil.copytree(path, place, copy_function=shutil.copy2)
    write_shards(root, images=True)
    assert len(shards(root)) == 10
    return root


def frame_name(item: dict) -> tuple[str, int]:
    return item["episode"], int(item["frame_index"])


def all_names(root: Path) -> list[tuple[str, int]]:
    return [frame_name(item) for item in OccupancyDataset(root, keys=NAMES)]


def test_stream_items_equal_dataset_items(rows):
    options = {"keys": KEYS, "history_len": 2, "history_step": 1, "voxel_stride": 4}
    options |= {"history_keys": ("occupancy", "image", "mask"), "image_size": (64, 48)}
    frames = OccupancyDataset(rows, **options)
    expected = {frame_name(item): item for item in frames}
    stream = OccupancyStream(rows, shuffle_buffer=8, **options)
    count = 0
    for item in stream:
        other = expected[frame_name(item)]
        assert item.keys() == other.keys()
        for key, value in item.items():
            same = (
                torch.equal(value, other[key]) if hasattr(value, "shape") else value == other[key]
            )
            assert same, key
        count += 1
    assert count == len(frames) == stream.num_frames


def test_four_workers_of_two_ranks_see_every_frame_once(rows):
    for options in ({}, {"shuffle": False}, {"history_len": 1, "history_step": 1}):
        epochs = []
        for epoch in range(2):
            seen = []
            for rank in range(2):
                stream = OccupancyStream(rows, keys=NAMES, rank=rank, world_size=2, **options)
                stream.set_epoch(epoch)
                loader = DataLoader(stream, batch_size=None, num_workers=4)
                seen.append([frame_name(item) for item in loader])
            together = seen[0] + seen[1]
            assert len(together) == len(set(together))
            assert sorted(together) == sorted(all_names(rows))
            epochs.append(together)
        assert (epochs[0] != epochs[1]) == options.get("shuffle", True)


def test_ranks_share_the_row_groups_of_one_file_without_overlap(dataset, tmp_path):
    root = tmp_path / "one"
    for n, path in enumerate(trajectories(dataset)):
        shutil.copytree(path, root / "group" / "scene" / f"run_{n}")
    write_shards(root)
    assert len(shards(root)) == 1
    seen = []
    for rank in range(3):
        stream = OccupancyStream(root, keys=NAMES, rank=rank, world_size=3)
        seen.append({name for name, _ in map(frame_name, stream)})
    assert sum(map(len, seen)) == len(set.union(*seen)) == 2


def test_persistent_workers_use_the_next_epoch(rows):
    stream = OccupancyStream(rows, keys=NAMES)
    loader = DataLoader(stream, batch_size=None, num_workers=2, persistent_workers=True)
    first = [frame_name(item) for item in loader]
    stream.set_epoch(1)
    second = [frame_name(item) for item in loader]
    assert first != second
    assert sorted(first) == sorted(second)


def test_even_option_gives_each_rank_the_same_number_of_frames(rows):
    counts = []
    for rank in range(3):
        stream = OccupancyStream(rows, keys=NAMES, rank=rank, world_size=3, even=True)
        counts.append(len(list(stream)))
    assert len(set(counts)) == 1
    assert 0 < sum(counts) <= len(all_names(rows))


def test_stream_resumes_from_its_state(rows):
    options = {"keys": (*NAMES, "image"), "shuffle_buffer": 12, "image_size": (32, 24), "seed": 4}
    options["augment"] = (occgen_hub.ColorJitter(),)
    whole = list(OccupancyStream(rows, **options))
    for place in np.random.default_rng(0).choice(len(whole), 10, replace=False).tolist():
        first = OccupancyStream(rows, **options)
        items = iter(first)
        for _ in range(place):
            next(items)
        state = first.state_dict()
        items.close()
        second = OccupancyStream(rows, **options)
        second.load_state_dict(state)
        rest = list(second)
        assert list(map(frame_name, rest)) == list(map(frame_name, whole[place:]))
        assert all(
            torch.equal(a["image"], b["image"]) for a, b in zip(rest, whole[place:], strict=True)
        )
        assert len(list(second)) == len(whole)  # The next epoch is complete.
    with pytest.raises(UsageError, match="seed is 5 here and 4 in the state"):
        OccupancyStream(rows, keys=NAMES, seed=5).load_state_dict(state)


@pytest.mark.parametrize("workers", [0, 2])
def test_stateful_loader_resumes_from_its_state(rows, workers):
    loaders = pytest.importorskip("torchdata.stateful_dataloader")

    def loader():
        stream = OccupancyStream(rows, keys=NAMES, shuffle_buffer=12)
        return loaders.StatefulDataLoader(stream, batch_size=3, num_workers=workers)

    whole = [list(zip(b["episode"], b["frame_index"].tolist(), strict=True)) for b in loader()]
    for place in (1, len(whole) // 2, len(whole) - 1):
        first = loader()
        items = iter(first)
        for _ in range(place):
            next(items)
        state = first.state_dict()
        del items
        second = loader()
        second.load_state_dict(state)
        rest = [list(zip(b["episode"], b["frame_index"].tolist(), strict=True)) for b in second]
        assert rest == whole[place:]


LEAVE_EARLY = """
import sys
from torch.utils.data import DataLoader
from occgen_hub import OccupancyStream
stream = OccupancyStream(sys.argv[1], keys=("occupancy", "image", "episode"), voxel_stride=4)
how = int(sys.argv[2])
if how == 0:
    items = iter(stream)  # Kept, and never closed.
    next(items)
elif how == 1:
    for item in stream:
        break
else:
    for item in DataLoader(stream, batch_size=None, num_workers=2):
        break
print("left", flush=True)
"""


def test_process_ends_after_leaving_the_loop_early(rows):
    for how in range(3):
        code = [sys.executable, "-c", LEAVE_EARLY, str(rows), str(how)]
        done = subprocess.run(code, capture_output=True, text=True, timeout=120, check=False)
        assert (done.returncode, done.stdout) == (0, "left\n"), done.stderr


FROM_THE_HUB = """
import sys
import occgen_hub.training.source as source
from occgen_hub import OccupancyStream
source.FIRST_WAIT = 0.01
options = {"keys": ("episode", "frame_index", "image", "occupancy", "task"), "voxel_stride": 4}
streams = [OccupancyStream(place, **options) for place in sys.argv[1:]]
pairs = [*zip(*streams, strict=True)]
assert len(pairs) == streams[0].num_frames
for here, there in pairs:
    for key, value in here.items():
        assert (value == there[key]).all() if hasattr(value, "all") else value == there[key], key
print("same", len(pairs))
"""


@pytest.mark.parametrize(
    "place",
    ["org/rows", pytest.param("hf://datasets/org/rows@main", marks=pytest.mark.long)],
    ids=["repo_id", "hf"],
)
def test_stream_from_the_hub_survives_broken_connections(rows, tmp_path, place):
    hub = Hub()
    try:
        repository = Repository(private=False)
        files = {p.relative_to(rows).as_posix(): p for p in rows.rglob("*.parquet")}
        served = {n: p.read_bytes() for n, p in files.items() if n.startswith(("index", "occ"))}
        repository.commit("main", served, "all")
        hub.repositories["org/rows"] = repository
        cut = Fault(r"GET .*/resolve/.*occupancy/", times=3, after=4)
        busy = Fault(r"GET .*/resolve/.*occupancy/", times=2, after=12, status=503)
        hub.faults += [cut, busy]
        environment = os.environ | {
            "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", FROM_THE_HUB, str(rows), place],
            env=environment, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.stdout == f"same {len(all_names(rows))}\n", done.stderr[-2000:]
        assert cut.met > 3
    finally:
        hub.close()


def test_wrong_arguments_are_refused(rows):
    for options, problem in (
        ({"rank": 1}, "rank and world_size: give both"),
        ({"rank": 2, "world_size": 2}, "rank is 2 of 2"),
        ({"shuffle_buffer": 0}, "must be 1 or more"),
        ({"split": "test"}, "split: 'test'"),
    ):
        with pytest.raises(UsageError, match=problem):
            OccupancyStream(rows, keys=NAMES, **options)
