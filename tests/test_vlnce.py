"""VLN-CE: the built sample compared with the same frames in the layout of VLN-N1."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import occgen_hub
from occgen_hub.sample import make_sample
from occgen_hub.validation import validate

SCENE, CAMERA = "sample_r2r/house_000", "125cm_0deg"
FLIP = np.diag([1.0, -1, -1, 1])


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    out = tmp_path_factory.mktemp("vlnce") / "tree"
    make_sample(out, trajectories=1, frames=5, layout="vln-ce")
    return out


@pytest.fixture(scope="module")
def built(tree):
    out = tree.parent / "out"
    summary = occgen_hub.build("internnav", tree, out)
    assert not summary.failures
    assert summary.built == 2
    assert summary.notes["hfov"] == 2
    return out


def as_vln_n1(tree, out):
    """Write the frames of one camera in VLN-N1 layout: 10,000 units per metre, OpenGL axes."""
    scene, folder = tree / SCENE, out / SCENE / "trajectory_0"
    (folder / "data/chunk-000").mkdir(parents=True)
    (folder / "meta").mkdir()
    table = pq.read_table(scene / "data/chunk-000/episode_000000.parquet")
    poses = np.array(table[f"pose.{CAMERA}"].to_pylist()) @ FLIP
    focal = 160 / np.tan(np.radians(79 / 2))
    K = np.array([[focal, 0, 160], [0, focal, 120], [0, 0, 1]])
    columns = {
        "action": pa.array(poses.astype(np.float32).tolist(), pa.list_(pa.list_(pa.float32()))),
        "observation.camera_intrinsic": pa.array([K.tolist()] * len(poses)),
    }
    pq.write_table(pa.table(columns), folder / "data/chunk-000/episode_000000.parquet")
    for frame in range(len(poses)):
        for kind, suffix in (("rgb", "jpg"), ("depth", "png")):
            place = scene / f"videos/chunk-000/observation.images.{kind}.{CAMERA}"
            source = place / f"episode_000000_{frame}.{suffix}"
            target = folder / f"videos/chunk-000/observation.images.{kind}/{frame}.{suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            if kind == "rgb":
                target.write_bytes(source.read_bytes())
            else:
                units = np.asarray(Image.open(source)).astype(np.int64) * 10
                Image.fromarray(np.where(units < 65536, units, 0).astype(np.uint16)).save(target)
    (folder / "meta/info.json").write_text(json.dumps({"fps": 10}))
    for name in ("tasks", "episodes", "episodes_stats"):
        (folder / f"meta/{name}.jsonl").write_text("")


def test_cells_equal_those_of_the_same_frames_in_vln_n1_layout(tree, built, tmp_path):
    as_vln_n1(tree, tmp_path / "n1")
    assert not occgen_hub.build("internnav", tmp_path / "n1", tmp_path / "out").failures
    ours = occgen_hub.load_episode(built / SCENE / f"episode_000000.{CAMERA}")
    other = occgen_hub.load_episode(tmp_path / "out" / SCENE / "trajectory_0")
    assert len(ours) == len(other) == 5
    for name in ("observation.occ.view/occ_sequence.npz", "observation.occ.mask/mask_sequence.npz"):
        path = f"videos/chunk-000/{name}"
        a, b = built / SCENE / f"episode_000000.{CAMERA}", tmp_path / "out" / SCENE / "trajectory_0"
        assert (a / path).read_bytes() == (b / path).read_bytes()
    assert np.array_equal(ours.depth(2), other.depth(2))


def test_dataset_is_valid_and_keeps_actions_and_instructions(tree, built):
    assert not validate(built).findings
    folder = built / SCENE / f"episode_000000.{CAMERA}"
    table = pq.read_table(folder / "data/chunk-000/episode_000000.parquet")
    source = pq.read_table(tree / SCENE / "data/chunk-000/episode_000000.parquet")
    assert table["action"].to_pylist() == source["action"].to_pylist()
    assert f"pose.{CAMERA}" in table.column_names
    assert "pose.125cm_30deg" not in table.column_names
    (row,) = [json.loads(line) for line in (folder / "meta/episodes.jsonl").open()]
    joined = json.loads((tree / SCENE / "meta/episodes.jsonl").read_text().splitlines()[0])
    assert row["tasks"] == list(dict.fromkeys(joined["tasks"][0].split("<INSTRUCTION_SEP>")))


@pytest.mark.parametrize("hfov", [60, 95])
def test_wrong_field_of_view_is_reported(tree, hfov, tmp_path):
    config = occgen_hub.Config(hfov=hfov)
    summary = occgen_hub.build("internnav", tree, tmp_path / "out", config=config)
    reasons = [failure.reason for failure in summary.failures]
    assert len(reasons) + summary.notes["field of view"] == 2
    assert all("give their field of view, perhaps --hfov" in reason for reason in reasons)
