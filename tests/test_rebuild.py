"""Rebuilds: they replace only files that a build wrote, and do so when the source changed."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from occgen_hub.builder import DatasetBuilder, load_builder
from occgen_hub.cli import cli
from occgen_hub.config import Config
from occgen_hub.episode_build import Settings, build_episode, reconstruct_episode, write_episode
from occgen_hub.errors import OccGenError, UsageError
from occgen_hub.sample import make_sample
from occgen_hub.up_to_date import source_stamp
from occgen_hub.validation import validate

RGB = "videos/chunk-000/observation.images.rgb"
RECORD = "meta/occgen.json"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A source with one trajectory. Tests must not change it."""
    out = tmp_path_factory.mktemp("rebuild") / "rooms"
    make_sample(out, trajectories=1, frames=2)
    return out


@pytest.fixture
def source_copy(source, tmp_path):
    """A copy of the source that a test may change."""
    return Path(shutil.copytree(source, tmp_path / "mine"))


def build(source: Path, out: Path, **settings):
    """Build the one trajectory of a source and return its result."""
    builder = load_builder("internnav", source)
    (ref,) = builder.episodes()
    return build_episode(builder, ref, out, Settings(config=Config(voxel_size=0.1), **settings))


def output_folder(source: Path, out: Path) -> Path:
    """The output folder of the trajectory of a source."""
    (ref,) = load_builder("internnav", source).episodes()
    return out / ref.id


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# What is replaced


@pytest.mark.parametrize("overwrite", [False, True])
def test_build_does_not_replace_recordings(source_copy, tmp_path, overwrite):
    """As if --output names another tree of recordings by mistake."""
    recordings = Path(shutil.copytree(source_copy, tmp_path / "recordings"))
    before = content(recordings)
    with pytest.raises(OccGenError, match=r"did not build.*choose another --output") as e:
        build(source_copy, recordings, overwrite=overwrite)
    assert str(output_folder(source_copy, recordings)) in str(e.value)
    assert content(recordings) == before


def test_command_refuses_recordings_in_the_output_until_they_are_moved(source_copy, tmp_path):
    recordings = Path(shutil.copytree(source_copy, tmp_path / "recordings"))
    theirs = output_folder(source_copy, recordings)
    command = ["build", "--input", str(source_copy), "--output", str(recordings), "--set",
               "voxel_size=0.1"]  # fmt: skip
    before = content(recordings)
    for option in ("--dry-run", "--overwrite", "--limit=1"):
        failed = CliRunner().invoke(cli, [*command, option], standalone_mode=False)
        assert isinstance(failed.exception, UsageError)
        assert f"{theirs}: is a folder that occgen-hub did not build" in str(failed.exception)
        assert content(recordings) == before

    theirs.rename(tmp_path / "moved")
    done = CliRunner().invoke(cli, command, standalone_mode=False)
    assert done.exit_code == 0, done.output
    assert (theirs / RECORD).is_file()


@pytest.mark.parametrize("kind", ["a file", "a link to a folder", "a link to nothing"])
def test_build_does_not_replace_files_or_links(source, tmp_path, kind):
    out = tmp_path / "out"
    there = output_folder(source, out)
    there.parent.mkdir(parents=True)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/notes").write_text("mine")
    if kind == "a file":
        there.write_text("mine")
    else:
        there.symlink_to(tmp_path / ("theirs" if kind == "a link to a folder" else "nothing"))
    with pytest.raises(OccGenError, match="did not build"):
        build(source, out, overwrite=True)
    assert there.is_symlink() or there.read_text() == "mine"
    assert (tmp_path / "theirs/notes").read_text() == "mine"


def test_build_does_not_replace_a_folder_created_meanwhile(source, tmp_path):
    out = tmp_path / "out"
    builder = load_builder("internnav", source)
    (ref,) = builder.episodes()
    found = reconstruct_episode(builder, ref, out, Settings(config=Config(voxel_size=0.1)))
    (out / ref.id).mkdir(parents=True)
    (out / ref.id / "notes").write_text("mine")
    with pytest.raises(OccGenError, match="did not build"):
        write_episode(found, out)
    assert content(out) == {f"{ref.id}/notes": b"mine"}


def test_an_empty_folder_and_a_damaged_trajectory_are_replaced(source, tmp_path):
    out = tmp_path / "out"
    there = output_folder(source, out)
    there.mkdir(parents=True)
    assert build(source, out).status == "built"
    (there / RECORD).write_text("{}")
    assert build(source, out).status == "built"
    assert build(source, out).status == "present"


# When it is replaced

FUTURE = 4_102_444_800
"""The first second of the year 2100, as from a camera with a wrong clock."""


def set_times(path: Path, seconds: float) -> None:
    os.utime(path, (seconds, seconds))


def change_byte(path: Path) -> None:
    """Change one byte of a JPEG header; the size stays the same."""
    data = bytearray(path.read_bytes())
    data[15] ^= 1
    path.write_bytes(data)


def append_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def change_byte_and_keep_times(path: Path) -> None:
    stat = path.stat()
    change_byte(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def replace_file_and_keep_times(path: Path) -> None:
    """Replace the file by another with the same size and times."""
    stat, new = path.stat(), path.with_name("new")
    shutil.copy(path, new)
    change_byte(new)
    os.utime(new, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    new.replace(path)


@pytest.mark.parametrize(
    "change", [change_byte, append_byte, change_byte_and_keep_times, replace_file_and_keep_times]
)
@pytest.mark.parametrize("which", ["the same file", "another file"])
def test_source_change_is_noticed_despite_a_future_timestamp(source_copy, tmp_path, change, which):
    images = sorted((output_folder(source_copy, source_copy) / RGB).iterdir())
    set_times(images[0], FUTURE)
    out = tmp_path / "out"
    assert build(source_copy, out).status == "built"
    assert build(source_copy, out).status == "present"
    changed = images[0] if which == "the same file" else images[1]
    change(changed)
    if changed == images[0]:
        set_times(changed, FUTURE)
    assert build(source_copy, out).status == "built"
    assert build(source_copy, out).status == "present"


def test_new_builder_version_triggers_a_rebuild(source_copy, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert build(source_copy, out).status == "built"
    kind = type(load_builder("internnav", source_copy))
    monkeypatch.setattr(kind, "version", "99")
    again = build(source_copy, out)
    assert again.status == "built"
    (reason,) = [note.text for note in again.notes if note.code == "built again"]
    assert f"builder_version {DatasetBuilder.version}, now 99" in reason
    record = json.loads((output_folder(source_copy, out) / RECORD).read_text())
    assert record["source"]["builder_version"] == "99"
    assert build(source_copy, out).status == "present"


def test_record_without_a_builder_version_means_the_first_version(
    source_copy, tmp_path, monkeypatch
):
    """Records were written so before builders had a version."""
    out = tmp_path / "out"
    build(source_copy, out)
    mark = output_folder(source_copy, out) / RECORD
    record = json.loads(mark.read_text())
    del record["source"]["builder_version"]
    mark.write_text(json.dumps(record))
    assert build(source_copy, out).status == "present"
    assert validate(out).valid
    monkeypatch.setattr(type(load_builder("internnav", source_copy)), "version", "2")
    assert build(source_copy, out).status == "built"


def test_unchanged_files_with_future_timestamps_are_not_read_again(
    source_copy, tmp_path, monkeypatch
):
    builder = load_builder("internnav", source_copy)
    (ref,) = builder.episodes()
    for path in builder.sources(ref):
        set_times(path, FUTURE)
    out = tmp_path / "out"
    assert build(source_copy, out).status == "built"
    read = []
    own = type(builder).fingerprint
    monkeypatch.setattr(
        type(builder), "fingerprint", lambda self, paths: read.append(1) or own(self, paths)
    )
    assert build(source_copy, out).status == "present"
    assert not read
    set_times(builder.sources(ref)[-1], FUTURE + 1)
    for _ in range(2):
        assert build(source_copy, out).status == "present"
        assert read == [1]


def test_source_stamp_depends_on_the_files_not_on_their_location(tmp_path):
    home = tmp_path / "top/home"
    (home / "inner").mkdir(parents=True)
    paths = [home / "a", home / "inner/b"]
    for path in paths:
        path.write_text("content")
    first = source_stamp(paths)
    assert source_stamp(paths) == first
    (tmp_path / "top").rename(tmp_path / "moved")
    moved = [tmp_path / "moved/home/a", tmp_path / "moved/home/inner/b"]
    assert source_stamp(moved) == first
    assert source_stamp(moved[::-1]) != first
    assert source_stamp(moved[:1]) != first
    assert abs(first / 10**9 - time.time()) < 60


def test_extreme_modification_time_is_accepted(source_copy, tmp_path):
    set_times(sorted((output_folder(source_copy, source_copy) / RGB).iterdir())[0], 9_000_000_000)
    assert build(source_copy, tmp_path / "out").status == "built"
    assert build(source_copy, tmp_path / "out").status == "present"
