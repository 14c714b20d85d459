"""All ways to start, stop and resume the shards of a build give the same bytes."""

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
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from commands import Tree, occgen_hub, start, tree
from hypothesis import given
from hypothesis import strategies as st

from occgen_hub.builder import EpisodeRef
from occgen_hub.builders.internnav import InternNavBuilder
from occgen_hub.config import load_config
from occgen_hub.episode_build import (
    Built,
    ReconstructedEpisode,
    Settings,
    reconstruct_episode,
    write_episode,
)
from occgen_hub.errors import MachineError, UsageError
from occgen_hub.files import read_json
from occgen_hub.job import Job, check_conditions, list_episodes, open_job
from occgen_hub.prefetch import background
from occgen_hub.runtime import cluster, records
from occgen_hub.runtime.build import build_dataset, build_shard
from occgen_hub.runtime.episodes import build_episodes
from occgen_hub.runtime.finalize import finalize, unfinished
from occgen_hub.runtime.lock import output_lock
from occgen_hub.runtime.report import read_failures
from occgen_hub.runtime.results import Summary
from occgen_hub.runtime.shard import Shard, share_out
from occgen_hub.sample import make_sample

COARSE = ("--set", "voxel_size=0.1")
TABLE = "data/chunk-000/episode_000000.parquet"
INFO = "meta/info.json"
SECOND = "sample_zed/house_000/trajectory_1"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight trajectories of 2 to 4 frames. Tests must not change them."""
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
    assert not build_dataset(job(source, out)).failures
    return tree(out)


def job(source: Path, out: Path, **choices: Any) -> Job:
    config = load_config(None, COARSE[1:])
    return open_job("internnav", source, out, config=config, **choices)


def command(source: Path, out: Path, *options: str | Path) -> tuple[str | Path, ...]:
    return ("build", "--input", source, "--output", out, *COARSE, *options)


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m")


def report(out: Path) -> dict[str, Any]:
    values = json.loads((out / "report.json").read_text())
    assert isinstance(values, dict)
    return values


# Distribution


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=7),
    st.integers(1, 3),
)
def test_shards_are_disjoint_complete_and_balanced(items: list[int], count: int) -> None:
    taken = share_out([float(item) for item in items], count)
    assert len(taken) == count
    assert sorted(itertools.chain.from_iterable(taken)) == list(range(len(items)))
    assert all(share == sorted(share) for share in taken)
    assert taken == share_out([float(item) for item in items], count)
    best = min(
        max(
            sum(i for i, owner in zip(items, owners, strict=True) if owner == n)
            for n in range(count)
        )
        for owners in itertools.product(range(count), repeat=len(items))
    )
    longest = max(sum(items[n] for n in share) for share in taken)
    assert longest <= best * (4 / 3 - 1 / (3 * count)) + 1e-9


def test_episodes_of_unknown_cost_are_distributed_evenly() -> None:
    assert [len(share) for share in share_out([0.0] * 9, 4)] == [3, 2, 2, 2]


def test_cost_is_frames_times_pixels(source: Path, tmp_path: Path) -> None:
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


def test_shards_are_numbered_from_0() -> None:
    assert Shard.parse("15/16") == Shard(15, 16)
    for text in ("16/16", "-1/3", "1", "1/0", "0/1000000", "\u0661/3", "a/b"):
        with pytest.raises(UsageError, match=f"--shard {text}: "):
            Shard.parse(text)


# The same bytes, in every way of building


@pytest.mark.long
def test_two_workers_give_the_same_bytes(source: Path, expected: Tree, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = occgen_hub(*command(source, out, "--workers", "2"))
    assert done.returncode == 0, done.stderr
    assert tree(out) == expected
    (process,) = report(out)["processes"]
    assert process["episodes"] == 8


@pytest.mark.parametrize("order", [(2, 0, 1), (0, 1, 2)])
def test_three_shards_in_any_order_give_the_same_bytes(
    source: Path, expected: Tree, tmp_path: Path, order: tuple[int, ...]
) -> None:
    out, built = tmp_path / "out", 0
    for index in order:
        summary = build_shard(job(source, out), Shard(index, 3))
        built += summary.built
        assert not summary.failures
        assert len(list(out.glob("*/*/trajectory_*"))) == built
        assert not (out / "README.md").exists()
        assert not (out / "report.json").exists()
        assert unfinished(out)
    summary = finalize(out)
    assert (summary.built, summary.present, summary.failures) == (8, 0, [])
    assert tree(out) == expected
    assert unfinished(out) == []
    build_report = report(out)
    assert build_report["executor"] == "shard"
    assert sum(process["episodes"] for process in build_report["processes"]) == 8


def test_concurrent_shards_give_the_same_bytes(
    source: Path, expected: Tree, tmp_path: Path
) -> None:
    """Each with workers and an engine of its own; the output holds spaces and quotes."""
    out, own = tmp_path / "an 'out'", ("--workers", "2", "--engine", "rgbd")
    with ThreadPoolExecutor(2) as both:
        done = list(
            both.map(
                lambda n: occgen_hub(*command(source, out, "--shard", f"{n}/2", *own)), range(2)
            )
        )
    for one in done:
        assert one.returncode == 0, one.stderr
        assert "When all shards are built: occgen-hub finalize '" in one.stdout
    last = occgen_hub("finalize", out)
    assert last.returncode == 0, last.stderr
    assert "8 built, 0 already there, 0 failed of 8 episodes" in last.stdout
    assert tree(out) == expected


def test_finalize_is_idempotent(three: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (three / SECOND / INFO).write_text("{")
    for index in range(2):
        build_shard(job(three, out), Shard(index, 2))
    first = finalize(out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    second = finalize(out, workers=2)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert first.failures == second.failures
    assert [failure.id for failure in first.failures] == [SECOND]


def test_finalize_uses_the_options_of_the_shards(three: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build_dataset(job(three, out))
    assert (out / "occupancy").is_dir()
    build_shard(job(three, out, parquet_occupancy=False), Shard(0, 1))
    finalize(out)
    assert not (out / "occupancy").exists()


def test_finalize_lists_unfinished_episodes(three: Path, expected: Tree, tmp_path: Path) -> None:
    """One shard was killed and one never started: their episodes count as failures until built."""
    out = tmp_path / "out"
    plan = records.make_plan(job(three, out), 3)
    _, second, third = (ids[0] for ids in plan.shards)
    build_shard(job(three, out), Shard(0, 3))
    build_shard(job(three, out), Shard(1, 3))
    record = out / ".logs/shard-1.jsonl"
    record.write_bytes(record.read_bytes().partition(b'\n{"id"')[0] + b'\n{"id": "sam')
    done = occgen_hub("finalize", out)
    assert done.returncode == 1, done.stderr
    assert "1 built, 0 already there, 2 failed of 3 episodes" in done.stdout
    assert f"{second}: shard 1/3 did not finish; run the same build again." in done.stdout
    assert f"{third}: shard 2/3 did not finish; run the same build again." in done.stdout
    assert {failure.id for failure in read_failures(out)} == {second, third}
    for index in (1, 2):
        build_shard(job(three, out), Shard(index, 3))
    assert finalize(out).failures == []
    assert read_failures(out) == []
    build_dataset(job(three, tmp_path / "one"))
    assert tree(out) == tree(tmp_path / "one")


def test_same_command_completes_a_killed_shard(
    source: Path, expected: Tree, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = start(*command(source, out, "--shard", "0/2"))
    end = time.monotonic() + 100
    while not list(out.glob("*/*/trajectory_*/meta/occgen.json")):
        assert time.monotonic() < end
        time.sleep(0.005)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    second = occgen_hub(*command(source, out, "--shard", "1/2"))
    assert second.returncode == 0, second.stderr
    early = occgen_hub("finalize", out)
    assert early.returncode == 1
    assert "shard 0/2 did not finish; run the same build again." in early.stdout
    again = occgen_hub(*command(source, out, "--shard", "0/2"))
    assert again.returncode == 0, again.stderr
    assert "0 already there" not in again.stdout
    assert occgen_hub("finalize", out).returncode == 0
    assert tree(out) == expected


def test_lock_admits_shards_of_one_build_only(three: Path, tmp_path: Path) -> None:
    out, busy = tmp_path / "out", "another build is writing here"

    class Visited(InternNavBuilder):
        """While it is read, other builds try to use the output."""

        def read(self, ref: EpisodeRef) -> Any:
            assert build_shard(job(three, out), Shard(1, 2)).failures == []
            for refused in (
                lambda: build_shard(job(three, out), Shard(0, 2)),  # The same shard.
                lambda: build_shard(job(three, out), Shard(1, 3)),
                lambda: build_shard(job(three, out, media="none"), Shard(1, 2)),
                lambda: build_shard(job(three, out, limit=2), Shard(1, 2)),
                lambda: build_dataset(job(three, out)),
                lambda: finalize(out),
            ):
                with pytest.raises(UsageError, match=busy):
                    refused()
            visits.append(ref.id)
            return super().read(ref)

    visits: list[str] = []
    own = job(three, out)
    own = Job(Visited(three), own.refs, out, own.settings)
    summary = build_shard(own, Shard(0, 2))
    assert [failure.reason for failure in summary.failures] == []
    assert visits
    assert finalize(out).built == 3
    with output_lock(out), pytest.raises(UsageError, match=busy):
        build_shard(job(three, out), Shard(0, 2))


def test_run_without_work_keeps_the_report(three: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build_dataset(job(three, out))
    first = report(out)
    assert (first["frames"], first["episodes"]["built"]) == (9, 3)
    build_dataset(job(three, out))
    second = report(out)
    assert second["episodes"] == {"total": 3, "built": 0, "present": 3, "failed": 0}
    for key in ("finished", "frames", "seconds", "stages", "notes", "processes"):
        assert second[key] == first[key]


@pytest.mark.long
@pytest.mark.slow
def test_two_torchrun_processes_give_the_same_bytes(
    source: Path, expected: Tree, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = occgen_hub(*command(source, out), launcher=TORCHRUN)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.count("8 built, 0 already there, 0 failed of 8 episodes") == 1
    assert tree(out) == expected
    build_report = report(out)
    assert build_report["notes"]
    # One of each kind, printed once.
    assert done.stderr.count("note    ") == len(build_report["notes"])
    assert build_report["executor"] == "accelerate"
    assert [process["device"] for process in build_report["processes"]] == ["cpu", "cpu"]
    assert sorted(process["episodes"] for process in build_report["processes"]) != [0, 8]


MORTAL = """
import os, signal
from occgen_hub.builders.internnav import InternNavBuilder
from occgen_hub.cli import main

read, seen = InternNavBuilder.read, []

def mortal(self, ref):
    seen.append(ref)
    if os.environ["GROUP_RANK"] == os.environ["DIES"] and len(seen) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(self, ref)

InternNavBuilder.read = mortal
main()
"""
"""A variant of `occgen-hub` that dies in the middle of a build on host number DIES."""


def on_two_hosts(
    arguments: tuple[str | Path, ...], tmp_path: Path, dies: str = ""
) -> list[subprocess.CompletedProcess[str]]:
    """Run a command by torchrun on two hosts with a process each, both on this machine."""
    (tmp_path / "mortal.py").write_text(MORTAL)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meeting = ["--nnodes", "2", "--master_addr", "127.0.0.1", "--master_port", port]

    def host(number: int) -> subprocess.CompletedProcess[str]:
        launcher = ["-m", "torch.distributed.run", *meeting, "--node_rank", str(number)]
        return subprocess.run(
            [sys.executable, *launcher, str(tmp_path / "mortal.py"), *map(str, arguments)],
            env=os.environ | {"TQDM_DISABLE": "1", "DIES": dies},
            capture_output=True,
            text=True,
            timeout=170,
            check=False,
        )

    with ThreadPoolExecutor(2) as both:
        return list(both.map(host, range(2)))


@pytest.mark.slow
def test_two_hosts_give_the_same_bytes(source: Path, expected: Tree, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first, second = on_two_hosts(command(source, out), tmp_path)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    # torchrun's launchers may print errors when one ends before the other.
    assert "occgen_hub/" not in first.stderr + second.stderr
    assert "8 built, 0 already there, 0 failed of 8 episodes" in first.stdout
    assert tree(out) == expected
    assert len(report(out)["processes"]) == 2


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("dies", ["0", "1"])
def test_same_command_completes_after_a_lost_host(
    source: Path, expected: Tree, tmp_path: Path, dies: str
) -> None:
    out = tmp_path / "out"
    first, second = on_two_hosts(command(source, out), tmp_path, dies=dies)
    assert (first.returncode, second.returncode) == (1, 1)
    assert not (out / "report.json").exists()
    done = occgen_hub(*command(source, out))
    assert done.returncode == 0, done.stderr
    assert "0 built" not in done.stdout
    assert tree(out) == expected


def listened_on(process: subprocess.Popen[str]) -> set[str]:
    """The addresses on which a process and its children listen, until it ends."""
    addresses: set[str] = set()
    while process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            parent = psutil.Process(process.pid)
            for one in (parent, *parent.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    found = one.net_connections("tcp")
                    addresses |= {c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN}
        time.sleep(0.2)
    return addresses


@pytest.mark.slow
def test_accelerate_without_launcher_starts_a_process_per_device(
    three: Path, tmp_path: Path
) -> None:
    """Without a launcher it starts the processes itself. One of them has a broken episode."""
    (three / SECOND / INFO).write_text("{")
    out = tmp_path / "out"
    process = start(*command(three, out, "--executor", "accelerate", "--workers", "2"))
    assert not listened_on(process)
    output, errors = process.communicate()
    assert process.returncode == 1, errors
    assert "Traceback" not in errors
    assert "2 built, 0 already there, 1 failed of 3 episodes" in output
    assert f"failed  {SECOND}: " in errors
    (row,) = map(json.loads, (out / "failures.jsonl").read_text().splitlines())
    assert row["episode"] == SECOND
    assert {p.name for p in out.iterdir()} >= {"report.json", "README.md", "occupancy"}


@pytest.mark.long
@pytest.mark.slow
def test_datatrove_builds_locally_and_reruns_only_unfinished_tasks(
    three: Path, tmp_path: Path
) -> None:
    pytest.importorskip("datatrove")
    build_dataset(job(three, tmp_path / "one"))
    out = tmp_path / "out"
    options = ("--executor", "datatrove", "--tasks", "2", "--workers", "2")
    done = occgen_hub(*command(three, out, *options))
    assert done.returncode == 0, done.stderr
    assert "3 built, 0 already there, 0 failed of 3 episodes" in done.stdout
    assert tree(out) == tree(tmp_path / "one")
    build_report = report(out)
    assert build_report["executor"] == "datatrove"
    assert done.stderr.count("note    ") == len(build_report["notes"]) > 0
    logs = out / ".logs/datatrove/logs"
    assert {path.name for path in logs.iterdir()} == {"task_00000.log", "task_00001.log"}

    shutil.rmtree(out / SECOND)
    tasks = cluster.make_tasks(job(three, out), "datatrove", 2)
    assert len(tasks.todo) == 1
    shutil.rmtree(logs)
    done = occgen_hub(*command(three, out, *options))
    assert done.returncode == 0, done.stderr
    assert "1 built, 2 already there, 0 failed of 3 episodes" in done.stdout
    assert tree(out) == tree(tmp_path / "one")
    assert len(list(logs.iterdir())) == 1  # The other task was not even started.


def test_episodes_built_by_another_command_are_not_failures(three: Path, tmp_path: Path) -> None:
    """Tasks with nothing to do count the present episodes."""
    pytest.importorskip("datatrove")
    out, good = tmp_path / "out", (three / SECOND / INFO).read_bytes()
    (three / SECOND / INFO).write_bytes(b"{")
    options = ("--executor", "datatrove", "--tasks", "2", "--workers", "1")
    assert occgen_hub(*command(three, out, *options)).returncode == 1
    (three / SECOND / INFO).write_bytes(good)
    assert build_dataset(job(three, out)).failures == []
    done = occgen_hub(*command(three, out, *options))
    assert done.returncode == 0, done.stdout
    assert "0 built, 3 already there, 0 failed of 3 episodes" in done.stdout
    assert read_failures(out) == []


@pytest.mark.long
@pytest.mark.slow
def test_ray_cluster_listens_on_localhost_only(
    source: Path, expected: Tree, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    out = tmp_path / "out"
    options = ("--executor", "ray", "--tasks", "2", "--workers", "2", "--cpus-per-task", "1")
    process = start(*command(source, out, *options, "--mem-per-cpu", "1"))
    listening = listened_on(process)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "8 built, 0 already there, 0 failed of 8 episodes" in output
    assert tree(out) == expected
    assert report(out)["executor"] == "ray"
    assert listening
    assert listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


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
    """Replace Slurm's commands by scripts that run at once. Returns the log of submissions."""
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
def test_slurm_builds_the_shards_and_then_finalizes(
    three: Path, tmp_path: Path, slurm: Path
) -> None:
    pytest.importorskip("datatrove")
    build_dataset(job(three, tmp_path / "one"))
    out = tmp_path / "an out; touch X;"
    options = ("--executor", "slurm", "--tasks", "2", "--slurm", "partition=gpu")
    dry = occgen_hub(*command(three, out, *options, "--slurm", "account=me", "--dry-run"))
    assert dry.returncode == 0, dry.stderr
    assert not out.exists()
    for line in (
        "Tasks: 2, 2 of them with something to do. Episodes: 3, 1 to 2 a task.",
        "#SBATCH --partition=gpu",
        "#SBATCH --account=me",
        "#SBATCH --array=0-1",
        f"#SBATCH --output='{out}/.logs/",
        f"launch_pickled_pipeline '{out}/.logs/datatrove'/executor.pik",
    ):
        assert line in dry.stdout, dry.stdout

    done = occgen_hub(*command(three, out, *options))
    assert done.returncode == 0, done.stderr
    assert "The tasks are queued in Slurm" in done.stdout
    assert tree(out) == tree(tmp_path / "one")
    assert not Path("X").exists()
    assert report(out)["episodes"]["built"] == 3
    submitted = slurm.read_text()
    assert submitted.count("--dependency=afterany:") == 1
    header = script_of(dry.stdout).replace("#SBATCH --account=me\n", "")
    assert " ".join(header.split()) in " ".join(submitted.split())

    again = occgen_hub(*command(three, out, *options, "--dry-run"))
    assert "0 of them with something to do" in again.stdout
    assert "#SBATCH" not in again.stdout
    done = occgen_hub(*command(three, out, *options))
    assert "0 built, 3 already there, 0 failed of 3 episodes" in done.stdout
    assert slurm.read_text() == submitted  # Nothing was submitted.


def script_of(text: str) -> str:
    """The #SBATCH lines of a batch script."""
    return text.partition("#!/bin/bash")[2].partition("\n\n")[0]


def test_slurm_without_a_partition_takes_the_default(three: Path, tmp_path: Path) -> None:
    pytest.importorskip("datatrove")
    done = occgen_hub(*command(three, tmp_path / "out", "--executor", "slurm", "--dry-run"))
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --array=0-0" in done.stdout
    assert "--partition" not in script_of(done.stdout)
    end = f"When all of these tasks have ended, one more runs occgen-hub finalize {tmp_path}/out.\n"
    assert end in done.stdout
    shutil.make_archive(str(tmp_path / "packed/g/s"), "tar", three / "sample_zed/house_000")
    packed = command(tmp_path / "packed", tmp_path / "out", "--executor", "slurm", "--dry-run")
    assert "Scenes: 1, 1 to 1 a task." in occgen_hub(*packed).stdout


def test_options_of_sbatch_are_checked() -> None:
    with pytest.raises(UsageError, match="expected key=value"):
        cluster.parse_slurm(("partition",))
    assert cluster.parse_slurm(("--time=1:00", "comment=a=b")) == {"time": "1:00", "comment": "a=b"}


def test_launched_processes_require_accelerate(three: Path, tmp_path: Path) -> None:
    env = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    done = occgen_hub(*command(three, tmp_path / "out", "--executor", "local"), **env)
    assert done.returncode == 2
    assert "only --executor accelerate distributes episodes over them" in done.stderr
    done = occgen_hub(*command(three, tmp_path / "out", "--workers", "7"), **env)
    assert done.returncode == 2
    assert "2 processes were started already" in done.stderr


@pytest.mark.slow
def test_usage_error_is_printed_once(three: Path, tmp_path: Path) -> None:
    arguments = command(three, tmp_path / "out", "--source", "nothing")
    done = occgen_hub(*arguments, launcher=TORCHRUN)
    assert done.stderr.count("Error: --source nothing: no such source") == 1
    assert "occgen_hub/" not in done.stderr


@pytest.mark.slow
def test_torchrun_stops_all_ranks_when_one_dies(
    source: Path, expected: Tree, tmp_path: Path
) -> None:
    """The launcher stops them all. The same command, or another executor, resumes the build."""
    out = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, *TORCHRUN, "occgen_hub", *map(str, command(source, out))],
        env=os.environ | {"TQDM_DISABLE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        end = time.monotonic() + 100
        while not list(out.glob("*/*/trajectory_*/meta/occgen.json")):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.01)
        family = psutil.Process(process.pid).children(recursive=True)
        victim = next(p for p in family if p.environ().get("RANK") == "1")
        victim.kill()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert build_dataset(job(source, out)).present >= 1
    assert tree(out) == expected


# Failures


def test_failed_episodes_are_retried(three: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    good = (three / SECOND / TABLE).read_bytes()
    (three / SECOND / TABLE).write_bytes(good[:100])
    attempts: list[str] = []

    class Counting(InternNavBuilder):
        def read(self, ref: EpisodeRef) -> Any:
            attempts.append(ref.id)
            return super().read(ref)

    def build() -> Summary:
        attempts.clear()
        builder, settings = Counting(three), Settings(load_config(None, COARSE[1:]))
        return build_dataset(Job(builder, list_episodes(builder), out, settings))

    first = build()
    assert (first.built, len(first.failures)) == (2, 1)
    again = build()
    assert (again.present, again.failures) == (2, first.failures)
    assert attempts == [SECOND]
    (row,) = map(json.loads, (out / "failures.jsonl").read_text().splitlines())
    assert row == {"episode": SECOND, "reason": first.failures[0].reason}
    assert report(out)["failures"] == [row]

    (three / SECOND / TABLE).write_bytes(good)
    mended = build()
    assert (mended.built, mended.failures) == (1, [])
    assert not (out / "failures.jsonl").exists()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ImportError("no lib"), "a library could not be loaded (no lib); repair the installation"),
        (MemoryError(), "needs more memory than there is; use fewer --workers"),
        (OSError(5, "Input/output error", "x.png"), "x.png: cannot be read or written (Input/"),
        (OSError("image file is truncated"), f"{SECOND}: cannot be read or written (image file is"),
        (KeyError("k"), "failed for an unexpected reason (KeyError: 'k'); please report it"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_machine_faults_are_reported_and_retried(
    three: Path, tmp_path: Path, error: Exception, words: str
) -> None:
    class Faulty(InternNavBuilder):
        def read(self, ref: EpisodeRef) -> Any:
            if ref.id == SECOND:
                raise error
            return super().read(ref)

    out, settings = tmp_path / "out", job(three, tmp_path / "out").settings
    builder = Faulty(three)
    (failure,) = build_dataset(Job(builder, list_episodes(builder), out, settings)).failures
    assert words in failure.reason
    if isinstance(error, OSError) and error.errno is None:
        assert str(three) in failure.reason
    of_code = isinstance(error, KeyError) or not getattr(error, "errno", True)
    assert ("Traceback" in failure.trace) == of_code
    assert read_failures(out) == [failure]
    assert build_dataset(job(three, out)).failures == []


def test_lack_of_file_handles_is_a_machine_error(tmp_path: Path) -> None:
    (tmp_path / "info.json").write_text("{}")
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limit[1]))
    try:
        with pytest.raises(MachineError, match=r"info\.json: cannot be read"):
            read_json(tmp_path / "info.json")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


def test_limit_keeps_failures_of_other_episodes(three: Path, tmp_path: Path) -> None:
    last, out = "sample_zed/house_001/trajectory_0", tmp_path / "out"
    (three / last / INFO).unlink()
    assert len(build_dataset(job(three, out)).failures) == 1
    assert build_dataset(job(three, out, limit=1)).failures == []
    assert [failure.id for failure in read_failures(out)] == [last]
    shutil.rmtree(three / last)
    assert build_dataset(job(three, out)).failures == []
    assert read_failures(out) == []


@pytest.mark.parametrize(
    "content", [b"", b"\x00\xff", b"[]\n1\nnull\n", b'{"episode": 1, "reason": []}\n', b"{" * 99999]
)
def test_malformed_files_of_a_build_are_ignored(
    three: Path, content: bytes, tmp_path: Path
) -> None:
    (tmp_path / "failures.jsonl").write_bytes(content)
    assert read_failures(tmp_path) == []
    out = tmp_path / "out"
    build_dataset(job(three, out))
    before = tree(out)
    for name in ("build.json", "shard-0.jsonl"):
        (out / ".logs" / name).write_bytes(content)
    (out / "report.json").write_bytes(content)
    assert records.read_record(out, 0) == records.Record()
    assert build_dataset(job(three, out)).present == 3
    assert report(out)["episodes"]["present"] == 3
    assert tree(out) == before


def test_pipe_in_the_place_of_the_plan_is_replaced(three: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build_dataset(job(three, out))
    before = tree(out)
    (out / ".logs/build.json").unlink()
    os.mkfifo(out / ".logs/build.json")
    assert (
        occgen_hub("build", "--input", three, "--output", out, *COARSE, timeout=60).returncode == 0
    )
    assert (out / ".logs/build.json").is_file()
    assert tree(out) == before


@pytest.mark.parametrize("shards", [[], [[SECOND]], [[SECOND, "a/b/c", "d/e/f"]]])
def test_plan_with_other_episodes_is_replaced(
    three: Path, tmp_path: Path, shards: list[list[str]]
) -> None:
    plan = tmp_path / "out/.logs/build.json"
    build_dataset(job(three, tmp_path / "out"))
    before = json.loads(plan.read_text())
    plan.write_text(json.dumps(before | {"shards": shards}))
    assert build_dataset(job(three, tmp_path / "out")).present == 3
    assert json.loads(plan.read_text()) == before


def test_finalize_refuses_a_plan_with_invalid_values(three: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build_dataset(job(three, out))
    path = out / ".logs/build.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shards": True}))
    with pytest.raises(UsageError, match=r"has no \.logs/build\.json of a build"):
        finalize(out)


def test_depth_is_looked_up_per_episode_of_a_scene(tmp_path: Path) -> None:
    """Episodes of a scene share image folders; only an episode's own images count."""
    make_sample(tmp_path / "tree", trajectories=3, frames=3, layout="scenes")
    builder = InternNavBuilder(tmp_path / "tree")
    refs = list_episodes(builder)
    scene = [ref for ref in refs if ref.path == refs[0].path]
    assert len(scene) > 1
    images = set(builder.sources(scene[0]))
    for path in images:
        if path.suffix == ".png":
            path.unlink()
    assert [builder.has_depth(ref) for ref in scene] == [False] + [True] * (len(scene) - 1)


def test_dry_run_downloads_no_weights(three: Path, tmp_path: Path) -> None:
    for folder in three.rglob("observation.images.depth"):
        shutil.rmtree(folder)
    offline = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = occgen_hub(*command(three, tmp_path / "out", "--dry-run"), **offline)
    # The plan uses the sizes of the published weights.
    assert done.returncode == 0, done.stderr
    assert "3 of 3 episodes would be built" in done.stdout
    assert "frames in 1 window" in done.stderr
    assert "Licence of its weights: CC BY-NC 4.0" in done.stderr
    assert "Before the build: there are no weights for pi3x" in done.stderr
    assert "could not be downloaded" not in done.stderr
    done = occgen_hub(*command(three, tmp_path / "out"), **offline)
    assert "could not be downloaded" in done.stderr


def test_condition_missing_in_the_source_is_a_usage_error(three: Path, tmp_path: Path) -> None:
    from occgen_hub.builders.video import VideoBuilder

    config = load_config(None, ("condition=[poses]",))
    builder = VideoBuilder(next(three.rglob("*.mp4")))
    with pytest.raises(UsageError, match="--condition poses: the source video has none"):
        check_conditions(builder, list(builder.episodes()), config)
    whole = InternNavBuilder(three)
    check_conditions(whole, list(whole.episodes()), config)
    deep = load_config(None, ("condition=[depth]",))
    check_conditions(whole, list(whole.episodes()), deep)
    for folder in three.rglob("observation.images.depth"):
        shutil.rmtree(folder)
    with pytest.raises(UsageError, match="--condition depth"):
        check_conditions(whole, list(whole.episodes()), deep)


# Inside a process


def test_one_episode_is_reconstructed_while_one_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, int]] = []
    number = {ref.id: n for n, ref in enumerate(InternNavBuilder(source).episodes())}
    next_found = threading.Event()

    def reconstruct(builder: Any, ref: EpisodeRef, *others: Any) -> Any:
        events.append(("reconstruct", number[ref.id]))
        if number[ref.id] == 1:
            next_found.set()
        return reconstruct_episode(builder, ref, *others)

    def write(done: ReconstructedEpisode, *others: Any) -> Built:
        if number[done.ref.id] == 0:
            assert next_found.wait(30)  # The next one is reconstructed while this one is written.
        events.append(("write", number[done.ref.id]))
        return write_episode(done, *others)

    monkeypatch.setattr("occgen_hub.runtime.episodes.reconstruct_episode", reconstruct)
    monkeypatch.setattr("occgen_hub.runtime.episodes.write_episode", write)
    builder = InternNavBuilder(source)
    refs = list_episodes(builder)
    settings = Settings(load_config(None, COARSE[1:]))
    summary = build_dataset(Job(builder, refs, tmp_path / "out", settings))
    assert summary.built == 8
    written = -1
    for what, n in events:
        written = max(written, n) if what == "write" else written
        assert n <= written + 2  # One is written, one is being reconstructed or waits.
    assert [n for what, n in events if what == "write"] == list(range(8))


def test_interruption_does_not_wait_for_reconstruction(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def endless(builder: Any, ref: Any, out: Any, settings: Any, progress: Any) -> Any:
        while True:
            progress("reconstructed", 0)
            time.sleep(0.01)

    monkeypatch.setattr("occgen_hub.runtime.episodes.reconstruct_episode", endless)

    class Impatient(BaseException):
        pass

    def leave(*_: object) -> None:
        raise Impatient

    refs = list(InternNavBuilder(source).episodes())
    results = build_episodes(InternNavBuilder(source), refs, tmp_path / "out", Settings())
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


def test_background_is_ordered_bounded_and_raises_errors() -> None:
    done: list[int] = []
    ahead = 0

    def slow(item: int) -> None:
        time.sleep(0.001)
        done.append(item)

    with background(slow, depth=3) as hand:
        for item in range(50):
            hand(item)
            ahead = max(ahead, item - len(done))
    assert done == list(range(50))
    assert ahead <= 5

    def bad(item: int) -> None:
        if item == 3:
            raise OSError(28, "No space left on device")

    def run(items: Iterable[int], error: type[Exception] | None = None) -> None:
        with background(bad, depth=1) as hand:
            for item in items:
                hand(item)
            if error is not None:
                raise error

    with pytest.raises(OSError, match="No space"):
        run(itertools.count())  # Endless without the error.
    with pytest.raises(OSError, match="No space"):
        run([3])
    with pytest.raises(ZeroDivisionError):
        run([1, 2], ZeroDivisionError)
    assert not [t for t in threading.enumerate() if "take" in t.name]


# On disk


def test_trajectory_is_flushed_before_rename(
    three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All its files and folders are flushed before the rename, the parent folder after it."""
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
    assert build_dataset(job(three, out)).built == 3
    for path in out.rglob("trajectory_*"):
        hidden = re.compile(re.escape(str(path.parent)) + rf"/\.{path.name}\.[0-9a-f]+\.partial")
        (partial,) = (place for place in renamed if hidden.fullmatch(place))
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
    """About the size of an episode on disk. Generated files are small with this cell size."""
    files = [path for path in source.rglob("*") if path.is_file()]
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in files) // 8


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 2])
def test_same_command_completes_after_a_full_disk(
    source: Path, expected: Tree, small_disk: Path, workers: int
) -> None:
    """Everything with a final name is valid. With free space, the same command completes it."""
    from occgen_hub.validation import validate

    out, ballast = small_disk / "out", small_disk / "ballast"
    room = 6 * trajectory_size(source)
    ballast.write_bytes(bytes((64 << 20) - room))
    done = occgen_hub(*command(source, out, "--workers", str(workers)))
    assert done.returncode == 1, done.stderr
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    built = list(out.glob("*/*/trajectory_*"))
    assert 0 < len(built) < 8
    assert not list(out.rglob(".*.partial"))
    ballast.unlink()
    for path in built:
        assert not [f for f in validate(path).findings if "occupancy" not in f.file]
    done = occgen_hub(*command(source, out, "--workers", str(workers)))
    assert done.returncode == 0, done.stderr
    assert tree(out) == expected


KILLS = int(os.environ.get("OCCGEN_KILLS", "0"))
"""Number of kills of the long version. The short one is in test_runtime.py."""


# Other machines


ELSEWHERE = """
import os, sys
os.umask(int(sys.argv.pop(1), 8))
from occgen_hub.cli import main
main()
"""


@pytest.mark.skipif(not KILLS, reason="OCCGEN_KILLS asks for long versions; ten minutes")
@pytest.mark.parametrize("number", range(16))
def test_dataset_does_not_depend_on_the_machine(
    source: Path, expected: Tree, tmp_path: Path, number: int
) -> None:
    """Threads, locales, time zones, umasks, hash seeds, caches, a copied source."""
    rng = random.Random(number)
    threads = str(rng.choice((1, 2, 3, 8)))
    env = {
        "NUMBA_NUM_THREADS": threads,
        "OMP_NUM_THREADS": rng.choice((threads, "1")),
        "OPENBLAS_NUM_THREADS": threads,
        "PYTHONHASHSEED": str(rng.randrange(1000)),
        "TZ": rng.choice(("Asia/Kathmandu", "America/St_Johns", "UTC")),
        "LC_ALL": rng.choice(("C", "POSIX", "C.UTF-8", "tr_TR.UTF-8", "de_DE.ISO-8859-1")),
        "MALLOC_PERTURB_": str(rng.choice((0, 85, 170))),
        "PYTHONUTF8": rng.choice(("0", "1")),
    }
    if rng.random() < 0.25:
        env["NUMBA_CACHE_DIR"] = str(tmp_path / "cold")
    if rng.random() < 0.5:
        source = Path(shutil.copytree(source, tmp_path / "copied", copy_function=shutil.copy))
    umask, workers = rng.choice(("022", "077", "002")), str(rng.choice((1, 2)))
    arguments = (umask, *command(source, tmp_path / "out", "--workers", workers))
    done = occgen_hub(*arguments, launcher=("-c", ELSEWHERE), timeout=900, **env)
    assert done.returncode == 0, (env, done.stderr)
    assert tree(tmp_path / "out") == expected, env


# Kills


@pytest.mark.skipif(not KILLS, reason="OCCGEN_KILLS says how often; ten minutes for 50")
@pytest.mark.parametrize("workers", [1, 2])
def test_resume_after_kills_at_random_moments(
    source: Path, expected: Tree, tmp_path: Path, workers: int
) -> None:
    """Kill all processes at once, at any moment of a build, with one output for all kills."""
    rng, out, whole = random.Random(workers), tmp_path / "out", 0
    began = time.monotonic()
    assert occgen_hub(*command(source, out, "--workers", str(workers))).returncode == 0
    usual = time.monotonic() - began
    shutil.rmtree(out)
    for number in range(KILLS // 2):
        process = start(*command(source, out, "--workers", str(workers)))
        time.sleep(rng.uniform(usual / 8, usual))
        ended = process.poll() is not None
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
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
    done = occgen_hub(*command(source, out, "--workers", str(workers)))
    assert done.returncode == 0, done.stderr
    assert tree(out) == expected
    print(f"{KILLS // 2} moments, {workers} processes; {whole} builds had ended by then")
