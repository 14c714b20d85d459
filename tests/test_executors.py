"""Whoever runs the episodes, and however often they are stopped, the bytes are the same."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from occgen_hub import cli
from occgen_hub.builder import Built, EpisodeRef, Found, Settings
from occgen_hub.builders.internnav import InternNavBuilder
from occgen_hub.config import load_config
from occgen_hub.errors import MachineError, OccGenError, UsageError
from occgen_hub.files import read_json, sha256
from occgen_hub.prefetch import behind
from occgen_hub.runtime import cluster, distributed, failures, loop, work
from occgen_hub.runtime.output import current, make_current, sole_use
from occgen_hub.runtime.plan import shares
from occgen_hub.runtime.results import Failure, Summary
from occgen_hub.sample import make_sample

COARSE = ("--set", "voxel_size=0.1")
OF_THE_RUN = {"report.json", ".logs"}
TABLE = "data/chunk-000/episode_000000.parquet"
INFO = "meta/info.json"
SECOND = "sample_zed/house_000/trajectory_1"
Tree = dict[str, str]


def tree(folder: Path) -> Tree:
    """Every path of a dataset, hidden ones too, with its content."""
    return {
        path.relative_to(folder).as_posix(): sha256(path) if path.is_file() else "folder"
        for path in folder.rglob("*")
        if path.relative_to(folder).parts[0] not in OF_THE_RUN
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight trajectories of 2 to 4 frames. Not to be changed by tests."""
    out = tmp_path_factory.mktemp("eight") / "tree"
    make_sample(out, trajectories=8, frames=3)
    shutil.rmtree(out / "ground_truth", ignore_errors=True)
    return out


@pytest.fixture
def three(source: Path, tmp_path: Path) -> Path:
    """Three of them, which a test may change."""
    for name in ("house_000/trajectory_0", "house_000/trajectory_1", "house_001/trajectory_0"):
        shutil.copytree(source / "sample_zed" / name, tmp_path / "three/sample_zed" / name)
    return tmp_path / "three"


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """The dataset from one process."""
    out = tmp_path_factory.mktemp("one") / "out"
    assert not loop.run_job(job(source, out)).failures
    return tree(out)


def job(source: Path, out: Path, **choices: Any) -> loop.Job:
    config = load_config(None, COARSE[1:])
    return loop.open_job("internnav", source, out, config=config, **choices)


def command(source: Path, out: Path, *options: str) -> list[str]:
    places = ["--input", str(source), "--output", str(out)]
    return [sys.executable, "-m", "occgen_hub", "build", *places, *COARSE, *options]


def torchrun(source: Path, out: Path, *options: str) -> list[str]:
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    python, _, *rest = command(source, out, *options)
    return [python, "-m", *launcher, *rest]


def finished(
    arguments: list[str], timeout: float = 170, **env: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments,
        env=os.environ | {"TQDM_DISABLE": "1"} | env,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def report(out: Path) -> dict[str, Any]:
    values = json.loads((out / "report.json").read_text())
    assert isinstance(values, dict)
    return values


# Sharing out


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=7),
    st.integers(1, 3),
)
def test_shares_are_disjoint_complete_and_near_the_best(items: list[int], count: int) -> None:
    taken = shares([float(item) for item in items], count)
    assert len(taken) == count
    assert sorted(itertools.chain.from_iterable(taken)) == list(range(len(items)))
    assert all(share == sorted(share) for share in taken)
    assert taken == shares([float(item) for item in items], count)
    best = min(
        max(
            sum(i for i, owner in zip(items, owners, strict=True) if owner == n)
            for n in range(count)
        )
        for owners in itertools.product(range(count), repeat=len(items))
    )
    longest = max(sum(items[n] for n in share) for share in taken)
    assert longest <= best * (4 / 3 - 1 / (3 * count)) + 1e-9


def test_episodes_of_no_known_work_are_dealt_out_evenly() -> None:
    assert [len(share) for share in shares([0.0] * 9, 4)] == [3, 2, 2, 2]


def test_work_is_frames_times_pixels(source: Path, tmp_path: Path) -> None:
    from occgen_hub.builders.video import VideoBuilder
    from occgen_hub.media import image_size

    builder = InternNavBuilder(source)
    for ref in builder.episodes():
        images = sorted((ref.path / "videos/chunk-000/observation.images.rgb").iterdir())
        width, height = image_size(images[0])
        assert builder.work(ref) == len(images) * width * height
    video = next(source.rglob("*.mp4"))
    (ref,) = VideoBuilder(video).episodes()
    assert VideoBuilder(video).work(ref) > 1e4
    assert VideoBuilder(video).work(EpisodeRef("a/b/c", tmp_path / "none.mp4")) == 0


# The same bytes, whoever runs them


def test_two_workers(source: Path, expected: Tree, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = finished(command(source, out, "--workers", "2"))
    assert done.returncode == 0, done.stderr
    assert tree(out) == expected


@pytest.mark.slow
def test_two_processes_of_torchrun(source: Path, expected: Tree, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = finished(torchrun(source, out))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.count("8 built, 0 already there, 0 failed of 8 episodes") == 1
    assert tree(out) == expected
    said = report(out)
    assert said["notes"]
    assert done.stderr.count("note    ") == len(said["notes"])  # One of each kind, told once.
    assert said["executor"] == "accelerate"
    assert [process["device"] for process in said["processes"]] == ["cpu:0", "cpu:0"]
    assert sorted(process["episodes"] for process in said["processes"]) != [0, 8]
    assert {path.name for path in (out / ".logs").iterdir()} == {
        "build.log",
        "build-1.log",
        "current",
        "lock",
    }


MORTAL = """
import os, signal
from occgen_hub.builders.internnav import InternNavBuilder
from occgen_hub.cli import main
from occgen_hub.runtime import distributed

distributed.LOST = 10.0
read, seen = InternNavBuilder.read, []

def mortal(self, ref):
    seen.append(ref)
    if os.environ["GROUP_RANK"] == os.environ["DIES"] and len(seen) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(self, ref)

InternNavBuilder.read = mortal
main()
"""
"""`occgen-hub`, on host number DIES dying in the middle of a build."""


def on_two_hosts(
    arguments: list[str], tmp_path: Path, dies: str = ""
) -> list[subprocess.CompletedProcess[str]]:
    """Run a command as torchrun does on two hosts, of a process each, both of them here."""
    (tmp_path / "mortal.py").write_text(MORTAL)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    python, _, _, *rest = arguments
    meeting = ["--nnodes", "2", "--master_addr", "127.0.0.1", "--master_port", port]

    def host(number: int) -> subprocess.CompletedProcess[str]:
        launcher = [python, "-m", "torch.distributed.run", *meeting, "--node_rank", str(number)]
        return finished([*launcher, str(tmp_path / "mortal.py"), *rest], DIES=dies)

    with ThreadPoolExecutor(2) as both:
        return list(both.map(host, range(2)))


def check_goes_on(source: Path, out: Path, expected: Tree) -> None:
    """The same build, started again, does what the one before left."""
    done = finished(command(source, out))
    assert done.returncode == 0, done.stderr
    assert tree(out) == expected
    assert not (out / ".run").exists()


@pytest.mark.slow
def test_two_hosts(source: Path, expected: Tree, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first, second = on_two_hosts(command(source, out), tmp_path)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    # torchrun's launchers may complain of one another, where one leaves before the other.
    assert "occgen_hub/" not in first.stderr + second.stderr
    assert "8 built, 0 already there, 0 failed of 8 episodes" in first.stdout
    assert tree(out) == expected
    assert len(report(out)["processes"]) == 2
    assert not (out / ".run").exists()


@pytest.mark.slow
def test_a_host_that_is_lost_is_told_of_and_holds_up_nobody(
    source: Path, expected: Tree, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first, second = on_two_hosts(command(source, out), tmp_path, dies="1")
    assert second.returncode == 1
    assert first.returncode == 1
    assert "occgen_hub/" not in first.stderr  # No traceback of ours, but for torchrun's own.
    assert re.search(r"\d built, [12] already there, [1-5] failed of 8 episodes", first.stdout)
    assert (
        "process 1 was lost; see what its host says, and run the same build again." in first.stdout
    )
    assert not (out / ".run").exists()
    check_goes_on(source, out, expected)


@pytest.mark.slow
def test_without_the_first_host_the_other_ends_as_well(
    source: Path, expected: Tree, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first, second = on_two_hosts(command(source, out), tmp_path, dies="0")
    assert first.returncode == 1
    assert second.returncode == 1
    assert not (out / "report.json").exists()
    check_goes_on(source, out, expected)


@pytest.mark.slow
def test_accelerate_by_itself_tells_failures_and_its_exit_code(three: Path, tmp_path: Path) -> None:
    """Started without a launcher, it starts the processes; one of them finds a broken episode."""
    (three / SECOND / INFO).write_text("{")
    out = tmp_path / "out"
    done = finished(command(three, out, "--executor", "accelerate", "--workers", "2"))
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "2 built, 0 already there, 1 failed of 3 episodes" in done.stdout
    assert f"failed  {SECOND}: " in done.stderr
    (row,) = map(json.loads, (out / "failures.jsonl").read_text().splitlines())
    assert row["episode"] == SECOND
    assert {p.name for p in out.iterdir()} >= {"report.json", "README.md", "occupancy"}
    assert not list(out.glob(".failures*"))
    assert not (out / ".run").exists()


@pytest.mark.slow
def test_datatrove_here_and_again(three: Path, tmp_path: Path) -> None:
    pytest.importorskip("datatrove")
    loop.run_job(job(three, tmp_path / "one"))
    out = tmp_path / "out"
    options = ("--executor", "datatrove", "--tasks", "2", "--workers", "2")
    done = finished(command(three, out, *options))
    assert done.returncode == 0, done.stderr
    assert "3 built, 0 already there, 0 failed of 3 episodes" in done.stdout
    assert tree(out) == tree(tmp_path / "one")
    said = report(out)
    assert said["executor"] == "datatrove"
    assert done.stderr.count("note    ") == len(said["notes"]) > 0
    (logs,) = (path for path in (out / ".logs").iterdir() if path.is_dir())
    assert len(list((logs / "completions").iterdir())) == 2
    assert {path.name for path in (logs / "logs").iterdir()} == {
        "task_00000.log",
        "task_00001.log",
    }

    shutil.rmtree(out / SECOND)
    plan = cluster.make_plan(job(three.absolute(), out.absolute()), 2)
    assert len(plan.todo) == 1
    marks = {path: path.stat().st_mtime_ns for path in (logs / "completions").iterdir()}
    done = finished(command(three, out, *options))
    assert done.returncode == 0, done.stderr
    assert "1 built, 2 already there, 0 failed of 3 episodes" in done.stdout
    assert tree(out) == tree(tmp_path / "one")
    kept = [path for path, mark in marks.items() if path.stat().st_mtime_ns == mark]
    assert len(kept) == 1  # The other task was not even started.


@pytest.mark.slow
def test_a_real_ray_cluster(source: Path, expected: Tree, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    out = tmp_path / "out"
    options = ("--executor", "ray", "--tasks", "2", "--workers", "2", "--cpus-per-task", "1")
    done = finished(command(source, out, *options, "--mem-per-cpu", "1"), timeout=400)
    assert done.returncode == 0, done.stderr
    assert "8 built, 0 already there, 0 failed of 8 episodes" in done.stdout
    assert tree(out) == expected
    assert report(out)["executor"] == "ray"


SBATCH = """#!{python}
import os, re, subprocess, sys
script = open(sys.argv[-1]).read()
log = {log!r}
open(log, "a").write(" ".join(sys.argv[1:-1]) + "\\n" + script)
number = len(re.findall("#!/bin/bash", open(log).read()))
if "merge_stats" not in script:
    last = int(re.search(r"--array=0-(\\d+)", script)[1])
    for task in range(last + 1):
        job = dict(SLURM_ARRAY_TASK_ID=str(task), SLURM_NODELIST="here", RUN_OFFSET="0")
        subprocess.run(["bash", sys.argv[-1]], env=os.environ | job, stdout=sys.stderr)
print("Submitted batch job", number)
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's commands, by scripts that run a batch script at once; returns what was submitted."""
    place, log = tmp_path / "bin", tmp_path / "submitted"
    place.mkdir()
    scripts = {
        "sbatch": SBATCH.format(python=sys.executable, log=str(log)),
        "srun": '#!/bin/bash\nshift 3\nexec "$@"\n',
        "scontrol": "#!/bin/bash\necho here\n",
    }
    for name, text in scripts.items():
        (place / name).write_text(text)
        (place / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    return log


@pytest.mark.slow
def test_slurm_runs_the_tasks_and_then_the_last_one(
    three: Path, tmp_path: Path, slurm: Path
) -> None:
    pytest.importorskip("datatrove")
    loop.run_job(job(three, tmp_path / "one"))
    out = tmp_path / "out"
    options = ("--executor", "slurm", "--tasks", "2", "--slurm", "partition=gpu")
    dry = finished(command(three, out, *options, "--slurm", "account=me", "--dry-run"))
    assert dry.returncode == 0, dry.stderr
    assert not out.exists()
    for line in (
        "Tasks: 2, 2 of them with something to do. Episodes: 3, 1 to 2 a task; ",
        "#SBATCH --partition=gpu",
        "#SBATCH --account=me",
        "#SBATCH --array=0-1",
        f"#SBATCH --output={out}/.logs/",
        "launch_pickled_pipeline",
    ):
        assert line in dry.stdout, dry.stdout

    done = finished(command(three, out, *options))
    assert done.returncode == 0, done.stderr
    assert "The tasks were given to Slurm" in done.stdout
    assert tree(out) == tree(tmp_path / "one")
    assert report(out)["episodes"]["built"] == 3
    submitted = slurm.read_text()
    assert submitted.count("--dependency=afterany:") == 1
    script = dry.stdout.partition("#!/bin/bash")[2].partition("\n\n")[0]
    said = script.replace("#SBATCH --account=me\n", "").split()
    assert " ".join(said) in " ".join(submitted.split())


def test_slurm_needs_a_partition_and_options_are_checked(three: Path, tmp_path: Path) -> None:
    pytest.importorskip("datatrove")
    with pytest.raises(UsageError, match="--slurm partition=NAME"):
        cluster.run_cluster(job(three, tmp_path / "out"), "slurm", cluster.Resources())
    with pytest.raises(UsageError, match="expected key=value"):
        cluster.parse_slurm(("partition",))
    assert cluster.parse_slurm(("--time=1:00", "comment=a=b")) == {"time": "1:00", "comment": "a=b"}


def test_a_task_is_alone_and_of_the_newest_plan(three: Path, tmp_path: Path) -> None:
    """Tasks run beside one another; not beside another build, nor twice, nor for an old plan."""
    out = tmp_path / "out"
    plan = cluster.make_plan(job(three, out.absolute()), 2)
    assert plan.name == cluster.make_plan(job(three, out.absolute()), 2).name
    assert plan.name != cluster.make_plan(job(three, out.absolute()), 3).name
    plan.folder.mkdir(parents=True)
    (plan.folder.parent / "current").write_text(plan.name)
    task = cluster.BuildShare(plan, 1, None)
    with sole_use(out), pytest.raises(UsageError, match="another build is writing here"):
        task(None, 0, 2)
    with sole_use(out, shared=True):
        with pytest.raises(UsageError, match="another build is writing here"):
            loop.run_job(job(three, out))
        with cluster._alone(plan.folder / "results/00000.lock"):
            with pytest.raises(OccGenError, match="the same task is running already"):
                task(None, 0, 2)
            task(None, 1, 2)
    with pytest.raises(UsageError, match="another build"), sole_use(out, shared=True):
        cluster.Finish(plan, "slurm")(None, 0, 1)

    # The first task never ended: its episodes are told of, the others are there.
    cluster.Finish(plan, "slurm")(None, 0, 1)
    missing = [plan.job.refs[number].id for number in plan.taken[0]]
    listed = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    assert [row["episode"] for row in listed] == missing
    assert all("task 0 did not end" in row["reason"] for row in listed)
    assert cluster.make_plan(job(three, out.absolute()), 2).todo == [0]
    assert loop.run_job(job(three, out)).built == len(missing)

    (plan.folder.parent / "current").write_text("another")
    with pytest.raises(OccGenError, match="took this one's place"):
        task(None, 0, 2)


def test_only_accelerate_runs_beside_processes_that_were_started(
    three: Path, tmp_path: Path
) -> None:
    env = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    done = finished(command(three, tmp_path / "out", "--executor", "local"), **env)
    assert done.returncode == 2
    assert "only --executor accelerate shares the episodes among" in done.stderr
    done = finished(command(three, tmp_path / "out", "--workers", "7"), **env)
    assert done.returncode == 2
    assert "2 processes were started already" in done.stderr


@pytest.mark.slow
def test_wrong_usage_is_told_once_by_all_processes(three: Path, tmp_path: Path) -> None:
    arguments = command(three, tmp_path / "out", "--executor", "accelerate", "--workers", "2")
    done = finished([*arguments, "--source", "nothing"])
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("Error: --source nothing: no such source") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_process_of_torchrun_that_dies_takes_the_others_along(
    source: Path, expected: Tree, tmp_path: Path
) -> None:
    """The launcher ends them all; the same command, or any other executor, goes on."""
    out = tmp_path / "out"
    with subprocess.Popen(
        command(source, out, "--executor", "accelerate", "--workers", "2"),
        env=os.environ | {"TQDM_DISABLE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        family: list[psutil.Process] = []
        end = time.monotonic() + 100
        while not list(out.glob("*/*/trajectory_*/meta/occgen.json")):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.01)
        family = psutil.Process(process.pid).children(recursive=True)
        victim = next(p for p in family if p.environ().get("RANK") == "1")
        victim.kill()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL, errors
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert loop.run_job(job(source, out)).present >= 1
    assert tree(out) == expected


# What failed


def test_what_failed_is_left_alone_until_something_changes(three: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    good = (three / SECOND / TABLE).read_bytes()
    (three / SECOND / TABLE).write_bytes(good[:100])
    attempts: list[str] = []

    class Counting(InternNavBuilder):
        def read(self, ref: EpisodeRef) -> Any:
            attempts.append(ref.id)
            return super().read(ref)

    def build(**choices: Any) -> Summary:
        attempts.clear()
        config = load_config(None, choices.pop("config", COARSE[1:]))
        builder = Counting(three)
        return loop.run(builder, loop.list_episodes(builder), out, Settings(config, **choices))

    first = build()
    assert (first.built, len(first.failures), first.repeated) == (2, 1, 0)
    again = build()
    assert (again.present, len(again.failures), again.repeated) == (2, 1, 1)
    assert attempts == []
    assert again.failures[0].reason == first.failures[0].reason
    assert len((out / "failures.jsonl").read_text().splitlines()) == 1

    assert build(retry_failed=True).repeated == 0
    assert attempts == [SECOND]
    assert build().repeated == 1
    assert build(config=("voxel_size=0.2",)).repeated == 0  # Another setting is another attempt.
    assert build().repeated == 0
    (three / SECOND / TABLE).chmod(0o600)  # Whatever happens to the file may have mended it.
    assert build().repeated == 0
    assert build().repeated == 1

    (three / SECOND / TABLE).write_bytes(good)
    mended = build()
    assert (mended.built, mended.failures) == (1, [])
    assert not (out / "failures.jsonl").exists()


def test_a_failure_does_not_outlive_the_episode_that_was_built_after_it(
    three: Path, tmp_path: Path
) -> None:
    """The run that built it did not come to its end, and so the failure stayed in the list."""
    out = tmp_path / "out"
    loop.run_job(job(three, out))
    builder, settings = InternNavBuilder(three), job(three, out).settings
    ref = next(ref for ref in loop.list_episodes(builder) if ref.id == SECOND)
    stale = Failure(SECOND, "was broken", state=builder.state(ref, settings))
    failures.write(out, [stale])
    assert set(failures.known(out)) == {SECOND}
    plan = cluster.make_plan(job(three.absolute(), out.absolute()), 2)
    assert plan.todo == []
    summary = loop.run_job(job(three, out))
    assert (summary.present, summary.failures) == (3, [])
    assert not (out / "failures.jsonl").exists()


def test_what_another_command_built_since_is_no_failure_of_a_cluster(
    three: Path, tmp_path: Path
) -> None:
    """A task that has nothing to do tells what is there now, not what its last run made of it."""
    pytest.importorskip("datatrove")
    out, good = tmp_path / "out", (three / SECOND / INFO).read_bytes()
    (three / SECOND / INFO).write_bytes(b"{")
    options = ("--executor", "datatrove", "--tasks", "2", "--workers", "1")
    assert finished(command(three, out, *options)).returncode == 1
    (three / SECOND / INFO).write_bytes(good)
    assert loop.run_job(job(three, out)).failures == []
    done = finished(command(three, out, *options))
    assert done.returncode == 0, done.stdout
    assert "0 built, 3 already there, 0 failed of 3 episodes" in done.stdout
    assert failures.known(out) == {}


def test_a_machine_without_handles_is_not_held_against_the_episode(tmp_path: Path) -> None:
    (tmp_path / "info.json").write_text("{}")
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limit[1]))
    try:
        with pytest.raises(MachineError, match=r"info\.json: cannot be read"):
            read_json(tmp_path / "info.json")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


def test_a_limit_forgets_no_failure_but_that_of_an_episode_that_is_gone(
    three: Path, tmp_path: Path
) -> None:
    last, out = "sample_zed/house_001/trajectory_0", tmp_path / "out"
    (three / last / INFO).unlink()
    assert len(loop.run_job(job(three, out)).failures) == 1
    assert loop.run_job(job(three, out, limit=1)).failures == []
    assert set(failures.known(out)) == {last}
    shutil.rmtree(three / last)
    assert loop.run_job(job(three, out)).failures == []
    assert failures.known(out) == {}


def test_of_a_process_that_did_not_end_is_told_what_is_known(three: Path, tmp_path: Path) -> None:
    """What is there is there, but unless all was to be built anew; its own reasons are kept."""
    out = tmp_path / "out"
    assert not loop.run_job(job(three, out)).failures
    (three / SECOND / TABLE).write_bytes(b"no table")
    broken = job(three, out)
    (told,) = loop.run_job(broken).failures
    failures.record(out, told, "1")

    found = loop.left(broken, broken.refs, "process 1 was lost")
    assert (found.built, found.present, found.remarks) == (0, 2, ["process 1 was lost"])
    assert found.failures == [told]
    anew = job(three, out, overwrite=True)
    found = loop.left(anew, anew.refs, "process 1 was lost")
    assert (found.built, found.present) == (0, 0)
    assert sum(failure == told for failure in found.failures) == 1
    assert sum("process 1 was lost" in failure.reason for failure in found.failures) == 2


def test_a_process_is_lost_when_it_is_silent_not_when_nobody_listened(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    now = [0.0]
    monkeypatch.setattr(distributed.time, "monotonic", lambda: now[0])
    (tmp_path / "1.tally").write_text("1")
    silence = distributed._Silence(tmp_path, 1)
    now[0] += 10_000  # As when a scheduler stops a job and goes on with it.
    assert not silence.is_long()
    for _ in range(598):
        now[0] += 1
        assert not silence.is_long()
    replaced = tmp_path / "1.tally.partial"
    replaced.write_text("2")
    replaced.replace(tmp_path / "1.tally")
    for _ in range(600):
        now[0] += 1
        assert not silence.is_long()
    now[0] += 2
    assert silence.is_long()


def test_tasks_that_wait_for_their_turn_are_out_of_date_after_another_build(
    three: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    plan = cluster.make_plan(job(three, out.absolute()), 2)
    plan.folder.mkdir(parents=True)
    make_current(out, plan.name, plan.job.choices)
    loop.run_job(job(three, out, limit=1))  # The same choices: the tasks may still run.
    assert current(out) == [plan.name, plan.job.choices]
    cluster.BuildShare(plan, 1, None)(None, 0, 2)
    other = job(three, out)
    other = replace(other, settings=replace(other.settings, media="none"))
    loop.run_job(other)
    with pytest.raises(OccGenError, match="a newer build into"):
        cluster.BuildShare(plan, 1, None)(None, 1, 2)
    alone = distributed.Group(0, 1, 0, 1, "cpu")
    with ExitStack() as held:
        distributed._cleared(other, alone, "mine")
        make_current(out, "theirs", "")  # Another run's, between the two.
        with pytest.raises(OccGenError, match="a newer build into"):
            distributed._held(held, other, alone, "mine")


def test_the_command_says_what_it_left_alone(
    three: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (three / SECOND / INFO).unlink()
    out = tmp_path / "out"
    arguments = ["build", "--input", str(three), "--output", str(out), *COARSE]

    def call(*options: str) -> str:
        capsys.readouterr()
        code = cli.cli.main([*arguments, *options], standalone_mode=False)
        assert code == (0 if "--dry-run" in options else 1)
        return capsys.readouterr().out

    assert "--retry-failed" not in call()
    sentence = (
        "1 of them failed before, with the same source and settings, and were not tried again"
    )
    assert sentence in call()
    assert f"{SECOND}  failed before: see --retry-failed" in call("--dry-run")
    assert sentence not in call("--retry-failed")
    said = report(out)
    assert said["episodes"] == {
        "total": 3, "built": 0, "present": 2, "failed": 1, "failed_before": 0,
    }  # fmt: skip
    assert said["failures"][0]["episode"] == SECOND


def test_failures_of_a_run_that_was_killed_are_known(tmp_path: Path) -> None:
    before = Failure("a/b/c", "bad; mend it.", "a trace", "state")
    failures.record(tmp_path, before, "3")
    with (tmp_path / ".failures-3.jsonl").open("a") as file:
        file.write('{"episode": "x/y/z", "reas')  # Cut off by the kill.
    assert failures.known(tmp_path) == {"a/b/c": before}
    failures.write(tmp_path, [before])
    assert [path.name for path in tmp_path.iterdir()] == ["failures.jsonl"]
    assert failures.known(tmp_path) == {"a/b/c": before}
    failures.write(tmp_path, [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content", [b"", b"\x00\xff", b"[]\n1\nnull\n", b'{"episode": 1, "reason": []}\n', b"{" * 99999]
)
def test_a_list_of_failures_that_is_none_is_no_matter(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "failures.jsonl").write_bytes(content)
    assert failures.known(tmp_path) == {}


def test_a_condition_that_the_source_lacks_is_wrong_usage(three: Path, tmp_path: Path) -> None:
    from occgen_hub.builders.video import VideoBuilder

    config = load_config(None, ("condition=[poses]",))
    builder = VideoBuilder(next(three.rglob("*.mp4")))
    with pytest.raises(UsageError, match="--condition poses: the source video has none"):
        loop.check_conditions(builder, list(builder.episodes()), config)
    whole = InternNavBuilder(three)
    loop.check_conditions(whole, list(whole.episodes()), config)
    deep = load_config(None, ("condition=[depth]",))
    loop.check_conditions(whole, list(whole.episodes()), deep)
    for folder in three.rglob("observation.images.depth"):
        shutil.rmtree(folder)
    with pytest.raises(UsageError, match="--condition depth"):
        loop.check_conditions(whole, list(whole.episodes()), deep)


# Inside a process


def test_the_next_is_reconstructed_while_one_is_written_and_no_more(
    source: Path, tmp_path: Path
) -> None:
    events: list[tuple[str, int]] = []
    number = {ref.id: n for n, ref in enumerate(InternNavBuilder(source).episodes())}
    next_found = threading.Event()

    class Watched(InternNavBuilder):
        def find(self, ref: EpisodeRef, *others: Any) -> Found | Built:
            events.append(("find", number[ref.id]))
            if number[ref.id] == 1:
                next_found.set()
            return super().find(ref, *others)

        def write(self, found: Found, *others: Any) -> Built:
            if number[found.ref.id] == 0:
                assert next_found.wait(30)  # It comes while this one is written.
            events.append(("write", number[found.ref.id]))
            return super().write(found, *others)

    builder = Watched(source)
    refs = loop.list_episodes(builder)
    summary = loop.run(builder, refs, tmp_path / "out", Settings(load_config(None, COARSE[1:])))
    assert summary.built == 8
    written = -1
    for what, n in events:
        written = max(written, n) if what == "write" else written
        assert n <= written + 2  # One is written, one is being found or waits.
    assert [n for what, n in events if what == "write"] == list(range(8))


def test_an_interruption_does_not_wait_for_the_reconstruction(source: Path, tmp_path: Path) -> None:
    class Endless(InternNavBuilder):
        def find(self, ref: EpisodeRef, out: Path, settings: Settings, progress: Any) -> Any:
            while True:
                progress("reconstructed", 0)
                time.sleep(0.01)

    class Impatient(BaseException):
        pass

    def leave(*_: object) -> None:
        raise Impatient

    results = work.build_each(
        Endless(source), list(InternNavBuilder(source).episodes()), tmp_path / "out",
        Settings(), work.Listener(), {},
    )  # fmt: skip
    before = signal.signal(signal.SIGALRM, leave)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    start = time.monotonic()
    try:
        with pytest.raises(Impatient):
            next(results)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - start < 2
    assert not [t for t in threading.enumerate() if t.name == "reconstruct" and t.is_alive()]


def test_behind_is_in_order_bounded_and_hands_errors_back() -> None:
    done: list[int] = []
    ahead = 0

    def slow(item: int) -> None:
        time.sleep(0.001)
        done.append(item)

    with behind(slow, depth=3) as hand:
        for item in range(50):
            hand(item)
            ahead = max(ahead, item - len(done))
    assert done == list(range(50))
    assert ahead <= 5

    def bad(item: int) -> None:
        if item == 3:
            raise OSError(28, "No space left on device")

    def run(items: Iterable[int], error: type[Exception] | None = None) -> None:
        with behind(bad, depth=1) as hand:
            for item in items:
                hand(item)
            if error is not None:
                raise error

    with pytest.raises(OSError, match="No space"):
        run(itertools.count())  # It would go on for ever.
    with pytest.raises(OSError, match="No space"):
        run([3])
    with pytest.raises(ZeroDivisionError):
        run([1, 2], ZeroDivisionError)
    assert not [t for t in threading.enumerate() if "take" in t.name]


# On disk


def test_a_trajectory_is_on_disk_before_it_has_its_name(
    three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file and folder of it is flushed before the rename, the folder above after it."""
    flushed: dict[str, int] = {}
    renamed: dict[str, int] = {}
    clock = itertools.count()
    sync, rename, lock = os.fsync, os.rename, threading.Lock()

    def fsync(handle: int) -> None:
        sync(handle)
        with lock:
            flushed[str(Path(f"/proc/self/fd/{handle}").readlink())] = next(clock)

    def noted(self: Path, target: Path) -> Path:
        rename(self, target)
        renamed[str(self)] = next(clock)
        return Path(target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", noted)
    out = (tmp_path / "out").resolve()
    assert loop.run_job(job(three, out)).built == 3
    for path in out.rglob("trajectory_*"):
        partial = str(path.with_name(f".{path.name}.partial"))
        for inner in (path, *path.rglob("*")):
            was = str(inner).replace(str(path), partial)
            assert flushed[was] < renamed[partial], was
        for above in list(path.parents)[:3]:
            assert flushed[str(above)] > renamed[partial]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def trajectory_size(source: Path) -> int:
    """About what one takes on disk: what is made anew is small at this size of cells."""
    files = [path for path in source.rglob("*") if path.is_file()]
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in files) // 8


@pytest.mark.parametrize("workers", [1, 2])
def test_a_disk_of_64_mb_that_fills_up(
    source: Path, expected: Tree, small_disk: Path, workers: int
) -> None:
    """What has a final name is valid; with room again, the same command does the rest."""
    from occgen_hub.validation import validate

    out, ballast = small_disk / "out", small_disk / "ballast"
    room = 6 * trajectory_size(source)
    ballast.write_bytes(bytes((64 << 20) - room))
    done = finished(command(source, out, "--workers", str(workers)))
    assert done.returncode == 1, done.stderr
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    built = list(out.glob("*/*/trajectory_*"))
    assert 0 < len(built) < 8
    assert not list(out.rglob(".*.partial"))
    ballast.unlink()
    for path in built:
        assert not [f for f in validate(path).findings if "occupancy" not in f.file]
    done = finished(command(source, out, "--workers", str(workers)))
    assert done.returncode == 0, done.stderr
    assert tree(out) == expected


# Killed


KILLS = int(os.environ.get("OCCGEN_KILLS", "0"))
"""How often the long version kills; the short one, of every run, is in test_runtime.py."""


@pytest.mark.skipif(not KILLS, reason="OCCGEN_KILLS says how often; ten minutes for 50")
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_random_moments(
    source: Path, expected: Tree, tmp_path: Path, workers: int
) -> None:
    """All processes at once, anywhere between the start and the end; one output for all kills."""
    rng, out, whole = random.Random(workers), tmp_path / "out", 0
    start = time.monotonic()
    assert finished(command(source, out, "--workers", str(workers))).returncode == 0
    usual = time.monotonic() - start
    shutil.rmtree(out)
    for number in range(KILLS // 2):
        process = subprocess.Popen(
            command(source, out, "--workers", str(workers)),
            env=os.environ | {"TQDM_DISABLE": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(rng.uniform(usual / 8, usual))
        ended = process.poll() is not None
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        there = list(out.glob("*/*/trajectory_*"))
        for path in there:
            name = path.relative_to(out).as_posix()
            held = {f"{name}/{inner}": content for inner, content in tree(path).items()}
            assert held == {k: v for k, v in expected.items() if k.startswith(f"{name}/")}
        print(f"kill {number}: {len(there)} of 8 there{', and it had ended' if ended else ''}")
        if ended:
            assert tree(out) == expected
            whole += 1
            shutil.rmtree(out)
    done = finished(command(source, out, "--workers", str(workers)))
    assert done.returncode == 0, done.stderr
    assert tree(out) == expected
    print(f"{KILLS // 2} moments, {workers} processes; {whole} builds had ended by then")
