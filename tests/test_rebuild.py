"""When a build replaces what is there: only what a build wrote, and whenever its source changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from occgen_hub.builder import Settings, load_builder
from occgen_hub.cli import cli
from occgen_hub.config import Config
from occgen_hub.errors import OccGenError, UsageError
from occgen_hub.sample import make_sample

RGB = "videos/chunk-000/observation.images.rgb"
RECORD = "meta/occgen.json"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A source of one trajectory. Not to be changed by tests."""
    out = tmp_path_factory.mktemp("rebuild") / "rooms"
    make_sample(out, trajectories=1, frames=2)
    return out


@pytest.fixture
def mine(source, tmp_path):
    """A copy that a test may change."""
    return Path(shutil.copytree(source, tmp_path / "mine"))


def build(source: Path, out: Path, **settings):
    """Build the one trajectory of a source; what became of it."""
    builder = load_builder("internnav", source)
    (ref,) = builder.episodes()
    return builder.build(ref, out, Settings(config=Config(voxel_size=0.1), **settings))


def place(source: Path, out: Path) -> Path:
    """Where its trajectory goes."""
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
def test_recordings_in_the_place_of_a_trajectory_are_left_as_they_are(mine, tmp_path, overwrite):
    """As where --output names another tree of recordings by mistake."""
    recordings = Path(shutil.copytree(mine, tmp_path / "recordings"))
    before = content(recordings)
    with pytest.raises(OccGenError, match=r"did not build.*choose another --output") as e:
        build(mine, recordings, overwrite=overwrite)
    assert str(place(mine, recordings)) in str(e.value)
    assert content(recordings) == before


def test_the_command_says_so_and_builds_it_once_they_are_moved_away(mine, tmp_path):
    recordings = Path(shutil.copytree(mine, tmp_path / "recordings"))
    theirs = place(mine, recordings)
    command = ["build", "--input", str(mine), "--output", str(recordings), "--set",
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
def test_whatever_else_is_there_is_left_as_well(source, tmp_path, kind):
    out = tmp_path / "out"
    there = place(source, out)
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


def test_what_comes_while_it_is_built_is_left_as_well(source, tmp_path):
    out = tmp_path / "out"
    builder = load_builder("internnav", source)
    (ref,) = builder.episodes()
    found = builder.find(ref, out, Settings(config=Config(voxel_size=0.1)))
    (out / ref.id).mkdir(parents=True)
    (out / ref.id / "notes").write_text("mine")
    with pytest.raises(OccGenError, match="did not build"):
        builder.write(found, out)
    assert content(out) == {f"{ref.id}/notes": b"mine"}


def test_an_empty_folder_and_a_damaged_trajectory_are_replaced(source, tmp_path):
    out = tmp_path / "out"
    there = place(source, out)
    there.mkdir(parents=True)
    assert build(source, out).status == "built"
    (there / RECORD).write_text("{}")
    assert build(source, out).status == "built"
    assert build(source, out).status == "present"
