"""Moving cells in every reader, in validation and in pictures, and how well frames agree."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from scipy import sparse
from scipy.spatial import cKDTree

import occgen_hub
from occgen_hub.card import write_card
from occgen_hub.cli import cli
from occgen_hub.errors import DatasetError
from occgen_hub.exporting import export
from occgen_hub.loading import Trajectory, trajectories
from occgen_hub.occupancy.visibility import OCCUPIED, first_occupied
from occgen_hub.quality import Quality
from occgen_hub.shards import shards, write_shards
from occgen_hub.training import OccupancyDataset, collate
from occgen_hub.validation import validate
from occgen_hub.visual.colors import MOVING, faded
from occgen_hub.visual.frames import frames
from occgen_hub.visual.inspection import describe
from occgen_hub.visual.preview import from_camera, preview
from occgen_hub.visual.report import write_report

VISIBLE = "videos/chunk-000/observation.occ.view/occ_sequence.npz"
DYNAMIC = "videos/chunk-000/observation.occ.dynamic/dynamic_sequence.npz"
NAME = "observation.occ.dynamic"
FRAMES = 8


@pytest.fixture(scope="module")
def trajectory(people: Path) -> Trajectory:
    (path,) = trajectories(people)
    return Trajectory.open(path)


@pytest.fixture(scope="module")
def truth(trajectory: Trajectory) -> list[np.ndarray]:
    """The moving cells of each frame, read with scipy alone."""
    matrix = sparse.load_npz(trajectory.path / DYNAMIC)
    assert matrix.shape == (FRAMES, trajectory.grid.cells)
    return [matrix[t].indices for t in range(FRAMES)]


@pytest.fixture
def mine(people: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(people, tmp_path / "mine"))


# Readers


def test_moving_cells_lie_on_the_people(people_tree, trajectory, truth):
    """The moving cells lie on the people's mesh of the ground truth."""
    assert sum(len(cells) > 200 for cells in truth) >= FRAMES - 2
    name = trajectory.record["source"]["episode"]
    people = np.load(people_tree / "ground_truth" / f"{name}.npz")
    rng, near, count = np.random.default_rng(0), 0, 0
    for t, cells in enumerate(truth):
        corners = people["people_vertices"][t][people["people_faces"]].astype(float)
        on_mesh = sample_triangles(corners, 100_000, rng)
        pose = trajectory.world_from_camera()[t]
        centres = trajectory.grid.centres(cells) @ pose[:3, :3].T + pose[:3, 3]
        near += int((cKDTree(on_mesh).query(centres)[0] < 0.05).sum())
        count += len(cells)
    assert near / count > 0.97


def sample_triangles(corners: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, 3) points spread evenly over triangles of (n, 3, 3) corners."""
    a, b, c = corners.transpose(1, 0, 2)
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    which = rng.choice(len(corners), count, p=area / area.sum())
    u, v = np.sort(rng.random((2, count)), axis=0)
    return a[which] * u[:, None] + b[which] * (v - u)[:, None] + c[which] * (1 - v)[:, None]


def test_moving_cells_are_visible(trajectory, truth):
    visible = sparse.load_npz(trajectory.path / VISIBLE)
    for t, cells in enumerate(truth):
        assert np.isin(cells, visible[t].indices).all()


def test_all_readers_match_scipy(people, trajectory, truth, tmp_path):
    from datasets import load_dataset

    dense = OccupancyDataset(people, keys=("dynamic", "occupancy"))
    flat = OccupancyDataset(people, keys=("dynamic",), dense=False)
    episode = occgen_hub.load_episode(trajectory.path)
    rows = load_dataset(
        str(people), "occupancy", split="train", streaming=True, cache_dir=str(tmp_path)
    )
    shape = trajectory.grid.shape
    readers = zip(trajectory.dynamic_frames(), rows, strict=True)
    for t, (columns, row) in enumerate(readers):
        np.testing.assert_array_equal(columns, truth[t])
        assert row["dynamic"] == truth[t].tolist()
        cells = dense[t]["dynamic"]
        assert (cells.shape, cells.dtype) == (shape, torch.bool)
        np.testing.assert_array_equal(np.flatnonzero(cells), truth[t])
        assert not (cells & ~dense[t]["occupancy"]).any()
        indices = flat[t]["dynamic"]
        assert indices.dtype == torch.int32
        np.testing.assert_array_equal(np.ravel_multi_index(indices.numpy().T, shape), truth[t])
        moving = episode.frame(t).dynamic
        assert (moving.shape, moving.dtype) == (shape, np.bool_)
        np.testing.assert_array_equal(np.flatnonzero(moving), truth[t])


def test_collate_numbers_sparse_moving_cells_and_stacks_dense_ones(people, truth):
    flat = OccupancyDataset(people, keys=("dynamic",), dense=False)
    batch = collate([flat[2], flat[5]])["dynamic"]
    for number, t in enumerate((2, 5)):
        own = batch[batch[:, 0] == number][:, 1:]
        np.testing.assert_array_equal(own, flat[t]["dynamic"])
    assert len(batch) == len(truth[2]) + len(truth[5])
    dense = OccupancyDataset(people, keys=("dynamic",))
    assert collate([dense[2], dense[5]])["dynamic"].shape == (2, *dense.grid.shape)


def test_moving_cells_are_returned_only_on_request(people):
    assert "dynamic" not in OccupancyDataset(people)[0]


def test_lerobot_items_contain_moving_cells(people, truth, tmp_path):
    pytest.importorskip("lerobot")
    from occgen_hub import LeRobotOccupancyDataset

    export(people, tmp_path / "lerobot")
    items = LeRobotOccupancyDataset(
        "local/people",
        tmp_path / "lerobot",
        occupancy=(NAME,),
        dense=False,
        delta_timestamps={NAME: [-0.1, 0.0]},
    )
    shape = items.occupancy.grid.shape
    found = items[3][NAME].numpy()
    for number, t in enumerate((2, 3)):
        own = found[found[:, 0] == number][:, 1:]
        np.testing.assert_array_equal(np.ravel_multi_index(own.T, shape), truth[t])
    alone = LeRobotOccupancyDataset("local/people", tmp_path / "lerobot")
    assert NAME not in alone[3]


# Without motion


def test_static_dataset_has_no_dynamic_file_and_an_empty_column(dataset):
    for path in trajectories(dataset):
        trajectory = Trajectory.open(path)
        assert not (path / DYNAMIC).parent.exists()
        assert trajectory.record["quality"]["moving"] == 0
        rows = list(trajectory.dynamic_frames())
        assert [len(columns) for columns in rows] == [0] * len(trajectory.world_from_camera())
    for shard in shards(dataset):
        column = pq.read_table(shard)["dynamic"].to_pylist()
        assert column
        assert column == [[]] * len(column)
    items = OccupancyDataset(dataset, keys=("dynamic",))
    assert not any(item["dynamic"].any() for item in items)
    report = validate(dataset)
    assert (report.findings, report.warnings) == ((), ())


def without_column(shard: Path) -> None:
    """Rewrite a shard in format 1, which has no column dynamic."""
    file = pq.ParquetFile(shard)
    table = file.read().drop_columns(["dynamic"])
    origin = json.loads(file.metadata.metadata[b"occgen"]) | {"format": 1}
    metadata = {b"occgen": json.dumps(origin).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), shard, row_group_size=8)


def test_shards_of_format_1_read_as_static(mine):
    (shard,) = shards(mine)
    without_column(shard)
    dense = OccupancyDataset(mine, keys=("dynamic", "occupancy"))
    assert dense[3]["occupancy"].any()
    assert not any(dense[t]["dynamic"].any() for t in range(FRAMES))
    flat = OccupancyDataset(mine, keys=("dynamic",), dense=False)
    assert flat[3]["dynamic"].shape == (0, 3)
    (finding,) = validate(mine).findings
    assert finding.file == str(shard)
    assert write_shards(mine) == 1
    assert validate(mine).findings == ()
    assert OccupancyDataset(mine, keys=("dynamic",))[3]["dynamic"].any()


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda t: [[-1], *t[1:]], "dynamic cells are out of order or outside the grid"),
        (lambda t: [t[0][::-1], *t[1:]], "dynamic cells are out of order or outside the grid"),
        (lambda t: [None, *t[1:]], "not whole"),
    ],
)
def test_a_damaged_column_is_named(mine, edit, problem):
    (shard,) = shards(mine)
    table = pq.read_table(shard)
    at, kind = table.column_names.index("dynamic"), table.schema.field("dynamic")
    values = pa.array(edit(table["dynamic"].to_pylist()), kind.type)
    pq.write_table(table.set_column(at, kind, values), shard, row_group_size=8)
    with pytest.raises(DatasetError, match=problem) as raised:
        OccupancyDataset(mine, keys=("dynamic",))[0]
    assert str(shard) in str(raised.value)


def test_a_column_of_another_type_is_named(mine):
    (shard,) = shards(mine)
    table = pq.read_table(shard)
    at = table.column_names.index("dynamic")
    texts = pa.array(["x"] * FRAMES)
    pq.write_table(table.set_column(at, "dynamic", texts), shard)
    with pytest.raises(DatasetError, match="column dynamic is not of list"):
        OccupancyDataset(mine, keys=("occupancy",))[0]


# Validation


def saved(change: Callable[[sparse.csr_matrix], Any]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        sparse.save_npz(path, change(sparse.load_npz(path)))

    return damage


def invisible(matrix: sparse.csr_matrix) -> sparse.csr_matrix:
    """Replace the first moving cell by the first cell of the grid, which no camera sees."""
    indices = matrix.indices.copy()
    indices[0] = 0
    return sparse.csr_matrix((matrix.data, indices, matrix.indptr), matrix.shape)


def twos(matrix: sparse.csr_matrix) -> sparse.csr_matrix:
    return sparse.csr_matrix((matrix.data * np.uint8(2), matrix.indices, matrix.indptr))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (saved(invisible), "frame 0: moving cells are not visible in occ.view"),
        (saved(lambda m: m[:5]), "expected (8, 5000000)"),
        (saved(lambda m: m[:, :4_999_999]), "expected (8, 5000000)"),
        (saved(twos), "has values other than 1"),
        (lambda path: path.write_bytes(b"no"), "cannot be read"),
    ],
)
def test_a_tampered_file_is_a_finding(mine, damage, words):
    (path,) = trajectories(mine)
    damage(path / DYNAMIC)
    report = validate(mine)
    matching = [finding for finding in report.findings if words in finding.problem]
    assert matching
    assert {finding.file for finding in matching} == {str(path / DYNAMIC)}


def test_readers_name_a_file_of_wrong_length(mine):
    (path,) = trajectories(mine)
    saved(lambda matrix: matrix[:5])(path / DYNAMIC)
    with pytest.raises(DatasetError, match=r"dynamic_sequence\.npz: has 5 rows for 8 frames"):
        list(Trajectory.open(path).dynamic_frames())
    with pytest.raises(DatasetError, match=r"dynamic_sequence\.npz"):
        preview(Trajectory.open(path))


def test_missing_file_is_a_finding(mine):
    (path,) = trajectories(mine)
    (path / DYNAMIC).unlink()
    assert str(path / DYNAMIC) in {finding.file for finding in validate(mine).findings}


# How well the frames agree


def change_quality(root: Path, **figures: Any) -> Path:
    """Change the quality in the dataset's record."""
    (path,) = trajectories(root)
    mark = path / "meta/occgen.json"
    record = json.loads(mark.read_text())
    record["quality"] |= figures
    mark.write_text(json.dumps(record))
    write_shards(root)
    return root


def test_disagreeing_frames_give_warnings_but_no_finding(mine):
    assert validate(mine).warnings == ()
    change_quality(mine, contradicted=0.41, shift=0.02)
    report = validate(mine)
    assert report.valid
    first, second = report.warnings
    assert str(trajectories(mine)[0]) in first
    assert "41% of the measured points" in first
    assert "20 mm and" in second
    assert "aligning the frames did not help" in second
    result = CliRunner().invoke(cli, ["validate", str(mine)])
    assert result.exit_code == 0
    assert result.stderr.count("Warning: ") == 2
    result = CliRunner().invoke(cli, ["validate", "--json", str(mine)])
    assert json.loads(result.stdout)["warnings"] == list(report.warnings)


def test_many_disagreeing_trajectories_give_one_warning(mine):
    change_quality(mine, contradicted=0.41)
    (path,) = trajectories(mine)
    shutil.copytree(path, path.with_name("trajectory_1"))
    (warning,) = validate(mine).warnings
    assert warning.endswith("(and 1 more trajectories).")


def test_quality_is_read_back_from_a_record(trajectory):
    quality = Quality.from_record(trajectory.record)
    assert quality is not None
    written = dict(trajectory.record["quality"])
    del written["moving"]
    assert quality.record() == written


@pytest.mark.parametrize(
    "figures",
    [None, 3, [], {}, {"sigma": [1, 2]}, {"sigma": "abc"}, {"sigma": [1, 2, float("nan")]}],
)
def test_invalid_quality_in_a_record_is_ignored(trajectory, figures):
    assert Quality.from_record({}) is None
    whole = trajectory.record["quality"]
    mixed = whole | figures if isinstance(figures, dict) and figures else figures
    assert Quality.from_record({"quality": mixed}) is None


# Text and pictures


def test_inspect_reports_motion_and_agreement_of_frames(people, dataset, mine, truth):
    text = "\n".join(describe(people))
    mean = sum(map(len, truth)) / FRAMES
    assert f", {mean:,.0f} of them moving" in text
    change_quality(mine, sigma=[0.0012, 0.0034, 0.0111], contradicted=0.125, supports=7.0)
    changed = "\n".join(describe(mine))
    assert "frames: 12.5% of the measured points contradicted" in changed
    assert "depth: noise 1.2 / 3.4 / 11.1 mm at 1 / 2 / 4 m" in changed
    assert "seen by 7 frames" in changed
    assert "moving" not in "\n".join(describe(dataset))


def test_report_has_only_columns_with_values(people, dataset, tmp_path):
    heads = {}
    for name, root in {"people": people, "still": dataset}.items():
        write_report(root, tmp_path / f"{name}.html")
        text = (tmp_path / f"{name}.html").read_text()
        heads[name] = re.findall(r'data-kind="number"><button>([^<]*)', text)
        drawn = [
            Image.open(io.BytesIO(base64.b64decode(uri))).convert("RGB")
            for uri in re.findall(r"data:image/png;base64,([^\"]*)", text)
        ]
        assert len(drawn) == 2 * len(trajectories(root))
        for picture in drawn:  # The legends list moving cells.
            assert pink(np.asarray(picture)[270:]).any() == (name == "people")
    assert "Depth noise at 4 m, mm" in heads["people"]
    assert "Points contradicted, %" in heads["people"]
    moving = {"Moving per frame", "Moving of occupied, %"}
    assert set(heads["people"]) - set(heads["still"]) == moving
    for given in heads.values():  # The cameras are the source's: nothing was aligned.
        assert not [head for head in given if "lign" in head]


def test_card_reports_motion_and_median_figures(mine, dataset):
    change_quality(mine, sigma=[0.0012, 0.0034, 0.0111], contradicted=0.125)
    text = write_card(mine).read_text()
    assert "Something moves in 1 trajectory" in text
    assert "depth noise 1.2, 3.4, 11.1 mm at 1, 2, 4 m; 12.5% of the measured points" in text
    assert "Something moves" not in (dataset / "README.md").read_text()


def pink(picture: np.ndarray | Image.Image) -> np.ndarray:
    """(H, W) bool: the pixels with the colour of moving cells, at any brightness."""
    red, green, blue = np.moveaxis(np.asarray(picture).astype(float), -1, 0)
    ratio = np.array(MOVING) / MOVING[0]
    level = np.maximum(red, 1)
    close = (abs(green / level - ratio[1]) < 0.05) & (abs(blue / level - ratio[2]) < 0.05)
    return close & (red > 80)


def test_picture_of_a_frame_shows_moving_cells_in_their_colour(trajectory, truth):
    frame = int(np.argmax([len(cells) for cells in truth]))
    picture = from_camera(trajectory, frame)
    state = np.zeros(trajectory.grid.cells, np.uint8)
    columns = list(trajectory.visible_frames())[frame]
    state[columns] = OCCUPIED
    K, size = trajectory.intrinsics()[frame], trajectory.image_size
    moving = np.isin(first_occupied(trajectory.grid, K, size, state), truth[frame])
    assert moving.sum() > 500
    np.testing.assert_array_equal(pink(picture), moving)


def test_past_and_present_and_moving_cells_differ(trajectory, truth):
    """Each kind has the colours that the legend of the world view gives it."""
    from occgen_hub.visual.heights import Heights
    from occgen_hub.visual.world import WorldView, world_legend

    heights = Heights(trajectory.cloud().points, trajectory.world_from_camera())
    bar, *marks = world_legend(heights.shade, heights.high - heights.low, 12, moving=True)
    assert any((np.asarray(mark) == MOVING).all(axis=2).sum() > 60 for mark in marks)
    shown = {tuple(color) for color in np.asarray(bar).reshape(-1, 3).tolist()}
    metres = np.linspace(0.05, 0.95, 50) * (heights.high - heights.low)
    now = heights.shade(metres).astype(int)
    for colors in (now, faded(now)):
        near = [min(np.abs(np.subtract(c, s)).max() for s in shown) for c in colors.tolist()]
        assert max(near) <= 3
    assert np.abs(now - faded(now)).max(axis=1).min() > 30
    # Cells of past frames change the picture of the frame.
    frame = list(frames(trajectory, 4, 1))[-1]
    view = WorldView(trajectory, (480, 270))
    before = view(replace(frame, past=()), None)
    assert (before != view(frame, None)).any(axis=2).sum() > 20
    view.close()


def test_legend_lists_moving_cells_only_if_something_moves(trajectory, dataset):
    picture = np.asarray(preview(trajectory))
    for left in (0, 640):  # The legends of both lower panels.
        assert pink(picture[690:, left : left + 640]).any()
    still = preview(Trajectory.open(trajectories(dataset)[0]))
    assert not pink(np.asarray(still)[360:]).any()


@pytest.mark.parametrize("view", ["ego", "world", pytest.param("panels", marks=pytest.mark.long)])
def test_render_shows_moving_cells(view, trajectory, dataset, truth):
    from occgen_hub.visual.render import RenderOptions, pictures

    frame = int(np.argmax([len(cells) for cells in truth]))
    for number, picture in enumerate(pictures(trajectory, RenderOptions(view, (960, 540)))):
        assert (picture == MOVING).all(axis=2).any()  # The legend.
        if number == frame:
            assert pink(picture[80:440]).sum() > 200
    still = Trajectory.open(trajectories(dataset)[0])
    picture = next(pictures(still, RenderOptions(view, (960, 540))))
    assert not (picture == MOVING).all(axis=2).any()


def test_world_view_omits_moving_cells_of_past_frames(trajectory):
    """Only static cells of past frames are shown."""
    from occgen_hub.visual.world import WorldView

    view = WorldView(trajectory, (640, 360))
    alone = [view(frame, None) for frame in frames(trajectory)]
    later = [view(frame, None) for frame in frames(trajectory, 4, 1)]
    view.close()
    for now, with_past in zip(alone, later, strict=True):
        assert pink(with_past).sum() <= pink(now).sum() + 5


def test_rerun_recording_has_moving_cells_as_separate_entities(
    trajectory, dataset, truth, tmp_path
):
    experimental = pytest.importorskip("rerun.experimental")
    still = trajectories(dataset)[0]
    paths = {}
    for name, folder in {"people": trajectory.path, "still": still}.items():
        place = tmp_path / f"{name}.rrd"
        command = [sys.executable, "-m", "occgen_hub", "view", folder, "--save", place]
        subprocess.run(list(map(str, command)), check=True, capture_output=True)
        store = experimental.RrdReader(place).store()
        paths[name] = {c.entity_path for c in store.schema().component_columns()}
        if name == "still":
            continue
        counts = {}
        for chunk in store.stream():
            if chunk.entity_path == "/cells/moving":
                batch = chunk.to_record_batch()
                if "frame" not in batch.schema.names:
                    continue
                (values,) = (n for n in batch.schema.names if n.endswith("scalars"))
                numbers = batch.column("frame").to_pylist()
                for number, value in zip(numbers, batch.column(values).to_pylist(), strict=True):
                    counts[number] = value[0]
        assert counts == {t: len(cells) for t, cells in enumerate(truth)}
    assert {"/world/camera/moving", "/cells/moving"} <= paths["people"]
    assert not {"/world/camera/moving", "/cells/moving"} & paths["still"]
