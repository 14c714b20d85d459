"""The real InternData-N1 trajectory, built with the command line, if the files are present."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial import cKDTree

from occgen_hub.geometry.ply import read_ply
from occgen_hub.loading import Trajectory, trajectories


def occgen_hub(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "occgen_hub", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def built(real_tree, tmp_path_factory):
    out = tmp_path_factory.mktemp("real") / "out"
    result = occgen_hub("build", "--source", "internnav", "--input", real_tree, "--output", out)
    assert result.returncode == 0, result.stderr
    return out, result


def test_each_fault_of_the_real_files_gives_a_note_of_one_line(built):
    notes = [line for line in built[1].stderr.splitlines() if line.startswith("note")]
    for pattern in (
        r"104 frames.*length 104.*parquet has 52",
        r"declares timestamp, frame_index, episode_index, task_index",
        r"30 fps, the video has 10",
        r"480 x 272, the images 480 x 270",
        r"JSON inside strings",
    ):
        assert sum(bool(re.search(pattern, line)) for line in notes) == 1, pattern
    assert len(notes) == 5


def test_built_dataset_is_valid(built):
    result = occgen_hub("validate", built[0])
    assert result.returncode == 0, result.stdout
    assert "1 trajectory, 52 frames: valid." in result.stdout


def test_tasks_are_plain_instructions(built):
    tasks = Trajectory.open(trajectories(built[0])[0]).tasks()
    assert len(tasks) == 2
    assert tasks[0].startswith("Gliding forward")
    assert not any("{" in task for task in tasks)


def test_scene_cells_lie_on_the_ground_truth(built):
    folder = trajectories(built[0])[0]
    truth = read_ply(folder / "data/chunk-000/path.ply").points
    cells = np.load(folder / "data/chunk-000/all_occ.npz", allow_pickle=False)["data"]
    low, high = truth[:, 2].min(), truth[:, 2].max()
    cells = cells[(cells[:, 2] >= low) & (cells[:, 2] <= high)]
    distance, _ = cKDTree(truth).query(cells)
    assert len(cells) > 30_000
    assert np.median(distance) <= 0.035
    assert np.quantile(distance, 0.95) <= 0.07


def test_build_takes_less_than_a_minute(built):
    """A loose bound that catches large regressions; scripts/bench measures the time."""
    seconds = float(re.search(r"52 frames in ([\d.]+) s", built[1].stdout).group(1))
    assert seconds < 60


def test_record_has_all_notes(built):
    record = json.loads((trajectories(built[0])[0] / "meta/occgen.json").read_text())
    assert len(record["notes"]) == 5
