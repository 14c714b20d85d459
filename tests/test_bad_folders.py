"""Folders that cannot be listed are skipped with a warning, and the others are built."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from occgen_hub.builder import load_builder
from occgen_hub.builders.internnav import InternNavBuilder
from occgen_hub.builders.video import VideoBuilder
from occgen_hub.cli import cli
from occgen_hub.errors import MachineError, SourceError
from occgen_hub.sample import make_sample

DEPTH = "videos/chunk-000/observation.images.depth"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A source of two trajectories. Tests must not change it."""
    out = tmp_path_factory.mktemp("folders") / "rooms"
    make_sample(out, trajectories=2, frames=2)
    return out


@pytest.fixture
def mine(source, tmp_path):
    """A copy that a test may change."""
    return Path(shutil.copytree(source, tmp_path / "mine"))


@pytest.fixture
def unreadable(monkeypatch):
    """Make listing a folder fail, even if root runs the tests."""
    own = os.scandir

    def make(folder: Path, number: int = errno.EACCES) -> None:
        def scandir(path="."):
            if Path(os.fsdecode(path)) == folder:
                raise OSError(number, os.strerror(number), str(folder))
            return own(path)

        monkeypatch.setattr(os, "scandir", scandir)

    return make


def names(builder) -> list[str]:
    return [ref.id for ref in builder.episodes()]


def test_unreadable_folder_is_skipped_with_a_warning(mine, unreadable, caplog):
    before = names(InternNavBuilder(mine))
    (mine / "lost+found").mkdir()
    unreadable(mine / "lost+found")
    builder = InternNavBuilder(mine)
    assert names(builder) == before
    assert names(builder) == before
    (warning,) = (record for record in caplog.records if record.levelno == logging.WARNING)
    assert warning.getMessage() == (
        f"Warning: {mine / 'lost+found'}: cannot be listed (Permission denied), and is skipped."
    )


def test_circular_and_broken_links_are_skipped(mine, caplog):
    before = names(InternNavBuilder(mine))
    (mine / "loop").symlink_to("loop")
    (mine / "sample_zed/loop").symlink_to(mine / "sample_zed/loop")
    (mine / "nothing").symlink_to("nowhere")
    assert names(InternNavBuilder(mine)) == before
    assert "loop: cannot be listed (Too many levels of symbolic links)" in caplog.text


def test_videos_beside_unreadable_folders_are_found(tmp_path, unreadable, caplog):
    for name in ("a", "lost+found", "b"):
        (tmp_path / "in" / name).mkdir(parents=True)
        Image.new("RGB", (64, 48)).save(tmp_path / "in" / name / "0.jpg")
    (tmp_path / "in/loop").symlink_to("loop")
    unreadable(tmp_path / "in/lost+found")
    assert names(VideoBuilder(tmp_path / "in")) == [
        "custom_videos/a/trajectory_0", "custom_videos/b/trajectory_0",
    ]  # fmt: skip
    assert "lost+found: cannot be listed (Permission denied)" in caplog.text


@pytest.mark.parametrize("kind", [InternNavBuilder, VideoBuilder])
def test_unreadable_root_is_an_error(mine, unreadable, kind):
    unreadable(mine)
    with pytest.raises(SourceError, match=r"cannot be listed \(Permission denied\)"):
        names(kind(mine))


@pytest.mark.parametrize("kind", [InternNavBuilder, VideoBuilder])
@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.ESTALE])
def test_machine_error_ends_the_listing(mine, unreadable, kind, number):
    """If it were skipped, its episodes would be missing without notice."""
    unreadable(mine / "sample_zed", number)
    with pytest.raises(MachineError, match="fix that and run again"):
        names(kind(mine))


def replace_by_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("no folder")


def replace_by_circular_link(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(folder.name)


def replace_by_broken_link(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to("nowhere")


@pytest.mark.parametrize(
    "damage", [replace_by_file, replace_by_circular_link, replace_by_broken_link]
)
@pytest.mark.parametrize("what", ["depth", "rgb"])
def test_invalid_image_folder_fails_its_episode_only(mine, tmp_path, damage, what):
    first, second = load_builder("internnav", mine).episodes()
    damage(first.path / f"videos/chunk-000/observation.images.{what}")
    command = ["build", "--input", mine, "--output", tmp_path / "out", "--set", "voxel_size=0.1"]
    result = CliRunner().invoke(cli, list(map(str, command)), standalone_mode=False)
    assert result.return_value == 1, result.output
    assert "1 built, 0 already there, 1 failed of 2 episodes" in result.output
    assert f"observation.images.{what}: " in result.output
    assert "not foreseen" not in result.output
    assert (tmp_path / "out" / second.id / "meta/occgen.json").is_file()


def test_episode_with_unreadable_meta_folder_is_listed(mine, monkeypatch):
    """Path.is_file raises in such a folder, but not for a missing file."""
    first, second = load_builder("internnav", mine).episodes()
    own = Path.is_file

    def is_file(self):
        if self.parent == first.path / "meta":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return own(self)

    monkeypatch.setattr(Path, "is_file", is_file)
    assert names(InternNavBuilder(mine)) == [first.id, second.id]
