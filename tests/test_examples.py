"""The examples run as they are documented, with fewer steps."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from occgen_hub.loading import trajectories
from occgen_hub.shards import write_shards

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_the_network_is_trained_on_scenes_and_measured_on_others(dataset, tmp_path):
    root, picture = tmp_path / "scenes", tmp_path / "prediction.png"
    for n in (16, 17):  # 17 is in the split "validation".
        shutil.copytree(trajectories(dataset)[0], root / "group" / f"scene_{n}" / "run")
    write_shards(root)
    script = EXAMPLES / "train_occupancy.py"
    assert len(script.read_text().splitlines()) < 200
    done = subprocess.run(
        [sys.executable, script, root, "--steps", "4", "--batch", "2", "--picture", picture],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = re.search(r"IoU ([\d.e-]+), baseline IoU ([\d.]+).* steps (\d+)", done.stdout)
    assert found, done.stdout
    assert 0 <= float(found[1]) <= 1
    assert float(found[2]) > 0.5  # The held-out scene is the training scene under another name.
    assert found[3] == "4"
    assert picture.read_bytes()[:4] == b"\x89PNG"
