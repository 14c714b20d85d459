"""The dataset card: the Hub's library reads it, and its examples run unchanged."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import tree as files_of
from PIL import Image

from occgen_hub.builder import load_builder, plain_license
from occgen_hub.card import MARK, is_own, states_no_license, write_card
from occgen_hub.config import Config
from occgen_hub.episode_build import Settings
from occgen_hub.errors import DatasetError, UsageError
from occgen_hub.files import sha256
from occgen_hub.index import bucket
from occgen_hub.job import Job, list_episodes
from occgen_hub.loading import trajectories
from occgen_hub.runtime.build import build_dataset
from occgen_hub.runtime.finalize import finalize
from occgen_hub.sample import make_sample
from occgen_hub.shards import write_shards
from occgen_hub.validation import validate

COARSE = Settings(Config(voxel_size=0.1))
TABLE = "data/chunk-000/episode_000000.parquet"


@pytest.fixture
def mine(dataset: Path, tmp_path: Path) -> Path:
    """A copy of the dataset that a test may change."""
    return Path(shutil.copytree(dataset, tmp_path / "mine"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give `datasets` its own cache for each test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def front_matter(root: Path) -> dict[str, Any]:
    """The front matter, as the Hub's library reads it."""
    from huggingface_hub import DatasetCard

    return dict(DatasetCard.load(root / "README.md", ignore_metadata_errors=False).data.to_dict())


def build(source: Path, out: Path) -> list[str]:
    builder = load_builder("internnav", source)
    summary = build_dataset(Job(builder, list_episodes(builder), out, COARSE))
    assert not summary.failures
    return summary.remarks


def change_record(root: Path, change: dict[str, Any], number: int = 0) -> None:
    path = trajectories(root)[number] / "meta/occgen.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    write_shards(root)


# Content


def test_hub_library_reads_the_front_matter(dataset):
    found = front_matter(dataset)
    assert found["license"] == "other"
    assert re.fullmatch(r"[a-z0-9.-]+", found["license_name"])
    assert found["task_categories"] == ["robotics"]
    assert {"LeRobot", "occupancy"} <= set(found["tags"])
    assert found["size_categories"] == ["n<1K"]
    assert [config["config_name"] for config in found["configs"]] == [
        "default", "occupancy", "scene_states", "index",
    ]  # fmt: skip


def test_licence_is_taken_from_the_source_card(tmp_path):
    tree, out = tmp_path / "copy/vln_n1/traj_data", tmp_path / "out"
    make_sample(tree, trajectories=1, frames=1)
    (tmp_path / "copy/README.md").write_text("---\nlicense: cc-by-nc-sa-4.0\n---\nRooms.\n")
    build(tree, out)
    assert front_matter(out)["license"] == "cc-by-nc-sa-4.0"
    assert "under the licence cc-by-nc-sa-4.0." in (out / "README.md").read_text()
    assert validate(out).findings == ()
    (tmp_path / "copy/README.md").write_text("No licence here.\n")
    job = Job(builder := load_builder("internnav", tree), list_episodes(builder), out, COARSE)
    # The text of a card causes no rebuild.
    assert (builder.license, build_dataset(job).present) == (None, 1)
    assert front_matter(out)["license"] == "cc-by-nc-sa-4.0"


def test_a_licence_that_is_stated_later_is_recorded_without_a_rebuild(tmp_path):
    tree, out = tmp_path / "tree", tmp_path / "out"
    make_sample(tree, trajectories=2, frames=1)
    build(tree, out)
    assert states_no_license(out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.npz")}
    (tree / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    builder = load_builder("internnav", tree)
    summary = build_dataset(Job(builder, list_episodes(builder), out, COARSE))
    assert (summary.present, summary.built) == (2, 0)
    assert not states_no_license(out)
    assert front_matter(out)["license"] == "cc-by-4.0"
    records = [json.loads(path.read_text()) for path in out.rglob("meta/occgen.json")]
    assert [record["source"]["license"] for record in records] == ["cc-by-4.0"] * 2
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.npz")} == before
    assert validate(out).findings == ()
    third = files_of(out)
    build_dataset(Job(builder, list_episodes(builder), out, COARSE))
    assert files_of(out) == third


@pytest.mark.parametrize(
    ("licence", "found"),
    [("mit", "mit"), (["mit"], "mit"), (["mit", "gpl-3.0"], None), ("other", None), (3, None)],
)
def test_only_a_single_known_licence_is_used(licence, found):
    assert plain_license(licence) == found


def test_card_files_belong_to_a_valid_dataset(dataset):
    assert sorted(p.name for p in dataset.iterdir()) == [
        ".logs", "README.md", "index", "occupancy", "preview.png", "report.json", "sample_zed",
        "scene_states",
    ]  # fmt: skip
    assert validate(dataset).findings == ()


def test_card_examples_run(dataset):
    text = (dataset / "README.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 4
    places: list[dict[str, Any]] = [{} for _ in examples]
    for code, names in zip(examples, places, strict=True):
        # The stream is read to its end, but only its first frame is compared.
        first = code.replace("for row in rows:", "for row in [*rows][:1]:")
        exec(first.replace('"DATASET', f'"{dataset}'), names)
    frames, streamed, ours, files = places
    assert frames["world_from_camera"].shape == (4, 4)
    np.testing.assert_array_equal(streamed["occupied"], files["occupied"])
    np.testing.assert_array_equal(streamed["observed"], files["observed"])
    np.testing.assert_allclose(streamed["world_from_camera"], frames["world_from_camera"])
    assert (streamed["free"].sum() + streamed["occupied"].sum()) == files["observed"].sum()
    cells = np.load(trajectories(dataset)[0] / "data/chunk-000/all_occ.npz")["data"]
    distance = np.abs(cells[:, None] - streamed["in_world"][None, ::500]).max(-1).min(0)
    assert np.median(distance) < 0.02
    np.testing.assert_array_equal(ours["item"]["occupancy"].numpy(), streamed["occupied"])


def replaced(table: pa.Table, **values: str) -> pa.Table:
    """A table with one value in all rows of some columns."""
    for name, value in values.items():
        at = table.column_names.index(name)
        table = table.set_column(at, name, pa.array([value] * table.num_rows))
    return table


def test_card_filters_the_training_scenes(mine):
    """Only if there are both: the index of the copy gets another scene, for training."""
    advice = "leaves out the validation scenes"
    assert advice not in (mine / "README.md").read_text()
    (path,) = (mine / "index").iterdir()
    own = pq.read_table(path)
    own = replaced(own, split="validation")
    pq.write_table(own, path)
    assert advice not in write_card(mine).read_text()
    other = replaced(own, split="train", scene="other/room", episode="other/room/walk")
    pq.write_table(other.slice(0, 1), path.with_stem(bucket("other/room")))
    text = write_card(mine).read_text()
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec("".join(examples[:2]).replace('"DATASET', f'"{mine}'), names)
    assert len(names["frames"]) == 0


def test_card_states_where_images_are_and_the_unit_of_depth(dataset, mine):
    text = (dataset / "README.md").read_text()
    place = "videos/chunk-000/observation.images.depth"
    assert f"its depth `{place}/N.png`: 16 bits, 10,000 units per metre" in text
    assert (trajectories(dataset)[0] / place / "0.png").is_file()
    assert "`--parquet-images` has more columns in `occupancy`: `image` (JPEG), `depth`" in text
    assert "InternRobotics/InternData-N1) and recordings in its layouts" in text
    assert "  version = {0.2.0},\n" in text
    change_record(mine, {"source": {"builder": "missing"}})
    assert "from the source `internnav`, `missing`" in write_card(mine).read_text()


def test_frames_name_their_episode_and_scene(dataset):
    from datasets import Array2D, load_dataset

    frames = load_dataset(str(dataset), split="train")
    info = json.loads((trajectories(dataset)[0] / "meta/info.json").read_text())
    assert set(frames.column_names) == set(info["features"])
    assert frames.features["observation.camera_extrinsic_occ"] == Array2D((4, 4), "float32")
    expected = [
        (path.relative_to(dataset).as_posix(), path.parent.relative_to(dataset).as_posix(), t)
        for path in trajectories(dataset)
        for t in range(pq.read_metadata(path / TABLE).num_rows)
    ]
    columns = (frames[name] for name in ("episode", "scene", "frame_index"))
    assert list(zip(*columns, strict=True)) == expected
    assert {
        row["episode"] for row in load_dataset(str(dataset), split="train", streaming=True)
    } == {episode for episode, _, _ in expected}


def test_columns_that_trajectories_do_not_share_stay_in_their_own_files(sample_tree, tmp_path):
    from datasets import load_dataset

    source = Path(shutil.copytree(sample_tree, tmp_path / "source"))
    for number, path in enumerate(sorted(source.rglob("*.parquet"))):
        table = pq.read_table(path)
        length, kind = table.num_rows, (pa.float32(), pa.float64())[number]
        table = table.append_column("speed", pa.array(np.arange(length), kind))
        if number:
            table = table.append_column("said", pa.array(["hm"] * length))
        pq.write_table(table, path)
    out = tmp_path / "out"
    build(source, out)
    assert validate(out).findings == ()
    frames = load_dataset(str(out), split="train")
    assert {"said", "speed"} & set(frames.column_names) == set()
    assert {"episode", "action", "observation.camera_extrinsic_occ"} <= set(frames.column_names)
    assert frames.num_rows == sum(pq.read_metadata(p / TABLE).num_rows for p in trajectories(out))
    assert "only in their own files: `said`, `speed`" in (out / "README.md").read_text()


def test_card_states_that_weights_forbid_commercial_use(mine):
    weights = {"network": "pi3x", "sha256": "0" * 64, "license": "cc-by-nc-4.0", "repo_id": None}
    change_record(mine, {"weights": weights, "engine": "pi3x"}, 1)
    write_card(mine)
    assert front_matter(mine)["license"] == "cc-by-nc-4.0"
    assert "cc-by-nc-4.0, which forbids commercial use" in (mine / "README.md").read_text()
    assert "`pi3x`, `rgbd`" in (mine / "README.md").read_text()
    change_record(mine, {"weights": weights | {"license": "mine"}}, 1)
    write_card(mine)
    assert front_matter(mine)["license"] == "other"
    assert "under the licence mine. The same applies" in (mine / "README.md").read_text()


def test_card_picture_shows_the_first_trajectory(dataset, tmp_path):
    from occgen_hub.visual.inspection import picture

    picture(dataset, tmp_path / "look.png")
    with Image.open(dataset / "preview.png") as ours, Image.open(tmp_path / "look.png") as theirs:
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    assert "](preview.png)" in (dataset / "README.md").read_text()


# Rewriting the card


def test_equal_trajectories_give_an_equal_card(sample_tree, dataset, tmp_path):
    moved = Path(shutil.copytree(dataset, tmp_path / "moved"))
    for name in ("README.md", "preview.png"):
        (moved / name).unlink()
    assert write_card(moved) == moved / "README.md"
    for name in ("README.md", "preview.png"):
        assert sha256(moved / name) == sha256(dataset / name)


def test_card_is_rewritten_only_after_a_change(mine):
    files = [mine / "README.md", mine / "preview.png"]
    before = [path.stat().st_ino for path in files]
    write_card(mine)
    assert [path.stat().st_ino for path in files] == before
    change_record(mine, {"version": "9.9"})
    write_card(mine)
    assert [path.stat().st_ino for path in files] != before
    assert "9.9" in files[0].read_text()


def test_user_written_card_and_picture_are_kept(sample_tree, tmp_path):
    out = tmp_path / "out"
    assert build(sample_tree, out) == []
    Image.new("RGB", (4, 4)).save(out / "preview.png")
    picture = (out / "preview.png").read_bytes()
    assert build(sample_tree, out) == []
    assert (out / "preview.png").read_bytes() == picture
    text = (out / "README.md").read_text().replace(MARK + "\n", "").replace("# 4D", "# My 4D")
    (out / "README.md").write_text(text)
    assert not is_own(out / "README.md")
    (remark,) = build(sample_tree, out)
    assert f"{out / 'README.md'} was not written by occgen-hub and is left unchanged" in remark
    assert (out / "README.md").read_text() == text
    assert validate(out).findings == ()


def test_pipe_in_the_place_of_the_picture_is_replaced(mine):
    (mine / "preview.png").unlink()
    os.mkfifo(mine / "preview.png")
    change_record(mine, {"version": "9.9"})
    write_card(mine)
    with Image.open(mine / "preview.png") as picture:
        assert picture.size == (1280, 720)


def test_unreadable_scene_gives_a_card_without_a_picture(mine):
    (trajectories(mine)[0] / "data/chunk-000/all_occ.npz").write_bytes(b"")
    change_record(mine, {"version": "9.9"})
    write_card(mine)
    assert not (mine / "preview.png").exists()
    assert "preview.png" not in (mine / "README.md").read_text()
    assert front_matter(mine)["configs"]


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("meta/info.json", {"features": {"action": 3}}),
        ("meta/info.json", {"total_frames": None}),
        ("meta/occgen.json", {"grid": {"shape": [1]}}),
        ("meta/occgen.json", {"source": []}),
    ],
)
def test_invalid_meta_files_are_named(mine, file, change):
    path = trajectories(mine)[1] / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    before = (mine / "README.md").read_bytes()
    with pytest.raises(DatasetError, match=f"{file}: .*; remove this trajectory's folder"):
        finalize(mine)
    assert (mine / "README.md").read_bytes() == before


def test_card_requires_trajectories(dataset, tmp_path):
    for folder in (tmp_path, trajectories(dataset)[0]):
        with pytest.raises(UsageError, match="has no index with trajectories"):
            write_card(folder)
        assert not (folder / "README.md").exists()
