"""Pushing to a Hub on the loopback address with the Hub's own client, and loading from there."""

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
    """A dataset of one trajectory, quick to validate; beside it `other`, of another scene.

    Not to be changed by tests.
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
    """A dataset that may be changed."""
    return Path(shutil.copytree(small, tmp_path / "out"))


class Desk:
    """Where commands are run: with a home of its own, and the Hub of the test."""

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
def desk(hub, tmp_path):
    (tmp_path / "home").mkdir()
    return Desk(hub, tmp_path / "home")


def local(folder):
    return {path: (folder / path).read_bytes() for path in contents(folder)}


def held(hub, revision="main"):
    files = dict(hub.repositories[REPO].files(revision))
    files.pop(".gitattributes")
    return files


def refused(result, code, *words):
    """One sentence, no traceback, and a token nowhere."""
    assert result.returncode == code, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr
    assert "hf_" not in (result.stdout + result.stderr).replace("hf_xet", "")


def test_a_push_sends_what_is_there_once_and_tags_it(hub, desk, folder):
    (folder / "failures.jsonl").write_text("{}\n")
    assert (folder / "report.json").exists()
    (folder / ".cache").mkdir()
    (folder / ".cache" / "notes").write_text("mine")
    result = desk.push(folder, "--private")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"{hub.url}/datasets/{REPO}"
    repository = hub.repositories[REPO]
    assert repository.private
    assert held(hub) == local(folder)
    assert "README.md" in held(hub)
    assert not {"failures.jsonl", "report.json", ".cache/notes", ".logs/build.log"} & set(held(hub))
    assert repository.tags == {"v2.1": repository.refs["main"][-1]}
    assert repository.messages[-1] == "Upload dataset with OccGen Hub"
    assert not result.stderr

    commits, received = len(repository.commits), hub.received
    again = desk.push(folder)
    assert again.returncode == 0, again.stderr
    assert (len(repository.commits), hub.received) == (commits, received)

    token = WRITER.encode()
    places = (folder, Path(desk.environment["HF_HOME"]))
    assert not [p for place in places for p in files_under(place) if token in p.read_bytes()]
    assert WRITER not in result.stdout + result.stderr + again.stdout + again.stderr


def test_a_push_of_other_scenes_leaves_the_first_ones_alone(hub, desk, folder, small, tmp_path):
    other = Path(shutil.copytree(small.parent / "other", tmp_path / "other"))
    assert desk.push(folder).returncode == 0
    first = held(hub)
    result = desk.push(other)
    assert result.returncode == 0, result.stderr
    both = held(hub)
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
    # And the first folder again, which knows nothing of the other one.
    assert desk.push(folder).returncode == 0
    assert {path for path in held(hub) if path.startswith("occupancy/")} == {
        path for path in both if path.startswith("occupancy/")
    }
    assert len(read_entries(folder)) == len(frames.episodes) == 2


def test_what_was_removed_here_is_removed_there(hub, desk, folder):
    assert desk.push(folder).returncode == 0
    repository = hub.repositories[REPO]
    files = dict(repository.files())
    trajectory = next(path for path in files if path.endswith("/meta/info.json")).removesuffix(
        "/meta/info.json"
    )
    others = {"LICENSE": b"theirs", "elsewhere/meta/info.json": b"{}"}
    stale = {f"{trajectory}/videos/chunk-000/observation.images.rgb/[99].jpg": b"old"}
    repository.commit("main", files | others | stale, "more")
    result = desk.push(folder)
    assert result.returncode == 0, result.stderr
    assert held(hub) == local(folder) | others


def test_a_push_goes_without_hf_xet(hub, desk, folder):
    result = desk.push(folder, HF_HUB_DISABLE_XET="1")
    assert result.returncode == 0, result.stderr
    assert held(hub) == local(folder)
    assert any("/lfs/" in line for line in hub.asked)
    assert not any("/xet/" in line for line in hub.asked)


def test_a_connection_that_is_cut_twice_is_taken_up_again(hub, desk, folder):
    hub.faults = [Fault("POST /xet/v1/xorbs/"), Fault("POST .*/commit/")]
    result = desk.push(folder)
    assert result.returncode == 0, result.stderr
    assert [fault.met > 0 for fault in hub.faults] == [True, True]
    assert held(hub) == local(folder)


@pytest.mark.slow
def test_after_a_connection_is_lost_the_next_push_goes_on(hub, desk, folder):
    hub.faults = [Fault("POST /xet/v1/xorbs/", times=100)]
    refused(desk.push(folder), 1, "the upload was interrupted", "run the same command again")
    hub.faults = [Fault("POST /xet/.*shards", times=100)]
    refused(desk.push(folder), 1, "the upload was interrupted")
    assert not held(hub)
    hub.faults = []
    result = desk.push(folder)
    assert result.returncode == 0, result.stderr
    assert held(hub) == local(folder)


def test_a_hub_that_has_to_be_waited_for_is_waited_for(hub, desk, folder):
    hub.faults = [Fault("POST .*/preupload/", status=500), Fault("POST .*/commit/", status=429)]
    result = desk.push(folder)
    assert result.returncode == 0, result.stderr
    assert held(hub) == local(folder)


def test_ctrl_c_stops_and_the_next_push_sends_nothing_twice(hub, desk, folder):
    hub.faults = [Fault("POST .*/commit/", stall=STALL)]
    command = [sys.executable, "-m", "occgen_hub", "push", str(folder), "--repo-id", REPO]
    with subprocess.Popen(
        command, env=desk.environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as running:
        deadline = time.monotonic() + 60
        while not any("/commit/" in line for line in hub.asked) and time.monotonic() < deadline:
            time.sleep(0.05)
        start = time.monotonic()
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=60)
    assert time.monotonic() - start < STALL / 2
    assert running.returncode == 130
    assert said.startswith("Stopped.")
    assert len(said.splitlines()) == 1
    received = hub.received
    assert received > 0
    result = desk.push(folder)
    assert result.returncode == 0, result.stderr
    assert held(hub) == local(folder)
    assert hub.received == received


def test_what_is_invalid_is_refused_and_nothing_sent(hub, desk, folder):
    broken = next(folder.rglob("occ_sequence.npz"))
    broken.write_bytes(broken.read_bytes()[:1000])
    refused(desk.push(folder), 1, str(broken), "so nothing was sent", "occgen-hub validate")
    assert not hub.asked
    refused(desk.push(folder.parent / "home"), 1, "has no trajectories")


def test_a_card_that_the_hub_does_not_take_is_told(hub, desk, folder):
    (folder / "README.md").write_text("---\na: [b\n---\nMy own words.\n")
    refused(desk.push(folder), 1, "rejected the card", "bad indentation", "README.md")
    assert not [line for line in hub.asked if "/commit/" in line or "/xet/" in line]


def test_a_dataset_that_is_not_whole_is_told_of(desk, folder):
    (folder / "report.json").rename(folder / ".aside")
    (folder / "failures.jsonl").write_text('{"episode": "a/b/c", "reason": "d"}\n')
    result = desk.push(folder, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "Warning: the last build is not finalized; run occgen-hub finalize" in result.stderr
    (folder / ".aside").rename(folder / "report.json")
    result = desk.push(folder, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert f"Warning: 1 episode failed; see {folder}/failures.jsonl." in result.stderr


def test_a_dry_run_says_what_would_go_and_sends_nothing(hub, desk, folder):
    short = desk.push(folder, "--dry-run", HF_TOKEN="")
    assert re.search(
        r"^ +[\d,]+ +2 files  sample_zed/.*observation.images.rgb$", short.stdout, re.M
    )
    assert len(short.stdout.splitlines()) <= MOST_LINES + 3
    result = desk.push(folder, "--dry-run", "--verbose", HF_TOKEN="")
    assert result.returncode == 0, result.stderr
    *lines, total = result.stdout.splitlines()
    sizes = {path: int(size.replace(",", "")) for size, path in (line.split() for line in lines)}
    assert sizes == contents(folder)
    assert f"{len(sizes)} files of {sum(sizes.values()):,} bytes would be pushed to {REPO}" in total
    assert not hub.asked


def test_a_pull_request_is_made_and_gone_on_with(hub, desk, folder):
    for _ in range(2):
        result = desk.push(folder, "--create-pr")
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines()[-1] == f"{hub.url}/datasets/{REPO}/discussions/1"
    assert not held(hub)
    assert held(hub, "refs/pr/1") == local(folder)
    assert not hub.repositories[REPO].tags


def test_a_branch_is_made_and_main_left_alone(hub, desk, folder):
    result = desk.push(folder, "--revision", "side/way")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"{hub.url}/datasets/{REPO}/tree/side%2Fway"
    assert held(hub, "side/way") == local(folder)
    assert not held(hub)
    assert not hub.repositories[REPO].tags
    refused(desk.push(folder, "--private"), 2, "already exists and is public")


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
    ids=["none", "bad", "reader", "closed", "offline", "theirs", "name", "space", "pr", "both"],
)
def test_what_stands_in_the_way_is_told_in_a_sentence(
    hub, desk, folder, options, environment, code, words
):
    refused(desk.push(folder, *options, **environment), code, words)
    assert not [line for line in hub.asked if "/commit/" in line or "/xet/" in line]


def test_limits_are_warned_of_with_the_way_out():
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


LOADED = """
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

TRAINED = """
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


EXPORTED = """
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
@pytest.mark.parametrize("program", [LOADED, TRAINED], ids=["datasets", "training"])
def test_what_was_pushed_is_loaded_as_it_was_built(hub, desk, dataset, tmp_path, program):
    """Though the connection was cut twice."""
    folder = Path(shutil.copytree(dataset, tmp_path / "out"))
    hub.faults = [Fault("POST /xet/v1/xorbs/"), Fault("POST .*/commit/")]
    assert desk.push(folder).returncode == 0
    assert [fault.met > 0 for fault in hub.faults] == [True, True]
    result = desk.run("-c", program, folder, REPO)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.long
def test_the_real_trajectory_there_and_back(desk, real_tree, tmp_path):
    out = tmp_path / "out"
    built = desk.run("-m", "occgen_hub", "build", "--input", real_tree, "--output", out)
    assert built.returncode == 0, built.stderr
    assert desk.push(out).returncode == 0
    for program in (LOADED, TRAINED):
        result = desk.run("-c", program, out, REPO)
        assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_an_export_is_pushed_and_loaded_by_lerobot(hub, desk, dataset, tmp_path):
    from occgen_hub.exporting import export

    export(dataset, tmp_path / "lerobot")
    result = desk.push(tmp_path / "lerobot")
    assert result.returncode == 0, result.stderr
    repository = hub.repositories[REPO]
    assert held(hub) == local(tmp_path / "lerobot")
    assert repository.tags == {"v3.0": repository.refs["main"][-1]}
    loaded = desk.run("-c", EXPORTED, dataset, REPO)
    assert loaded.returncode == 0, loaded.stderr

    stale = {"videos/observation.images.left/chunk-000/file-000.mp4": b"old", "LICENSE": b"theirs"}
    repository.commit("main", dict(repository.files()) | stale, "more")
    assert desk.push(tmp_path / "lerobot").returncode == 0
    assert held(hub) == local(tmp_path / "lerobot") | {"LICENSE": b"theirs"}


FETCHED = """
import sys
from huggingface_hub import snapshot_download
print(snapshot_download(sys.argv[1], repo_type="dataset"))
"""


def test_what_was_fetched_is_valid_and_can_be_pushed_again(hub, desk, folder):
    """The Hub's client keeps files as links to their content."""
    assert desk.push(folder).returncode == 0
    sent = held(hub)
    fetched = desk.run("-c", FETCHED, REPO)
    assert fetched.returncode == 0, fetched.stderr
    snapshot = Path(fetched.stdout.strip())
    assert any(path.is_symlink() for path in snapshot.rglob("*"))
    checked = desk.run("-m", "occgen_hub", "validate", snapshot)
    assert checked.returncode == 0, checked.stdout
    again = desk.push(snapshot)
    assert again.returncode == 0, again.stderr
    assert held(hub) == sent
    copied = desk.push(snapshot, repo_id="org/copy")
    assert copied.returncode == 0, copied.stderr
    files = dict(hub.repositories["org/copy"].files("main"))
    files.pop(".gitattributes")
    assert files == sent


def test_a_link_to_a_file_elsewhere_is_refused(hub, desk, folder, tmp_path):
    (tmp_path / "secret").write_text("hidden from all")
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    refused(desk.push(folder), 1, "notes.txt", "leads out of the dataset", "nothing was sent")
    assert REPO not in hub.repositories


def test_a_push_gives_way_to_others_at_the_same_time(hub, desk, folder):
    hub.faults = [
        Fault("POST .*/commit/main", status=412, times=2),
        Fault("POST .*/tag/", status=409),
    ]
    said = desk.push(folder)
    assert said.returncode == 0, said.stderr
    assert local(folder).items() <= hub.repositories[REPO].files().items()
    assert hub.repositories[REPO].tags == {"v2.1": hub.repositories[REPO].find("main")}
    hub.faults = [Fault("POST .*/commit/main", status=412, times=9)]
    (folder / "notes.txt").write_text("new")
    said = desk.push(folder)
    assert said.returncode == 1
    assert "run the same command again later" in said.stderr


def test_three_pushes_at_once_all_end_well(hub, desk, folder):
    """Of one dataset to one repository, which all three of them make."""
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda _: desk.push(folder), range(3)))
    assert [result.returncode for result in results] == [0, 0, 0], [r.stderr for r in results]
    assert held(hub) == local(folder)
    assert hub.repositories[REPO].tags == {"v2.1": hub.repositories[REPO].find("main")}
    assert desk.push(folder).returncode == 0


STOPS = int(os.environ.get("OCCGEN_KILLS", "0"))
"""How often the long version stops pushes."""


@pytest.mark.skipif(not STOPS, reason="OCCGEN_KILLS says how often; ten minutes for 36")
def test_stopped_at_random_moments_a_push_goes_on(hub, desk, folder):
    """By one of three signals, anywhere between the start and the end; each time once more."""
    rng, began = random.Random(0), time.monotonic()
    assert desk.push(folder, repo_id="org/other").returncode == 0
    usual, ended = time.monotonic() - began, 0
    command = [sys.executable, "-m", "occgen_hub", "push", str(folder), "--repo-id", REPO]
    for number in range(STOPS):
        hub.repositories.pop(REPO, None)
        with subprocess.Popen(
            command, env=desk.environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as running:
            time.sleep(rng.uniform(usual / 8, usual))
            ended += running.poll() is not None
            running.send_signal(rng.choice((signal.SIGINT, signal.SIGTERM, signal.SIGKILL)))
            _, said = running.communicate(timeout=60)
        assert "Traceback" not in said
        done = desk.push(folder)
        assert done.returncode == 0, (number, done.stderr)
        assert held(hub) == local(folder)
    print(f"{STOPS} stops, {ended} of which came after the end")
