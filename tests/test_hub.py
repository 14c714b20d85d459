"""Push to a Hub on the loopback address with the Hub's own client, and load from it."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hub_server import BAD, READER, WRITER, Fault, Hub

from occgen_hub.cli.command import MOST_LINES
from occgen_hub.files import files_under
from occgen_hub.hub import contents, warnings
from occgen_hub.index import read_entries
from occgen_hub.training import OccupancyDataset
from occgen_hub.validation import validate

REPO = "org/rooms"
STALL = 30


@pytest.fixture
def hub():
    served = Hub()
    yield served
    served.close()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A dataset of one trajectory, quick to validate. `other` beside it has another scene.

    Tests must not change them.
    """
    from occgen_hub.builder import load_builder
    from occgen_hub.episode_build import Settings
    from occgen_hub.job import Job, list_episodes
    from occgen_hub.runtime.build import build_dataset
    from occgen_hub.sample import make_sample

    place = tmp_path_factory.mktemp("hub")
    make_sample(place / "rooms", trajectories=1, frames=2)
    scene = place / "rooms/sample_zed/house_000"
    for name in ("out", "other"):
        builder = load_builder("internnav", place / "rooms")
        build_dataset(Job(builder, list_episodes(builder), place / name, Settings()))
        if name == "out":  # The other dataset has a scene of another name.
            scene.rename(scene.with_name("house_009"))
    return place / "out"


@pytest.fixture
def folder(small, tmp_path):
    """A copy of the dataset that a test may change."""
    return Path(shutil.copytree(small, tmp_path / "out"))


class CommandRunner:
    """Runs commands with their own home folder and the Hub of the test."""

    def __init__(self, hub, home):
        self.environment = {
            **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": WRITER, "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "2",
            "HF_XET_CLIENT_RETRY_BASE_DELAY": "100ms",
        }  # fmt: skip

    def run(self, *command, **environment):
        return subprocess.run(
            [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=240,
            check=False, cwd=self.environment["HF_HOME"], env=self.environment | environment,
        )  # fmt: skip

    def push(self, folder, *options, repo_id=REPO, **environment):
        command = ["-m", "occgen_hub", "push", folder, "--repo-id", repo_id, *options]
        return self.run(*command, **environment)


@pytest.fixture
def runner(hub, tmp_path):
    (tmp_path / "home").mkdir()
    return CommandRunner(hub, tmp_path / "home")


def local_files(folder):
    return {path: (folder / path).read_bytes() for path in contents(folder)}


def remote_files(hub, revision="main"):
    files = dict(hub.repositories[REPO].files(revision))
    files.pop(".gitattributes")
    return files


def assert_refused(result, code, *words):
    """Assert an error of one sentence, without a traceback or a token."""
    assert result.returncode == code, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr
    assert "hf_" not in (result.stdout + result.stderr).replace("hf_xet", "")


def test_push_sends_each_file_once_and_tags_the_commit(hub, runner, folder):
    (folder / "failures.jsonl").write_text("{}\n")
    assert (folder / "report.json").exists()
    (folder / ".cache").mkdir()
    (folder / ".cache" / "notes").write_text("mine")
    result = runner.push(folder, "--private")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"{hub.url}/datasets/{REPO}"
    repository = hub.repositories[REPO]
    assert repository.private
    assert remote_files(hub) == local_files(folder)
    assert "README.md" in remote_files(hub)
    assert not {"failures.jsonl", "report.json", ".cache/notes", ".logs/build.log"} & set(
        remote_files(hub)
    )
    assert repository.tags == {"v2.1": repository.refs["main"][-1]}
    assert repository.messages[-1] == "Upload dataset with OccGen Hub"
    assert not result.stderr

    commits, received = len(repository.commits), hub.received
    again = runner.push(folder)
    assert again.returncode == 0, again.stderr
    assert (len(repository.commits), hub.received) == (commits, received)

    token = WRITER.encode()
    places = (folder, Path(runner.environment["HF_HOME"]))
    assert not [p for place in places for p in files_under(place) if token in p.read_bytes()]
    assert WRITER not in result.stdout + result.stderr + again.stdout + again.stderr


def test_push_of_other_scenes_keeps_the_first_ones(hub, runner, folder, small, tmp_path):
    other = Path(shutil.copytree(small.parent / "other", tmp_path / "other"))
    assert runner.push(folder).returncode == 0
    first = remote_files(hub)
    result = runner.push(other)
    assert result.returncode == 0, result.stderr
    both = remote_files(hub)
    kept = {path for path in first if not path.startswith(("README.md", "index/", "preview"))}
    assert {path: both[path] for path in kept} == {path: first[path] for path in kept}
    assert {row.scene for row in read_entries(other).values()} == {
        "sample_zed/house_000", "sample_zed/house_009"
    }  # fmt: skip
    fetched = tmp_path / "fetched"
    for path, content in both.items():
        (fetched / path).parent.mkdir(parents=True, exist_ok=True)
        (fetched / path).write_bytes(content)
    assert validate(fetched).findings == ()
    frames = OccupancyDataset(fetched, keys=("occupancy", "episode"))
    assert {frames[n]["episode"].split("/")[1] for n in range(len(frames))} == {
        "house_000", "house_009"
    }  # fmt: skip
    # Push the first folder again, which does not have the other scene.
    assert runner.push(folder).returncode == 0
    assert {path for path in remote_files(hub) if path.startswith("occupancy/")} == {
        path for path in both if path.startswith("occupancy/")
    }
    assert len(read_entries(folder)) == len(frames.episodes) == 2


def test_push_deletes_files_that_its_trajectories_no_longer_have(hub, runner, folder):
    assert runner.push(folder).returncode == 0
    repository = hub.repositories[REPO]
    files = dict(repository.files())
    trajectory = next(path for path in files if path.endswith("/meta/info.json")).removesuffix(
        "/meta/info.json"
    )
    others = {"LICENSE": b"theirs", "elsewhere/meta/info.json": b"{}"}
    stale = {f"{trajectory}/videos/chunk-000/observation.images.rgb/[99].jpg": b"old"}
    repository.commit("main", files | others | stale, "more")
    result = runner.push(folder)
    assert result.returncode == 0, result.stderr
    assert remote_files(hub) == local_files(folder) | others


def test_push_works_without_hf_xet(hub, runner, folder):
    result = runner.push(folder, HF_HUB_DISABLE_XET="1")
    assert result.returncode == 0, result.stderr
    assert remote_files(hub) == local_files(folder)
    assert any("/lfs/" in line for line in hub.asked)
    assert not any("/xet/" in line for line in hub.asked)


def test_push_retries_after_cut_connections(hub, runner, folder):
    hub.faults = [Fault("POST /xet/v1/xorbs/"), Fault("POST .*/commit/")]
    result = runner.push(folder)
    assert result.returncode == 0, result.stderr
    assert [fault.met > 0 for fault in hub.faults] == [True, True]
    assert remote_files(hub) == local_files(folder)


@pytest.mark.long
@pytest.mark.slow
def test_next_push_succeeds_after_a_lost_connection(hub, runner, folder):
    hub.faults = [Fault("POST /xet/v1/xorbs/", times=100)]
    assert_refused(
        runner.push(folder), 1, "the upload was interrupted", "run the same command again"
    )
    hub.faults = [Fault("POST /xet/.*shards", times=100)]
    assert_refused(runner.push(folder), 1, "the upload was interrupted")
    assert not remote_files(hub)
    hub.faults = []
    result = runner.push(folder)
    assert result.returncode == 0, result.stderr
    assert remote_files(hub) == local_files(folder)


def test_push_retries_after_status_500_and_429(hub, runner, folder):
    hub.faults = [Fault("POST .*/preupload/", status=500), Fault("POST .*/commit/", status=429)]
    result = runner.push(folder)
    assert result.returncode == 0, result.stderr
    assert remote_files(hub) == local_files(folder)


def test_ctrl_c_stops_a_push_and_the_next_one_sends_nothing_twice(hub, runner, folder):
    hub.faults = [Fault("POST .*/commit/", stall=STALL)]
    command = [sys.executable, "-m", "occgen_hub", "push", str(folder), "--repo-id", REPO]
    with subprocess.Popen(
        command, env=runner.environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as running:
        deadline = time.monotonic() + 60
        while not any("/commit/" in line for line in hub.asked) and time.monotonic() < deadline:
            time.sleep(0.05)
        start = time.monotonic()
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=60)
    assert time.monotonic() - start < STALL / 2
    assert running.returncode == 130
    assert errors.startswith("Stopped.")
    assert len(errors.splitlines()) == 1
    received = hub.received
    assert received > 0
    result = runner.push(folder)
    assert result.returncode == 0, result.stderr
    assert remote_files(hub) == local_files(folder)
    assert hub.received == received


def test_push_refuses_an_invalid_dataset_and_sends_nothing(hub, runner, folder):
    broken = next(folder.rglob("occ_sequence.npz"))
    broken.write_bytes(broken.read_bytes()[:1000])
    assert_refused(
        runner.push(folder), 1, str(broken), "so nothing was sent", "occgen-hub validate"
    )
    assert not hub.asked
    assert_refused(runner.push(folder.parent / "home"), 1, "has no trajectories")


def test_push_reports_a_card_that_the_hub_rejects(hub, runner, folder):
    (folder / "README.md").write_text("---\na: [b\n---\nMy own words.\n")
    assert_refused(runner.push(folder), 1, "rejected the card", "bad indentation", "README.md")
    assert not [line for line in hub.asked if "/commit/" in line or "/xet/" in line]


def test_push_warns_about_an_incomplete_dataset(runner, folder):
    (folder / "report.json").rename(folder / ".aside")
    (folder / "failures.jsonl").write_text('{"episode": "a/b/c", "reason": "d"}\n')
    result = runner.push(folder, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "Warning: the last build is not finalized; run occgen-hub finalize" in result.stderr
    (folder / ".aside").rename(folder / "report.json")
    result = runner.push(folder, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert f"Warning: 1 episode failed; see {folder}/failures.jsonl." in result.stderr


def test_dry_run_lists_the_files_and_sends_nothing(hub, runner, folder):
    short = runner.push(folder, "--dry-run", HF_TOKEN="")
    assert re.search(
        r"^ +[\d,]+ bytes +2 files  sample_zed/.*observation.images.rgb$", short.stdout, re.M
    )
    assert len(short.stdout.splitlines()) <= MOST_LINES + 5
    result = runner.push(folder, "--dry-run", "--verbose", HF_TOKEN="")
    assert result.returncode == 0, result.stderr
    *lines, total, kind, licence = result.stdout.splitlines()
    sizes = {path: int(size.replace(",", "")) for size, _, path in (line.split() for line in lines)}
    assert sizes == contents(folder)
    assert f"{len(sizes)} files of {sum(sizes.values()):,} bytes would be pushed to {REPO}" in total
    assert "it will be public, since --private is not given" in kind
    assert licence == "The card states no licence; docs/licence.md says how to give yours."
    assert "it will be private" in runner.push(folder, "--dry-run", "--private").stdout
    assert not hub.asked


@pytest.mark.long
def test_create_pr_opens_a_pull_request_and_reuses_it(hub, runner, folder):
    for _ in range(2):
        result = runner.push(folder, "--create-pr")
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines()[-1] == f"{hub.url}/datasets/{REPO}/discussions/1"
    assert not remote_files(hub)
    assert remote_files(hub, "refs/pr/1") == local_files(folder)
    assert not hub.repositories[REPO].tags


def test_revision_creates_a_branch_and_leaves_main_unchanged(hub, runner, folder):
    result = runner.push(folder, "--revision", "side/way")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"{hub.url}/datasets/{REPO}/tree/side%2Fway"
    assert remote_files(hub, "side/way") == local_files(folder)
    assert not remote_files(hub)
    assert not hub.repositories[REPO].tags
    assert_refused(runner.push(folder, "--private"), 2, "already exists and is public")


@pytest.mark.parametrize(
    ("options", "environment", "code", "words"),
    [
        ([], {"HF_TOKEN": ""}, 1, "there is no token"),
        ([], {"HF_TOKEN": BAD}, 1, "rejected the token"),
        ([], {"HF_TOKEN": READER}, 1, "the token has no write access"),
        ([], {"HF_ENDPOINT": "http://127.0.0.1:9"}, 1, "cannot be reached"),
        ([], {"HF_HUB_OFFLINE": "1"}, 1, "unset it to push"),
        (["--repo-id", "their/rooms"], {}, 1, "the token has no write access"),
        (["--repo-id", "rooms"], {}, 2, "ORG/NAME"),
        (["--repo-id", "org/ro oms"], {}, 2, "ORG/NAME"),
        (["--revision", "refs/pr/9"], {}, 1, "was not found"),
        (["--revision", "a", "--create-pr"], {}, 2, "leave out"),
    ],
    ids=[
        "no token",
        "bad token",
        "read token",
        "no connection",
        "offline",
        "other organization",
        "no organization",
        "space in the name",
        "unknown pull request",
        "revision and pull request",
    ],
)
def test_push_errors_are_one_sentence(hub, runner, folder, options, environment, code, words):
    assert_refused(runner.push(folder, *options, **environment), code, words)
    assert not [line for line in hub.asked if "/commit/" in line or "/xet/" in line]


def test_warnings_about_hub_limits_name_the_remedy():
    files = {f"a/b/{n}.jpg": n for n in range(12)} | {"a/c/d.txt": 1, "README.md": 1}
    assert not warnings(files)
    assert not warnings(files, max_files=14, max_entries=12, max_bytes=11)
    many, folder, large = warnings(files, max_files=13, max_entries=11, max_bytes=10)
    assert many.startswith("14 files are more than the 13 ")
    assert folder.startswith("a/b: 12 entries are more than the 11 ")
    assert large.startswith("a/b/11.jpg: ")
    assert "--media none" in many
    assert "occgen-hub export" in many
    assert "--media none" in folder
    assert "Parquet" in large
    folders = {f"{n}/a/b": 1 for n in range(5)}
    assert warnings(folders, max_entries=4)[0].startswith(".: 5 entries")


LOAD_WITH_DATASETS = """
import sys
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pathlib import Path
from datasets import load_dataset

folder, repo_id = Path(sys.argv[1]), sys.argv[2]

def same(row, built):
    assert set(row) == set(built)
    for name, value in built.items():
        np.testing.assert_equal(np.asarray(row[name]), np.asarray(value), err_msg=name)

def rows(paths):
    return [row for path in paths for row in pq.read_table(path).to_pylist()]

frames = load_dataset(repo_id, split="train")
built = rows(sorted(folder.glob("**/episode_000000.parquet")))
assert len(frames) == len(built)
for row, other in zip(frames, built):
    same(row, other)
streamed = list(load_dataset(repo_id, "occupancy", split="train", streaming=True))
built = rows(sorted(folder.glob("occupancy/*/*.parquet")))
assert len(streamed) == len(built) == len(frames)
for row, other in zip(streamed, built):
    same(row, other)
"""

LOAD_FOR_TRAINING = """
import sys
import torch
from occgen_hub.training import OccupancyDataset

there, here = OccupancyDataset(sys.argv[2]), OccupancyDataset(sys.argv[1])
assert len(there) == len(here) > 0
for n in range(len(here)):
    a, b = there[n], here[n]
    assert set(a) == set(b)
    for key in b:
        equal = torch.equal(a[key], b[key]) if torch.is_tensor(b[key]) else a[key] == b[key]
        assert equal, key
"""


LOAD_EXPORT = """
import sys
import torch
from datasets import load_dataset
from occgen_hub import LeRobotOccupancyDataset, OccupancyDataset

there, here = LeRobotOccupancyDataset(sys.argv[2]), OccupancyDataset(sys.argv[1])
assert len(there) == len(here) > 0
for n in range(len(here)):
    assert torch.equal(there[n]["observation.occ.view"], here[n]["occupancy"])
    assert torch.equal(there[n]["observation.occ.mask"], here[n]["mask"])
    assert torch.equal(there[n]["observation.camera_extrinsic_occ"].view(4, 4), here[n]["pose"])
    assert there[n]["task"] == here[n]["task"]
some = LeRobotOccupancyDataset(sys.argv[2], episodes=[1], force_cache_sync=True)
assert torch.equal(some[0]["observation.occ.view"], here[int(here.starts[1])]["occupancy"])
assert len(load_dataset(sys.argv[2], split="train")) == len(here)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "program", [LOAD_WITH_DATASETS, LOAD_FOR_TRAINING], ids=["datasets", "training"]
)
def test_pushed_dataset_loads_as_it_was_built(hub, runner, dataset, tmp_path, program):
    """Even if the connection was cut twice."""
    folder = Path(shutil.copytree(dataset, tmp_path / "out"))
    hub.faults = [Fault("POST /xet/v1/xorbs/"), Fault("POST .*/commit/")]
    assert runner.push(folder).returncode == 0
    assert [fault.met > 0 for fault in hub.faults] == [True, True]
    result = runner.run("-c", program, folder, REPO)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.long
def test_real_trajectory_is_pushed_and_loaded(runner, real_tree, tmp_path):
    out = tmp_path / "out"
    built = runner.run("-m", "occgen_hub", "build", "--input", real_tree, "--output", out)
    assert built.returncode == 0, built.stderr
    assert runner.push(out).returncode == 0
    for program in (LOAD_WITH_DATASETS, LOAD_FOR_TRAINING):
        result = runner.run("-c", program, out, REPO)
        assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_an_export_is_pushed_and_loaded_by_lerobot(hub, runner, dataset, tmp_path):
    from occgen_hub.exporting import export

    export(dataset, tmp_path / "lerobot")
    result = runner.push(tmp_path / "lerobot")
    assert result.returncode == 0, result.stderr
    repository = hub.repositories[REPO]
    assert remote_files(hub) == local_files(tmp_path / "lerobot")
    assert repository.tags == {"v3.0": repository.refs["main"][-1]}
    loaded = runner.run("-c", LOAD_EXPORT, dataset, REPO)
    assert loaded.returncode == 0, loaded.stderr

    stale = {"videos/observation.images.left/chunk-000/file-000.mp4": b"old", "LICENSE": b"theirs"}
    repository.commit("main", dict(repository.files()) | stale, "more")
    assert runner.push(tmp_path / "lerobot").returncode == 0
    assert remote_files(hub) == local_files(tmp_path / "lerobot") | {"LICENSE": b"theirs"}


FETCH = """
import sys
from huggingface_hub import snapshot_download
print(snapshot_download(sys.argv[1], repo_type="dataset"))
"""


def test_fetched_dataset_is_valid_and_can_be_pushed_again(hub, runner, folder):
    """The Hub's client keeps files as links to their content."""
    assert runner.push(folder).returncode == 0
    sent = remote_files(hub)
    fetched = runner.run("-c", FETCH, REPO)
    assert fetched.returncode == 0, fetched.stderr
    snapshot = Path(fetched.stdout.strip())
    assert any(path.is_symlink() for path in snapshot.rglob("*"))
    checked = runner.run("-m", "occgen_hub", "validate", snapshot)
    assert checked.returncode == 0, checked.stdout
    again = runner.push(snapshot)
    assert again.returncode == 0, again.stderr
    assert remote_files(hub) == sent
    copied = runner.push(snapshot, repo_id="org/copy")
    assert copied.returncode == 0, copied.stderr
    files = dict(hub.repositories["org/copy"].files("main"))
    files.pop(".gitattributes")
    assert files == sent


def test_push_refuses_links_out_of_the_dataset(hub, runner, folder, tmp_path):
    (tmp_path / "secret").write_text("hidden from all")
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    assert_refused(
        runner.push(folder), 1, "notes.txt", "leads out of the dataset", "nothing was sent"
    )
    assert REPO not in hub.repositories


@pytest.mark.long
def test_push_retries_after_concurrent_commits(hub, runner, folder):
    hub.faults = [
        Fault("POST .*/commit/main", status=412, times=2),
        Fault("POST .*/tag/", status=409),
    ]
    result = runner.push(folder)
    assert result.returncode == 0, result.stderr
    assert local_files(folder).items() <= hub.repositories[REPO].files().items()
    assert hub.repositories[REPO].tags == {"v2.1": hub.repositories[REPO].find("main")}
    hub.faults = [Fault("POST .*/commit/main", status=412, times=9)]
    (folder / "notes.txt").write_text("new")
    result = runner.push(folder)
    assert result.returncode == 1
    assert "run the same command again later" in result.stderr


def test_three_concurrent_pushes_succeed(hub, runner, folder):
    """All three push the same dataset and create the same repository."""
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda _: runner.push(folder), range(3)))
    assert [result.returncode for result in results] == [0, 0, 0], [r.stderr for r in results]
    assert remote_files(hub) == local_files(folder)
    assert hub.repositories[REPO].tags == {"v2.1": hub.repositories[REPO].find("main")}
    assert runner.push(folder).returncode == 0


STOPS = int(os.environ.get("OCCGEN_KILLS", "0"))
"""Number of pushes that the long version stops."""


@pytest.mark.skipif(not STOPS, reason="OCCGEN_KILLS says how often; ten minutes for 36")
def test_push_succeeds_after_stops_at_random_moments(hub, runner, folder):
    """Stop a push by one of three signals at a random moment, then push again."""
    rng, began = random.Random(0), time.monotonic()
    assert runner.push(folder, repo_id="org/other").returncode == 0
    usual, ended = time.monotonic() - began, 0
    command = [sys.executable, "-m", "occgen_hub", "push", str(folder), "--repo-id", REPO]
    for number in range(STOPS):
        hub.repositories.pop(REPO, None)
        with subprocess.Popen(
            command,
            env=runner.environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as running:
            time.sleep(rng.uniform(usual / 8, usual))
            ended += running.poll() is not None
            running.send_signal(rng.choice((signal.SIGINT, signal.SIGTERM, signal.SIGKILL)))
            _, errors = running.communicate(timeout=60)
        assert "Traceback" not in errors
        done = runner.push(folder)
        assert done.returncode == 0, (number, done.stderr)
        assert remote_files(hub) == local_files(folder)
    print(f"{STOPS} stops, {ended} of which came after the end")
