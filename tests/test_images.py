"""The images that a build copies: each one whole, and of the format that it is called by."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from occgen_hub.builder import load_builder
from occgen_hub.builders.internnav import InternNavBuilder
from occgen_hub.config import Config
from occgen_hub.episode import Episode
from occgen_hub.episode_build import Settings, build_episode
from occgen_hub.errors import SourceError
from occgen_hub.loading import Trajectory, trajectories
from occgen_hub.media import ImageSequence, read_rgb
from occgen_hub.sample import make_sample
from occgen_hub.validation import validate

RGB = "videos/chunk-000/observation.images.rgb"
DEPTH = "videos/chunk-000/observation.images.depth"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A source of one trajectory of four frames. Not to be changed by tests."""
    out = tmp_path_factory.mktemp("images") / "rooms"
    make_sample(out, trajectories=1, frames=4)
    return out


@pytest.fixture
def mine(source, tmp_path):
    """A copy that a test may change."""
    return Path(shutil.copytree(source, tmp_path / "mine"))


class Unchecked(InternNavBuilder):
    """A source as others write it, which does not say how its files are checked."""

    def read(self, ref) -> Episode:
        episode = super().read(ref)
        return replace(episode, media=tuple(replace(item, check=None) for item in episode.media))


def build(tree: Path, out: Path, interval: int = 1, kind=InternNavBuilder, **settings):
    builder = kind(tree)
    (ref,) = builder.episodes()
    config = Config(voxel_size=0.1, interval=interval)
    return build_episode(builder, ref, out, Settings(config=config, **settings))


def folder(tree: Path) -> Path:
    (ref,) = load_builder("internnav", tree).episodes()
    return ref.path


def cut(path: Path) -> None:
    """The header says what it said; the end of the pixels is missing."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


@pytest.mark.parametrize("kind", [InternNavBuilder, Unchecked])
@pytest.mark.parametrize("image", [f"{RGB}/1.jpg", f"{DEPTH}/2.png"])
@pytest.mark.parametrize("media", ["copy", "link"])
def test_a_cut_image_of_a_frame_that_is_skipped_is_not_copied(mine, tmp_path, kind, image, media):
    cut(folder(mine) / image)
    with pytest.raises(SourceError, match="damaged") as error:
        build(mine, tmp_path / "out", interval=3, kind=kind, media=media)
    assert error.value.path == str(folder(mine) / image)
    assert not trajectories(tmp_path / "out")


def test_without_media_nothing_is_copied_and_nothing_amiss(mine, tmp_path):
    cut(folder(mine) / f"{RGB}/1.jpg")
    assert build(mine, tmp_path / "out", interval=3, media="none").status == "built"


@pytest.mark.parametrize(("file", "kind"), [("rgb", "jpg"), ("depth", "png")])
def test_validate_finds_a_cut_image_whichever_frame_it_is_of(source, tmp_path, file, kind):
    build(source, tmp_path / "out")
    (path,) = trajectories(tmp_path / "out")
    for frame in (1, 2):
        cut(Trajectory.open(path).file(file, frame))
    found = {
        f.file: f.problem for f in validate(tmp_path / "out").findings if "damaged" in f.problem
    }
    assert {Path(name).name for name in found} == {f"1.{kind}", f"2.{kind}"}


@pytest.mark.parametrize("interval", [1, 3])
def test_every_image_is_decoded_and_colour_once(source, tmp_path, interval, monkeypatch):
    """In fusion, which looks at depth several times, or by the writer where it was skipped."""
    seen: list[tuple[str, int]] = []
    own = ImageSequence.__call__

    def call(self, number):
        seen.append((self._paths[number].parent.name, number))
        return own(self, number)

    monkeypatch.setattr(ImageSequence, "__call__", call)
    build(source, tmp_path / "out", interval=interval)
    rgb, depth = "observation.images.rgb", "observation.images.depth"
    assert set(seen) == {(name, n) for name in (rgb, depth) for n in range(4)}
    assert sorted(n for name, n in seen if name == rgb) == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", [InternNavBuilder, Unchecked])
@pytest.mark.parametrize("media", ["copy", "link"])
def test_a_png_that_is_called_jpg_is_stored_as_jpeg(mine, tmp_path, kind, media):
    path = folder(mine) / f"{RGB}/0.jpg"
    pixels = np.asarray(Image.open(path))
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    path.write_bytes(content.getvalue())
    built = build(mine, tmp_path / "out", kind=kind, media=media)
    assert [note.text for note in built.notes if note.code == "image format"] == [
        "0.jpg is a PNG, whatever it is called: such images are stored as JPEG"
    ]
    (there,) = trajectories(tmp_path / "out")
    images = [there / RGB / f"{n}.jpg" for n in range(4)]
    assert [Image.open(image).format for image in images] == ["JPEG"] * 4
    stored = read_rgb(images[0], (pixels.shape[1], pixels.shape[0])).astype(int)
    assert np.abs(stored - pixels).mean() < 2
    assert images[1].read_bytes() == (folder(mine) / f"{RGB}/1.jpg").read_bytes()
    assert path.read_bytes() == content.getvalue()
    assert validate(tmp_path / "out").valid
    assert Trajectory.open(there).rgb(0) is not None
