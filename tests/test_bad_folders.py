"""A folder that cannot be looked into is passed over, with a warning, and the others are built."""

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
    """A source of two trajectories. Not to be changed by tests."""
    out = tmp_path_factory.mktemp("folders") / "rooms"
    make_sample(out, trajectories=2, frames=2)
    return out


@pytest.fixture
def mine(source, tmp_path):
    """A copy that a test may change."""
    return Path(shutil.copytree(source, tmp_path / "mine"))


@pytest.fixture
def unreadable(monkeypatch):
    """Makes a folder one that cannot be listed, for whoever runs the tests."""
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


def test_a_folder_that_cannot_be_listed_is_passed_over(mine, unreadable, caplog):
    before = names(InternNavBuilder(mine))
    (mine / "lost+found").mkdir()
    unreadable(mine / "lost+found")
    builder = InternNavBuilder(mine)
    assert names(builder) == before
    assert names(builder) == before
    (said,) = (record for record in caplog.records if record.levelno == logging.WARNING)
    assert said.getMessage() == (
        f"Warning: {mine / 'lost+found'}: cannot be listed (Permission denied), and is skipped."
    )


def test_a_link_to_itself_is_passed_over(mine, caplog):
    before = names(InternNavBuilder(mine))
    (mine / "loop").symlink_to("loop")
    (mine / "sample_zed/loop").symlink_to(mine / "sample_zed/loop")
    (mine / "nothing").symlink_to("nowhere")
    assert names(InternNavBuilder(mine)) == before
    assert "loop: cannot be listed (Too many levels of symbolic links)" in caplog.text


def test_videos_beside_such_folders_are_found(tmp_path, unreadable, caplog):
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
def test_the_root_itself_is_not_passed_over(mine, unreadable, kind):
    unreadable(mine)
    with pytest.raises(SourceError, match=r"cannot be listed \(Permission denied\)"):
        names(kind(mine))


@pytest.mark.parametrize("kind", [InternNavBuilder, VideoBuilder])
@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.ESTALE])
def test_a_fault_of_the_machine_ends_the_listing(mine, unreadable, kind, number):
    """Or a folder of episodes would be missing as if it were not there."""
    unreadable(mine / "sample_zed", number)
    with pytest.raises(MachineError, match="fix that and run again"):
        names(kind(mine))


def a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("no folder")


def a_link_to_itself(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(folder.name)


def a_link_to_nothing(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to("nowhere")


@pytest.mark.parametrize("harm", [a_file, a_link_to_itself, a_link_to_nothing])
@pytest.mark.parametrize("what", ["depth", "rgb"])
def test_invalid_image_folder_fails_its_episode_only(mine, tmp_path, harm, what):
    first, second = load_builder("internnav", mine).episodes()
    harm(first.path / f"videos/chunk-000/observation.images.{what}")
    command = ["build", "--input", mine, "--output", tmp_path / "out", "--set", "voxel_size=0.1"]
    result = CliRunner().invoke(cli, list(map(str, command)), standalone_mode=False)
    assert result.return_value == 1, result.output
    assert "1 built, 0 already there, 1 failed of 2 episodes" in result.output
    assert f"observation.images.{what}: " in result.output
    assert "not foreseen" not in result.output
    assert (tmp_path / "out" / second.id / "meta/occgen.json").is_file()


def test_unreadable_meta_folder_fails_its_episode_only(mine, monkeypatch):
    """Looking a file up there raises, where a file that is missing does not."""
    first, second = load_builder("internnav", mine).episodes()
    own = Path.is_file

    def is_file(self):
        if self.parent == first.path / "meta":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return own(self)

    monkeypatch.setattr(Path, "is_file", is_file)
    assert names(InternNavBuilder(mine)) == [first.id, second.id]
