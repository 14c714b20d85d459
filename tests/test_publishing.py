"""Scenes that are pushed while they are built: the files on the Hub and the local files."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
from hub_server import WRITER, Fault, Hub

import occgen_hub as library
from occgen_hub.config import Config
from occgen_hub.errors import UsageError
from occgen_hub.files import files_under
from occgen_hub.index import bucket, read_entries
from occgen_hub.loading import trajectories
from occgen_hub.publishing import HubPublisher, _HubIndex
from occgen_hub.sample import make_sample
from occgen_hub.training import OccupancyDataset
from occgen_hub.validation import validate

COARSE = Config(voxel_size=0.25)
REPO = "org/rooms"


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Three scenes with two trajectories each; one in the third scene is broken.

    Tests must not change it.
    """
    root = tmp_path_factory.mktemp("publishing") / "tree"
    make_sample(root, trajectories=2, frames=2, seed=7)
    scene = root / "sample_zed/house_000"
    for name in ("house_001", "house_002"):
        shutil.copytree(scene, scene.with_name(name))
    table = next((root / "sample_zed/house_002/trajectory_1").rglob("*.parquet"))
    table.write_bytes(b"none")
    return root


@pytest.fixture(scope="module")
def plain_build(tree, tmp_path_factory):
    """The dataset from a build of `tree` without a push."""
    out = tmp_path_factory.mktemp("plain") / "out"
    summary = library.build("internnav", tree, out, config=COARSE)
    assert (summary.built, len(summary.failures)) == (5, 1)
    return out


@pytest.fixture
def hub(monkeypatch):
    """A local Hub for this process. The client retries without waiting."""
    served = Hub()
    files = f"{served.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", served.url)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    monkeypatch.setattr("occgen_hub.publishing.PAUSES", (0.01, 0.01))
    monkeypatch.setenv("HF_TOKEN", WRITER)
    yield served
    served.close()


def build(tree, out, **options):
    options = {"config": COARSE, "push_to": REPO, "push_every": 0} | options
    return library.build("internnav", tree, out, **options)


def download_all(hub, folder):
    """Copy all files of the Hub repository into a folder."""
    for path, content in hub.repositories[REPO].files().items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def dataset_files(root, *without):
    """The files of a dataset, except for `without` and those of the Hub and of the run."""
    without = {".gitattributes", "report.json", "failures.jsonl", *without}
    return {
        name: path.read_bytes()
        for path in files_under(root)
        if not (name := path.relative_to(root).as_posix()).startswith((".logs/", "index/"))
        and name not in without
    }


def test_pushed_dataset_equals_a_plain_build_and_keeps_no_local_copy(
    hub, tree, plain_build, tmp_path
):
    summary = build(tree, tmp_path / "out", keep="none")
    assert (summary.built, len(summary.failures)) == (5, 1)
    there = download_all(hub, tmp_path / "there")
    # The picture may show another trajectory: one of the first batch.
    assert dataset_files(there, "preview.png") == dataset_files(plain_build, "preview.png")
    assert (there / "preview.png").exists()
    assert validate(there).findings == ()
    rows, own = read_entries(there), read_entries(plain_build)
    states = {row.scene: row.scene_state for row in rows.values()}
    for name, row in rows.items():
        assert row.shard_sha256 == own[name].shard_sha256
    assert [states[f"sample_zed/house_00{n}"] is None for n in range(3)] == [False, False, True]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        ".logs", "failures.jsonl", "report.json",
    }  # fmt: skip
    assert hub.repositories[REPO].tags == {"v2.1": hub.repositories[REPO].find("main")}

    # On another machine, complete scenes are not built again.
    commits = len(hub.repositories[REPO].commits)
    again = build(tree, tmp_path / "other", keep="none")
    assert (again.built, again.present, len(again.failures)) == (1, 4, 1)
    assert len(hub.repositories[REPO].commits) == commits
    assert not trajectories(tmp_path / "other")


def test_kept_scenes_are_a_valid_local_dataset(hub, tree, plain_build, tmp_path):
    build(tree, tmp_path / "out", scenes=["house_000"])
    out = tmp_path / "out"
    assert dataset_files(out).keys() == {
        name for name in dataset_files(plain_build) if "house_00" not in name or "house_000" in name
    }
    assert validate(out).findings == ()
    changed = build(tree, out, scenes=["house_000"], config=Config(voxel_size=0.5))
    assert changed.built == 2
    there = download_all(hub, tmp_path / "there")
    assert validate(there).findings == ()
    assert {row.voxel_size for row in read_entries(there).values()} == {0.5}
    with pytest.raises(UsageError, match="give --layout trajectories, or another --push-to"):
        build(tree, out, layout="packed")


def test_concurrent_pushes_do_not_lose_scenes(hub, tree, tmp_path, monkeypatch):
    """Their scenes share one part of the index, so each commit must build on the last."""
    names = [f"room_{n}" for n in range(4000) if bucket(f"zed/room_{n}") == "07"][:4]
    for name in names:
        shutil.copytree(tree / "sample_zed/house_000", tmp_path / "tree/zed" / name)
    errors, both = [], threading.Barrier(2, timeout=60)
    waiting = [both, both]
    merged = _HubIndex.merged

    def merge_when_both_have_read(*arguments):
        found = merged(*arguments)
        if waiting:
            waiting.pop().wait()
        return found

    monkeypatch.setattr(_HubIndex, "merged", merge_when_both_have_read)

    def machine(number):
        try:
            build(tmp_path / "tree", tmp_path / f"out{number}", shard=(number, 2), keep="none")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=machine, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    there = download_all(hub, tmp_path / "there")
    assert {row.scene for row in read_entries(there).values()} == {f"zed/{n}" for n in names}
    assert len(list((there / "index").iterdir())) == 1
    assert validate(there).findings == ()


def test_packed_layout_has_few_files_with_all_training_data(hub, tree, plain_build, tmp_path):
    from datasets import load_dataset

    build(tree, tmp_path / "out", keep="none", layout="packed", scenes=["house_00[01]"])
    there = download_all(hub, tmp_path / "there")
    (there / ".gitattributes").unlink()
    names = {path.relative_to(there).parts[0] for path in files_under(there)}
    assert names == {"README.md", "preview.png", "index", "occupancy", "scene_states"}
    report = validate(there)
    assert (report.findings, report.trajectories, report.frames) == ((), 4, 8)
    keys = ("occupancy", "mask", "pose", "image", "depth", "task", "episode")
    packed, own = OccupancyDataset(there, keys=keys), OccupancyDataset(plain_build, keys=keys)
    assert len(packed) == 8
    for n in range(len(packed)):
        for key in keys:
            same = packed[n][key] == own[n][key]
            assert same if isinstance(same, bool) else same.all(), key
    rows = load_dataset(str(there), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == 8
    assert rows[0]["image"].size == (480, 270)
    shard = next((there / "occupancy").rglob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    assert "has another SHA-256" in str(validate(there).findings[0])


def test_push_is_retried_when_the_hub_is_briefly_unavailable(hub, tree, tmp_path):
    hub.faults.append(Fault("POST .*/commit/main", status=503, times=2))
    messages = []
    publisher = HubPublisher(REPO, keep="none", every=0, tell=messages.append)
    from occgen_hub.job import open_job
    from occgen_hub.runtime.build import build_dataset

    job = open_job("internnav", tree, tmp_path / "out", config=COARSE, scenes=["house_000"],
                   whole_scenes=True)  # fmt: skip
    assert not build_dataset(job, publisher=publisher).failures
    assert "Trying again in" in messages[0]
    assert len(read_entries(download_all(hub, tmp_path / "there"))) == 2


def test_push_of_too_many_files_is_refused(hub, tree, tmp_path, monkeypatch):
    monkeypatch.setattr("occgen_hub.publishing.MAX_FILES", 20)
    from occgen_hub.hub import HubError

    with pytest.raises(HubError, match=r"would have .* files, more than the 20 .* --layout packed"):
        build(tree, tmp_path / "out", scenes=["house_000"])
    assert len(trajectories(Path(tmp_path / "out"))) == 2


def test_push_with_a_limit_that_splits_a_scene_is_refused(hub, tree, tmp_path):
    with pytest.raises(UsageError, match="could push an incomplete scene"):
        build(tree, tmp_path / "out", limit=1)
    assert not hub.asked
