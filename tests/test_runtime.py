"""Builds that are stopped at any moment and run again give the same bytes."""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import RUN_FILES, Tree, start, tree

from occgen_hub import cli
from occgen_hub.builder import EpisodeRef, load_builder
from occgen_hub.builders.internnav import InternNavBuilder
from occgen_hub.config import load_config
from occgen_hub.episode import Episode
from occgen_hub.episode_build import Built, Settings
from occgen_hub.errors import DatasetError
from occgen_hub.index import bucket
from occgen_hub.job import Job, list_episodes
from occgen_hub.loading import trajectories
from occgen_hub.runtime.build import build_dataset
from occgen_hub.runtime.finalize import unfinished
from occgen_hub.runtime.results import Listener, Summary
from occgen_hub.sample import make_sample

COARSE = "voxel_size=0.1"
RECORD = "meta/occgen.json"
RGB = "videos/chunk-000/observation.images.rgb"
DEPTH = "videos/chunk-000/observation.images.depth"
VIDEO = "videos/chunk-000/observation.video.trajectory"
TABLE = "data/chunk-000/episode_000000.parquet"
FIRST, SECOND, THIRD = (
    "sample_zed/house_000/trajectory_0",
    "sample_zed/house_000/trajectory_1",
    "sample_zed/house_001/trajectory_0",
)
Command = Callable[..., tuple[int, str, str]]


# Sources, expected results and helpers


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three trajectories in two scenes, of 3, 2 and 4 frames. Tests must not change it."""
    out = tmp_path_factory.mktemp("source") / "tree"
    make_sample(out, trajectories=3, frames=3)
    return out


@pytest.fixture(scope="session")
def without_video(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first trajectory without its mp4; the build encodes one from the images."""
    out = tmp_path_factory.mktemp("without_video") / "tree"
    shutil.copytree(source / FIRST, out / FIRST)
    shutil.rmtree(out / FIRST / VIDEO)
    return out


@pytest.fixture(scope="session")
def uninterrupted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset from an uninterrupted build in one process. Tests must not change it."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    done = finish(start_build(source, out))
    assert done.returncode == 0, done.stderr
    pattern = r"^3 built, 0 already there, 0 failed of 3 episodes; 9 frames in .* frames/s\.$"
    assert re.search(pattern, done.stdout, re.MULTILINE)
    return out


@pytest.fixture(scope="session")
def expected(uninterrupted: Path) -> Tree:
    return tree(uninterrupted)


@pytest.fixture
def source_copy(source: Path, tmp_path: Path) -> Path:
    """A copy of the source that a test may change."""
    return Path(shutil.copytree(source, tmp_path / "mine"))


@pytest.fixture
def out(uninterrupted: Path, tmp_path: Path) -> Path:
    """A copy of the dataset, modification times included, that a test may change."""
    return Path(shutil.copytree(uninterrupted, tmp_path / "out"))


@pytest.fixture
def command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Command]:
    """Runs `occgen-hub build` in this process; returns exit code, output and errors."""
    before = {number: signal.getsignal(number) for number in cli.STOPS}
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(cli, "end_at_once", sys.exit)  # The test process must not end.

    def call(source: Path, out: Path, *options: str) -> tuple[int, str, str]:
        arguments = ["build", "--input", str(source), "--output", str(out), "--set", COARSE]
        monkeypatch.setattr(sys, "argv", ["occgen-hub", *arguments, *options])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        output = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code, output.out, output.err

    yield call
    for number, handler in before.items():
        signal.signal(number, handler)


def build(
    source: Path, out: Path, *settings: str, workers: int = 1, listener: Listener | None = None,
    builder: InternNavBuilder | None = None, **choices: Any,
) -> Summary:  # fmt: skip
    """A build in this process."""
    chosen = Settings(config=load_config(None, settings or (COARSE,)), **choices)
    builder = builder or InternNavBuilder(source)
    return build_dataset(Job(builder, list_episodes(builder), out, chosen), workers, listener)


def counts(summary: Summary) -> tuple[int, int, int]:
    """(built, already there, failed)"""
    return summary.built, summary.present, len(summary.failures)


def file_marks(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and modification time of each file, which change when it is written again."""
    stats = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {
        path.relative_to(folder).as_posix(): (stat.st_ino, stat.st_mtime_ns)
        for path, stat in stats.items()
        if path.relative_to(folder).parts[0] not in RUN_FILES
    }


def rebuilt(before: dict[str, tuple[int, int]], out: Path) -> set[str]:
    """The trajectories whose files were all replaced."""
    now = file_marks(out)
    names = {episode for episode in (FIRST, SECOND, THIRD) if (out / episode).exists()}
    kept = {n for n in names if all(now[k] == v for k, v in before.items() if k.startswith(n))}
    anew = {n for n in names if not any(now[k] == before.get(k) for k in now if k.startswith(n))}
    assert kept | anew == names
    return anew


# Real processes


def start_build(
    source: Path, out: Path, *options: str, workers: int = 1, **env: str
) -> subprocess.Popen[str]:
    """Start `occgen-hub build` in its own process group."""
    places = ["--input", source, "--output", out]
    return start("build", *places, "--set", COARSE, "--workers", str(workers), *options, **env)


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    try:
        stdout, stderr = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def wait_until(condition: Callable[[], Any], timeout: float = 60) -> Any:
    end = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.002)
    return value


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return [child for child in descendants(process) if "spawn_main" in " ".join(child.cmdline())]


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def writing_started(out: Path) -> bool:
    """Whether a trajectory is being written."""
    return any(out.glob("*/*/.*.partial"))


def finished_episodes(out: Path) -> list[Path]:
    return [mark.parents[1] for mark in out.glob(f"*/*/trajectory_*/{RECORD}")]


def check_resumed(source: Path, out: Path, expected: Tree, workers: int = 1) -> None:
    """Run an interrupted build again: it builds only the missing episodes."""
    done = finished_episodes(out)
    before = {folder: file_marks(folder) for folder in done}
    summary = build(source, out, workers=workers)
    assert counts(summary) == (3 - len(done), len(done), 0)
    assert tree(out) == expected
    assert {folder: file_marks(folder) for folder in done} == before


def check_clean(stderr: str) -> None:
    """Check that there is no traceback or warning of Python."""
    for word in ("Traceback", "Exception", "Error", "Warning", "File "):
        assert word not in stderr, stderr


# The same bytes


def test_two_workers_give_the_same_bytes_and_continue_after_a_failure(
    source_copy: Path, expected: Tree, tmp_path: Path, command: Command
) -> None:
    out, broken = tmp_path / "out", "sample_zed/house_000/trajectory_2"
    shutil.copytree(source_copy / FIRST, source_copy / broken)
    (source_copy / broken / TABLE).write_bytes((source_copy / FIRST / TABLE).read_bytes()[:100])
    process = start_build(source_copy, out, workers=2)
    environments = wait_until(lambda: [dict(w.environ()) for w in workers_of(process)])
    done = finish(process)
    share = str(max(1, len(os.sched_getaffinity(0)) // 2))
    for name in ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        assert {environment[name] for environment in environments} == {share}

    assert done.returncode == 1
    assert "3 built, 0 already there, 1 failed of 4 episodes; 9 frames" in done.stdout
    assert (
        f"failed  {broken}: {source_copy / broken / TABLE}: is not a readable Parquet file"
        in done.stderr
    )
    check_clean(done.stderr)
    (row,) = map(json.loads, (out / "failures.jsonl").read_text().splitlines())
    assert row["episode"] == broken
    assert row["reason"] in done.stderr
    found = tree(out)
    del found["failures.jsonl"]
    assert found == expected

    shutil.rmtree(source_copy / broken)
    code, output, _ = command(source_copy, out)
    assert code == 0
    assert "0 built, 3 already there, 0 failed" in output
    assert tree(out) == expected


def test_source_path_does_not_change_the_bytes(
    source: Path, expected: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    moved = Path(shutil.copytree(source, "elsewhere"))
    link = Path("link")
    link.symlink_to(source)
    for number, root in enumerate((moved, link, link / "sample_zed", Path("x/../link").resolve())):
        out = Path(f"out_{number}")
        build(root, out)
        assert tree(out) == expected, root
        shutil.rmtree(out)


@pytest.mark.long
def test_threads_and_uninitialized_memory_do_not_change_the_video(
    without_video: Path, tmp_path: Path
) -> None:
    process = start_build(
        without_video, tmp_path / "there", NUMBA_NUM_THREADS="1", MALLOC_PERTURB_="170"
    )  # fmt: skip
    build(without_video, tmp_path / "here")
    assert finish(process).returncode == 0
    assert tree(tmp_path / "there") == tree(tmp_path / "here")
    assert (tmp_path / "here" / FIRST / VIDEO / "reference.mp4").stat().st_size > 1000


def test_equal_frames_give_an_equal_video(source: Path, tmp_path: Path) -> None:
    """With pictures of this size, x264 can depend on uninitialized memory."""
    code = (
        "import sys; from pathlib import Path; from occgen_hub.media import read_rgb, write_video;"
        "paths = [Path(sys.argv[1], f'{t % 4}.jpg') for t in range(12)];"
        "write_video(Path(sys.argv[2]), (read_rgb(path, (424, 240)) for path in paths), 10.0)"
    )
    made = set()
    for memory in ("0", "1", "85", "170"):
        path = tmp_path / f"{memory}.mp4"
        arguments = [sys.executable, "-c", code, str(source / THIRD / RGB), str(path)]
        subprocess.run(arguments, env=os.environ | {"MALLOC_PERTURB_": memory}, check=True)
        made.add(path.read_bytes())
    assert len(made) == 1


# Killed


@pytest.mark.parametrize(
    ("workers", "moment"),
    [(1, finished_episodes), pytest.param(2, writing_started, marks=pytest.mark.slow)],
    ids=["one process, first trajectory finished", "two processes, first one started"],
)
def test_resume_after_kill(
    source: Path, expected: Tree, tmp_path: Path, workers: int, moment: Callable[[Path], Any]
) -> None:
    out = tmp_path / "out"
    process = start_build(source, out, workers=workers)
    wait_until(lambda: moment(out))
    os.killpg(process.pid, signal.SIGKILL)
    finish(process)
    assert len(finished_episodes(out)) < 3
    check_resumed(source, out, expected)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_resume_after_kills_at_many_moments(
    source: Path, expected: Tree, tmp_path: Path, workers: int
) -> None:
    """Each kill is a little later after the first write; some kill only the parent process."""
    rng = random.Random(workers)
    for number in range(9 - 3 * workers):
        out = tmp_path / f"out_{number}"
        process = start_build(source, out, workers=workers)
        wait_until(lambda out=out: writing_started(out) or finished_episodes(out))
        family = descendants(process)
        time.sleep(number * 0.2 + rng.uniform(0, 0.2))
        if rng.random() < 0.3:
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
        finish(process)
        wait_until(lambda family=family: not alive(family), timeout=2)
        check_resumed(source, out, expected)


def test_leftovers_of_interrupted_renames_are_repaired(
    source: Path, expected: Tree, tmp_path: Path
) -> None:
    """The test creates the states between two renames."""
    out = tmp_path / "out"
    build(source, out)
    (out / FIRST).rename((out / FIRST).with_name(".trajectory_0.old"))
    half = (out / FIRST).with_name(".trajectory_0.partial")
    shutil.copytree(out / SECOND, half)
    shutil.copytree(out / SECOND / "meta", (out / SECOND).with_name(".trajectory_1.old"))
    (out / THIRD).with_name(".trajectory_0.partial").mkdir()
    assert counts(build(source, out)) == (0, 3, 0)
    assert tree(out) == expected

    (out / FIRST).rename((out / FIRST).with_name(".trajectory_0.old"))
    assert counts(build(source, out, overwrite=True)) == (3, 0, 0)
    assert tree(out) == expected


def test_episode_of_killed_worker_is_built_again(
    source: Path, expected: Tree, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start_build(source, out, workers=2)
    wait_until(lambda: writing_started(out))
    workers_of(process)[0].kill()
    done = finish(process)
    assert done.returncode == 0, done.stderr
    assert "3 built, 0 already there, 0 failed of 3 episodes; 9 frames" in done.stdout
    assert tree(out) == expected
    check_clean(done.stderr)


def test_workers_exit_with_their_parent(source: Path, expected: Tree, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start_build(source, out, workers=2)
    wait_until(lambda: writing_started(out))
    family = descendants(process)
    assert len(alive(family)) >= 2
    process.kill()
    wait_until(lambda: not alive(family), timeout=2)
    finish(process)
    check_resumed(source, out, expected)


class KillsItsProcess(InternNavBuilder):
    """Kills each process that reads the second trajectory."""

    def read(self, ref: EpisodeRef) -> Episode:
        if ref.id == SECOND:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(ref)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, pytest.param(3, marks=pytest.mark.long)])
def test_episode_that_kills_its_process_twice_fails(
    source: Path, expected: Tree, tmp_path: Path, workers: int
) -> None:
    out = tmp_path / "out"
    summary = build(source, out, workers=workers, builder=KillsItsProcess(source))
    assert counts(summary) == (2, 0, 1)
    assert summary.failures[0].id == SECOND
    assert "its process was killed twice, perhaps out of memory" in summary.failures[0].reason
    assert counts(build(source, out)) == (1, 2, 0)  # Failures are tried again.
    assert tree(out) == expected


# Interrupted


def check_stopped(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """Signal the whole process group, as a terminal does; it ends with one sentence."""
    family = descendants(process)
    os.killpg(process.pid, number)
    done = finish(process)
    assert done.returncode == 128 + number, done.stderr
    assert "Stopped. Finished work is kept; run the same command again to resume." in done.stderr
    check_clean(done.stderr)
    wait_until(lambda: not alive(family), timeout=2)


@pytest.mark.parametrize(
    ("workers", "number"),
    [
        (1, signal.SIGINT),
        (2, signal.SIGINT),
        pytest.param(1, signal.SIGTERM, marks=pytest.mark.long),
    ],
)
def test_resume_after_interruption(
    source: Path, expected: Tree, tmp_path: Path, workers: int, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    process = start_build(source, out, workers=workers)
    wait_until(lambda: writing_started(out))
    check_stopped(process, number)
    if workers == 1:
        assert not writing_started(out)
    assert unfinished(out) == ["the last build did not finish (1 of 1 shards); run it again"]
    check_resumed(source, out, expected)
    assert unfinished(out) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_between_starting_a_worker_and_sending_its_arguments(
    source: Path, tmp_path: Path, number: signal.Signals
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, time\n"
        "from multiprocessing import util\n"
        "spawn = util.spawnv_passfds\n"
        "def interrupted(path, args, passfds):\n"
        "    number = spawn(path, args, passfds)\n"
        "    if 'spawn_main' in ' '.join(map(os.fsdecode, args)):\n"
        f"        os.kill(os.getpid(), {number.value})\n"
        "        time.sleep(0.5)\n"
        "    return number\n"
        "util.spawnv_passfds = interrupted\n"
    )
    process = start_build(source, tmp_path / "out", workers=2, PYTHONPATH=str(tmp_path))
    done = finish(process)
    assert done.returncode == 128 + number, done.stderr
    check_clean(done.stderr)


def test_interruption_while_workers_start(source: Path, tmp_path: Path) -> None:
    process = start_build(source, tmp_path / "out", workers=2)
    wait_until(lambda: len(workers_of(process)) == 2)
    check_stopped(process, signal.SIGINT)


@pytest.mark.long
@pytest.mark.parametrize(
    ("workers", "number"), [(1, signal.SIGINT), (2, signal.SIGINT), (2, signal.SIGTERM)]
)
def test_resume_after_interruptions_at_many_moments(
    source: Path, tmp_path: Path, workers: int, number: signal.Signals
) -> None:
    """Interrupts during import, computation and writing, once the output folder exists."""
    rng = random.Random(workers)
    for step in range(4):
        out = tmp_path / f"out_{step}"
        process = start_build(source, out, workers=workers)
        wait_until(out.exists)
        time.sleep(step * 0.3 + rng.uniform(0, 0.3))
        if process.poll() is None and len(finished_episodes(out)) < 2:
            check_stopped(process, number)
        finish(process)


def test_interruption_swallowed_by_a_library_stops_the_build(
    source: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when compiled code imports pandas, which loses the interrupt."""

    def swallowing(*_: Any) -> Built:
        try:
            signal.raise_signal(signal.SIGINT)
        except BaseException:
            raise RuntimeError("half imported") from None
        raise AssertionError

    monkeypatch.setattr("occgen_hub.runtime.episodes.write_episode", swallowing)
    code, _, errors = command(source, tmp_path / "out")
    assert (code, tree(tmp_path / "out")) == (130, {})
    assert errors.strip() == (
        "Stopped. Finished work is kept; run the same command again to resume."
    )


# Run again


def test_second_run_does_nothing(source: Path, out: Path, expected: Tree, command: Command) -> None:
    before = file_marks(out)
    code, output, errors = command(source, out)
    assert (code, errors) == (0, "")
    assert "0 built, 3 already there, 0 failed of 3 episodes; 0 frames" in output
    assert (file_marks(out), tree(out)) == (before, expected)


def test_overwrite_rebuilds_everything(source: Path, out: Path, expected: Tree) -> None:
    before = file_marks(out)
    assert counts(build(source, out, overwrite=True)) == (3, 0, 0)
    assert rebuilt(before, out) == {FIRST, SECOND, THIRD}
    assert tree(out) == expected


def test_changed_setting_rebuilds_everything(source: Path, out: Path, expected: Tree) -> None:
    assert counts(build(source, out, "voxel_size=0.2")) == (3, 0, 0)
    assert tree(out) != expected
    assert counts(build(source, out, "voxel_size=0.2")) == (0, 3, 0)
    assert counts(build(source, out)) == (3, 0, 0)
    assert tree(out) == expected


def test_settings_from_a_file_equal_those_from_options(
    source: Path, out: Path, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("voxel_size: 0.1\n")
    chosen = Settings(config=load_config(config))
    builder = load_builder("internnav", source)
    job = Job(builder, list_episodes(builder), out, chosen)
    assert counts(build_dataset(job)) == (0, 3, 0)


def test_changed_media_option_rebuilds_except_for_links(source: Path, out: Path) -> None:
    assert counts(build(source, out, media="link")) == (0, 3, 0)
    assert counts(build(source, out, media="none")) == (3, 0, 0)
    assert not list(out.rglob("*.jpg"))
    assert counts(build(source, out, media="link")) == (3, 0, 0)
    image = Path(f"{RGB}/0.jpg")
    assert (out / FIRST / image).samefile(source / FIRST / image)
    assert counts(build(source, out, media="copy")) == (0, 3, 0)


def change_image(folder: Path) -> None:
    """Change one byte of a JPEG header; size and time stay the same."""
    path = folder / RGB / "1.jpg"
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[15] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def change_pose(folder: Path) -> None:
    table = pq.read_table(folder / TABLE)
    index = table.schema.get_field_index("action")
    poses = table.column(index).to_pylist()
    poses[0][0][3] += 0.01
    column = pa.array(poses, table.schema.field(index).type)
    pq.write_table(table.set_column(index, table.schema.field(index), column), folder / TABLE)


def remove_last_frame(folder: Path) -> None:
    table = pq.read_table(folder / TABLE)
    last = table.num_rows - 1
    pq.write_table(table.slice(0, last), folder / TABLE)
    for name in (f"{RGB}/{last}.jpg", f"{DEPTH}/{last}.png"):
        (folder / name).unlink()


def change_task(folder: Path) -> None:
    path = folder / "meta/tasks.jsonl"
    path.write_text(path.read_text().replace("task", "tasK", 1))


@pytest.mark.parametrize("change", [change_image, change_pose, remove_last_frame, change_task])
def test_changed_source_is_rebuilt(
    source_copy: Path, out: Path, change: Callable[[Path], None], tmp_path: Path
) -> None:
    assert counts(build(source_copy, out)) == (0, 3, 0)
    before = file_marks(out)
    change(source_copy / SECOND)
    assert counts(build(source_copy, out)) == (1, 2, 0)
    assert rebuilt(before, out) == {SECOND}
    build(source_copy, tmp_path / "fresh")
    assert tree(out) == tree(tmp_path / "fresh")


def test_touched_source_is_not_rebuilt(source_copy: Path, out: Path) -> None:
    assert counts(build(source_copy, out)) == (0, 3, 0)
    before = file_marks(out)
    for path in (source_copy / SECOND).rglob("*"):
        path.touch()
    (source_copy / SECOND / RGB / "Thumbs.db").touch()
    assert counts(build(source_copy, out)) == (0, 3, 0)
    assert file_marks(out) == before


def test_unchanged_sources_are_read_once(
    source_copy: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later runs recognise them by their modification times."""
    read: list[Path] = []
    monkeypatch.setattr(
        InternNavBuilder,
        "fingerprint",
        lambda self, paths, of=InternNavBuilder.fingerprint: (
            read.append(self.root) or of(self, paths)
        ),
    )
    for _ in range(2):
        build(source_copy, out)
        assert len(read) == 3  # The copied tree has new times.
    (source_copy / FIRST / TABLE).touch()
    for _ in range(2):
        build(source_copy, out)
        assert len(read) == 4
    build(source_copy, out, overwrite=True)
    del read[:]
    build(source_copy, out)
    assert read == []


def test_a_source_changed_before_its_dataset_was_copied_is_noticed(
    source_copy: Path, tmp_path: Path
) -> None:
    """Even though the copy is newer than the change."""
    build(source_copy, tmp_path / "out")
    change_image(source_copy / THIRD)
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "out", copy, copy_function=shutil.copyfile)
    assert counts(build(source_copy, copy)) == (1, 2, 0)


def test_missing_file_rebuilds_its_trajectory(source: Path, out: Path, expected: Tree) -> None:
    before = file_marks(out)
    (out / SECOND / RGB / "1.jpg").unlink()
    (out / THIRD / RECORD).write_text("{}\n")
    assert counts(build(source, out)) == (2, 1, 0)
    assert rebuilt(before, out) == {SECOND, THIRD}
    assert tree(out) == expected


def test_a_source_that_changes_while_it_is_read_fails(source_copy: Path, tmp_path: Path) -> None:
    class ChangesItsSource(InternNavBuilder):
        def read(self, ref: EpisodeRef) -> Episode:
            episode = super().read(ref)
            if ref.id == SECOND:
                change_pose(ref.path)
            return episode

    out = tmp_path / "out"
    summary = build(source_copy, out, builder=ChangesItsSource(source_copy))
    assert counts(summary) == (2, 0, 1)
    assert "changed while it was read; run the build again." in summary.failures[0].reason
    assert not (out / SECOND).exists()
    assert counts(build(source_copy, out)) == (1, 2, 0)


# The command and its messages


def test_limit_builds_only_the_first_episodes(
    source: Path, tmp_path: Path, expected: Tree, command: Command
) -> None:
    code, output, _ = command(source, tmp_path / "out", "--limit", "2")
    assert code == 0
    assert "2 built, 0 already there, 0 failed of 2 episodes; 5 frames" in output
    built = {k: v for k, v in expected.items() if k.startswith("sample_zed/house_000")}
    found = tree(tmp_path / "out")
    assert {k: v for k, v in found.items() if k.startswith("sample_zed/house")} == built
    part = bucket("sample_zed/house_001")
    others = {f"index/{part}.parquet", f"occupancy/{part}", f"scene_states/{part}"}
    assert set(found) == set(expected) - {k for k in expected if "house_001" in k} - others


def test_dry_run_writes_nothing(source_copy: Path, out: Path, command: Command) -> None:
    code, output, _ = command(source_copy, out.with_name("other"), "--dry-run")
    assert (code, out.with_name("other").exists()) == (0, False)
    assert "3 of 3 episodes would be built" in output
    assert f"{FIRST}  to build: does not exist\n" in output

    change_pose(source_copy / FIRST)
    shutil.rmtree(source_copy / SECOND / "data")
    (source_copy / SECOND / "data").mkdir()
    half = (out / FIRST).with_name(".trajectory_0.partial")
    half.mkdir()
    before = [(path, path.stat().st_ctime_ns) for path in sorted(out.rglob("*"))]
    code, output, _ = command(source_copy, out, "--dry-run")
    assert code == 0
    assert f"{FIRST}  to build: was built from a source that has changed\n" in output
    assert f"\n{SECOND}  would fail: " in output
    assert f"{THIRD}  present\n2 of 3 episodes would be built" in output
    assert [(path, path.stat().st_ctime_ns) for path in sorted(out.rglob("*"))] == before
    assert (
        "3 of 3 episodes would be built" in command(source_copy, out, "--dry-run", "--overwrite")[1]
    )


def test_second_build_of_the_same_output_is_refused(
    source: Path, out: Path, expected: Tree, command: Command
) -> None:
    assert unfinished(out) == []
    with (out / ".logs/lock").open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert unfinished(out) == ["a build is writing to it now"]
        code, _, errors = command(source, out, "--overwrite")
    assert code == 2
    assert errors == (
        f"Error: {out}: another build is writing here; wait for it or choose another --output.\n"
    )
    assert tree(out) == expected
    assert command(source, out)[0] == 0


def test_failed_overwrite_keeps_the_old_trajectory(
    source_copy: Path, out: Path, expected: Tree, command: Command
) -> None:
    (source_copy / SECOND / DEPTH / "1.png").write_bytes(b"")
    code, output, _ = command(source_copy, out, "--overwrite")
    assert code == 1
    assert "2 built, 0 already there, 1 failed of 3 episodes" in output
    assert "\nEarlier versions of 1 of them remain in the dataset.\n" in output
    (out / "failures.jsonl").unlink()
    assert tree(out) == expected


def test_progress_counts_every_frame_and_episode(source: Path, tmp_path: Path) -> None:
    frames: Counter[str] = Counter()
    episodes: list[str] = []

    def count(stage: str, done: int) -> None:
        frames[stage] += done

    listener = Listener(lambda result: episodes.append(result.id), count)
    build(source, tmp_path / "out", listener=listener)
    assert frames == {"reconstructed": 9, "built": 9}
    assert episodes == [FIRST, SECOND, THIRD]


def test_unfinished_builds_are_reported(out: Path) -> None:
    (out / "failures.jsonl").write_text('{"episode": "a/b/c", "reason": "d"}\n')
    assert unfinished(out) == [f"1 episode failed; see {out / 'failures.jsonl'}"]
    (out / "report.json").unlink()
    not_finalized = [f"the last build is not finalized; run occgen-hub finalize {out}"]
    assert unfinished(out) == not_finalized
    record = out / ".logs/shard-0.jsonl"
    record.write_bytes(record.read_bytes().rpartition(b"\n")[0])
    assert unfinished(out) == ["the last build did not finish (1 of 1 shards); run it again"]
    shutil.rmtree(out / ".logs")  # As in a dataset from another machine.
    assert unfinished(out) == [f"1 episode failed; see {out / 'failures.jsonl'}"]


def test_unlistable_folder_is_an_error(out: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limit[1]))
    try:
        with pytest.raises(DatasetError, match="cannot be listed"):
            trajectories(out)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert len(trajectories(out)) == 3


# Folders that cannot be written


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A file system with mount options such as its size. Skips if none can be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")

    def options(text: str) -> Path:
        subprocess.run(["mount", "-o", f"remount,{text}", str(place)], check=True)
        return place

    yield options
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("video", [True, False], ids=["video copied", "video encoded"])
def test_full_disk_is_reported_and_leaves_nothing_incomplete(
    source: Path, without_video: Path, disk: Callable[[str], Path], command: Command, video: bool
) -> None:
    """The disk gets full at each stage of writing."""
    root = source if video else without_video
    place = disk("size=20k")
    for size in ("20k", "80k", "200k", "500k", "900k", "1300k", "1700k"):
        out = disk(f"size={size}") / "out"
        code, output, errors = command(root, out, "--limit", "1")
        if code == 0:
            break
        assert code == 1, size
        assert "No space left on device" in errors, size
        assert not re.search(rf"{root}\S*: cannot be", errors), size  # It blames no input file.
        assert "unexpected" not in errors + output
        assert "Traceback" not in errors
        assert set(tree(out)) <= {"failures.jsonl"}
    disk("size=64m")
    assert command(root, place / "out")[0] == 0
    assert not (place / "out/failures.jsonl").exists()


def test_read_only_output_is_reported(
    source: Path, uninterrupted: Path, expected: Tree, disk: Callable[[str], Path], command: Command
) -> None:
    out = disk("size=64m") / "out"
    shutil.copytree(uninterrupted, out)
    shutil.rmtree(out / SECOND)
    disk("ro")
    for place in (out, out.with_name("new")):
        code, _, errors = command(source, place)
        assert code == 2
        assert f"{place}: cannot be created or written (Read-only file system)" in errors
        assert "Traceback" not in errors
    disk("rw")
    assert command(source, out)[0] == 0
    assert tree(out) == expected
