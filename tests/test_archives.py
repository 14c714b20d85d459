"""Archives and datasets on the Hub as sources: what is built from them, and what is refused."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import shutil
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner
from commands import occgen_hub, tree
from hub_server import BAD, LOCKED, READER, Fault, Hub, Repository

import occgen_hub as library
from occgen_hub import cli
from occgen_hub.archives import unpack
from occgen_hub.config import Config
from occgen_hub.errors import OccGenError, SourceError
from occgen_hub.hub_source import HubSource
from occgen_hub.index import read_entries
from occgen_hub.scenes import SceneRef, estimate, read_scene
from occgen_hub.scratch import ScratchPlace, open_scratch

COARSE = Config(voxel_size=0.25)
"""For builds of which only the episode names are checked."""


def run(*arguments):
    """Run the command line in this process."""
    return CliRunner().invoke(cli.cli, [str(argument) for argument in arguments])


def unlimited(_):
    """Accept any size."""


def pack(folder, path):
    """Pack a folder, under its own name, into an archive. The path's suffix sets the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(folder.rglob("*")):
                archive.write(file, file.relative_to(folder.parent))
        return
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as archive:
        archive.add(folder, folder.name)


@pytest.fixture(scope="module")
def packed(sample_tree, tmp_path_factory):
    """The scene of the sample in three kinds of archive, and one that is truncated."""
    out = tmp_path_factory.mktemp("packed") / "tree"
    (scene,) = [path for path in (sample_tree / "sample_zed").iterdir() if path.is_dir()]
    for name in ("g1/house_000.tar.gz", "g2/house_000.zip", "g3/house_000.tar"):
        pack(scene, out / name)
    whole = (out / "g1/house_000.tar.gz").read_bytes()
    (out / "g1/cut.tgz").write_bytes(whole[:2000])
    return out


def group_files(out, group):
    """The files of a group, except records and tables, which contain its name."""
    found = tree(out / group)
    return {
        name: value
        for name, value in found.items()
        if not name.endswith(("occgen.json", ".parquet"))
    }


@pytest.fixture(scope="module")
def built(packed, tmp_path_factory):
    """The dataset built from them by two workers with 40 MB of scratch, and its process."""
    place = tmp_path_factory.mktemp("built")
    ran = occgen_hub(
        "build", "--input", packed, "--output", place / "out", "--workers", "2",
        "--scratch", place / "scratch", "--scratch-limit", "40MB",
    )  # fmt: skip
    return place / "out", ran


def test_archives_are_built_like_the_tree_they_hold(built, dataset):
    out, ran = built
    assert ran.returncode == 1, ran.stderr
    assert "6 built, 0 already there, 1 failed of 7 episodes" in ran.stdout
    plain = group_files(dataset, "sample_zed")
    assert plain
    for group in ("g1", "g2", "g3"):
        assert group_files(out, group) == plain
    assert not (out.parent / "scratch").exists()


def test_damaged_archive_fails_with_a_reason(built, packed):
    out, _ = built
    (row,) = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    assert row["episode"] == "g1/cut"
    assert row["reason"].startswith(f"{packed / 'g1/cut.tgz'}: is truncated")


def test_only_replaced_archives_are_unpacked_again(built, packed, tmp_path):
    copy, out = tmp_path / "tree", tmp_path / "out"
    shutil.copytree(packed / "g1", copy / "g1", copy_function=shutil.copy2)
    (copy / "g1/cut.tgz").unlink()
    shutil.copytree(built[0], out, copy_function=shutil.copy2)
    archive = copy / "g1/house_000.tar.gz"
    os.utime(archive, (1, 1))  # Only the time changes, not the content.

    unreadable = tmp_path / "scratch"
    unreadable.write_text("No scratch can be made here.")
    summary = library.build("internnav", copy, out, scratch=unreadable / "below")
    assert (summary.built, summary.present, summary.failures) == (0, 2, [])

    other = tmp_path / "other"
    make_other_sample(other)
    pack(other / "sample_zed/house_000", archive)
    ran = run("build", "--input", copy, "--output", out, "--dry-run")
    assert " MB  to build: was replaced since it was built" in ran.stdout
    assert "(measured on 3 built scenes)" in ran.stdout
    assert "1 of 1 scenes would be built" in ran.stdout
    summary = library.build("internnav", copy, out)
    assert (summary.built, summary.failures) == (1, [])


def make_other_sample(out):
    from occgen_hub.sample import make_sample

    make_sample(out, trajectories=1, frames=2, seed=8)


def test_shards_of_archives_build_every_scene(packed, tmp_path):
    copy = tmp_path / "tree"
    shutil.copytree(packed / "g1", copy / "g1")
    for index in (0, 1):
        library.build("internnav", copy, tmp_path / "out", shard=(index, 2), config=COARSE)
    summary = library.finalize(tmp_path / "out")
    assert (summary.built, len(summary.failures)) == (2, 1)


def test_scene_larger_than_scratch_fails(packed, tmp_path):
    summary = library.build(
        "internnav", packed, tmp_path / "out", scenes=["g3/*"], scratch_limit=200_000
    )
    (failure,) = summary.failures
    assert "needs more than 0 MB of scratch; raise --scratch-limit" in failure.reason
    assert not (tmp_path / "out/.scratch").exists()


def test_failures_name_the_file_in_the_archive(packed, tmp_path):
    with tarfile.open(packed / "g3/house_000.tar") as archive:
        archive.extractall(tmp_path / "scene", filter="data")
    image = next((tmp_path / "scene").rglob("*.jpg"))
    image.write_bytes(b"")
    pack(tmp_path / "scene/house_000", tmp_path / "tree/g/house_000.tgz")
    summary = library.build("internnav", tmp_path / "tree", tmp_path / "out", config=COARSE)
    (failure,) = summary.failures
    assert summary.built == 1
    inside = image.relative_to(tmp_path / "scene/house_000")
    assert failure.reason.startswith(f"{tmp_path / 'tree/g/house_000.tgz'}:{inside}: ")


# Contents of archives


def tar_of(path, name="x", **values):
    with tarfile.open(path, "w") as archive:
        entry = tarfile.TarInfo(name)
        for key, value in values.items():
            setattr(entry, key, value)
        archive.addfile(entry, io.BytesIO(b"a" * entry.size))


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"name": "../x"}, "leads out"),
        ({"name": "/tmp/x"}, "leads out"),
        ({"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "is a symbolic link to /etc/passwd"),
        ({"type": tarfile.LNKTYPE, "linkname": "../../etc/passwd"}, "leads out"),
        ({"type": tarfile.LNKTYPE, "linkname": "later"}, "does not come before it"),
        ({"type": tarfile.CHRTYPE}, "is a device"),
        ({"type": tarfile.FIFOTYPE}, "is a device, a pipe"),
        ({"name": "a/" * 40 + "x"}, "has an invalid name"),
    ],
)
def test_unsafe_archive_entries_are_refused(entry, problem, tmp_path):
    tar_of(tmp_path / "x.tar", **entry)
    (tmp_path / "out").mkdir()
    with pytest.raises(SourceError, match=problem):
        unpack(tmp_path / "x.tar", tmp_path / "out", unlimited)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "x.tar"]


def test_links_in_a_zip_are_refused(tmp_path):
    entry = zipfile.ZipInfo("x")
    entry.create_system, entry.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(entry, "/etc/passwd")
    (tmp_path / "out").mkdir()
    with pytest.raises(SourceError, match="is a symbolic link"):
        unpack(tmp_path / "x.zip", tmp_path / "out", unlimited)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html>", "neither a gzip, a tar nor a zip"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"\x1f\x8b\x08\x00broken", "is damaged|is truncated"),
        (b"PK\x03\x04broken", "is damaged"),
    ],
)
def test_unreadable_archives_are_reported(content, problem, tmp_path):
    (tmp_path / "x.tar.gz").write_bytes(content)
    (tmp_path / "out").mkdir()
    with pytest.raises(SourceError, match=problem):
        unpack(tmp_path / "x.tar.gz", tmp_path / "out", unlimited)


def test_archive_bomb_is_stopped_at_the_scratch_limit(tmp_path):
    with (
        gzip.open(tmp_path / "x.tar.gz", "wb") as packed,
        tarfile.open(fileobj=packed, mode="w|") as archive,
    ):
        entry = tarfile.TarInfo("zeros")
        entry.size = 50_000_000
        archive.addfile(entry, io.BytesIO(bytes(entry.size)))
    with open_scratch(ScratchPlace(tmp_path / "scratch", 5_000_000)) as scratch:
        room = scratch.room()
        with pytest.raises(SourceError, match="raise --scratch-limit"):
            unpack(tmp_path / "x.tar.gz", room.folder, room.reserve)
        held = sum(p.stat().st_size for p in room.folder.rglob("*") if p.is_file())
        assert held <= 5_000_000
    assert not (tmp_path / "scratch").exists()


def test_archive_header_that_claims_gigabytes_is_refused(tmp_path):
    entry = tarfile.TarInfo("x")
    entry.type, entry.size = tarfile.XHDTYPE, 7 << 30
    with gzip.open(tmp_path / "x.tgz", "wb") as packed:
        packed.write(entry.tobuf(tarfile.USTAR_FORMAT) + bytes(1 << 20))
    (tmp_path / "out").mkdir()
    with pytest.raises(SourceError, match="a header of 7516192768 bytes"):
        unpack(tmp_path / "x.tgz", tmp_path / "out", unlimited)


def test_archive_with_gigabytes_after_its_end_is_refused_quickly(tmp_path):
    tar_of(tmp_path / "x.tar", size=10)
    with (tmp_path / "x.tar").open("r+b") as file:
        file.truncate(1 << 40)
    (tmp_path / "out").mkdir()
    began = time.monotonic()
    with pytest.raises(SourceError, match="goes on for more than 64 MB after its end"):
        unpack(tmp_path / "x.tar", tmp_path / "out", unlimited)
    assert time.monotonic() - began < 20


# The Hub

ROOMS = "hf://datasets/org/rooms"


@pytest.fixture(scope="module")
def served(packed, sample_tree):
    """A Hub with an archive and a folder of the same scene."""
    served = Hub()
    repository = Repository(private=False)
    files = {"README.md": b"---\nlicense: cc-by-nc-sa-4.0\n---\nRooms.\n"}
    for path in packed.rglob("*.tar.gz"):
        files[f"vln_n1/traj_data/{path.relative_to(packed).as_posix()}"] = path.read_bytes()
    scene = sample_tree / "sample_zed"
    for path in scene.rglob("*"):
        if path.is_file():
            files[f"vln_n1/traj_data/loose/{path.relative_to(scene).as_posix()}"] = (
                path.read_bytes()
            )
    repository.commit("main", files, "rooms")
    served.repositories["org/rooms"] = repository
    yield served
    served.close()


@pytest.fixture
def hub(served, monkeypatch):
    """That Hub, used by this process, with a client that retries without delay."""
    served.asked.clear()
    served.faults.clear()
    files = f"{served.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", served.url)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    for module in ("file_download", "utils._http"):
        monkeypatch.setattr(f"huggingface_hub.{module}.time.sleep", lambda _: None)
    monkeypatch.setenv("HF_TOKEN", READER)
    return served


def test_scenes_on_the_hub_are_fetched_built_and_removed(hub, dataset, tmp_path, monkeypatch):
    home = tmp_path / "home"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home))
    summary = library.build("internnav", ROOMS, tmp_path / "out")
    assert (summary.built, summary.present, summary.failures) == (4, 0, []), summary.failures
    plain = group_files(dataset, "sample_zed")
    assert group_files(tmp_path / "out", "g1") == group_files(tmp_path / "out", "loose") == plain
    assert not [path for path in home.rglob("*") if path.suffix in (".gz", ".jpg")]
    assert not (tmp_path / "out/.scratch").exists()
    assert {row.source_licence for row in read_entries(tmp_path / "out").values()} == {
        "cc-by-nc-sa-4.0"
    }
    assert "\nlicense: cc-by-nc-sa-4.0\n" in (tmp_path / "out/README.md").read_text()

    hub.asked.clear()
    summary = library.build("internnav", ROOMS, tmp_path / "out")
    assert (summary.built, summary.present) == (0, 4)
    assert not [line for line in hub.asked if "/resolve/" in line]


def test_gated_dataset_error_is_one_sentence(hub, tmp_path):
    ran = occgen_hub(
        "build", "--input", ROOMS, "--output", tmp_path / "out", "--dry-run",
        HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="0", HF_TOKEN=LOCKED,
    )  # fmt: skip
    assert ran.returncode == 1
    assert "is gated, and this token has no access" in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1, ran.stderr


@pytest.mark.parametrize(
    ("constants", "token", "address", "message"),
    [
        ({}, LOCKED, ROOMS, "is gated, and this token has no access"),
        ({}, BAD, ROOMS, "the Hub rejected the token"),
        (
            {"HF_HUB_OFFLINE": True}, READER, ROOMS,
            "HF_HUB_OFFLINE is set; unset it to read from the Hub.",
        ),
        (
            {"ENDPOINT": "http://127.0.0.1:9"}, READER, ROOMS,
            "the connection to http://127.0.0.1:9 failed",
        ),
        ({}, READER, "hf://datasets/org/none", "was not found, or this token has no access"),
        ({}, READER, "hf://datasets/org/rooms@none", "has no revision none"),
        ({}, READER, "hf://datasets/org", "is not a dataset on the Hub; give --input hf://"),
    ],
)  # fmt: skip
def test_hub_errors_give_one_sentence(
    hub, tmp_path, monkeypatch, constants, token, address, message
):
    monkeypatch.setenv("HF_TOKEN", token)
    for name, value in constants.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    ran = run("build", "--input", address, "--output", tmp_path / "out", "--dry-run")
    assert isinstance(ran.exception, OccGenError), ran.output
    assert message in str(ran.exception)
    assert "\n" not in str(ran.exception)


def test_dry_run_lists_scenes_with_sizes_and_an_estimate(hub, packed, tmp_path):
    ran = run("build", "--input", ROOMS, "--output", tmp_path / "out", "--dry-run")
    size = (packed / "g1/house_000.tar.gz").stat().st_size
    assert f"g1/house_000  {size / 1e6:.1f} MB  to build: is not built" in ran.stdout
    assert re.search(
        r"2 scenes, [\d.]+ MB to be downloaded: about \S+ s of one process, [\d.]+ MB in the "
        r"dataset, and [\d.]+ MB of scratch for the largest \(assumed, since no scene",
        ran.stdout,
    )
    assert "2 of 2 scenes would be built" in ran.stdout
    assert not [line for line in hub.asked if "/resolve/" in line]
    assert not (tmp_path / "out").exists()


def test_estimate_scales_with_built_scenes(built):
    refs = [SceneRef(f"g/{n}", Path(f"g/{n}.tar"), 5_000_000, "") for n in (1, 2)]
    found = estimate(built[0], refs)
    records = [read_scene(built[0], f"g{n}/house_000") for n in (1, 2, 3)]
    read = sum(record.bytes for record in records)
    assert found.measured == 3
    assert found.seconds == pytest.approx(1e7 * sum(r.seconds for r in records) / read)
    assert found.unpacked == int(5e6 * sum(r.unpacked for r in records) / read)
    written = sum(p.stat().st_size for p in built[0].glob("g?/**/*") if p.is_file())
    assert found.output == int(1e7 * written / read)


def test_truncated_download_fails_its_scene(hub, tmp_path):
    hub.faults.append(Fault("GET .*/resolve/.*tar.gz", times=100))
    summary = library.build("internnav", ROOMS, tmp_path / "out", config=COARSE)
    (failure,) = summary.failures
    assert (summary.built, failure.id) == (2, "g1/house_000")
    assert "check the connection and run the same command again" in failure.reason
    (row,) = map(json.loads, (tmp_path / "out/failures.jsonl").read_text().splitlines())
    assert row["episode"] == "g1/house_000"
    hub.faults.clear()
    again = library.build("internnav", ROOMS, tmp_path / "out", scenes=["g1/*"], config=COARSE)
    assert (again.built, again.failures) == (2, [])


def test_hub_addresses_are_parsed():
    commit = HubSource.parse("hf://datasets/org/rooms@refs/pr/3/a/b/")
    assert commit == HubSource("org/rooms", "refs/pr/3", "a/b")
    assert HubSource.parse("hf://datasets/org/rooms") == HubSource("org/rooms", "main", "")
    assert HubSource.parse("rooms") is None
