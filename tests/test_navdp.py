"""The export for the NavDP loader of InternNav, read by a reimplementation of that loader."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from PIL import Image

import occgen_hub as library
from occgen_hub import cli
from occgen_hub.config import Config
from occgen_hub.errors import OccGenError, UsageError
from occgen_hub.files import files_under
from occgen_hub.geometry.ply import read_ply
from occgen_hub.loading import trajectories
from occgen_hub.navdp import export_navdp
from occgen_hub.sample import make_sample

COARSE = Config(voxel_size=0.25)


def sorted_names(folder, key=None):
    """Sorted names of the entries of a folder."""
    return sorted((path.name for path in folder.iterdir()), key=key)


def sorted_paths(folder, key=None):
    return [folder / name for name in sorted_names(folder, key)]


def by_number(name):
    return int(name.split(".")[0])


def items_of_scenes(root, key=None):
    """The items of the loader since March 2026. key: how names are sorted; None sorts as text."""
    for group in sorted_names(root):
        for scene in sorted_names(root / group):
            folder = root / group / scene
            chunk = sorted_names(folder / "data")[0]
            text = (folder / "meta/episodes_stats.jsonl").read_text()
            images = folder / "videos" / chunk
            rgb = sorted_paths(images / "observation.images.rgb", key)
            depth = sorted_paths(images / "observation.images.depth", key)
            tables = sorted_paths(folder / "data" / chunk)
            for number, line in enumerate(text.splitlines()):
                index = json.loads(line)["image_index"]
                own = slice(index["min"], index["max"] + 1)
                yield item(tables[number], rgb[own], depth[own], folder / "meta/pointcloud.ply")


def items_of_trajectories(root):
    """The items of the loader before March 2026."""
    for group in sorted_names(root):
        for scene in sorted_names(root / group):
            for name in sorted_names(root / group / scene):
                folder = root / group / scene / name
                images = folder / "videos/chunk-000"
                count = len(sorted_names(images / "observation.images.rgb"))
                assert len(sorted_names(images / "observation.images.depth")) == count
                rgb = [images / f"observation.images.rgb/{i}.jpg" for i in range(count)]
                depth = [images / f"observation.images.depth/{i}.png" for i in range(count)]
                data = folder / "data/chunk-000"
                yield item(data / "episode_000000.parquet", rgb, depth, data / "path.ply")


def item(table, rgb, depth, cloud):
    """The arrays of an episode, before the loader samples a part of it and resizes images."""
    frames = pd.read_parquet(table)
    columns = ("observation.camera_intrinsic", "observation.camera_extrinsic")
    K, base = (np.vstack(np.array(frames[name].tolist()[0])) for name in columns)
    poses = np.array([np.stack(frame) for frame in frames["action"]], np.float64)
    found = read_ply(cloud)
    blue = np.abs(found.colors / 255 - np.array([0, 0, 0.5])).sum(axis=-1) < 0.05
    return {
        "intrinsic": K.reshape(3, 3),
        "extrinsic": base.reshape(4, 4),
        "poses": poses.reshape(-1, 4, 4),
        "rgb": np.stack([np.array(Image.open(path), np.uint8) for path in rgb]),
        "depth": np.stack([np.array(Image.open(path), np.uint16) for path in depth]),
        "obstacles": found.points[blue],
    }


def assert_same_items(found, expected):
    found, expected = list(found), list(expected)
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert len(one["rgb"]) == len(one["poses"])
        assert len(one["obstacles"])
        for name, value in other.items():
            np.testing.assert_array_equal(one[name], value, err_msg=name)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A source with one scene, two episodes and more than ten images; and the built dataset."""
    place = tmp_path_factory.mktemp("navdp")
    make_sample(place / "tree", trajectories=2, frames=7, seed=7, layout="vln-n1-scenes")
    shutil.rmtree(place / "tree/ground_truth")
    assert not library.build("internnav", place / "tree", place / "out", config=COARSE).failures
    return place


def test_loader_reads_equal_items_from_export_and_source(scenes, tmp_path):
    assert export_navdp(scenes / "out", tmp_path / "navdp") == []
    command = ["push", str(tmp_path / "navdp"), "--repo-id", "org/rooms", "--dry-run"]
    refused = rf"is an export for NavDP.*hf upload ORG/NAME {tmp_path}/navdp navdp"
    with pytest.raises(OccGenError, match=refused):
        CliRunner().invoke(cli.cli, command, catch_exceptions=False)
    with pytest.raises(UsageError, match="is an export; give the dataset that it was made from"):
        export_navdp(tmp_path / "navdp", tmp_path / "again")
    source = list(items_of_scenes(scenes / "tree", by_number))
    assert sum(len(found["rgb"]) for found in source) > 10
    assert_same_items(items_of_scenes(tmp_path / "navdp"), source)
    (chunk,) = (tmp_path / "navdp").glob("*/*/data/*")
    assert {path.suffix for path in chunk.iterdir()} == {".parquet"}


def test_trajectories_layout_has_one_folder_per_episode(dataset, sample_tree, tmp_path):
    source = Path(shutil.copytree(sample_tree, tmp_path / "source"))
    shutil.rmtree(source / "ground_truth")
    command = ["export", dataset, tmp_path / "navdp", "--to", "navdp"]
    ran = CliRunner().invoke(cli.cli, [*map(str, command), "--navdp-layout", "trajectories"])
    assert ran.exit_code == 0, ran.output
    assert_same_items(items_of_trajectories(tmp_path / "navdp"), items_of_trajectories(source))
    # The current layout has the same items; only the paths of the clouds differ.
    export_navdp(dataset, tmp_path / "scenes")
    assert_same_items(items_of_scenes(tmp_path / "scenes"), items_of_trajectories(source))


def test_export_can_be_built_again(scenes, tmp_path):
    export_navdp(scenes / "out", tmp_path / "navdp")
    again = library.build("internnav", tmp_path / "navdp", tmp_path / "again", config=COARSE)
    assert not again.failures
    assert again.notes.keys() <= {"task json"}  # The text columns `episode` and `scene` are known.
    for path in trajectories(scenes / "out"):
        other = tmp_path / "again" / path.relative_to(scenes / "out")
        for file in path.rglob("observation.occ.*/*.npz"):
            assert file.read_bytes() == (other / file.relative_to(path)).read_bytes()


def test_trajectories_without_depth_are_left_out_with_a_remark(scenes, tmp_path):
    out = Path(shutil.copytree(scenes / "out", tmp_path / "out"))
    shutil.rmtree(next(out.rglob("observation.images.depth")))
    (remark,) = export_navdp(out, tmp_path / "navdp")
    assert remark.startswith("1 of 2 trajectories have no depth images and are left out, e.g. ")
    assert len(list(items_of_scenes(tmp_path / "navdp"))) == 1
    for folder in list(out.rglob("observation.images.depth")):
        shutil.rmtree(folder)
    with pytest.raises(
        UsageError, match=r"none of its trajectories: 2 have no depth.*InternData-N1"
    ):
        export_navdp(out, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_overwrite_replaces_only_earlier_exports(scenes, tmp_path):
    out = tmp_path / "navdp"
    (out / "mine").mkdir(parents=True)
    (out / "mine/notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="has files that no export wrote"):
        export_navdp(scenes / "out", out, overwrite=True)
    shutil.rmtree(out)
    export_navdp(scenes / "out", out)
    before = {path: path.read_bytes() for path in files_under(out)}
    with pytest.raises(UsageError, match="--overwrite replaces it"):
        export_navdp(scenes / "out", out)
    export_navdp(scenes / "out", out, overwrite=True)
    assert {path: path.read_bytes() for path in files_under(out)} == before
