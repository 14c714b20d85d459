"""Links in a dataset: targets outside the dataset do not belong to it and are never read."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from occgen_hub.cli import cli
from occgen_hub.errors import DatasetError
from occgen_hub.exporting import export
from occgen_hub.files import LINK_OUT, files_under, leaves_folder, links_leaving_folder
from occgen_hub.hub import contents
from occgen_hub.loading import Trajectory, trajectories
from occgen_hub.shards import shards
from occgen_hub.validation import validate

SECRET = b"a secret that stays here"


@pytest.fixture
def folder(dataset, tmp_path):
    """A dataset that a test may change."""
    return Path(shutil.copytree(dataset, tmp_path / "out"))


@pytest.fixture
def secret(tmp_path):
    place = tmp_path / "elsewhere" / "secret"
    place.parent.mkdir()
    place.write_bytes(SECRET)
    return place


@pytest.fixture
def opened_files(monkeypatch):
    """The resolved paths of all files that this process opens."""
    seen: list[str] = []
    watching = [True]

    def watch(event, arguments):
        if watching[0] and event == "open" and isinstance(arguments[0], str | bytes):
            seen.append(os.path.realpath(os.fsdecode(arguments[0])))

    sys.addaudithook(watch)
    yield seen
    watching[0] = False


def as_snapshot(folder: Path, cache: Path) -> Path:
    """Copy a dataset in the layout of the Hub cache: blobs, and a snapshot of links to them."""
    repository = cache / "datasets--org--rooms"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / ("c" * 40)
    blobs.mkdir(parents=True)
    for path in files_under(folder):
        place = snapshot / path.relative_to(folder)
        content = path.read_bytes()
        blob = blobs / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(os.path.relpath(blob, place.parent))
    return snapshot


# The rule


def test_links_inside_the_folder_are_allowed(tmp_path):
    home = tmp_path / "home"
    (home / "inner").mkdir(parents=True)
    (home / "file").write_text("content")
    (home / "inner/relative").symlink_to("../file")
    (home / "inner/absolute").symlink_to(home / "file")
    for name in ("file", "inner", "inner/relative", "inner/absolute", "inner/missing"):
        assert not leaves_folder(home / name, home)
    assert [path.name for path in files_under(home)] == ["file", "absolute", "relative"]
    assert not list(links_leaving_folder(home))


@pytest.mark.parametrize("target", ["../secret", "ABSOLUTE", "up/secret", "chain", "/nowhere"])
def test_links_out_of_the_folder_are_found(tmp_path, target):
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "secret").write_text("content")
    (home / "up").symlink_to("..")
    (home / "chain").symlink_to("up/secret")
    (home / "link").symlink_to(target.replace("ABSOLUTE", str(tmp_path / "secret")))
    assert leaves_folder(home / "link", home)
    assert leaves_folder(home / "up/secret", home)
    assert {path.name for path in links_leaving_folder(home)} == {"up", "chain", "link"}
    assert not list(files_under(home))


def test_folder_may_itself_be_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real/file").write_text("content")
    (tmp_path / "real/link").symlink_to("file")
    (tmp_path / "named").symlink_to("real")
    assert not leaves_folder(tmp_path / "named/file", tmp_path / "named")
    assert not leaves_folder(tmp_path / "named/link", tmp_path / "named")


def test_circular_links_are_ignored(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert not list(files_under(tmp_path))
    assert not leaves_folder(tmp_path / "a", tmp_path)


def test_only_links_to_blobs_of_the_same_repository_are_followed(tmp_path):
    for name in ("datasets--org--rooms", "datasets--org--other"):
        (tmp_path / name / "blobs").mkdir(parents=True)
        (tmp_path / name / "blobs/0123").write_text("content")
    home = tmp_path / "datasets--org--rooms/snapshots/cafe"
    home.mkdir(parents=True)
    (home / "good").symlink_to("../../blobs/0123")
    (home / "other").symlink_to("../../../datasets--org--other/blobs/0123")
    (home / "refs").symlink_to("../../../secret")
    assert [path.name for path in files_under(home)] == ["good"]
    # A folder with other names than those of the Hub cache is not treated as one.
    (tmp_path / "mine/blobs").mkdir(parents=True)
    (tmp_path / "mine/blobs/0123").write_text("content")
    (tmp_path / "mine/snapshots/cafe").mkdir(parents=True)
    (tmp_path / "mine/snapshots/cafe/bad").symlink_to("../../blobs/0123")
    assert not list(files_under(tmp_path / "mine/snapshots/cafe"))


# Datasets


def places_for_links(folder: Path) -> dict[str, Path]:
    """Paths in a dataset that tests replace by a link, by name."""
    path = trajectories(folder)[0]
    trajectory = Trajectory.open(path)
    return {
        "beside": folder / "LICENSE",
        "card": folder / "README.md",
        "picture": folder / "preview.png",
        "extra": path / "data/notes.txt",
        "failures": folder / "failures.jsonl",
        "info": trajectory.file("info"),
        "record": trajectory.file("record"),
        "cloud": trajectory.file("scene_cloud"),
        "visible": trajectory.file("visible"),
        "image": trajectory.file("rgb", 0),
        "video": trajectory.file("video"),
        "shard": shards(folder)[0],
    }


PLACES = ("beside", "card", "picture", "extra", "failures", "info", "record", "cloud", "visible",
         "image", "video", "shard")  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_link_out_of_a_dataset_is_reported_and_never_read_or_pushed(
    folder, secret, opened_files, tmp_path, name
):
    place = places_for_links(folder)[name]
    place.unlink(missing_ok=True)
    place.symlink_to(secret)
    report = validate(folder)
    assert [f.problem for f in report.findings if f.file == str(place)] == [LINK_OUT]
    assert place.relative_to(folder).as_posix() not in contents(folder)
    with pytest.raises(DatasetError, match="leads out of the dataset"):
        export(folder, tmp_path / "export")
    assert not (tmp_path / "export").exists()

    runner = CliRunner()
    pushed = runner.invoke(cli, ["push", str(folder), "--repo-id", "org/rooms", "--dry-run"])
    assert pushed.exit_code == 1
    assert "leads out of the dataset" in str(pushed.exception)
    runner.invoke(cli, ["inspect", str(folder), "--preview", str(tmp_path / "look.png")])
    runner.invoke(cli, ["report", str(folder), "--output", str(tmp_path / "page.html")])
    assert str(secret) not in opened_files
    assert secret.read_bytes() == SECRET


@pytest.mark.parametrize("inside", ["meta", "videos", "occupancy"])
def test_validate_reports_a_folder_that_is_a_link_out(folder, tmp_path, opened_files, inside):
    """Even though the link leads to the same content."""
    home = folder if inside == "occupancy" else trajectories(folder)[0]
    shutil.move(home / inside, tmp_path / "moved")
    (home / inside).symlink_to(tmp_path / "moved")
    opened_files.clear()
    report = validate(folder)
    assert [f.problem for f in report.findings if f.file == str(home / inside)] == [LINK_OUT]
    assert not [path for path in opened_files if path.startswith(str(tmp_path / "moved"))]


def test_validate_reports_a_link_out_of_an_export(dataset, secret, opened_files, tmp_path):
    export(dataset, tmp_path / "export")
    (tmp_path / "export/meta/info.json").unlink()
    (tmp_path / "export/meta/info.json").symlink_to(secret)
    opened_files.clear()
    report = validate(tmp_path / "export")
    assert [finding.problem for finding in report.findings] == [LINK_OUT]
    assert "meta/info.json" not in contents(tmp_path / "export")
    assert str(secret) not in opened_files


def test_a_link_to_another_trajectory_is_not_followed(folder, opened_files):
    one, other = trajectories(folder)
    place = Trajectory.open(one).file("scene_cloud")
    place.unlink()
    place.symlink_to(Trajectory.open(other).file("scene_cloud"))
    assert not validate(folder).valid
    with pytest.raises(DatasetError, match="leads out of the trajectory"):
        Trajectory.open(one).cloud()


def test_snapshot_of_the_hub_cache_is_valid(dataset, tmp_path):
    snapshot = as_snapshot(dataset, tmp_path / "cache")
    report = validate(snapshot)
    assert not report.findings
    assert report.trajectories == 2
    assert contents(snapshot) == contents(dataset)


def test_a_snapshot_with_a_link_elsewhere_is_not_valid(dataset, secret, tmp_path):
    snapshot = as_snapshot(dataset, tmp_path / "cache")
    (snapshot / "LICENSE").symlink_to(secret)
    assert [finding.problem for finding in validate(snapshot).findings] == [LINK_OUT]


def test_an_export_of_a_snapshot_equals_that_of_the_dataset(dataset, tmp_path):
    export(dataset, tmp_path / "one")
    export(as_snapshot(dataset, tmp_path / "cache"), tmp_path / "two")
    one, two = tmp_path / "one", tmp_path / "two"
    assert contents(one) == contents(two)
    assert not [path for path in two.rglob("*") if path.is_symlink()]
