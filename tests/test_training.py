"""PyTorch datasets, and the public names of the package."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from scipy import sparse
from torch.utils.data import DataLoader, Subset

import occgen_hub
from occgen_hub.errors import DatasetError, SourceError, UsageError
from occgen_hub.exporting import export
from occgen_hub.index import read_entries, write_index
from occgen_hub.loading import Trajectory, trajectories
from occgen_hub.media import SeekingVideo, video_frames
from occgen_hub.shards import remove_shards, shards, write_shards
from occgen_hub.training import KEYS, OccupancyDataset, collate

sys.path.append(str(Path(__file__).parent.parent / "scripts"))

from bench_opening import measure_opening, write_synthetic_index

COLUMNS = {
    "pose": "observation.camera_extrinsic_occ",
    "intrinsics": "observation.camera_intrinsic_occ",
}
CAMERA = ("occupancy", "mask", "pose", "intrinsics", "task", "episode", "frame_index")
SHAPE = (200, 125, 200)


@pytest.fixture(scope="module")
def many(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of ten trajectories in several shards. Tests must not change it."""
    root = tmp_path_factory.mktemp("many")
    for n, path in enumerate(trajectories(dataset) * 5):
        shutil.copytree(path, root / "group" / f"scene_{n:02d}" / "run", copy_function=os.link)
    size = sum(f.stat().st_size for f in root.rglob("*_sequence.npz"))
    write_shards(root, shard_bytes=size // 3)
    assert len(shards(root)) > 2
    return root


@pytest.fixture(scope="module")
def truth(many: Path) -> list[dict]:
    """All frames of `many`, in order, read with only scipy, numpy and pyarrow."""
    frames = []
    for folder in sorted(many.glob("*/*/*/meta"), key=lambda p: p.parent.as_posix()):
        videos = folder.parent / "videos/chunk-000"
        visible = sparse.load_npz(videos / "observation.occ.view/occ_sequence.npz")
        mask = np.load(videos / "observation.occ.mask/mask_sequence.npz")["data"]
        rows = pq.read_table(folder.parent / "data/chunk-000/episode_000000.parquet").to_pylist()
        for t, row in enumerate(rows):
            frames.append(
                {
                    "cells": visible[t].indices,
                    "packed": mask[t],
                    "episode": folder.parent.relative_to(many).as_posix(),
                    "frame_index": t,
                    **{key: np.array(row[name], np.float32) for key, name in COLUMNS.items()},
                }
            )
    return frames


def linked_copy(root: Path, out: Path) -> Path:
    return shutil.copytree(root, out, copy_function=os.link)


def flat(cells: torch.Tensor) -> np.ndarray:
    return np.ravel_multi_index(cells.numpy().T, SHAPE)


@pytest.mark.parametrize("dense", [True, False])
def test_items_match_the_trajectories(many, truth, dense):
    frames = OccupancyDataset(many, dense=dense, keys=CAMERA)
    assert len(frames) == len(truth)
    assert frames.grid.shape == SHAPE
    assert list(frames.episodes) == sorted({frame["episode"] for frame in truth})
    order = [*range(len(truth))] * 2
    random.Random(0).shuffle(order)
    for n in order:
        item, expected = frames[n], truth[n]
        assert tuple(item) == CAMERA
        observed = np.unpackbits(expected["packed"], count=np.prod(SHAPE)).astype(bool)
        if dense:
            assert item["occupancy"].dtype == item["mask"].dtype == torch.bool
            assert item["occupancy"].shape == item["mask"].shape == SHAPE
            cells = np.flatnonzero(item["occupancy"].numpy())
            np.testing.assert_array_equal(item["mask"].numpy().reshape(-1), observed)
        else:
            assert item["occupancy"].dtype == torch.int32
            cells = flat(item["occupancy"])
            np.testing.assert_array_equal(item["mask"].numpy(), expected["packed"])
        np.testing.assert_array_equal(cells, expected["cells"])
        for key in COLUMNS:
            assert item[key].dtype == torch.float32
            np.testing.assert_array_equal(item[key].numpy(), expected[key])
        assert (item["episode"], item["frame_index"]) == (
            expected["episode"],
            expected["frame_index"],
        )


def test_items_are_indexed_like_a_list(many):
    frames = OccupancyDataset(many, keys=("episode", "frame_index"))
    items = list(frames)
    assert len(items) == len(frames)
    assert frames[-1] == items[-1]
    assert frames[np.int64(3)] == items[3]
    for number in (len(frames), -len(frames) - 1):
        with pytest.raises(IndexError, match=str(number)):
            frames[number]


def test_starts_are_the_first_frames_of_the_episodes(many):
    frames = OccupancyDataset(many, keys=("episode", "frame_index"))
    assert frames.starts[-1] == len(frames)
    for episode, start in zip(frames.episodes, frames.starts[:-1], strict=True):
        assert frames[start] == {"episode": episode, "frame_index": 0}


def test_changing_an_item_does_not_change_the_dataset(many):
    for dense in (True, False):
        frames = OccupancyDataset(many, dense=dense, keys=[k for k in KEYS if k != "image"])
        first, again = frames[2], frames[2]
        for value in first.values():
            if isinstance(value, torch.Tensor):
                value.zero_()
        for key, value in frames[2].items():
            same = (
                torch.equal(value, again[key]) if hasattr(value, "shape") else value == again[key]
            )
            assert same, key


# Processes


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.long)])
def test_loader_processes_give_the_same_items(many, method):
    frames = OccupancyDataset(many, dense=False, keys=KEYS, history_len=2, history_step=1)
    order = np.random.default_rng(0).permutation(len(frames)).tolist()
    alone = [collate([frames[n]]) for n in order]  # One by one, since image sizes differ.
    loader = DataLoader(
        frames, sampler=order, num_workers=4, collate_fn=collate, multiprocessing_context=method
    )
    for ours, theirs in zip(alone, loader, strict=True):
        assert_same(ours, theirs)


def test_the_default_collation_stacks_dense_items(many):
    frames = OccupancyDataset(many, keys=("occupancy", "mask", "pose", "task"))
    few = Subset(frames, [9, 0, 17, 4])
    loader = DataLoader(few, batch_size=2, num_workers=4)
    batches = list(loader)
    assert batches[0]["occupancy"].shape == (2, *SHAPE)
    for n, batch in enumerate(batches):
        for b in range(2):
            item = few[2 * n + b]
            assert torch.equal(batch["occupancy"][b], item["occupancy"])
            assert torch.equal(batch["mask"][b], item["mask"])
            assert torch.equal(batch["pose"][b], item["pose"])
            assert batch["task"][b] == item["task"]


def assert_same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        same = torch.equal(value, theirs[key]) if hasattr(value, "shape") else value == theirs[key]
        assert same, key


def test_pickle_of_a_used_dataset_is_small(many):
    frames = OccupancyDataset(many, keys=CAMERA)
    item = frames[5]
    content = pickle.dumps(frames)
    assert len(content) < 20_000
    assert_same(item, pickle.loads(content)[5])


def test_collate_adds_the_item_number_to_sparse_rows(many):
    frames = OccupancyDataset(
        many, dense=False, history_len=2, history_step=1, keys=("occupancy", "history", "task")
    )
    items = [frames[n] for n in (3, 0, 2)]
    batch = collate(items)
    assert batch["occupancy"].dtype == batch["history"].dtype == torch.int32
    for b, item in enumerate(items):
        for key in ("occupancy", "history"):
            rows = batch[key][batch[key][:, 0] == b]
            assert torch.equal(rows[:, 1:], item[key])
    assert batch["history_valid"].tolist() == [[True, True], [False, False], [True, True]]
    assert batch["task"] == [item["task"] for item in items]


# History
@pytest.mark.parametrize(("length", "step"), [(1, 1), (3, 1), (2, 2), (10, 2), (0, 1)])
def test_history_starts_with_the_episode(many, truth, length, step):
    keys = ("history", "frame_index")
    dense, thin = (
        OccupancyDataset(many, history_len=length, history_step=step, keys=keys, dense=dense)
        for dense in (True, False)
    )
    for n in range(8):
        item, rows = dense[n], thin[n]["history"]
        assert item["history"].shape == (length, *SHAPE)
        assert item["history"].dtype == item["history_valid"].dtype == torch.bool
        for h in range(length):
            before = item["frame_index"] - (h + 1) * step
            assert item["history_valid"][h] == (before >= 0)
            expected = truth[n - (h + 1) * step]["cells"] if before >= 0 else []
            np.testing.assert_array_equal(np.flatnonzero(item["history"][h].numpy()), expected)
            np.testing.assert_array_equal(flat(rows[rows[:, 0] == h, 1:]), expected)
            motion = np.eye(4)
            if before >= 0:
                motion = (
                    np.linalg.inv(truth[n]["pose"].astype(float))
                    @ truth[n - (h + 1) * step]["pose"]
                )
            np.testing.assert_allclose(item["history_pose"][h], motion, atol=1e-6)


def test_aligned_history_is_moved_into_the_current_grid(many, truth):
    """Compared with moving the centre of each cell through the world."""
    dense, thin = (
        OccupancyDataset(
            many, history_len=3, history_step=1, align_history=True, keys=("history",), dense=dense
        )
        for dense in (True, False)
    )
    item, rows = dense[3], thin[3]["history"]
    lower, size = np.array([-2, -1.5, -0.5]), 0.02
    camera_from_world = np.linalg.inv(truth[3]["pose"].astype(float))
    left = 0
    for h in range(3):
        past = truth[2 - h]
        expected = set()
        for i, j, k in zip(*np.unravel_index(past["cells"], SHAPE), strict=True):
            centre = [*(lower + (np.array([i, j, k]) + 0.5) * size), 1]
            moved = camera_from_world @ (past["pose"].astype(float) @ centre)
            cell = tuple(np.floor((moved[:3] - lower) / size).astype(int).tolist())
            if all(0 <= c < n for c, n in zip(cell, SHAPE, strict=True)):
                expected.add(cell)
            else:
                left += 1
        assert set(map(tuple, np.argwhere(item["history"][h].numpy()).tolist())) == expected
        found = rows[rows[:, 0] == h, 1:].tolist()
        assert found == sorted(map(list, expected))
    assert left > 0
    still = OccupancyDataset(many, history_len=3, history_step=1, keys=("history",))[3]["history"]
    assert not torch.equal(still, item["history"])


# Images


def test_images_and_depth_match_the_trajectory(many, truth):
    frames = OccupancyDataset(many, keys=("image", "depth"))
    for n in (0, 5, 2):
        trajectory = Trajectory.open(many / truth[n]["episode"])
        item, t = frames[n], truth[n]["frame_index"]
        assert item["image"].dtype == torch.uint8
        np.testing.assert_array_equal(item["image"].permute(1, 2, 0), trajectory.rgb(t))
        assert item["depth"].dtype == torch.float32
        np.testing.assert_array_equal(item["depth"], trajectory.depth(t).astype(np.float32))


def test_images_come_from_the_video_if_there_are_no_image_files(many, truth, tmp_path):
    root = linked_copy(many, tmp_path / "video")
    for folder in [*root.rglob("observation.images.rgb")]:
        shutil.rmtree(folder)
    frames = OccupancyDataset(root, keys=("image",))
    for n in (6, 3, 0, 1, 9, 2):
        expected = Trajectory.open(root / truth[n]["episode"]).rgb(truth[n]["frame_index"])
        np.testing.assert_array_equal(frames[n]["image"].permute(1, 2, 0), expected)


def test_missing_image_file_is_an_error(many, truth, tmp_path):
    """The video is not used, since the other frames come from image files."""
    root = linked_copy(many, tmp_path / "gap")
    trajectory = Trajectory.open(root / truth[0]["episode"])
    trajectory.file("rgb", 0).unlink()
    frames = OccupancyDataset(root, keys=("image",))
    for look in (
        lambda: frames[0],
        lambda: trajectory.rgb(0),
        lambda: export(root, tmp_path / "x"),
    ):
        with pytest.raises(SourceError, match=r"/0\.jpg: is missing"):
            look()
    assert frames[1]["image"].any()


@pytest.mark.parametrize(
    "options", ["keyint=12:bframes=3:open-gop=1", "keyint=250:bframes=0", "keyint=7:bframes=0"]
)
def test_any_frame_of_a_video_can_be_read(tmp_path, options):
    path = tmp_path / "video.mp4"
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=Fraction(30), options={"x264-params": options})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(60):
            small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
            out.mux(stream.encode(av.VideoFrame.from_image(small.resize((64, 48)))))
        out.mux(stream.encode())
    expected = list(video_frames(path))
    video = SeekingVideo(path, (64, 48))
    for n in [59, 0, 1, 2, 30, 29, 31, *rng.integers(0, 60, 40).tolist()]:
        np.testing.assert_array_equal(video(n), expected[n])
    with pytest.raises(SourceError, match="ends before frame 60"):
        video(60)
    assert video(5).shape == (48, 64, 3)


# Errors


def test_error_for_missing_shards_names_the_remedy(dataset, tmp_path):
    root = linked_copy(dataset, tmp_path / "npz")
    shutil.rmtree(root / "occupancy")
    with pytest.raises(UsageError, match=r"no files of its episodes.* run occgen-hub finalize"):
        OccupancyDataset(root)
    remove_shards(root)
    with pytest.raises(UsageError, match=r"has no occupancy as Parquet.* run occgen-hub build"):
        OccupancyDataset(root)


def test_index_must_be_an_integer(many):
    frames = OccupancyDataset(many, keys=("occupancy",))
    last = frames[np.int64(len(frames) - 1)]["occupancy"]
    assert torch.equal(frames[-1]["occupancy"], last)
    for wrong in (slice(0, 2), 1.0, "1"):
        with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
            frames[wrong]


def test_episodes_of_different_grids_are_refused(sample_tree, tmp_path):
    for size, limit in ((0.2, None), (0.1, 1)):
        config = occgen_hub.Config(voxel_size=size)
        occgen_hub.build("internnav", sample_tree, tmp_path / "out", config=config, limit=limit)
    with pytest.raises(DatasetError, match="episodes of several grids"):
        OccupancyDataset(tmp_path / "out", keys=("occupancy",))


def test_wrong_arguments_are_refused(many, tmp_path):
    for wrong in (tmp_path / "none", str(tmp_path / "none"), "/no/such/folder", "plain"):
        with pytest.raises(UsageError, match="is not a folder"):
            OccupancyDataset(wrong)
    with pytest.raises(UsageError, match="colour is unknown; give some of occupancy, mask"):
        OccupancyDataset(many, keys=("occupancy", "colour"))
    with pytest.raises(UsageError, match=r"'occupancy' is not a list; give \('occupancy',\)"):
        OccupancyDataset(many, keys="occupancy")
    with pytest.raises(UsageError, match=r"image_size is 240; give \(width, height\)"):
        OccupancyDataset(many, keys=("image",), image_size=240)
    trajectory = trajectories(many)[0]
    with pytest.raises(UsageError, match=f"one trajectory: give the whole dataset, {many}"):
        OccupancyDataset(trajectory)
    for arguments in ({"history_len": -1}, {"history_step": 0}):
        with pytest.raises(UsageError, match="history_len must be"):
            OccupancyDataset(many, **arguments)


def test_unreachable_hub_gives_an_error_of_one_line(tmp_path):
    code = (
        "import occgen_hub; from occgen_hub.errors import UsageError\n"
        "try: occgen_hub.OccupancyDataset('nobody/nothing')\n"
        "except UsageError as error: print(error)"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (
        "nobody/nothing: is not a local folder, and cannot be downloaded from the Hub"
        in done.stdout
    )
    assert len(done.stdout.splitlines()) == 1, done


def test_keys_of_missing_media_are_refused(many, tmp_path):
    root = linked_copy(many, tmp_path / "bare")
    for name in ("rgb", "depth"):
        for folder in [*root.rglob(f"observation.images.{name}")]:
            shutil.rmtree(folder)
    for path in root.rglob("reference.mp4"):
        path.unlink()
    for key in ("image", "depth"):
        with pytest.raises(UsageError, match=f"has no {key} of .*leave '{key}' out of keys"):
            OccupancyDataset(root, keys=("occupancy", key))
    assert OccupancyDataset(root, keys=CAMERA)[0]["occupancy"].any()


def first_shard(root: Path) -> Path:
    """The shard of the first episode."""
    return root / next(iter(read_entries(root).values())).shards[0]


def test_partial_dataset_has_only_the_episodes_that_are_present(many, truth, tmp_path):
    root = linked_copy(many, tmp_path / "partly")
    first_shard(root).unlink()
    episodes = OccupancyDataset(root, keys=CAMERA).episodes
    assert episodes == OccupancyDataset(many).episodes[1:]
    shutil.rmtree(root / episodes[0])
    assert OccupancyDataset(root, keys=("task",)).episodes == episodes[1:]
    frames = OccupancyDataset(root, dense=False, keys=("occupancy", "episode"))
    assert frames.episodes == episodes  # Occupancy is in the shards.
    expected = [frame for frame in truth if frame["episode"] in episodes]
    for item, frame in zip(frames, expected, strict=True):
        np.testing.assert_array_equal(flat(item["occupancy"]), frame["cells"])
    for path in shards(root):
        path.unlink()
    with pytest.raises(UsageError, match="no files of its episodes; download them"):
        OccupancyDataset(root)
    shutil.rmtree(root / "index")
    with pytest.raises(UsageError, match="has no index; run occgen-hub finalize"):
        OccupancyDataset(root)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"shape": (200, 0, 200)}, "does not describe a grid"),
        ({"shape": (1 << 20,) * 3}, "has a grid of more than"),
        ({"voxel_size": float("nan")}, "does not describe a grid"),
        ({"voxel_size": 0.5}, "several grids"),
        ({"pc_range": (0, 0, 0, 1, 1)}, "does not describe a grid"),
        ({"frames": 0}, "without frames"),
        ({"frames": 1 << 40}, "not in order"),
        ({"shard_starts": (1,)}, "without frames"),
        ({"shard_starts": (0, 1)}, "of unequal length"),
        ({"row_groups": (-1,)}, "without frames"),
        ({"group_rows": 1 << 20, "frames": 1 << 20}, "row groups of more than"),
    ],
)
def test_invalid_index_is_refused(many, tmp_path, change, problem):
    rows = list(read_entries(many).values())
    some = rows[:1] if "voxel_size" in change and change["voxel_size"] == 0.5 else rows
    some = [replace(row, **change) for row in some]
    for row in rows:
        (tmp_path / row.shards[0]).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / row.shards[0]).touch()
    write_index(tmp_path, [*some, *rows[len(some) :]])
    with pytest.raises(DatasetError, match=problem) as raised:
        OccupancyDataset(tmp_path, keys=("occupancy",))
    assert f"{tmp_path / 'index'}" in str(raised.value)


def copy_with_changed_shard(many: Path, out: Path, change, group: int = 8) -> Path:
    """A copy of `many` with `change` applied to the table of its first shard."""
    root = linked_copy(many, out)
    path = first_shard(root)
    table = change(pq.read_table(path))
    path.unlink()  # It is a link to the original.
    pq.write_table(table, path, row_group_size=group)
    return root


def in_column(name: str, edit):
    """A change of one column: `edit` maps the list of its values to a new list."""

    def change(table: pa.Table) -> pa.Table:
        at = table.schema.get_field_index(name)
        values = edit(table[name].to_pylist())
        return table.set_column(
            at, table.schema.field(at), pa.array(values, table.schema.types[at])
        )

    return change


def in_first_row(value):
    return lambda values: [value(values[0]), *values[1:]]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            in_column("occupied", in_first_row(lambda v: [*v[:-1], 5_000_000])),
            "out of order or outside",
        ),
        (in_column("occupied", in_first_row(lambda v: [-1, *v])), "out of order or outside"),
        (in_column("occupied", in_first_row(lambda v: v[::-1])), "out of order or outside"),
        (in_column("occupied", in_first_row(lambda v: None)), "not whole"),
        (in_column("observed", in_first_row(lambda v: v[:-1])), "not of the grid's 5000000 cells"),
        (in_column("observed", in_first_row(lambda v: None)), "not whole"),
        (
            in_column("frame_index", in_first_row(lambda v: 7)),
            "not of frames 0 to 3 of group/scene_00/run",
        ),
        (in_column("frame_index", in_first_row(lambda v: None)), "not of frames"),
        (in_column("episode", in_first_row(lambda v: "a/b/c")), "not of frames"),
        (in_column("episode", lambda v: ["../../x" for _ in v]), "not of frames"),
        (
            in_column("camera_extrinsic", in_first_row(lambda v: [[float("nan")] * 4] * 4)),
            "not finite",
        ),
        (in_column("camera_extrinsic", in_first_row(lambda v: [[2.0] * 4] * 4)), "not rigid"),
        (lambda table: table.drop_columns(["observed"]), "no column observed of binary"),
        (lambda table: table.append_column("shape", table["shape"]), "two columns with the"),
        (lambda table: table.slice(0, 0), "not of frames 0 to 3"),
        (lambda table: table.slice(0, 3), "not of frames 0 to 3"),
    ],
)
def test_invalid_shard_is_refused(many, tmp_path, change, problem):
    root = copy_with_changed_shard(many, tmp_path / "changed", change)
    with pytest.raises(DatasetError, match=problem) as raised:
        OccupancyDataset(root, keys=("occupancy", "mask", "pose"))[0]
    assert str(first_shard(root)) in str(raised.value)
    assert "changed since, fetch it again, or remove it and run the build" in str(raised.value)


def test_row_groups_of_another_size_are_read(many, truth, tmp_path):
    root = copy_with_changed_shard(many, tmp_path / "large", lambda table: table, group=3)
    first_row, *others = read_entries(root).values()
    write_index(root, [replace(first_row, group_rows=3), *others])
    frames = OccupancyDataset(root, dense=False, keys=("occupancy", "mask"))
    for n, expected in enumerate(truth):
        np.testing.assert_array_equal(flat(frames[n]["occupancy"]), expected["cells"])
        np.testing.assert_array_equal(frames[n]["mask"], expected["packed"])


def test_error_names_a_damaged_shard(many, tmp_path):
    """With random or missing bytes, a shard is either read or raises a DatasetError."""
    shard = first_shard(many)
    content = shard.read_bytes()
    rng = np.random.default_rng(3)
    refusals = []
    for n in range(40):
        root = tmp_path / str(n)
        shutil.copytree(many / "index", root / "index", copy_function=os.link)
        damaged = bytearray(content)
        for at in rng.integers(0 if n % 2 else len(content) - 4000, len(content), 3):
            damaged[at] = rng.integers(0, 256)
        path = root / shard.relative_to(many)
        path.parent.mkdir(parents=True)
        path.write_bytes(damaged if n % 5 else damaged[: len(damaged) // (n + 2)])
        try:
            frames = OccupancyDataset(root, dense=False, keys=("occupancy", "mask", "pose"))
            list(frames)
        except DatasetError as error:
            refusals.append((path, str(error)))
    assert len(refusals) > 10
    for path, text in refusals:
        assert text.startswith(f"{path}: ")
        assert "\n" not in text


def test_missing_task_is_an_error(many, truth, tmp_path):
    root = linked_copy(many, tmp_path / "tasks")
    path = root / truth[0]["episode"] / "meta/tasks.jsonl"
    path.unlink()
    path.write_text("")
    with pytest.raises(DatasetError, match=r"tasks\.jsonl: has no task of frame 1"):
        OccupancyDataset(root, keys=("task",))[1]


# Cost


def test_memory_does_not_grow(many):
    frames = OccupancyDataset(
        many, keys=("occupancy", "mask", "pose", "image", "history"), history_len=2
    )
    order = np.random.default_rng(0).integers(0, len(frames), 240).tolist()
    for n in order[:40]:
        frames[n]
    process = psutil.Process()
    before = process.memory_info().rss
    for n in order[40:]:
        frames[n]
    assert process.memory_info().rss - before < 40 << 20


def test_reading_one_item_reads_few_bytes(many):
    """An item needs one row group, less than half of all bytes."""
    process = psutil.Process()
    frames = OccupancyDataset(many, keys=("occupancy", "mask"))
    before = process.io_counters().read_chars
    frames[0]
    total = sum(path.stat().st_size for path in shards(many))
    assert 0 < process.io_counters().read_chars - before < total / 2


def test_large_dataset_opens_quickly(tmp_path):
    """20,000 episodes with an index and empty shard files."""
    write_synthetic_index(tmp_path, 20_000)
    found = measure_opening(tmp_path)
    assert (found["episodes"], found["frames"]) == (20_000, 76 * 20_000)
    assert found["core_seconds"] < 2  # CPU time, since other processes may use the cores.
    assert found["bytes_more"] < 300e6


# Public names


def test_importing_the_package_imports_no_heavy_modules():
    code = (
        "import sys, occgen_hub\n"
        "heavy = {'torch', 'pyarrow', 'numpy', 'huggingface_hub', 'av'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert set(occgen_hub.__all__) <= set(dir(occgen_hub))\n"
        "occgen_hub.load_episode, occgen_hub.build, occgen_hub.validate\n"
        "assert 'torch' not in sys.modules\n"
        "occgen_hub.OccupancyDataset\n"
        "assert 'torch' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_exist_and_have_docstrings():
    for name in occgen_hub.__all__:
        for _ in range(2):  # After the first access, a module could replace the name.
            assert callable(getattr(occgen_hub, name))
        assert getattr(occgen_hub, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = occgen_hub.nothing


def test_loaded_episode_matches_the_files(many, truth):
    episode = occgen_hub.load_episode(many / truth[0]["episode"])
    frames = [frame for frame in truth if frame["episode"] == truth[0]["episode"]]
    assert len(episode) == len(frames)
    assert len(episode.tasks) > max(episode.task_index) >= 0
    for t in (1, 3, 0, 0, 2):
        frame, expected = episode.frame(t), frames[t]
        np.testing.assert_array_equal(np.flatnonzero(frame.occupancy), expected["cells"])
        np.testing.assert_array_equal(np.argwhere(frame.occupancy), frame.cells)
        np.testing.assert_array_equal(np.packbits(frame.mask), expected["packed"])
        np.testing.assert_array_equal(episode.world_from_camera[t], expected["pose"])
        np.testing.assert_array_equal(episode.intrinsics[t], expected["intrinsics"])
        assert episode.rgb(t).shape == (*episode.depth(t).shape, 3)
    for ask in (episode.frame, episode.rgb, episode.depth):
        for number in (len(frames), -1):
            with pytest.raises(IndexError, match=f"frame {number}"):
                ask(number)
    with pytest.raises(DatasetError, match=r"occgen\.json"):
        occgen_hub.load_episode(many)


WRONG_ARGUMENTS = (
    {"media": "all"},
    {"workers": 0},
    {"limit": 0},
    {"engine": "none"},
    {"config": {"voxel_size": 0.1}},
)


def test_a_dataset_is_built_and_read_from_python(sample_tree, tmp_path):
    config = occgen_hub.Config(voxel_size=0.1, pc_range=(-2, -1.5, 0, 2, 1, 4))
    out = tmp_path / "out"
    summary = occgen_hub.build(
        "internnav", str(sample_tree), str(out), config=config, media="none", limit=1
    )
    assert (summary.built, summary.failures) == (1, [])
    assert occgen_hub.validate(out).valid
    frames = occgen_hub.OccupancyDataset(str(out), keys=CAMERA)
    assert frames[0]["occupancy"].shape == config.grid_shape == (40, 25, 40)
    assert frames.grid.lower == config.pc_range[:3]
    for wrong in WRONG_ARGUMENTS:
        with pytest.raises(UsageError):
            occgen_hub.build("internnav", sample_tree, tmp_path / "other", **wrong)
    assert not (tmp_path / "other").exists()
