"""Images in a built dataset: complete, and in the format of their file name."""

from __future__ import annotations

import io
import shutil
import sys
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
from occgen_hub.schema import load_schema
from occgen_hub.shards import write_shards
from occgen_hub.validation import validate

RGB = "videos/chunk-000/observation.images.rgb"
DEPTH = "videos/chunk-000/observation.images.depth"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A source with one trajectory of four frames. Tests must not change it."""
    out = tmp_path_factory.mktemp("images") / "rooms"
    make_sample(out, trajectories=1, frames=4)
    return out


@pytest.fixture
def source_copy(source, tmp_path):
    """A copy of the source that a test may change."""
    return Path(shutil.copytree(source, tmp_path / "mine"))


class WithoutChecks(InternNavBuilder):
    """A source, like those of other authors, whose media have no `check`."""

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


def truncate(path: Path) -> None:
    """Cut off the end of an image file. The header stays valid."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


@pytest.mark.parametrize("kind", [InternNavBuilder, WithoutChecks])
@pytest.mark.parametrize("image", [f"{RGB}/1.jpg", f"{DEPTH}/2.png"])
@pytest.mark.parametrize("media", ["copy", "link"])
def test_truncated_image_of_skipped_frame_is_not_copied(source_copy, tmp_path, kind, image, media):
    truncate(folder(source_copy) / image)
    with pytest.raises(SourceError, match="damaged") as error:
        build(source_copy, tmp_path / "out", interval=3, kind=kind, media=media)
    assert error.value.path == str(folder(source_copy) / image)
    assert not trajectories(tmp_path / "out")


def test_damaged_image_does_not_stop_a_build_without_media(source_copy, tmp_path):
    truncate(folder(source_copy) / f"{RGB}/1.jpg")
    assert build(source_copy, tmp_path / "out", interval=3, media="none").status == "built"


@pytest.mark.parametrize(("file", "kind"), [("rgb", "jpg"), ("depth", "png")])
def test_validate_finds_truncated_images_of_any_frame(source, tmp_path, file, kind):
    build(source, tmp_path / "out")
    (path,) = trajectories(tmp_path / "out")
    for frame in (1, 2):
        truncate(Trajectory.open(path).file(file, frame))
    found = {
        f.file: f.problem for f in validate(tmp_path / "out").findings if "damaged" in f.problem
    }
    assert {Path(name).name for name in found} == {f"1.{kind}", f"2.{kind}"}


@pytest.mark.parametrize("interval", [1, 3])
def test_build_decodes_every_image_and_colour_images_only_once(
    source, tmp_path, interval, monkeypatch
):
    """By fusion, which reads depth several times, or by the writer for skipped frames."""
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


@pytest.mark.parametrize("kind", [InternNavBuilder, WithoutChecks])
@pytest.mark.parametrize("media", ["copy", "link"])
def test_png_named_jpg_is_stored_as_jpeg(source_copy, tmp_path, kind, media):
    path = folder(source_copy) / f"{RGB}/0.jpg"
    pixels = np.asarray(Image.open(path))
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    path.write_bytes(content.getvalue())
    built = build(source_copy, tmp_path / "out", kind=kind, media=media)
    assert [note.text for note in built.notes if note.code == "image format"] == [
        "0.jpg is a PNG despite its name: such images are stored as JPEG"
    ]
    (there,) = trajectories(tmp_path / "out")
    images = [there / RGB / f"{n}.jpg" for n in range(4)]
    assert [Image.open(image).format for image in images] == ["JPEG"] * 4
    stored = read_rgb(images[0], (pixels.shape[1], pixels.shape[0])).astype(int)
    assert np.abs(stored - pixels).mean() < 2
    assert images[1].read_bytes() == (folder(source_copy) / f"{RGB}/1.jpg").read_bytes()
    assert path.read_bytes() == content.getvalue()
    assert validate(tmp_path / "out").valid
    assert Trajectory.open(there).rgb(0) is not None


# Depth in other units


class Metres(InternNavBuilder):
    """A source whose depth images are in millimetres; it returns metres."""

    name = "metres"
    far = False

    def read(self, ref) -> Episode:
        episode = super().read(ref)
        stored = episode.read_depth
        assert stored is not None

        def metres(frame: int) -> np.ndarray:
            depth = stored(frame) * 10
            if self.far and frame == 1:
                depth[:2, :2] = 70.0
            return depth

        return replace(episode, read_depth=metres)


class MetresWithoutImages(Metres):
    """The same without depth image files."""

    name = "metres-alone"

    def read(self, ref) -> Episode:
        episode = super().read(ref)
        return replace(episode, media=tuple(m for m in episode.media if m.file != "depth"))


class MetresWithFarDepth(MetresWithoutImages):
    """The same with a depth of 70 m in frame 1."""

    name = "far-metres"
    far = True


def convert_to_millimetres(tree: Path) -> None:
    for path in tree.rglob(f"{DEPTH}/*.png"):
        Image.fromarray(np.asarray(Image.open(path)) // 10).save(path)


@pytest.mark.parametrize("kind", [Metres, MetresWithoutImages, MetresWithFarDepth])
@pytest.mark.parametrize("media", ["copy", "link"])
def test_depth_is_stored_in_the_unit_of_the_schema(source_copy, tmp_path, kind, media):
    convert_to_millimetres(source_copy)
    built = build(source_copy, tmp_path / "out", kind=kind, media=media)
    (there,) = trajectories(tmp_path / "out")
    trajectory = Trajectory.open(there)
    units = trajectory.schema.depth_units_per_metre
    for frame in range(4):
        millimetres = np.asarray(Image.open(folder(source_copy) / DEPTH / f"{frame}.png"))
        expected = millimetres / 1000
        if kind is MetresWithFarDepth and frame == 1:
            expected[:2, :2] = 0
        image = Image.open(there / DEPTH / f"{frame}.png")
        assert (image.format, image.mode) == ("PNG", "I;16")
        np.testing.assert_allclose(np.asarray(image) / units, expected, atol=0.5 / units)
        np.testing.assert_array_equal(trajectory.depth(frame), np.asarray(image) / units)
    far = [note.text for note in built.notes if note.code == "far depth"]
    expected = "depth beyond 6.5535 m is stored as none, in 1 of the depth images"
    assert far == ([expected] if kind is MetresWithFarDepth else [])
    assert far == [text for text in trajectory.record["notes"] if text.startswith("depth beyond")]
    assert validate(tmp_path / "out").valid


def test_depth_images_in_the_unit_of_the_schema_are_copied_unchanged(source_copy, tmp_path):
    build(source_copy, tmp_path / "out")
    (there,) = trajectories(tmp_path / "out")
    for frame in range(4):
        name = f"{DEPTH}/{frame}.png"
        assert (there / name).read_bytes() == (folder(source_copy) / name).read_bytes()


def test_build_without_media_stores_no_depth_images(source_copy, tmp_path):
    convert_to_millimetres(source_copy)
    build(source_copy, tmp_path / "out", kind=MetresWithoutImages, media="none")
    assert not list((tmp_path / "out").rglob("*.png"))
    assert validate(tmp_path / "out").valid


def test_readers_take_the_unit_of_depth_from_the_schema(source_copy, tmp_path, monkeypatch):
    """With a schema in millimetres: the writer, the reader and the training dataset."""
    import occgen_hub.training

    millimetres = load_schema("trajectory").model_copy(update={"depth_units_per_metre": 1000})
    for name, module in list(sys.modules.items()):
        if name.startswith("occgen_hub.") and hasattr(module, "load_schema"):
            monkeypatch.setattr(module, "load_schema", lambda _: millimetres)
    build(source_copy, tmp_path / "out")
    write_shards(tmp_path / "out")
    (there,) = trajectories(tmp_path / "out")
    source = np.asarray(Image.open(folder(source_copy) / DEPTH / "1.png"))
    stored = np.asarray(Image.open(there / DEPTH / "1.png"))
    np.testing.assert_allclose(stored, source / 10, atol=0.51)
    np.testing.assert_array_equal(Trajectory.open(there).depth(1), stored / 1000)
    item = occgen_hub.training.OccupancyDataset(tmp_path / "out", keys=("depth",))[1]
    np.testing.assert_array_equal(item["depth"], (stored / 1000).astype(np.float32))
