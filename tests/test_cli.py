"""The command line as users see it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from click.testing import CliRunner
from commands import occgen_hub
from PIL import Image

from occgen_hub.cli import cli, main
from occgen_hub.cli.command import by_folder, say_by_folder
from occgen_hub.loading import Trajectory, trajectories
from occgen_hub.visual.colors import ramp


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from occgen_hub.cli import cli; cli(['--help'], standalone_mode=False); "
        "heavy = {'torch', 'lerobot', 'open3d', 'datasets', 'numpy', 'numba', 'pyarrow', "
        "'huggingface_hub'}; "
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_help_is_quick():
    """The aim is 0.3 s. The best of five runs counts, with tolerance for a busy machine."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        assert occgen_hub("--help").returncode == 0
        times.append(time.perf_counter() - start)
    assert min(times) < 0.6


@pytest.mark.parametrize(
    "command",
    [
        "sample",
        "build",
        "finalize",
        "validate",
        "inspect",
        "push",
        "visualize",
        "render",
        "view",
        "report",
    ],
)
def test_every_command_has_help_with_an_example(command):
    result = CliRunner().invoke(cli, [command, "--help"])
    assert result.exit_code == 0
    assert f"occgen-hub {command}" in result.output.split("Example")[1]


def test_build_accepts_the_output_of_sample(tmp_path):
    made = occgen_hub("sample", tmp_path / "rooms", "--trajectories", "1", "--frames", "2")
    assert made.returncode == 0, made.stderr
    assert "Next: occgen-hub build" in made.stdout
    built = occgen_hub("build", "--input", tmp_path / "rooms", "--output", tmp_path / "out")
    assert built.returncode == 0, built.stderr
    assert "1 built, 0 already there, 0 failed of 1 episodes; 2 frames" in built.stdout


def test_validate_reports_valid_or_the_problem(dataset, tmp_path):
    good = occgen_hub("validate", dataset, "--json")
    assert good.returncode == 0
    report = json.loads(good.stdout)
    assert report["valid"]
    assert report["trajectories"] == 2
    bad = occgen_hub("validate", tmp_path)
    assert bad.returncode == 1
    assert "has no trajectories; give the folder" in bad.stdout


def test_inspect_prints_facts_and_draws_a_preview(dataset, tmp_path):
    picture = tmp_path / "look.png"
    result = occgen_hub("inspect", dataset, "--preview", picture)
    assert result.returncode == 0, result.stderr
    assert "2 trajectories" in result.stdout
    assert "200 x 125 x 200 cells" in result.stdout
    first = Trajectory.open(trajectories(dataset)[0])
    share = np.mean([cells.mean() for _, cells in zip(range(200), first.observed(), strict=False)])
    assert f"world: up is z; a frame observes {share:.0%} of its cells" in result.stdout
    image = np.asarray(Image.open(picture))
    assert image.shape == (720, 1280, 3)
    quarters = [image[r : r + 360, c : c + 640] for r in (0, 360) for c in (0, 640)]
    assert all(quarter.std() > 10 for quarter in quarters)
    for quarter in quarters[1:]:  # Depth and both height views have a scale at the bottom.
        assert any(_is_scale(line) for line in quarter[324:])


def _is_scale(line: np.ndarray) -> bool:
    """Whether a row of pixels contains the whole color ramp in order."""
    wanted = ramp(np.linspace(0, 1, 30)).astype(int)
    places = np.abs(line.astype(int)[None] - wanted[:, None]).max(axis=2)
    first = places.argmin(axis=1)
    steps = np.diff(first)
    return bool(places.min(axis=1).max() < 24 and ((steps >= 0).all() or (steps <= 0).all()))


def test_inspect_without_media_shows_the_cloud(sample_tree, tmp_path):
    out = tmp_path / "o"
    options = ("--media", "none", "--limit", "1")
    built = occgen_hub("build", "--input", sample_tree, "--output", out, *options)
    assert built.returncode == 0, built.stderr
    picture = tmp_path / "look.png"
    assert occgen_hub("inspect", tmp_path / "o", "--preview", picture).returncode == 0
    assert np.asarray(Image.open(picture))[:360, 640:].std() > 10


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "DATASET", "--frame", "99"], "numbered from 0"),
        (["inspect", "DATASET", "--trajectory", "no/such/one"], "was not found"),
        (["inspect", "DATASET", "--preview", "a.jpg"], "ends in .png"),
        (["inspect", "EMPTY"], "has no trajectories"),
        (["inspect", "SAMPLE"], "has trajectories, but none with"),
        (["report", "SAMPLE"], "occgen-hub build --input SAMPLE wrote"),
        (["visualize", "SAMPLE", "OUT"], "has trajectories, but none with"),
        (["visualize", "a/b/c", "OUT"], "with --input, the id of an episode"),
        (["view", "DATASET"], "name one, for example"),
        (["build", "--input", "EMPTY", "--output", "EMPTY/x"], "inside the input"),
        (["build", "--input", "EMPTY", "--output", "OUT"], "holds no episode"),
        (["build", "--input", "DATASET/no", "--output", "OUT"], "does not exist"),
        (["build", "--input", "EMPTY", "--output", "OUT", "--source", "xyz"], "internnav"),
        (["build", "--input", "SAMPLE", "--output", "OUT", "--engine", "xyz"], "rgbd"),
        (["build", "--input", "EMPTY", "--output", "OUT", "--set", "voxelsize=1"], "voxel_size"),
        (
            ["build", "--input", "EMPTY", "--output", "OUT", "--set", "voxel_size=-1"],
            "voxel_size: must be greater than or equal to 0.0001 (edge of an occupancy cell, met",
        ),
        (
            ["build", "--input", "EMPTY", "--output", "OUT", "--set", "pc_range=[1,2]"],
            "pc_range: expected 6 numbers in square brackets",
        ),
        (["build", "--input", "EMPTY", "--output", "OUT", "--set", "mesh=maybe"], "true or false"),
        (
            ["build", "--input", "EMPTY", "--output", "OUT", "--set", "interval=yes"],
            "interval: cannot be true or false",
        ),
        (["build", "--input", "EMPTY", "--output", "OUT", "--set", " =1"], "expected key=value"),
        (["build", "--input", "SAMPLE", "--output", ""], "'--output': is empty"),
        (["build", "--output", "OUT"], "--input"),
        (["build", "--input", "SAMPLE", "--output", "OUT", "--shard", "3/3"], "numbered from 0"),
        (["build", "--input", "SAMPLE", "--output", "OUT", "--shard", "1-3"], "expected I/N"),
        (
            ["build", "--input", "SAMPLE", "--output", "OUT", "--mem-per-cpu", "4"],
            "--mem-per-cpu: is not used by --executor local; leave it out or choose one of slurm",
        ),
        (
            [
                "build",
                "--input",
                "SAMPLE",
                "--output",
                "OUT",
                "--executor",
                "datatrove",
                "--cpus-per-task",
                "4",
            ],
            "--cpus-per-task: is not used by --executor datatrove",
        ),
        (
            [
                "build",
                "--input",
                "SAMPLE",
                "--output",
                "OUT",
                "--executor",
                "datatrove",
                "--shard",
                "0/2",
            ],
            "makes shards itself",
        ),
        (["finalize", "EMPTY"], "has no .logs/build.json"),
        (["finalize", "OUT"], "has no .logs/build.json"),
        (["sample", "DATASET"], "DATASET"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else None,
)
def test_wrong_usage_exits_with_2_and_names_the_problem(
    sample_tree, dataset, tmp_path, arguments, words, monkeypatch, capsys
):
    places = {
        "SAMPLE": str(sample_tree),
        "DATASET": str(dataset),
        "EMPTY": str(tmp_path / "empty"),
        "OUT": str(tmp_path / "o"),
    }
    (tmp_path / "empty").mkdir()

    def placed(text: str) -> str:
        for name, place in places.items():
            text = text.replace(name, place)
        return text

    monkeypatch.setattr(sys, "argv", ["occgen-hub", *map(placed, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert placed(words) in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_long_lists_are_summarized_by_folder(capsys):
    paths = {f"g/s{s}/t/videos/{k}/{n}.jpg": n for s in range(9) for k in "ab" for n in range(50)}
    paths |= {"README.md": 7}
    folders = by_folder(paths)
    assert list(folders) == [".", *(f"g/s{s}/t/videos/{k}" for s in range(9) for k in "ab")]
    assert sum(map(len, folders.values())) == len(paths)
    assert len(by_folder(f"g{n}/a/b" for n in range(99))) == 99
    assert by_folder([]) == {}

    lines = {path: f"line {n}" for path, n in paths.items()}
    assert say_by_folder(lines, lambda names: f"{len(names)} files", verbose=False)
    lines_shown = capsys.readouterr().out.splitlines()
    assert lines_shown[:2] == ["1 files  .", "50 files  g/s0/t/videos/a"]
    assert lines_shown[-1] == "--verbose lists all 901."
    assert not say_by_folder(lines, lambda _: "", verbose=True)
    assert capsys.readouterr().out.splitlines() == list(lines.values())
    say_by_folder({f"g{n}/a/b": "" for n in range(99)}, lambda _: "1", verbose=False)
    assert "and 79 more folders" in capsys.readouterr().out


def test_dry_run_of_many_episodes_counts_them_by_scene(sample_tree, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[say_by_folder.__module__], "MOST_LINES", 1)
    command = ["build", "--input", str(sample_tree), "--output", str(tmp_path / "o"), "--dry-run"]
    output = CliRunner().invoke(cli, command, catch_exceptions=False).stdout
    assert re.search(r"^ +2 of +2 to build  sample_zed", output, re.M), output
    assert "\n2 to build: does not exist\n" in output
    assert "trajectory_0" not in output
    output = CliRunner().invoke(cli, [*command, "--verbose"], catch_exceptions=False).stdout
    assert output.count("trajectory_") == 2


def test_no_command_has_duplicate_options():
    for name, command in cli.commands.items():
        options = [text for p in command.params for text in (*p.opts, *p.secondary_opts)]
        assert len(set(options)) == len(options), f"{name}: {sorted(options)}"
