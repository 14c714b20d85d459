"""The examples run as they are documented, with fewer steps."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from occgen_hub.loading import trajectories
from occgen_hub.shards import write_shards

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_network_is_trained_and_evaluated_on_different_scenes(dataset, tmp_path):
    root, picture = tmp_path / "scenes", tmp_path / "prediction.png"
    for n in (16, 17):  # 17 is in the split "validation".
        shutil.copytree(trajectories(dataset)[0], root / "group" / f"scene_{n}" / "run")
    write_shards(root)
    script = EXAMPLES / "train_occupancy.py"
    assert len(script.read_text().splitlines()) < 210

    def run(place):
        return subprocess.run(
            [sys.executable, script, place, "--steps", "4", "--batch", "2", "--picture", picture],
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip

    done = run(dataset)
    assert done.returncode == 2
    assert re.fullmatch("Error: .*: none of its 2 episodes is selected by split .*\n", done.stderr)
    done = run(root)
    assert done.returncode == 0, done.stderr
    rows = dict(re.findall(r"^(network|mean occupancy over 0\.5) +([\d. ]+)$", done.stdout, re.M))
    figures = {name: [float(value) for value in row.split()] for name, row in rows.items()}
    assert all(0 <= value <= 1 for value in figures["network"])
    # The held-out scene is the training scene under another name.
    assert figures["mean occupancy over 0.5"][0] > 0.5
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_notebook_runs_and_is_stored_without_outputs(tmp_path, monkeypatch):
    """Run all cells in a kernel of this Python, with fewer frames and steps."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    text = "\n".join(cell.source for cell in code)
    for long, short in (("frames = 16", "frames = 2"), ("steps = 20", "steps = 2")):
        assert long in text
        for cell in code:
            cell.source = cell.source.replace(long, short)
    # Use the kernel of this environment, not one that the user installed.
    kernels = tmp_path / "share/jupyter/kernels/python3"
    kernels.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": command, "display_name": "Python 3", "language": "python"}
    (kernels / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share/jupyter"))
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    assert "loss " in code[-1].outputs[-1].text
    assert any("image/png" in out.get("data", {}) for out in code[3].outputs)
