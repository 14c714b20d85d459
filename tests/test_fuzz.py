"""Half a minute of scripts/fuzz, and a test of how it corrupts files."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import tree

sys.path.append(str(Path(__file__).parent.parent / "scripts"))

from fuzz_mutations import corrupt

SCRIPT = Path(__file__).parent.parent / "scripts/fuzz.py"
MINUTES = float(os.environ.get("OCCGEN_FUZZ", "0.5"))
"""Duration. If OCCGEN_FUZZ sets another one, each run also has a new seed."""


def test_commands_handle_corrupted_files():
    for library in ("pyvista", "rerun", "lerobot", "rosbags"):
        pytest.importorskip(library)
    # The same cases each time, unless OCCGEN_FUZZ is set: new cases may fail in any run.
    seed = int(time.time()) if "OCCGEN_FUZZ" in os.environ else 0
    options = ["--minutes", str(MINUTES), "--seed", str(seed)]
    done = subprocess.run(
        [sys.executable, SCRIPT, *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 findings" in done.stdout


def test_fuzz_cases_are_reproducible(dataset, tmp_path):
    for number in range(60):
        descriptions, found = [], []
        for copy in ("one", "two"):
            root = Path(shutil.copytree(dataset, tmp_path / copy))
            rng = random.Random(number)
            path = rng.choice(sorted(path for path in root.rglob("*") if path.is_file()))
            descriptions.append(corrupt(path, rng))
            entries = sorted(path for path in root.rglob("*") if not path.is_fifo())
            small = all(path.stat().st_size < 1 << 20 for path in entries if path.exists())
            found.append(tree(root) if small else {})
            shutil.rmtree(root)
        assert descriptions[0] == descriptions[1]
        assert found[0] == found[1]


@pytest.mark.parametrize("suffix", ["", ".json", ".jsonl", ".yaml", ".md", ".jpg", ".tar"])
def test_nothing_is_written_through_a_link_of_an_earlier_change(suffix, tmp_path):
    """The fuzzer links to files of the machine, and may run as root."""
    secret = tmp_path / "secret"
    secret.write_text('{"a": [1, 2, 3]}\n')
    folder = tmp_path / "folder"
    for number in range(60):
        folder.mkdir()
        (folder / "other").write_text("other")
        path = folder / f"name{suffix}"
        path.symlink_to(secret)
        corrupt(path, random.Random(number))
        assert secret.read_text() == '{"a": [1, 2, 3]}\n'
        shutil.rmtree(folder)
