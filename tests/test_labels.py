"""Semantic labels: label images, votes, classes of cells, and labels in training items."""

from __future__ import annotations

import importlib
import json
import pickle
import shutil
import sys
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import datasets
import made_up
import numba
import numpy as np
import pytest
from PIL import Image
from scipy import sparse

import occgen_hub
from occgen_hub import OccupancyDataset, plugins
from occgen_hub.builder import load_builder
from occgen_hub.config import Config
from occgen_hub.episode import check_episode
from occgen_hub.errors import OccGenError, UsageError
from occgen_hub.exporting import export
from occgen_hub.fusion.fuse import fuse
from occgen_hub.fusion.joined import joined_views
from occgen_hub.loading import Trajectory, trajectories
from occgen_hub.occupancy.classes import joined_classes, most_common, nearest_classes
from occgen_hub.sample import make_sample
from occgen_hub.segmenters import Segmenter, load_segmenter, with_labels
from occgen_hub.taxonomy import UNLABELLED, load_taxonomy, taxonomy_names
from occgen_hub.validation import validate

sys.path.append(str(Path(__file__).parent.parent / "scripts"))
labels = importlib.import_module("accuracy_labels")

IMAGES = "videos/chunk-000/observation.images.labels"
PERSON = load_taxonomy("sample").id_of("person")


@pytest.fixture(scope="module")
def labelled_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trajectory with labels, Kinect noise and a person. Tests must not change it."""
    out = tmp_path_factory.mktemp("labelled_tree") / "tree"
    make_sample(out, trajectories=1, frames=6, seed=1, noise=["kinect"], people=1, labels=True)
    return out


@pytest.fixture(scope="module")
def labelled(labelled_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset built from `labelled_tree`. Tests must not change it."""
    out = tmp_path_factory.mktemp("labelled") / "out"
    assert not occgen_hub.build("internnav", labelled_tree, out).failures
    return out


def linked_copy(tree: Path, out: Path) -> Path:
    """A copy of a tree whose files are hard links to the original."""
    shutil.copytree(tree, out, copy_function=lambda a, b: Path(b).hardlink_to(a))
    return out


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file without changing the original that it is linked to."""
    path.unlink()
    path.write_bytes(content)


# Taxonomies


def test_class_numbers_do_not_overlap_state_numbers():
    assert taxonomy_names() == ["mpcat40", "nyu40", "occscannet11", "sample"]
    for name in taxonomy_names():
        taxonomy = load_taxonomy(name)
        assert [*taxonomy.classes] == [*range(1, len(taxonomy.classes) + 1)]
        assert len(taxonomy.classes) < UNLABELLED
        table = taxonomy.to_occscannet(255)
        assert set(table[[*taxonomy.classes]]) <= {*range(1, 12)}
        assert table[[0, UNLABELLED, 255]].tolist() == [0, 255, 255]
    assert load_taxonomy("nyu40").classes[40].name == "otherprop"
    assert load_taxonomy("occscannet11").to_occscannet(11)[:12].tolist() == [*range(12)]


def test_label_images_are_checked_against_their_taxonomy():
    mpcat40 = load_taxonomy("mpcat40")
    image = np.array([[0, 41, 3]], np.uint16)
    np.testing.assert_array_equal(mpcat40.checked(image), [[0, 0, 3]])
    for wrong, words in ((42, "id 42"), (1000, "id 1000"), (-1, "id -1")):
        with pytest.raises(ValueError, match=words):
            mpcat40.checked(np.array([[1, wrong]], np.int32))
    with pytest.raises(ValueError, match="float32"):
        mpcat40.checked(np.ones((1, 2), np.float32))
    with pytest.raises(UsageError, match="is not a taxonomy"):
        load_taxonomy("ade20k")


# Label images of sources


def test_depth_noise_does_not_change_labels(tmp_path, labelled_tree):
    make_sample(tmp_path / "clean", trajectories=1, frames=6, seed=1, people=1, labels=True)
    images = sorted(labelled_tree.glob(f"*/*/*/{IMAGES}/*.png"))
    assert len(images) == 6
    for path in images:
        place = tmp_path / "clean" / path.relative_to(labelled_tree)
        assert place.read_bytes() == path.read_bytes()
    assert PERSON in np.concatenate([np.asarray(Image.open(path)) for path in images])


def test_sample_refuses_labels_for_a_layout_without_them(tmp_path):
    with pytest.raises(UsageError, match="vln-ce has none"):
        make_sample(tmp_path / "ce", layout="vln-ce", labels=True)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "taxonomy.txt").unlink(), "taxonomy.txt: is missing"),
        (lambda f: replace_file(f / "taxonomy.txt", b"ade20k\n"), "names an unknown taxonomy"),
        (lambda f: (f / "2.png").unlink(), "2.png: is missing"),
        (lambda f: save(f / "2.png", np.full((270, 480), 77, np.uint8)), "2.png: has the id 77"),
        (lambda f: save(f / "2.png", np.ones((90, 160), np.uint8)), "2.png: is 160 x 90 pixels"),
        (lambda f: save(f / "2.png", np.ones((270, 480, 3), np.uint8)), "2.png: is not a label"),
        (lambda f: replace_file(f / "2.png", b"no image"), "2.png: is not a JPEG or PNG"),
    ],
)
def test_error_names_an_invalid_label_image(tmp_path, labelled_tree, spoil, words):
    tree = linked_copy(labelled_tree, tmp_path / "tree")
    spoil(next(tree.glob(f"*/*/*/{IMAGES}")))
    builder = load_builder("internnav", tree)
    with pytest.raises(OccGenError, match=words):
        check_episode(builder.read(next(builder.episodes()))).read_labels(2)


def save(path: Path, image: np.ndarray) -> None:
    path.unlink()
    Image.fromarray(image).save(path)


def test_labels_of_other_sources_are_checked():
    depths = [np.full((48, 64), 2.0)] * 2
    episode = made_up.episode_of(depths, np.tile(np.eye(4), (2, 1, 1)))
    image = np.full((48, 64), 3, np.int64)
    good = replace(episode, read_labels=lambda t: image, taxonomy="nyu40")
    assert check_episode(good).read_labels(0).dtype == np.uint8
    for wrong, words in (
        (replace(good, taxonomy="mine"), "taxonomy is 'mine'"),
        (replace(good, taxonomy=None), "read_labels or taxonomy is missing"),
    ):
        with pytest.raises(OccGenError, match=words):
            check_episode(wrong)
    for wrong, words in ((np.zeros((48, 63), np.uint8), "shape"), (image * 20, "the id 60")):
        with pytest.raises(OccGenError, match=words):
            check_episode(replace(good, read_labels=lambda t, i=wrong: i)).read_labels(1)


# Votes


def test_votes_are_weighted_like_their_depth():
    """Two far frames vote for class 1, one near frame for 2; unlabelled pixels do not vote."""
    wall = [made_up.plane((0, 0, 3.0), (0, 0, -1))]
    poses = np.tile(np.eye(4), (3, 1, 1))
    poses[:, 0, 3], poses[2, 2, 3] = (-0.05, 0.05, 0.0), 2.0
    depths = [made_up.depth_of(wall, pose) for pose in poses]
    views = made_up.views_of(depths, poses)
    height, width = depths[0].shape
    images = np.stack([np.full((height, width), c, np.uint8) for c in (1, 1, 2)])
    images[0, :, : width // 4] = 0

    def classes(*noise):
        config = Config(noise=noise, refine_poses=False)
        found = fuse(replace(views, read_labels=lambda t: images[t]), config)
        near = np.abs(found.cloud.points[:, :2]).max(axis=1) < 0.3  # All three frames see it.
        return found.cloud.points[:, 0], found.classes, near

    x, found, near = classes(0.0, 0.0, 0.01)
    assert near.sum() > 100
    assert (found[near] == 2).all()
    assert (found[x > 1.2] == 1).all()
    assert (found[x == x.min()] == UNLABELLED).all()  # Only the first frame sees it.
    _, found, near = classes(0.01, 0.0, 0.0)  # Equal weights: two votes beat one.
    assert (found[near] == 1).mean() > 0.95
    images = images.repeat(2, axis=1).repeat(3, axis=2)  # Another size than the depth.
    _, larger, _ = classes(0.01, 0.0, 0.0)
    np.testing.assert_array_equal(larger, found)
    images[:] = 0
    assert (classes(0.01, 0.0, 0.0)[1] == UNLABELLED).all()
    assert fuse(views, Config()).classes is None


def test_joined_views_keep_the_labels_of_each_camera():
    """One camera has labels, in an image size of its own; the other has none."""
    depths = [np.full((48, 64), 2.0)] * 2
    first = made_up.views_of(depths, np.tile(np.eye(4), (2, 1, 1)))
    small = replace(first, read_labels=lambda t: np.full((24, 32), 3 + t, np.uint8))
    small = replace(small, image_size=(32, 24))
    both = joined_views([first, small])
    assert [np.unique(both.read_labels(t)).tolist() for t in range(4)] == [[0], [3], [0], [4]]
    assert both.read_labels(1).shape == (48, 64)
    assert joined_views([first, first]).read_labels is None


def test_joined_views_keep_the_confidence_and_scale_of_each_camera():
    first = made_up.views_of([np.full((48, 64), 2.0)] * 2, np.tile(np.eye(4), (2, 1, 1)))
    other = replace(first, scale=3.0, read_confidence=lambda t: np.full((48, 64), t / 2, "f4"))
    both = joined_views([other, first])
    assert [both.depth(t, confidence=0.4).max() for t in range(4)] == [0.0, 2.0, 6.0, 2.0]
    assert joined_views([first, first]).read_confidence is None


def test_added_surface_points_take_the_class_of_the_nearest_point():
    points = np.array([[0, 0, 0], [1, 0, 0]], np.float32)
    others = np.array([[0.4, 0, 0], [0.6, 0, 0]], np.float32)
    classes = np.array([4, 5], np.uint8)
    assert nearest_classes(points, classes, others).tolist() == [4, 5]
    assert nearest_classes(points[:0], classes[:0], others).tolist() == [UNLABELLED] * 2


def test_votes_do_not_depend_on_threads(labelled_tree):
    builder = load_builder("internnav", labelled_tree)
    episode = check_episode(builder.read(next(builder.episodes())))
    poses, depths = episode.world_from_camera, [episode.read_depth(t) for t in range(4)]
    views = replace(
        made_up.views_of(depths, poses[:4]),
        intrinsics=episode.intrinsics[:4],
        read_labels=episode.read_labels,
    )
    found = []
    for threads in (1, numba.config.NUMBA_NUM_THREADS):
        numba.set_num_threads(threads)
        found.append(fuse(views, Config(refine_poses=False)))
    np.testing.assert_array_equal(found[0].classes, found[1].classes)
    assert len(np.unique(found[0].classes)) > 3


# Cells


def test_cells_get_their_most_common_class():
    rng = np.random.default_rng(0)
    cells, classes = rng.integers(0, 50, 400), rng.choice([1, 2, 3, UNLABELLED], 400)
    classes[cells == 7] = UNLABELLED
    numbers, found = most_common(cells, classes.astype(np.uint8))
    np.testing.assert_array_equal(numbers, np.unique(cells))
    for cell, name in zip(numbers, found, strict=True):
        counts = np.bincount(classes[cells == cell], minlength=256)
        counts[UNLABELLED] = 0
        assert name == (counts.argmax() if counts.any() else UNLABELLED)
    labels = rng.choice([0, 1, 2, UNLABELLED, 255], (9, 8, 7)).astype(np.uint8)
    wide = joined_classes(labels, 2)
    assert wide.shape == (5, 4, 4)
    for place in np.ndindex(wide.shape):
        part = labels[tuple(slice(2 * p, 2 * p + 2) for p in place)]
        counts = np.bincount(part.ravel(), minlength=256)
        named = counts[:UNLABELLED].copy()
        named[0] = 0
        state = 0 if counts[0] else 255
        expected = named.argmax() if named.any() else UNLABELLED if counts[UNLABELLED] else state
        assert wide[place] == expected


def test_classes_of_visible_cells_match_the_mesh(labelled_tree, labelled):
    """With Kinect noise. A short version of `scripts/accuracy --labels`."""
    (path,) = trajectories(labelled)
    trajectory = Trajectory.open(path)
    assert (trajectory.taxonomy, validate(labelled).findings) == ("sample", ())
    name = path.relative_to(labelled).as_posix()
    counts = labels.confusion(labelled_tree, path, name, range(0, 6, 3))
    assert counts[:, 0].sum() == counts[:, 255].sum() == 0
    found = labels.ious(counts)
    assert len(found) > 7
    assert np.mean([*found.values()]) >= labels.TARGET
    moving = np.concatenate(
        [
            classes[np.isin(visible, dynamic)]
            for visible, dynamic, classes in zip(
                trajectory.visible_frames(),
                trajectory.dynamic_frames(),
                trajectory.label_frames(),
                strict=True,
            )
        ]
    )
    assert len(moving) > 200
    assert (moving == PERSON).mean() > 0.95
    # scipy reads the classes as a matrix like that of the visible cells.
    stored = sparse.load_npz(trajectory.file("labels"))
    assert (stored != 0).nnz == sparse.load_npz(trajectory.file("visible")).nnz


def test_validate_finds_wrong_classes(tmp_path, labelled):
    dataset = linked_copy(labelled, tmp_path / "out")
    (path,) = trajectories(dataset)
    file = Trajectory.open(path).file("labels")
    stored = sparse.load_npz(file)
    stored.data[5] = 99
    file.unlink()
    sparse.save_npz(file, stored)
    assert any("classes that its taxonomy lacks" in f.problem for f in validate(dataset).findings)
    stored.data[5] = 1
    file.unlink()
    sparse.save_npz(file, stored)
    problems = [f.problem for f in validate(dataset).findings]
    assert any("labels differs from the trajectory" in problem for problem in problems)


# Training items


def test_datasets_return_labels(labelled):
    keys = ("labels", "occupancy", "mask")
    dataset = OccupancyDataset(labelled, keys=keys)
    assert dataset.taxonomy == "sample"
    trajectory = Trajectory.open(trajectories(labelled)[0])
    rows = zip(trajectory.visible_frames(), trajectory.label_frames(), strict=True)
    for item, (visible, classes) in zip(dataset, rows, strict=False):
        found = item["labels"].numpy()
        np.testing.assert_array_equal(found.ravel()[visible], classes)
        np.testing.assert_array_equal(found == 255, ~item["mask"].numpy())
        np.testing.assert_array_equal((found > 0) & (found < 255), item["occupancy"].numpy())
    fine = dataset[3]["labels"].numpy()
    for stride in (2, 4):
        coarse = OccupancyDataset(labelled, keys=("labels",), voxel_stride=stride)[3]["labels"]
        np.testing.assert_array_equal(coarse, joined_classes(fine, stride))
    (streamed,) = [
        item
        for item in occgen_hub.OccupancyStream(labelled, keys=("labels", "frame_index"))
        if item["frame_index"] == 3
    ]
    np.testing.assert_array_equal(streamed["labels"], fine)
    history = OccupancyDataset(
        labelled, keys=("history",), history_keys=("labels",), history_len=1, history_step=1
    )
    np.testing.assert_array_equal(history[4]["history_labels"][0], fine)
    aligned = OccupancyDataset(
        labelled, keys=("history",), history_keys=("labels", "occupancy"), history_len=1,
        history_step=1, align_history=True,
    )[4]  # fmt: skip
    moved = aligned["history_labels"][0].numpy()
    there = aligned["history"][0].numpy()
    assert set(np.unique(moved[there])) <= set(np.unique(fine[(fine > 0) & (fine < 255)]))
    turned = occgen_hub.RotateYaw(30.0)
    augmented = OccupancyDataset(labelled, keys=("labels",), augment=[turned])[3]["labels"].numpy()
    assert set(np.unique(augmented)) <= set(np.unique(fine))
    assert len(np.unique(augmented)) > 4


def test_scene_target_has_labels_of_hidden_cells(labelled):
    """Hidden cells have the classes of the scene cells in all_occ.npz."""
    trajectory = Trajectory.open(trajectories(labelled)[0])
    arrays = np.load(trajectory.file("scene_occupancy"))
    cells = np.floor(arrays["data"].astype(float) / 0.02).astype(int)
    known = dict(zip(map(tuple, cells.tolist()), arrays["labels"].tolist(), strict=True))
    dataset = OccupancyDataset(labelled, keys=("labels", "grid_pose", "mask"), target="scene")
    seen = OccupancyDataset(labelled, keys=("labels", "mask"))
    item, labels = dataset[2], dataset[2]["labels"].numpy()
    mask, visible = seen[2]["mask"].numpy(), seen[2]["labels"].numpy()
    np.testing.assert_array_equal(labels[mask], visible[mask])
    hidden = np.argwhere((labels > 0) & (labels < 255) & ~mask)
    assert len(hidden) > 1000
    pose = item["grid_pose"].numpy().astype(float)
    centres = np.asarray(dataset.grid.lower) + (hidden + 0.5) * dataset.grid.voxel_size
    world = np.floor((centres @ pose[:3, :3].T + pose[:3, 3]) / 0.02).astype(int)
    expected = [known.get(cell, 0) for cell in map(tuple, world.tolist())]
    assert (labels[tuple(hidden.T)] == expected).mean() > 0.999  # Except for rounding.
    wide = OccupancyDataset(labelled, keys=("labels",), target="scene", voxel_stride=4)[2]
    np.testing.assert_array_equal(wide["labels"], joined_classes(labels, 4))


def test_labelled_and_unlabelled_scenes_can_be_mixed(tmp_path, labelled, dataset, monkeypatch):
    """Unlabelled cells are 254 in a mixed dataset, and 1 if no selected scene has labels."""
    root = linked_copy(labelled, tmp_path / "out")
    other = trajectories(dataset)[0]
    shutil.copytree(other, root / "plain" / "house" / "run")
    occgen_hub.finalize(root)
    both = OccupancyDataset(root, keys=("labels",))
    assert len(both.episodes) == 2
    plain = both.starts[both.episodes.index("plain/house/run")]
    assert set(np.unique(both[plain]["labels"])) == {0, UNLABELLED, 255}
    alone = OccupancyDataset(root, keys=("labels",), scenes=["plain/house"], target="scene")
    assert set(np.unique(alone[0]["labels"])) == {0, 1, 255}
    assert not validate(root).findings
    # `datasets` requires the same columns in all files of a table.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for folder, table, there in (
        (labelled, "occupancy", True),
        (root, "occupancy", False),
        (root, "index", False),
        (root, "scene_states", False),
    ):
        rows = datasets.load_dataset(str(folder), table, split="train")
        assert len(rows) >= 1
        assert ("labels" in rows.column_names) == there


# Card and exports


def test_card_lists_the_classes(labelled):
    card = (labelled / "README.md").read_text()
    assert "taxonomy `sample`: `labels`" in card
    assert f"{PERSON} person" in card


def test_exports_have_classes(tmp_path, labelled):
    """Each cell of 8 cm has the most common class of its 64 cells, mapped to OccScanNet."""
    remarks = export(labelled, tmp_path / "scannet", to="occscannet")
    assert any("taxonomy sample became" in remark for remark in remarks)
    assert not any("one class" in remark for remark in remarks)
    trajectory = Trajectory.open(trajectories(labelled)[0])
    states, table = trajectory.states(), load_taxonomy("sample").to_occscannet(255)
    low = 32 * states.blocks.min(axis=0).astype(int) - 400
    scene = np.full(32 * (np.ptp(states.blocks, axis=0) + 1) + 800, 255, np.uint8)
    scene[tuple((states.cells(np.uint8(0)) - low).T)] = 0
    scene[tuple((states.cells(np.uint8(1)) - low).T)] = states.classes
    names = (tmp_path / f"scannet/{name}_final.txt" for name in ("train", "test"))
    lines = [line for path in names for line in path.read_text().split()]
    assert len(lines) == 6
    for line in lines[::3]:
        data = pickle.loads((tmp_path / "scannet" / line).read_bytes())
        target = data["target_1_4"].transpose(1, 0, 2)
        first = np.rint(data["voxel_origin"] / 0.02).astype(int) - low
        here = scene[tuple(slice(a, a + 4 * n) for a, n in zip(first, target.shape, strict=True))]
        np.testing.assert_array_equal(target, table[joined_classes(here, 4)])
        assert {2, 3} < set(np.unique(target)) - {0, 255}
    export(labelled, tmp_path / "occ3d", to="occ3d")
    notes = json.loads((tmp_path / "occ3d" / "annotations.json").read_text())
    assert (notes["classes"]["0"], notes["classes"]["2"]) == ("others", "floor")
    first = next(iter(next(iter(notes["scene_infos"].values())).values()))
    semantics = np.load(tmp_path / "occ3d" / first["gt_path"])["semantics"]
    assert {2, 3, 17} <= set(np.unique(semantics)) <= {*range(12), 17}


def test_lerobot_export_has_labels(tmp_path, labelled):
    from occgen_hub import LeRobotOccupancyDataset

    export(labelled, tmp_path / "lerobot")
    name = "observation.occ.labels"
    frames = LeRobotOccupancyDataset(
        "made/up", tmp_path / "lerobot", occupancy=[name], dense=False,
        delta_timestamps={name: [-0.1, 0.0]},
    )  # fmt: skip
    expected = OccupancyDataset(labelled, keys=("labels",))
    found = frames[3][name]
    np.testing.assert_array_equal(found[0], expected[2]["labels"])
    np.testing.assert_array_equal(found[1], expected[3]["labels"])


def test_loaded_episode_has_labels(labelled):
    episode = occgen_hub.load_episode(trajectories(labelled)[0])
    item = OccupancyDataset(labelled, keys=("labels",))[1]
    np.testing.assert_array_equal(episode.frame(1).labels, item["labels"])


# Segmenters


class FloorBelow(Segmenter):
    """Labels the upper half of each image as wall and the lower half as floor, or as `below`."""

    name, taxonomy = "mine", "nyu40"

    def __init__(self, weights=None, device=None, below=2):
        self.below = below

    def segment(self, image):
        labels = np.ones(image.shape[:2], np.int64)
        labels[len(labels) // 2 :] = self.below
        return labels


@pytest.fixture
def installed_segmenters(monkeypatch):
    """Registers segmenters as if a package had installed them."""
    objects = {
        "mine": "test_labels:FloorBelow",
        "none": "test_labels:made_up",
        "wrong": "builtins:max",
    }
    points = {name: [EntryPoint(name, value, "any")] for name, value in objects.items()}
    others = plugins._points
    monkeypatch.setattr(
        plugins, "_points", lambda kind: points if kind == "segmenter" else others(kind)
    )


def test_segmenter_provides_missing_labels(tmp_path, sample_tree, installed_segmenters):
    options = {"limit": 1, "media": "none", "segmenter": "mine"}
    summary = occgen_hub.build("internnav", sample_tree, tmp_path / "out", **options)
    assert not summary.failures
    trajectory = Trajectory.open(trajectories(tmp_path / "out")[0])
    assert trajectory.taxonomy == "nyu40"
    assert trajectory.record["segmenter"] == {"name": "mine"}
    # The robot looks ahead: the lowest cells of its grid are the floor.
    visible, classes = next(trajectory.visible_frames()), next(trajectory.label_frames())
    rows = np.unravel_index(visible, trajectory.grid.shape)[1]
    assert set(np.unique(classes)) == {1, 2}
    assert rows[classes == 2].min() > rows[classes == 1].min()
    assert (classes[rows == rows.max()] == 2).all()
    assert validate(tmp_path / "out").valid
    again = occgen_hub.build("internnav", sample_tree, tmp_path / "out", **options)
    assert (again.present, again.built) == (1, 0)
    options["segmenter"] = None
    plain = occgen_hub.build("internnav", sample_tree, tmp_path / "out", **options)
    assert (plain.present, plain.built) == (0, 1)
    trajectory = Trajectory.open(trajectories(tmp_path / "out")[0])
    assert (trajectory.taxonomy, "segmenter" in trajectory.record) == (None, False)


def test_source_labels_take_precedence_over_the_segmenter(labelled_tree, sample_tree):
    def read(tree):
        builder = load_builder("internnav", tree)
        return builder.read(next(builder.episodes()))

    assert with_labels(read(labelled_tree), FloorBelow()).taxonomy == "sample"
    labelled = with_labels(read(sample_tree), FloorBelow())
    assert labelled.taxonomy == "nyu40"
    assert np.unique(labelled.read_labels(1)).tolist() == [1, 2]
    with pytest.raises(OccGenError, match="segmenter mine has the id 99"):
        with_labels(read(sample_tree), FloorBelow(below=99)).read_labels(0)


def test_unusable_segmenters_are_refused(tmp_path, sample_tree, installed_segmenters):
    for name, words in (("other", "installed are mine, none, wrong"), ("none", "cannot be opened")):
        with pytest.raises(UsageError, match=words):
            load_segmenter(name)
    with pytest.raises(UsageError, match="needs --segmenter"):
        occgen_hub.build("internnav", sample_tree, tmp_path / "o", segmenter_weights="w")


def test_cells_are_drawn_by_class(tmp_path, labelled, dataset):
    from occgen_hub.visual.render import RenderOptions, pictures, render

    trajectory = Trajectory.open(trajectories(labelled)[0])
    picture = next(pictures(trajectory, RenderOptions("ego", (480, 360), color="class")))
    floor, wall = (np.array(load_taxonomy("sample").classes[n].color) for n in (2, 3))
    shades = (
        picture.reshape(-1, 3) / np.linalg.norm(picture.reshape(-1, 3), axis=1).clip(1)[:, None]
    )
    bright = picture.reshape(-1, 3).sum(axis=1) > 250
    for color in (floor, wall):
        assert ((shades @ (color / np.linalg.norm(color)) > 0.9995) & bright).sum() > 1000
    with pytest.raises(UsageError, match="choose --view ego"):
        next(pictures(trajectory, RenderOptions("world", color="class")))
    plain = Trajectory.open(trajectories(dataset)[0])
    with pytest.raises(UsageError, match="has no labels"):
        render(plain, tmp_path / "out.png", RenderOptions("ego", color="class"))
