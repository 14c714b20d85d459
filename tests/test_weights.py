"""Finding and downloading weights, from a Hub on the loopback address."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from standin import random_weights, save

from occgen_hub.engines.weights import (
    Checkpoint,
    Weights,
    WeightsError,
    find_weights,
    missing_error,
    published,
    verify,
)
from occgen_hub.errors import shorten_message

REVISION = published("pi3").revision


class Hub(BaseHTTPRequestHandler):
    """Serves one file of one repository like the Hub; `asked` has the requests."""

    content = b""
    asked: list[str]
    status = 200

    def do_HEAD(self):
        self.answer(b"")

    def do_GET(self):
        self.answer(self.content)

    def answer(self, body):
        self.asked.append(f"{self.command} {self.path}")
        found = self.path == f"/yyfz233/Pi3/resolve/{REVISION}/model.safetensors"
        self.send_response(self.status if found else 404)
        if found and self.status == 200:
            self.send_header("ETag", f'"{hashlib.sha256(self.content).hexdigest()}"')
            self.send_header("X-Repo-Commit", REVISION)
            self.send_header("Content-Length", str(len(self.content)))
        else:
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
        self.end_headers()
        if found and self.status == 200:
            self.wfile.write(body)

    def log_message(self, *_):
        """Print nothing."""


@pytest.fixture
def hub(tmp_path):
    """A running Hub that serves a tiny checkpoint, and the environment to reach it."""
    folder = save(tmp_path / "served", "pi3", random_weights("pi3"))
    served = type(
        "Served", (Hub,), {"content": (folder / "model.safetensors").read_bytes(), "asked": []}
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), served)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
    }
    yield served, environment
    server.shutdown()
    server.server_close()


def run_python(program, environment, cwd):
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False,
        cwd=cwd, env={**os.environ, **environment},
    )  # fmt: skip


def occgen_hub(*arguments, environment, cwd):
    command = [sys.executable, "-m", "occgen_hub", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, cwd=cwd,
        env={**os.environ, **environment},
    )  # fmt: skip


DOWNLOAD_SCRIPT = """
from occgen_hub.engines import weights
assert weights.local_weights("pi3") is None
found = weights.download_weights("pi3")
assert weights.local_weights("pi3") == found.path
print(found.path)
print(weights._digest(found.path))
print(found.record()["license"])
"""


def test_weights_are_downloaded_into_the_cache_and_found_there(hub, tmp_path):
    served, environment = hub
    result = run_python(DOWNLOAD_SCRIPT, environment, tmp_path)
    assert result.returncode == 0, result.stderr
    path, digest, license = result.stdout.split()
    assert Path(path).read_bytes() == served.content
    assert Path(path).is_relative_to(tmp_path / "home")
    assert digest == hashlib.sha256(served.content).hexdigest()
    assert license == "cc-by-nc-4.0"
    assert REVISION in path


def test_pull_prints_the_licence_and_checks_the_file(hub, tmp_path):
    """The served file has smaller tensors than the published pi3, so the check fails."""
    _, environment = hub
    result = occgen_hub("weights", "pull", "pi3", environment=environment, cwd=tmp_path)
    assert "Licence of these weights: CC BY-NC 4.0, which allows no comm" in result.stderr
    assert result.returncode == 2
    assert "not a checkpoint of pi3" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("status", [401, 403, 500])
def test_hub_error_gives_a_message_of_three_lines(hub, tmp_path, status):
    served, environment = hub
    served.status = status
    result = occgen_hub("weights", "pull", "pi3", environment=environment, cwd=tmp_path)
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 3
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("name", ["pi3", "pi3x"])
def test_error_for_missing_weights_names_the_licence(name):
    with pytest.raises(
        WeightsError, match=r"licence: CC BY-NC 4\.0, which allows no commercial use"
    ):
        raise missing_error(name)


def test_library_messages_are_shortened_between_words():
    words = "the connection was refused by a machine that nobody knows " * 5
    short = shorten_message(words, 100)
    assert len(short) <= 104
    assert short.endswith(" ...")
    assert words.startswith(short.removesuffix(" ..."))
    assert words[len(short) - 4] == " "
    assert shorten_message("short.\nand more") == "short"
    assert shorten_message("") == ""
    assert shorten_message("x" * 300, 100) == "x" * 100 + " ..."


def test_long_hub_message_is_shortened_between_words(tmp_path):
    """The message has an address that is longer than the limit."""
    environment = {
        "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    result = occgen_hub("weights", "pull", "pi3", environment=environment, cwd=tmp_path)
    (reason,) = re.findall(r"could not be downloaded \((.*)\)", result.stderr.splitlines()[0])
    program = (
        "from occgen_hub.engines.weights import download_weights\n"
        "try: download_weights('pi3')\n"
        "except Exception as error: print(error.__cause__)"
    )
    whole = run_python(program, environment, tmp_path).stdout
    assert reason in whole or f"{reason.removesuffix(' ...')} " in whole


def test_unreachable_hub_fails_quickly(tmp_path):
    environment = {
        "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0",
    }  # fmt: skip
    result = occgen_hub("weights", "pull", "pi3", environment=environment, cwd=tmp_path)
    assert result.returncode == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 3
    assert "Retry" not in result.stderr


def test_check_reads_weights_in_the_working_folder(tmp_path):
    folder = save(tmp_path / "ckpt" / "pi3", "pi3", random_weights("pi3"))
    environment = {"HF_HOME": str(tmp_path / "home")}
    result = occgen_hub("weights", "check", "pi3", environment=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert digest in result.stdout
    assert "complete" in result.stdout
    assert "Licence: cc0-1.0" in result.stdout


def test_check_downloads_nothing(hub, tmp_path):
    served, environment = hub
    result = occgen_hub("weights", "check", "pi3", environment=environment, cwd=tmp_path)
    assert result.returncode == 2
    assert not served.asked


def test_manual_weights_have_priority_over_the_cache(hub, tmp_path):
    _, environment = hub
    assert run_python(DOWNLOAD_SCRIPT, environment, tmp_path).returncode == 0
    save(tmp_path / "ckpt" / "pi3", "pi3", random_weights("pi3", seed=1))
    program = "from occgen_hub.engines import weights; print(weights.local_weights('pi3'))"
    result = run_python(program, environment, tmp_path)
    assert result.stdout.strip() == "ckpt/pi3/model.safetensors"


def test_config_json_identifies_the_network(tmp_path):
    folder = save(tmp_path / "w", "pi3x", random_weights("pi3x"))
    result = occgen_hub(
        "weights", "check", "pi3", "--weights", folder, environment={}, cwd=tmp_path
    )
    assert result.returncode == 2
    assert "choose --engine pi3x" in result.stderr


def test_verify_rejects_another_file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"something")
    digest = hashlib.sha256(b"something").hexdigest()
    right = Checkpoint(network="pi3", sha256=digest)
    assert verify(Weights(path, right)) == digest
    with pytest.raises(WeightsError, match="is not the published file"):
        verify(Weights(path, Checkpoint(network="pi3", sha256="0" * 64)))


@pytest.mark.parametrize("name", ["pi3", "pi3x"])
def test_the_published_checkpoints_are_pinned(name):
    checkpoint = published(name)
    assert len(checkpoint.revision) == 40
    assert checkpoint.sha256 is not None
    assert checkpoint.license == "cc-by-nc-4.0"
    assert checkpoint.repo_id.startswith("yyfz233/Pi3")


def test_config_json_of_the_authors_is_ignored(tmp_path):
    folder = save(tmp_path / "w", "pi3", random_weights("pi3"))
    (folder / "config.json").write_text('{"decoder_size": "large"}')
    with pytest.raises(WeightsError, match="not a checkpoint of pi3 with these sizes"):
        find_weights("pi3", folder)
