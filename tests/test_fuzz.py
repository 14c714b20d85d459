"""Half a minute of scripts/fuzz, and what spoils files."""

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

from fuzz_mutations import spoil

SCRIPT = Path(__file__).parent.parent / "scripts/fuzz.py"
MINUTES = float(os.environ.get("OCCGEN_FUZZ", "0.5"))
"""How long; OCCGEN_FUZZ names another number, and chooses another seed for each run."""


def test_spoiled_files_harm_no_command():
    for library in ("pyvista", "rerun", "lerobot", "rosbags"):
        pytest.importorskip(library)
    # The same cases each time, unless more are asked for: others may find something in any run.
    seed = int(time.time()) if "OCCGEN_FUZZ" in os.environ else 0
    options = ["--minutes", str(MINUTES), "--seed", str(seed)]
    done = subprocess.run(
        [sys.executable, SCRIPT, *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 findings" in done.stdout


def test_a_case_is_the_same_each_time(dataset, tmp_path):
    for number in range(60):
        said, found = [], []
        for copy in ("one", "two"):
            root = Path(shutil.copytree(dataset, tmp_path / copy))
            rng = random.Random(number)
            path = rng.choice(sorted(path for path in root.rglob("*") if path.is_file()))
            said.append(spoil(path, rng))
            entries = sorted(path for path in root.rglob("*") if not path.is_fifo())
            small = all(path.stat().st_size < 1 << 20 for path in entries if path.exists())
            found.append(tree(root) if small else {})
            shutil.rmtree(root)
        assert said[0] == said[1]
        assert found[0] == found[1]
