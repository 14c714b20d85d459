"""The source template as an installed package, and errors for wrong sources."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up import depth_of, episode_of, path, room

import occgen_hub
from occgen_hub import plugins
from occgen_hub.builder import DatasetBuilder, EpisodeRef, load_builder, other_source
from occgen_hub.config import Config
from occgen_hub.engines import load_engine
from occgen_hub.episode import Column, MediaFile
from occgen_hub.episode_build import Settings
from occgen_hub.errors import OccGenError, UsageError
from occgen_hub.job import Job, check_conditions, choose_engine, list_episodes
from occgen_hub.runtime.build import build_dataset
from occgen_hub.schema import Feature
from occgen_hub.source_check import check_source

EXAMPLE = Path(__file__).parent.parent / "examples/source_plugin"


def test_template_can_be_installed_and_passes_its_tests(tmp_path: Path) -> None:
    """Its entry point is found, and its own tests pass."""
    package = Path(shutil.copytree(EXAMPLE, tmp_path / "package"))
    target = tmp_path / "installed"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
               "--no-build-isolation", "--target", target, package]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(package / "src")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"],
        cwd=package, env=os.environ | {"PYTHONPATH": str(target)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout


# Errors of sources


def test_wrong_entry_points_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "half_written.py").write_text("class Builder(")
    (tmp_path / "careless.py").write_text("import os\nos.environ['NOT_SET']\n")
    monkeypatch.syspath_prepend(tmp_path)

    def given(value: str) -> None:
        points = {"mine": [EntryPoint("mine", value, "occgen_hub.builders")]}
        monkeypatch.setattr(plugins, "_points", lambda kind: points)

    def two_packages(kind: plugins.Kind) -> dict[str, list[EntryPoint]]:
        group = "occgen_hub.engines"
        return {"mine": [EntryPoint("mine", value, group) for value in ("one:open", "two:open")]}

    for value, message in (
        ("nowhere:Builder", "cannot be loaded .*nowhere"),
        ("half_written:Builder", "cannot be loaded .*never closed"),
        ("careless:Builder", "cannot be loaded .KeyError: 'NOT_SET'; correct that package"),
        ("pathlib:Path", "is not a subclass of"),
        ("occgen_hub.builder:DatasetBuilder", "lacks the methods episodes, read, sources"),
        ("occgen_hub.builders.video:VideoBuilder", "has the name 'video'; give it name = 'mine'"),
    ):
        given(value)
        with pytest.raises(UsageError, match=message):
            load_builder("mine", Path())
    for value, message in (
        ("nowhere:open_engine", "--engine mine: .* cannot be loaded .*nowhere"),
        ("pathlib:Path", "cannot be opened"),
        ("builtins:max", "cannot be opened"),
        ("builtins:print", "does not return an instance of occgen_hub.engines.Engine"),
        ("occgen_hub.engines.rgbd:open_engine", "has the name 'rgbd'; give it name = 'mine'"),
    ):
        given(value)
        with pytest.raises(UsageError, match=message):
            load_engine("mine")
    monkeypatch.setattr(plugins, "_points", two_packages)
    with pytest.raises(UsageError, match="--engine mine: one:open and two:open have this name"):
        load_engine("mine")


class Mine(DatasetBuilder):
    """A source with one synthetic episode, which tests modify by class attributes."""

    name = "mine"
    changes: dict[str, Any] = {}  # noqa: RUF012
    ids = ("mine/room/walk",)
    depth = True

    def episodes(self):
        for name in self.ids:
            yield EpisodeRef(name, self.root)

    def sources(self, ref):
        return [self.root / "recording"]

    def has_depth(self, ref):
        return self.depth

    def read(self, ref):
        poses = path(6)
        episode = episode_of([depth_of(room(), pose) for pose in poses], poses, ref.id)
        return dataclasses.replace(episode, **self.changes)


NO_TIMES = Column(Feature(dtype="float64", shape=(1,)), np.full(6, np.nan))
HALVES = Column(Feature(dtype="int64", shape=(1,)), np.arange(6) + 0.5)
OTHER = Column(Feature(dtype="float", shape=(1,)), np.arange(6))
OTHERS = tuple(
    MediaFile("rgb", Path("recording"), t, read=lambda: np.full((60, 80, 3), 120, np.uint8))
    for t in range(6)
)
IMAGES = tuple(MediaFile("rgb", Path(f"{t}.jpg"), t) for t in range(6))


class Licensed(Mine):
    """A source that states the licence of all its recordings."""

    license = "cc0-1.0"


class Unlisted(Mine):
    """A source with mistakes in the methods that list and recognise recordings."""

    def episodes(self):
        yield from super().episodes()
        raise KeyError("index.json")

    @classmethod
    def recognise(cls, root):
        raise IndexError


class Recognising(Mine):
    """A source that reads any folder."""

    name = "own"

    @classmethod
    def recognise(cls, root):
        return "my own"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "recording").write_text("")
    return tmp_path


def test_a_builder_is_loaded_for_a_path_given_as_text(root: Path) -> None:
    assert load_builder("video", str(root)).root == root


def test_an_error_of_a_source_in_one_episode_does_not_end_the_build(root: Path) -> None:
    class Careless(Mine):
        ids = ("mine/room/one", "mine/room/two")

        def sources(self, ref):
            return [self.root / {"mine/room/one": "recording"}[ref.id]]

        def has_depth(self, ref):
            return {"mine/room/one": True}[ref.id]

    builder = Careless(root)
    refs = list_episodes(builder)
    engine = choose_engine(builder, refs)
    check_conditions(builder, refs, Config(condition=("depth",)))
    job = Job(builder, refs, root / "out", Settings(engine=engine, media="none"))
    summary = build_dataset(job)
    assert (summary.built, [failure.id for failure in summary.failures]) == (1, ["mine/room/two"])


def test_an_error_of_a_source_that_lists_its_episodes_is_one_sentence(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"mine cannot list its episodes \(KeyError: 'index.json"):
        list_episodes(Unlisted(root))
    # Both sources that recognise a folder are named, in spite of one that cannot say.
    points = plugins._points("source")
    own = {
        name: [EntryPoint(name, f"{__name__}:{kind}", "occgen_hub.builders")]
        for name, kind in (("mine", "Unlisted"), ("own", "Recognising"))
    }
    monkeypatch.setattr(plugins, "_points", lambda kind: points | own)
    for name in ("color", "depth"):
        (root / name).mkdir()
    found = other_source(root, "internnav")
    assert found.endswith(": use --source capture, or it is my own: use --source own")


def test_a_source_with_an_open_file_needs_one_worker(root: Path) -> None:
    builder = type("Mine", (Mine,), {"ids": ("mine/room/one", "mine/room/two")})(root)
    builder.log = (root / "recording").open()
    job = Job(builder, list_episodes(builder), root / "out", Settings(media="none"))
    with builder.log, pytest.raises(UsageError, match=r"--workers 2: the source mine .*pickle"):
        build_dataset(job, workers=2)


def test_license_of_a_source_is_used_without_a_card(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = {"mine": [EntryPoint("mine", f"{__name__}:Licensed", "occgen_hub.builders")]}
    monkeypatch.setattr(plugins, "_points", lambda kind: points)
    assert load_builder("mine", root).license == "cc0-1.0"
    (root / "README.md").write_text("---\nlicense: mit\n---\n")
    assert load_builder("mine", root).license == "mit"


def test_check_source_accepts_a_correct_source(root: Path) -> None:
    (episode,) = check_source(Mine(root))
    assert episode.length == 6
    assert occgen_hub.check_source is check_source


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"ids": ("mine/walk",)}, "which has 2 parts"),
        ({"ids": ("mine/../walk",)}, "not a valid folder name"),
        ({"ids": ("b/b/b", "a/a/a")}, "is not sorted by id"),
        ({"ids": ("a/a/a", "a/a/a")}, "holds the episode a/a/a twice"),
        ({"depth": False}, "has_depth.* but read returns the opposite"),
        ({"sources": lambda self, ref: []}, "is empty"),
        ({"sources": lambda self, ref: [self.root / "lost"]}, "lost, which is not a file"),
        ({"work": lambda self, ref: -1.0}, "return a number of 0 or more"),
        ({"changes": {"id": "other"}}, "is 'other'; give the ref's id"),
        ({"changes": {"fingerprint": "1"}}, "not a SHA-256"),
        ({"changes": {"image_size": (60, 80)}}, "swapped"),
        ({"changes": {"fps": 0.0}}, "fps is 0.0"),
        ({"changes": {"image_size": np.array([80, 60])}}, "a tuple .width, height."),
        ({"changes": {"tasks": ("explore",)}}, "tasks has a str"),
        ({"changes": {"columns": {"time": np.zeros(6)}}}, "column time is a ndarray"),
        (
            {"changes": {"columns": {"time": NO_TIMES}}},
            "column time has a value that is not finite",
        ),
        ({"changes": {"columns": {"n": HALVES}}}, "n has float64 values for the feature int64"),
        ({"changes": {"columns": {"n": OTHER}}}, "n has the feature float .1,.; give one of"),
        ({"changes": {"notes": ("odd",)}}, "notes has a str"),
        ({"changes": {"unmeasured": "empty"}}, "unmeasured is 'empty'; .* unknown or free"),
        ({"changes": {"media": IMAGES}}, "media 0.jpg is not in sources"),
        ({"changes": {"media": OTHERS}}, "media rgb of frame 0 differs from read_rgb.0. by 1"),
        ({"sources": lambda self, ref: None}, "gives a NoneType; give a list of paths"),
        ({"episodes": lambda self: iter([EpisodeRef("a/b/c", "d")])}, "path of a/b/c is a str"),
        ({"changes": {"media": IMAGES[:5]}}, "media rgb has 5 images"),
        ({"changes": {"media": IMAGES[:5] + IMAGES[:1]}}, "media rgb has other frame numbers"),
        ({"episodes": lambda self: None}, "gives a NoneType; yield every EpisodeRef"),
        ({"sources": lambda self, ref: ["recording"]}, "has a str; give paths"),
        ({"read": lambda self, ref: None}, "gives a NoneType; give an Episode"),
        ({"changes": {"intrinsics": None}}, "intrinsics are missing"),
        ({"changes": {"world_from_camera": np.linalg.inv(path(6))}}, "camera_from_world"),
    ],
)
def test_check_source_refuses_a_wrong_source(
    attributes: dict[str, Any], message: str, root: Path
) -> None:
    wrong = type("Mine", (Mine,), attributes)
    wrong.__module__, wrong.__qualname__ = "pytest_wrong", "Mine"
    sys.modules["pytest_wrong"] = type(sys)("pytest_wrong")
    sys.modules["pytest_wrong"].Mine = wrong  # So that it can be pickled.
    with pytest.raises(OccGenError, match=message):
        check_source(wrong(root))
