"""Wrong units, sizes, axes and poses: the error names the likely cause, and nothing is built."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_up import camera, depth_of, episode_of, intrinsics, path, room
from PIL import Image
from scipy.spatial.transform import Rotation

from occgen_hub.builder import DatasetBuilder, EpisodeRef, load_builder
from occgen_hub.builders.internnav import InternNavBuilder
from occgen_hub.config import Config
from occgen_hub.engines import Engine, Progress, load_engine
from occgen_hub.episode import Column, Episode, Note, check_episode
from occgen_hub.episode_build import Settings
from occgen_hub.errors import OccGenError
from occgen_hub.geometry.poses import OPENGL_FROM_OPENCV
from occgen_hub.job import Job, list_episodes
from occgen_hub.pipeline import reconstruct
from occgen_hub.runtime.build import build_dataset
from occgen_hub.runtime.results import Summary
from occgen_hub.scene import Scene
from occgen_hub.schema import Feature
from occgen_hub.views import Views

COARSE = Settings(Config(voxel_size=0.1), media="none")
DEPTH = "videos/chunk-000/observation.images.depth"
TABLE = "data/chunk-000/episode_000000.parquet"
Change = Callable[[Path], None]


# Builds of a small sample


@pytest.fixture
def tree(sample_tree: Path, tmp_path: Path) -> Path:
    """A source tree of one trajectory that a test may change."""
    copy = Path(shutil.copytree(sample_tree, tmp_path / "tree"))
    _, *others = list_episodes(load_builder("internnav", copy))
    for ref in others:
        shutil.rmtree(ref.path)
    return copy


def build(tree: Path, out: Path, builder: DatasetBuilder | None = None) -> Summary:
    """The summary of building all episodes of a tree."""
    builder = builder or load_builder("internnav", tree)
    return build_dataset(Job(builder, list_episodes(builder), out, COARSE))


def failure(summary: Summary, out: Path) -> str:
    """The failure reason of the only episode, which was not built."""
    (failed,) = summary.failures
    assert not list(out.rglob("*.npz"))
    assert failed.reason.count(". ") == 0
    assert failed.reason.rstrip().endswith(".")
    return failed.reason


def depth_images(tree: Path) -> list[Path]:
    return sorted(tree.rglob(f"{DEPTH}/*.png"))


def in_millimetres(tree: Path) -> None:
    """Write depth images with 1000 units per metre instead of 10,000."""
    for place in depth_images(tree):
        Image.fromarray(np.asarray(Image.open(place)) // 10).save(place)


def half_size(tree: Path) -> None:
    for place in depth_images(tree):
        Image.fromarray(np.asarray(Image.open(place))[::2, ::2]).save(place)


def change_poses(tree: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    for place in tree.rglob(TABLE):
        table = pq.read_table(place)
        poses = np.array(table["action"].to_pylist())
        field = table.schema.field("action")
        column = pa.array(change(poses).astype(np.float32).tolist(), field.type)
        index = table.column_names.index("action")
        pq.write_table(table.set_column(index, field, column), place)


def opencv_axes(tree: Path) -> None:
    """Write poses with OpenCV axes, which the source takes for OpenGL axes and converts."""
    change_poses(tree, lambda poses: poses @ OPENGL_FROM_OPENCV)


def inverted(tree: Path) -> None:
    change_poses(tree, np.linalg.inv)


def test_correct_source_is_built(tree: Path, tmp_path: Path) -> None:
    summary = build(tree, tmp_path / "out")
    assert not summary.failures
    assert not {"frames disagree", "empty scene", "poses"} & set(summary.notes)


@pytest.mark.parametrize(
    ("change", "cause", "remedy"),
    [
        (
            in_millimetres,
            "as if depth were 10 times as large",
            "--depth-unit cm if it was read as millimetres",
        ),
        (opencv_axes, "as if the cameras' y and z axes had the opposite", "from_opengl"),
        (inverted, "as if the poses were inverted", "invert them"),
    ],
)
def test_wrong_convention_fails_with_the_likely_cause(
    change: Change, cause: str, remedy: str, tree: Path, tmp_path: Path
) -> None:
    change(tree)
    message = failure(build(tree, tmp_path / "out"), tmp_path / "out")
    assert "frames contradict one another" in message
    assert cause in message
    assert remedy in message


def test_depth_images_of_half_the_size_fail(tree: Path, tmp_path: Path) -> None:
    half_size(tree)
    message = failure(build(tree, tmp_path / "out"), tmp_path / "out")
    assert "depth" in message
    assert "240" in message
    assert "480" in message


class ThirdPartySource(InternNavBuilder):
    """A third-party source that changes the episodes of another source."""

    name: ClassVar[str] = "wrapped"
    change: ClassVar[Callable[[Episode], Episode]]

    def read(self, ref: EpisodeRef) -> Episode:
        return type(self).change(super().read(ref))


def third_party_source(change: Callable[[Episode], Episode]) -> type[ThirdPartySource]:
    return type("Changed", (ThirdPartySource,), {"change": staticmethod(change)})


def test_swapped_image_size_fails(tree: Path, tmp_path: Path) -> None:
    changed = third_party_source(lambda e: dataclasses.replace(e, image_size=e.image_size[::-1]))
    message = failure(build(tree, tmp_path / "out", changed(tree)), tmp_path / "out")
    assert "swapped" in message


def test_depth_of_half_the_size_from_a_third_party_fails(tree: Path, tmp_path: Path) -> None:
    def halved(episode: Episode) -> Episode:
        read_depth = episode.read_depth
        assert read_depth is not None
        return dataclasses.replace(episode, read_depth=lambda t: read_depth(t)[::2, ::2])

    message = failure(
        build(tree, tmp_path / "out", third_party_source(halved)(tree)), tmp_path / "out"
    )
    assert "read_depth" in message
    assert "1/2 of the image's size" in message


def test_metres_read_as_millimetres_fail(tree: Path, tmp_path: Path) -> None:
    """A third-party source forgets to divide: depth is a thousand times too large."""

    def thousandfold(episode: Episode) -> Episode:
        read_depth = episode.read_depth
        assert read_depth is not None
        return dataclasses.replace(episode, read_depth=lambda t: 1000 * read_depth(t))

    summary = build(tree, tmp_path / "out", third_party_source(thousandfold)(tree))
    if summary.failures:
        message = failure(summary, tmp_path / "out")
        assert "as if depth were 0.001 times as large" in message
    else:  # Frames that only turn agree at any scale. Then no depth is within depth_range.
        assert summary.notes["empty scene"] == 1


def test_scene_without_depth_gives_a_note(tree: Path, tmp_path: Path) -> None:
    for place in depth_images(tree):
        Image.fromarray(np.zeros_like(np.asarray(Image.open(place)))).save(place)
    summary = build(tree, tmp_path / "out")
    assert not summary.failures
    assert summary.notes["empty scene"] == 1
    (record,) = (tmp_path / "out").rglob("meta/occgen.json")
    (note,) = (n for n in json.loads(record.read_text())["notes"] if "no points" in str(n))
    assert "do not use it" in str(note)


# On small made-up episodes


def scene_of(
    episode: Episode, folder: Path, config: Config | None = None, engine: Engine | None = None
) -> Scene:
    config = config or Config(voxel_size=0.05)
    return reconstruct(episode, engine or load_engine("rgbd"), config, folder)


def made_up(poses: np.ndarray | None = None) -> Episode:
    poses = path(8) if poses is None else poses
    return episode_of([depth_of(room(), pose) for pose in poses], poses)


def scaled(episode: Episode, factor: float) -> Episode:
    read_depth = episode.read_depth
    assert read_depth is not None
    return dataclasses.replace(episode, read_depth=lambda t: factor * read_depth(t))


def with_poses(episode: Episode, change: Callable[[np.ndarray], np.ndarray]) -> Episode:
    assert episode.world_from_camera is not None
    return dataclasses.replace(episode, world_from_camera=change(episode.world_from_camera))


def test_correct_episode_has_no_notes(tmp_path: Path) -> None:
    assert scene_of(made_up(), tmp_path).notes == ()


class ThirdPartyEngine(Engine):
    """A third-party engine that changes the views of the engine rgbd."""

    name = "mine"

    def __init__(self, change: Callable[[Views], Views]) -> None:
        self.change = change

    def reconstruct(
        self, episode: Episode, config: Config, scratch: Path, progress: Progress = lambda _: None
    ) -> Views:
        views = load_engine("rgbd").reconstruct(episode, config, scratch, progress)
        return self.change(dataclasses.replace(views, engine=self.name))


UNCHANGED = ThirdPartyEngine(lambda views: views)
ENGINE_DISAGREES = (
    r"depth of the engine mine does not agree with the poses \((only \d+%|nothing) of it agrees"
)


def test_depth_of_an_engine_that_contradicts_the_poses_names_the_engine(tmp_path: Path) -> None:
    """Options of the source would not help."""
    with pytest.raises(OccGenError) as error:
        scene_of(with_poses(made_up(), np.linalg.inv), tmp_path, engine=UNCHANGED)
    assert re.match(f"made/up/episode: {ENGINE_DISAGREES}", str(error.value))
    assert "--pose" not in str(error.value)
    assert "choose another one with --engine" in str(error.value)


@pytest.mark.parametrize("factor", [0.001, 0.1, 0.2, 2.0, 5.0, 10.0, 1000.0])
def test_each_common_depth_unit_is_named(factor: float, tmp_path: Path) -> None:
    with pytest.raises(OccGenError, match=f"as if depth were {1 / factor:g} times as large"):
        scene_of(scaled(made_up(), factor), tmp_path)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda poses: poses @ OPENGL_FROM_OPENCV, "y and z axes had the opposite directions"),
        (np.linalg.inv, "the poses were inverted;"),
        (
            lambda poses: np.linalg.inv(poses @ OPENGL_FROM_OPENCV),
            "inverted and had OpenGL's axes",
        ),
    ],
    ids=["opengl", "inverse", "both"],
)
def test_each_common_pose_mistake_is_named(
    change: Callable[[np.ndarray], np.ndarray], cause: str, tmp_path: Path
) -> None:
    with pytest.raises(OccGenError) as error:
        scene_of(with_poses(made_up(), change), tmp_path)
    assert cause in str(error.value)
    assert str(error.value).startswith("made/up/episode: frames contradict one another")


def test_poses_of_another_recording_give_a_note(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    others = path(8)
    for pose in others:
        turn = Rotation.from_euler("y", rng.uniform(-25, 25), degrees=True)
        pose[:3, :3] = turn.as_matrix() @ pose[:3, :3]
        pose[:3, 3] += rng.normal(0, 0.5, 3)
    scene = scene_of(with_poses(made_up(), lambda _: others), tmp_path)
    (text, *_) = (note.text for note in scene.notes if note.code == "frames disagree")
    assert "check that poses, depth and intrinsics belong together" in text
    scene = scene_of(with_poses(made_up(), lambda _: others), tmp_path, engine=UNCHANGED)
    (text, *_) = (note.text for note in scene.notes if note.code == "frames disagree")
    assert re.match(ENGINE_DISAGREES, text)


def test_static_camera_is_not_a_mistake(tmp_path: Path) -> None:
    still = np.repeat(path(1), 6, axis=0)
    scene = scene_of(made_up(still), tmp_path)
    assert [note.code for note in scene.notes] == ["static camera"]
    assert len(scene.cloud) > 1000


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_turning_camera_is_not_a_mistake(noise: float, tmp_path: Path) -> None:
    """Every depth unit fits equally well, even if noise makes most depths disagree."""
    turns = [camera((0, 0, 0), (np.sin(t), 0.1, np.cos(t))) for t in np.linspace(-0.6, 0.6, 8)]
    rng = np.random.default_rng(0)
    depths = [depth_of(room(), pose) for pose in turns]
    depths = [depth * (1 + noise * rng.normal(size=depth.shape)) for depth in depths]
    scene = scene_of(episode_of(depths, np.stack(turns)), tmp_path)
    assert not {"frames disagree", "empty scene"} & {note.code for note in scene.notes}


def test_single_frame_is_not_a_mistake(tmp_path: Path) -> None:
    assert scene_of(made_up(path(1)), tmp_path).notes == ()


def test_a_field_of_view_that_the_source_does_not_need_gives_a_note(tmp_path: Path) -> None:
    episode, config = made_up(path(1)), Config(voxel_size=0.05, hfov=60)
    (note,) = scene_of(episode, tmp_path, config).notes
    assert note == Note("hfov", "--hfov is not used by this source")
    assert scene_of(dataclasses.replace(episode, assumed_view=True), tmp_path, config).notes == ()


@pytest.mark.parametrize("fusion", ["evidence", "union"])
@pytest.mark.parametrize("depth", [0.0, 50.0])
def test_depth_out_of_range_gives_a_note(depth: float, fusion: str, tmp_path: Path) -> None:
    still = np.repeat(path(1), 4, axis=0)
    episode = episode_of([np.full((60, 80), depth)] * 4, still)
    config = Config.model_validate({"voxel_size": 0.05, "fusion": fusion})
    (note,) = scene_of(episode, tmp_path, config).notes
    assert note.code == "empty scene"
    assert "no points" in note.text


# Each field of an episode


def wrong_frame(name: str, change: Callable[[Any], Any]) -> Callable[[Episode], Episode]:
    """Change what a reader returns for frame 2."""

    def changed(episode: Episode) -> Episode:
        read = getattr(episode, name)
        return dataclasses.replace(
            episode, **{name: lambda t: change(read(t)) if t == 2 else read(t)}
        )

    return changed


def changed_array(name: str, place: Any, value: float) -> Callable[[Episode], Episode]:
    def changed(episode: Episode) -> Episode:
        array = getattr(episode, name).copy()
        array[place] = value
        return dataclasses.replace(episode, **{name: array})

    return changed


def replaced(**fields: Any) -> Callable[[Episode], Episode]:
    return lambda episode: dataclasses.replace(episode, **fields)


def with_value(array: np.ndarray, value: float) -> np.ndarray:
    array = array.copy()
    array[3, 4] = value
    return array


def read_frame(episode: Episode, frame: int) -> None:
    assert episode.read_depth is not None
    episode.read_rgb(frame)
    episode.read_depth(frame)


UNION = Config(voxel_size=0.05, fusion="union")
POSE, INTRINSIC = "world_from_camera", "intrinsics"
NUMBERS = Feature(dtype="float32", shape=(2,))


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        (replaced(length=0), "length", "at least one frame"),
        (replaced(image_size=(0, 60)), "image_size", "(width, height)"),
        (replaced(fps=0.0), "fps", "over 0"),
        (replaced(fps=float("nan")), "fps", "over 0"),
        (replaced(tasks=()), "tasks", "at least one instruction"),
        (replaced(task_index=np.zeros(3, np.int64)), "task_index", "(8,)"),
        (replaced(task_index=np.full(8, 1)), "task_index", "whole numbers of the 1 tasks"),
        (replaced(task_index=np.full(8, -1)), "task_index", "whole numbers of the 1 tasks"),
        (replaced(task_index=np.full(8, 0.5)), "task_index", "whole numbers of the 1 tasks"),
        (
            replaced(columns={"speed": Column(NUMBERS, np.zeros((5, 2)))}),
            "the column speed",
            "8, one a frame",
        ),
        (replaced(world_from_camera=np.zeros((8, 3, 4))), POSE, "(8, 4, 4)"),
        (replaced(world_from_camera=np.zeros((7, 4, 4))), POSE, "(8, 4, 4)"),
        (replaced(world_from_camera=path(8).astype(np.float32)), POSE, "float64"),
        (replaced(world_from_camera=path(8).tolist()), POSE, "float64"),
        (changed_array(POSE, (3, 0, 0), np.nan), POSE, "frame 3 is not rigid and finite"),
        (changed_array(POSE, (3, 0, 3), np.inf), POSE, "frame 3 is not rigid and finite"),
        (changed_array(POSE, (3, 0, 0), 1.7), POSE, "frame 3 is not rigid and finite"),
        (changed_array(POSE, (3, 3, 3), 0.0), POSE, "frame 3 is not rigid and finite"),
        (replaced(intrinsics=np.zeros((3, 3))), INTRINSIC, "(8, 3, 3)"),
        (replaced(intrinsics=np.zeros((8, 3, 3), np.float32)), INTRINSIC, "float64"),
        (changed_array(INTRINSIC, (5, 0, 0), -70.0), INTRINSIC, "frame 5"),
        (changed_array(INTRINSIC, (5, 0, 0), np.nan), INTRINSIC, "frame 5"),
        (changed_array(INTRINSIC, (5, 0, 1), 2.0), INTRINSIC, "skew"),
        (changed_array(INTRINSIC, (5, 0, 2), 90.0), INTRINSIC, "outside the image of 80 x 60"),
        (
            replaced(intrinsics=np.tile(intrinsics((1, 1)), (8, 1, 1))),
            INTRINSIC,
            "of frame 0 has a field of view of 177.5 degrees (fx 0.875 for 80 pixels), which no "
            "pinhole camera has, and must be in pixels",
        ),
        (changed_array(INTRINSIC, (5, 1, 1), 1e-320), INTRINSIC, "180.0 degrees (fy 9.99989e-321"),
        (replaced(image_size=(60, 80)), "read_rgb(2)", "are width and height of image_size"),
        (replaced(image_size=(40, 60)), INTRINSIC, "outside the image of 40 x 60"),
        (wrong_frame("read_rgb", lambda x: x[:, :, 0]), "read_rgb(2)", "(60, 80, 3)"),
        (wrong_frame("read_rgb", lambda x: x / 255), "read_rgb(2)", "uint8"),
        (wrong_frame("read_rgb", lambda x: x[::2, ::2]), "read_rgb(2)", "1/2 of the image's"),
        (wrong_frame("read_rgb", lambda _: None), "read_rgb(2)", "uint8"),
        (wrong_frame("read_depth", lambda x: x[..., None]), "read_depth(2)", "(60, 80)"),
        (wrong_frame("read_depth", lambda x: x[::2, ::2]), "read_depth(2)", "1/2 of the image's"),
        (wrong_frame("read_depth", lambda x: x.T), "read_depth(2)", "swapped"),
        (
            wrong_frame("read_depth", lambda x: (1000 * x).astype(np.uint16)),
            "read_depth(2)",
            "float metres",
        ),
        (wrong_frame("read_depth", lambda x: with_value(x, np.nan)), "read_depth(2)", "has NaN"),
        (wrong_frame("read_depth", lambda x: with_value(x, np.inf)), "read_depth(2)", "infinite"),
        (wrong_frame("read_depth", lambda x: with_value(x, -1.0)), "read_depth(2)", "negative"),
        (wrong_frame("read_depth", lambda _: None), "read_depth(2)", "float metres"),
    ],
)
def test_each_wrong_field_is_named(
    change: Callable[[Episode], Episode], field: str, message: str
) -> None:
    wrong = change(made_up())
    with pytest.raises(OccGenError) as error:
        read_frame(check_episode(wrong), 2)
    assert str(error.value).startswith(f"made/up/episode: {field}")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("reader", "value", "message"),
    [
        ("read_depth", np.ones((30, 40), np.float32), "is float32 (30, 40), expected float32"),
        ("read_depth", np.ones((59, 80), np.float32), "is float32 (59, 80), expected float32"),
        ("read_depth", np.ones(4800, np.float32), "is float32 (4800,), expected float32"),
        ("read_depth", np.ones((60, 80), np.uint16), "is uint16 (60, 80), expected float32"),
        ("read_depth", np.full((60, 80), np.nan), "has NaN, expected finite"),
        ("read_depth", np.full((60, 80), -np.inf), "has infinite values"),
        ("read_depth", np.full((60, 80), 1e300), "has infinite values"),
        ("read_depth", np.full((60, 80), -1.0), "has negative values"),
        ("read_color", np.zeros((60, 80), np.uint8), "is uint8 (60, 80), expected uint8"),
        ("read_color", np.zeros((60, 80, 3)), "is float64 (60, 80, 3), expected uint8"),
        ("read_confidence", np.ones((60, 1)), "is float64 (60, 1), expected float32"),
        ("read_confidence", np.full((60, 80), 1.5), "has NaN or values outside [0, 1]"),
    ],
)
def test_each_wrong_frame_of_an_engine_is_named(
    reader: str, value: np.ndarray, message: str, tmp_path: Path
) -> None:
    """Only frame 5 is wrong: a build reads all frames."""

    def changed(views: Views) -> Views:
        views = dataclasses.replace(views, read_confidence=lambda _: np.ones((60, 80), np.float32))
        read = getattr(views, reader)
        return dataclasses.replace(views, **{reader: lambda t: value if t == 5 else read(t)})

    with pytest.raises(OccGenError) as error:
        scene_of(made_up(), tmp_path, UNION, ThirdPartyEngine(changed))
    text = str(error.value)
    assert text.startswith(f"made/up/episode: {reader}(5) of the engine mine {message}")
    assert text.endswith("report it to the authors of the engine.")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("frames", np.arange(-1, 7), "is out of range or not ascending"),
        ("frames", np.arange(9), "is out of range or not ascending"),
        ("frames", np.array([0, 0, 1]), "is out of range or not ascending"),
        ("frames", np.arange(8)[::-1], "is out of range or not ascending"),
        ("frames", list(range(8)), "is list, expected int64 (n,)"),
        ("edges", "ramp", "is 'ramp', expected sensor or network"),
    ],
)
def test_wrong_fields_of_an_engine_are_named(
    field: str, value: object, message: str, tmp_path: Path
) -> None:
    wrong = ThirdPartyEngine(lambda views: dataclasses.replace(views, **{field: value}))
    with pytest.raises(OccGenError) as error:
        scene_of(made_up(), tmp_path, UNION, wrong)
    assert f"{field} of the engine mine {message}" in str(error.value)


def test_engine_that_returns_no_views_is_named(tmp_path: Path) -> None:
    with pytest.raises(OccGenError, match="the engine returned a NoneType, expected occgen_h"):
        scene_of(made_up(), tmp_path, UNION, ThirdPartyEngine(lambda views: None))


def test_engine_may_return_float64_depth(tmp_path: Path) -> None:
    wide = ThirdPartyEngine(
        lambda views: dataclasses.replace(
            views, read_depth=lambda t: views.read_depth(t).astype(np.float64)
        )
    )
    found = scene_of(made_up(), tmp_path, UNION, wide)
    expected = scene_of(made_up(), tmp_path, UNION)
    np.testing.assert_array_equal(found.cloud.points, expected.cloud.points)


def test_correct_episode_passes_unchanged() -> None:
    episode = made_up()
    checked = check_episode(episode)
    assert checked.read_depth is not None
    assert episode.read_depth is not None
    for frame in range(8):
        np.testing.assert_array_equal(checked.read_rgb(frame), episode.read_rgb(frame))
        np.testing.assert_array_equal(checked.read_depth(frame), episode.read_depth(frame))
    bare = dataclasses.replace(episode, read_depth=None, world_from_camera=None, intrinsics=None)
    assert check_episode(bare).read_depth is None


def episodes_of(builder: DatasetBuilder) -> Iterator[Episode]:
    for ref in builder.episodes():
        yield builder.read(ref)


def test_sample_episodes_pass(sample_tree: Path) -> None:
    for episode in episodes_of(load_builder("internnav", sample_tree)):
        checked = check_episode(episode)
        assert checked.read_depth is not None
        assert checked.read_depth(0).shape == checked.read_rgb(0).shape[:2]
