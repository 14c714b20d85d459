"""Build many synthetic scenes from one Hub dataset to another, and kill the build repeatedly.

    .venv/bin/python scripts/rehearse_scale.py [--scenes 20 200] [--kills 20] [--planned 10000]

The Hub is the test server on the loopback address. Its final content is compared with a build of
the same archives from a folder. docs/scale.md explains the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from hub_server import WRITER, Hub, Repository

from occgen_hub.files import files_under
from occgen_hub.index import read_entries
from occgen_hub.sample import make_sample
from occgen_hub.validation import validate

PAUSE = 0.02
"""Seconds between two measurements of a build's disk and memory use."""

DAMAGED = 20
"""One scene in this many is damaged."""

SOURCE, TARGET = "org/source", "org/target"

PLAN = """
import json, sys, time
import psutil
from pathlib import Path
from occgen_hub.job import open_job
from occgen_hub.runtime.records import make_plan

begin = time.perf_counter()
job = open_job("internnav", Path(sys.argv[1]), Path(sys.argv[2]))
listed = time.perf_counter()
plan = make_plan(job, 64)
planned = time.perf_counter()
todo = sum(job.reason_to_build(ref) is not None for ref in job.refs)
checked = time.perf_counter()
assert sum(map(len, plan.shards)) == todo == len(job.refs)
print(json.dumps({"scenes": len(job.refs), "listing": listed - begin, "planning": planned - listed,
                  "checking": checked - planned, "bytes": psutil.Process().memory_info().rss}))
"""


# Scenes


def make_archives(folder: Path, frames: int) -> list[bytes]:
    """Make archives of scenes with two trajectories: two intact and three damaged ones.

    Of the damaged ones, one has an empty image, one is truncated and one is not an archive.
    """
    found = []
    for seed in (7, 8):
        tree = folder / f"sample-{seed}"
        make_sample(tree, trajectories=2, frames=frames, seed=seed)
        (scene,) = (path for path in (tree / "sample_zed").iterdir() if path.is_dir())
        found.append(pack_scene(scene, folder / "scene.tar.gz"))
    next(iter(scene.rglob("*.jpg"))).write_bytes(b"")
    return [*found, pack_scene(scene, folder / "scene.tar.gz"), found[0][:5000], b"<!DOCTYPE html>"]


def pack_scene(scene: Path, place: Path) -> bytes:
    """Pack a scene's folder into an archive."""
    with tarfile.open(place, "w:gz") as archive:
        archive.add(scene, scene.name)
    return place.read_bytes()


def archive_name(number: int) -> str:
    """The archive's path of a scene, relative to the root."""
    return f"group_{number % 4}/scene_{number:05d}.tar.gz"


def archive_content(archives: list[bytes], number: int) -> bytes:
    """The content of a scene's archive."""
    if number % DAMAGED == DAMAGED // 2:
        return archives[2 + number // DAMAGED % 3]
    return archives[number % 2]


def make_tree(archives: list[bytes], root: Path, scenes: int) -> None:
    """Make a tree of archives with links, so that each is stored once."""
    stored: dict[bytes, Path] = {}
    for number in range(scenes):
        content, place = archive_content(archives, number), root / archive_name(number)
        place.parent.mkdir(parents=True, exist_ok=True)
        if content in stored:
            place.hardlink_to(stored[content])
        else:
            place.write_bytes(content)
            stored[content] = place


# Measuring


@dataclass
class Peaks:
    """Peak use of a build, bytes. disk: scratch and output together; memory: of all its processes,
    with shared pages counted in each.
    """

    disk: int = 0
    scratch: int = 0
    memory: int = 0

    def update(self, process: subprocess.Popen[bytes], out: Path, scratch: Path) -> None:
        """Look once."""
        memory = 0
        with suppress(psutil.Error):
            family = psutil.Process(process.pid)
            for member in (family, *family.children(recursive=True)):
                with suppress(psutil.Error):
                    memory += member.memory_info().rss
        self.memory = max(self.memory, memory)
        used = folder_bytes(scratch)
        self.scratch = max(self.scratch, used)
        self.disk = max(self.disk, used + folder_bytes(out))


def folder_bytes(folder: Path) -> int:
    """The bytes of the files in a folder that may change meanwhile."""
    total = 0
    with suppress(OSError):
        for path in folder.rglob("*"):
            with suppress(OSError):
                total += path.stat().st_size if path.is_file() else 0
    return total


def command(root: str | Path, out: Path, workers: int, limit: str, *more: str) -> list[str]:
    """A build's command, with large cells to save time."""
    return [
        sys.executable, "-m", "occgen_hub", "build", "--input", str(root), "--output", str(out),
        "--workers", str(workers), "--scratch", str(scratch_of(out)), "--scratch-limit", limit,
        "--engine", "rgbd", "--set", "voxel_size=0.25", *more,
    ]  # fmt: skip


def scratch_of(out: Path) -> Path:
    """The scratch folder of a build."""
    return out.with_name(f"{out.name}-scratch")


def run(arguments: list[str], out: Path, peaks: Peaks, after: float | None, **env: str) -> int:
    """Run a build, killed after `after` seconds if still running. Returns its exit status."""
    process = subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        env=os.environ | {"TQDM_DISABLE": "1"} | env,
    )  # fmt: skip
    end = time.monotonic() + (after or 1e9)
    while process.poll() is None:
        if time.monotonic() >= end:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            break
        peaks.update(process, out, scratch_of(out))
        time.sleep(PAUSE)
    return process.returncode


@contextmanager
def served(archives: list[bytes], scenes: int) -> Iterator[Hub]:
    """A Hub with the archives."""
    hub = Hub()
    repository = Repository(private=False)
    files = {f"traj/{archive_name(n)}": archive_content(archives, n) for n in range(scenes)}
    card = b"---\nlicense: cc-by-nc-sa-4.0\n---\n"
    repository.commit("main", files | {"README.md": card}, "rooms")
    hub.repositories[SOURCE] = repository
    try:
        yield hub
    finally:
        hub.close()


# The rehearsal


@dataclass
class Rehearsal:
    """Results. kills: number that hit a running build; runs: seconds of each; requests: to the Hub;
    commits, files: of the target; problems: descriptions of what is wrong.
    """

    scenes: int
    episodes: int = 0
    kills: int = 0
    runs: list[float] = field(default_factory=list)
    peaks: Peaks = field(default_factory=Peaks)
    requests: int = 0
    commits: int = 0
    files: int = 0
    problems: list[str] = field(default_factory=list)


def rehearse(
    folder: Path, archives: list[bytes], scenes: int, kills: int, *,
    workers: int = 2, limit: str = "500MB", seed: int = 1, times: tuple[float, float] = (5, 20),
) -> Rehearsal:  # fmt: skip
    """Build scenes from one repository to another with `kills` kills, and check the target.

    times: shortest and longest time before a kill, seconds.
    """
    chance, found = random.Random(seed), Rehearsal(scenes)
    tree, out, plain = folder / "tree", folder / "out", folder / "plain"
    make_tree(archives, tree, scenes)
    with served(archives, scenes) as hub:
        arguments = command(
            f"hf://datasets/{SOURCE}/traj", out, workers, limit,
            "--push-to", TARGET, "--keep", "none", "--push-every", "2",
        )  # fmt: skip
        environment = {
            "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": WRITER,
        }  # fmt: skip
        for attempt in range(kills + 10):
            after = chance.uniform(*times) if attempt < kills else None
            began = time.monotonic()
            status = run(arguments, out, found.peaks, after, **environment)
            found.runs.append(time.monotonic() - began)
            found.kills += status == -signal.SIGKILL
            if status in (0, 1) and attempt >= kills:
                break
            if status not in (0, 1, -signal.SIGKILL):
                found.problems.append(f"a run ended with exit code {status}")
                break
        target = hub.repositories[TARGET]
        found.requests, found.commits = len(hub.asked), len(target.commits)
        files = dict(target.files())
    there = folder / "there"
    for name, content in files.items():
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_bytes(content)
    found.files = len(files)
    run(command(tree, plain, workers, limit), plain, Peaks(), None)
    found.episodes = len(read_entries(plain))
    found.problems += compare(there, plain, out)
    return found


def compare(there: Path, plain: Path, out: Path) -> Iterator[str]:
    """Yield differences between the Hub and a plain build, and files that were not deleted here."""
    ours, theirs = ({
        path.relative_to(root).as_posix(): path.read_bytes() for path in files_under(root)
        if "/" in path.relative_to(root).as_posix() and path.relative_to(root).parts[0] not in
        (".logs", "index")
    } for root in (there, plain))  # fmt: skip
    for name in sorted(ours.keys() ^ theirs.keys()):
        yield f"{name}: only {'on the Hub' if name in ours else 'in the plain build'}"
    for name in sorted(ours.keys() & theirs.keys()):
        # A record has the licence, which is unknown for archives in a folder.
        if ours[name] != theirs[name] and not name.endswith("meta/occgen.json"):
            yield f"{name}: differs"
    rows, own = read_entries(there), read_entries(plain)  # Raises for duplicates.
    if rows.keys() != own.keys():
        yield f"the index has {len(rows)} episodes, the index of the plain build has {len(own)}"
    for name in rows.keys() & own.keys():
        if rows[name].shard_sha256 != own[name].shard_sha256:
            yield f"{name}: its shards differ"
    yield from (str(finding) for finding in validate(there).findings)
    if left := [path for path in files_under(out) if path.suffix in (".npz", ".parquet", ".jpg")]:
        yield f"{len(left)} files were not deleted here, such as {left[0]}"


def main() -> None:
    """Print a line for each measurement."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--scenes", type=int, nargs="*", default=[20, 200])
    parser.add_argument(
        "--kills", type=int, default=20, help="kills of the last build; others have fewer"
    )
    parser.add_argument("--planned", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--frames", type=int, default=2)
    parser.add_argument("--scratch-limit", default="500MB")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        archives = make_archives(folder, chosen.frames)
        print(f"an archive: {len(archives[0]) / 1e6:.2f} MB", flush=True)
        if chosen.planned:
            make_tree(archives, folder / "planned", chosen.planned)
            done = subprocess.run(
                [sys.executable, "-c", PLAN, folder / "planned", folder / "none"],
                stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            plan = json.loads(done.stdout)
            print(
                f"{plan['scenes']:,} scenes: listed in {plan['listing']:.1f} s, planned in "
                f"{plan['planning']:.1f} s, checked in {plan['checking']:.1f} s, "
                f"{plan['bytes'] / 1e6:.0f} MB of memory",
                flush=True,
            )
        for count in chosen.scenes:
            kills = chosen.kills * count // chosen.scenes[-1]
            found = rehearse(
                folder / f"scenes-{count}", archives, count, kills,
                workers=chosen.workers, limit=chosen.scratch_limit,
            )  # fmt: skip
            print(
                f"{count} scenes, {found.episodes} episodes, {found.kills} kills: "
                f"{sum(found.runs):.0f} s in {len(found.runs)} runs, {found.requests} requests, "
                f"{found.commits} commits, {found.files} files; at most "
                f"{found.peaks.disk / 1e6:.1f} MB of disk, {found.peaks.scratch / 1e6:.1f} MB of "
                f"it scratch, and {found.peaks.memory / 1e6:.0f} MB of memory; "
                f"{len(found.problems)} problems",
                flush=True,
            )
            for problem in found.problems[:20]:
                print(f"  {problem}", flush=True)


if __name__ == "__main__":
    main()
