"""Running the command line in processes of its own, and looking at what it wrote."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from occgen_hub.files import sha256

OF_THE_RUN = {"report.json", ".logs"}
"""What a build says of itself, which differs from run to run."""

Tree = dict[str, str]


def occgen_hub(
    *arguments: str | Path, launcher: tuple[str, ...] = (), timeout: float = 300, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end. launcher: arguments of Python that start it, as torchrun does,
    or ("-c", script) that calls `main`.
    """
    name = () if launcher[:1] == ("-c",) else ("occgen_hub",)
    return subprocess.run(
        [sys.executable, *(launcher or ("-m",)), *name, *map(str, arguments)],
        env=os.environ | {"TQDM_DISABLE": "1"} | env,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def start(*arguments: str | Path, **env: str) -> subprocess.Popen[str]:
    """Start the command in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "occgen_hub", *map(str, arguments)],
        env=os.environ | {"TQDM_DISABLE": "1"} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def tree(folder: Path) -> Tree:
    """Every path of a dataset, hidden ones too, with the checksum of its content."""
    return {
        path.relative_to(folder).as_posix(): sha256(path) if path.is_file() else "folder"
        for path in folder.rglob("*")
        if path.relative_to(folder).parts[0] not in OF_THE_RUN
    }
